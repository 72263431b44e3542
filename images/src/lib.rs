//! Disk images of other programs behind one synchronous interface: [`open`] reads them, [`create_target`] writes them.
//!
//! Raw files, block devices and qcow2 are read here; every other format is recognised and named in
//! [`OpenError::Unsupported`], so that the caller can have it read by QEMU. Images are hostile input: chains, tables
//! and offsets are bounded, and damage is an error of the read that meets it.
#![forbid(unsafe_code)]

mod bytes;
mod cache;
mod detect;
mod error;
pub mod fs;
mod guard;
mod mapped;
pub mod mount;
mod patched;
mod qcow2;
mod raw;
mod target;
pub mod volume;

use std::io;
use std::ops::Range;
use std::path::Path;

pub use cache::Cached;
pub use error::{OpenError, TargetError};
pub use target::{
    ImageTarget, Overwrite, Staging, TargetFormat, create_raw, create_target, open_in_place, resume_target,
};

/// A disk image that can be read from several threads at once.
pub trait DiskImage: Send + Sync {
    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`; the range must lie inside the disk.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The next range at or after `offset` that may hold data, or `None` when only holes follow. The range is not
    /// empty and ends inside the disk.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// Asks the file for the disk's size again.
    fn current_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    /// The format, for a person.
    fn describe(&self) -> String {
        "raw".to_owned()
    }
}

/// A disk, or a part of one, that several readers share.
pub type SharedDisk = std::sync::Arc<dyn DiskImage>;

/// A format that is read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// Whether a qcow2 image may name other files that are then read too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackingFiles {
    /// For images of people who could read those files anyway.
    #[default]
    Follow,
    /// For images of strangers.
    Refuse,
}

/// How to open an image.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// When not given, it is found out, and what a guest may have written is not believed where it could do harm:
    ///
    /// - a block device and a file whose name ends in `.raw` are raw, whatever they hold;
    /// - what looks like qcow2 is qcow2 if it names no backing file and no external data file, or if the file's name
    ///   says so, too (`.qcow2`, `.qcow3`, `.qcow`, `.qed`); otherwise it is [`OpenError::Uncertain`];
    /// - what looks like another known format is [`OpenError::Unsupported`];
    /// - everything else is raw.
    ///
    /// A format given here is obeyed. It is that of the image itself: its backing files have the formats it gives them.
    pub format: Option<Format>,
    /// What to do with backing files.
    pub backing_files: BackingFiles,
}

/// Opens the image, block device or raw file at `path` for reading.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn DiskImage>, OpenError> {
    let disk = raw::Raw::open(path)?;
    if let Some(format) = options.format {
        return open_as(format, disk, path, options.backing_files);
    }
    let format = detect::detect(&disk, path)?;
    if detect::says_qcow(path) {
        return open_as(format, disk, path, options.backing_files);
    }
    // The header is read again, and a running guest may have named a file in it meanwhile.
    open_as(format, disk, path, BackingFiles::Refuse).map_err(|error| match error {
        OpenError::BackingFile { path, .. } => OpenError::Uncertain { path, format: "qcow2", names: "a backing file" },
        error => error,
    })
}

fn open_as(
    format: Format,
    disk: raw::Raw,
    path: &Path,
    backing_files: BackingFiles,
) -> Result<Box<dyn DiskImage>, OpenError> {
    match format {
        Format::Raw => Ok(Box::new(disk)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2::open(path, backing_files)?)),
    }
}
