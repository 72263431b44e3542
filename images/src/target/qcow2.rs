//! qcow2 targets, written through imago.
//!
//! After a write that failed the image cannot be finished: a table updated by half must never get the image's name.
//! QEMU counts a qcow2 disk in sectors, so the image ends with a whole one; what is past the disk's end reads as zeroes,
//! as it does for a raw file in QEMU.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::qcow2::Qcow2 as Driver;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use super::temporary::Temporary;
use super::{ImageTarget, Overwrite, check_range};
use crate::guard::guarded;

const SECTOR: u64 = 512;

/// A new qcow2 image.
pub(super) struct Qcow2Target {
    image: FormatAccess<imago::file::File>,
    temporary: Temporary,
    size: u64,
    failed: AtomicBool,
}

impl Qcow2Target {
    pub(super) fn create(path: &Path, size: u64, overwrite: Overwrite) -> io::Result<Qcow2Target> {
        let too_large = || io::Error::new(io::ErrorKind::InvalidInput, format!("a disk of {size} bytes"));
        let sectors = size.checked_next_multiple_of(SECTOR).ok_or_else(too_large)?;
        let temporary = Temporary::create(path, overwrite)?;
        let image = guarded(|| make(temporary.file(), temporary.path(), sectors))?;
        Ok(Qcow2Target { image, temporary, size, failed: AtomicBool::new(false) })
    }
}

fn make(file: &File, path: &Path, size: u64) -> io::Result<FormatAccess<imago::file::File>> {
    let storage = |file: File| {
        let options = imago::StorageOpenOptions::new().write(true).filename(path);
        imago::file::File::from_open_file(file, options)
    };
    Driver::<imago::file::File>::create_builder(storage(file.try_clone()?)?).size(size).create()?;
    let image = Driver::<imago::file::File>::builder(storage(file.try_clone()?)?)
        .write(true)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

impl ImageTarget for Qcow2Target {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.size)?;
        guarded(|| self.image.write(data, offset)).inspect_err(|_| self.failed.store(true, Ordering::Release))
    }

    fn starts_zeroed(&self) -> bool {
        true
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        let Qcow2Target { image, temporary, failed, .. } = *self;
        if failed.load(Ordering::Acquire) {
            return Err(io::Error::other("a write to the image failed before"));
        }
        guarded(|| {
            image.flush()?;
            image.sync()
        })?;
        drop(image);
        temporary.publish()
    }
}
