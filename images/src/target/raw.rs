//! Raw targets: a sparse file, or a block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::direct::Direct;
use super::temporary::Temporary;
use super::{ImageTarget, Overwrite, check_range};
use crate::raw::device_size;

/// A file or device whose bytes become the disk.
pub(super) struct RawTarget {
    place: Place,
    direct: Direct,
    size: u64,
}

enum Place {
    File(Temporary),
    Device(File),
}

impl RawTarget {
    pub(super) fn file(path: &Path, size: u64, overwrite: Overwrite) -> io::Result<RawTarget> {
        let temporary = Temporary::create(path, overwrite)?;
        temporary.file().set_len(size)?;
        let direct = Direct::of(temporary.file());
        Ok(RawTarget { place: Place::File(temporary), direct, size })
    }

    /// Held exclusively: the kernel refuses a device that is mounted or belongs to a volume group.
    pub(super) fn device(path: &Path, size: u64) -> io::Result<RawTarget> {
        let exclusive = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or(0);
        let file = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(path)?;
        let direct = Direct::of(&file);
        Ok(RawTarget { place: Place::Device(file), direct, size })
    }

    /// Bytes there are room for.
    pub(super) fn available(&self) -> u64 {
        match &self.place {
            Place::File(_) => self.size,
            Place::Device(file) => device_size(file).unwrap_or(0),
        }
    }
}

impl ImageTarget for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.size)?;
        if self.direct.write_at(offset, data)? {
            return Ok(());
        }
        match &self.place {
            Place::File(temporary) => temporary.file().write_all_at(data, offset),
            Place::Device(file) => file.write_all_at(data, offset),
        }
    }

    fn starts_zeroed(&self) -> bool {
        matches!(self.place, Place::File(_))
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        match self.place {
            Place::File(temporary) => temporary.publish(),
            Place::Device(file) => file.sync_all(),
        }
    }
}
