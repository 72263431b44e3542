//! Disk images of other programs behind one synchronous interface: [`open`] reads them, [`create_target`] writes them.
//!
//! Raw files, block devices and qcow2 are read here; every other format is recognised and named in
//! [`OpenError::Unsupported`], so that the caller can have it read by QEMU. Images are hostile input: chains, tables
//! and offsets are bounded, and damage is an error of the read that meets it.
#![forbid(unsafe_code)]

mod detect;
mod error;
mod guard;
mod qcow2;
mod raw;
mod target;

use std::io;
use std::ops::Range;
use std::path::Path;

pub use error::{OpenError, TargetError};
pub use target::{ImageTarget, Overwrite, TargetFormat, create_raw, create_target};

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
    fn current_size(&self) -> io::Result<u64>;

    /// The format, for a person.
    fn describe(&self) -> String;
}

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
    /// Found out by looking at the first bytes when not given. A guest can write a qcow2 header to its raw disk, and
    /// only saying that the disk is raw keeps that from being believed; a block device is raw unless told otherwise.
    pub format: Option<Format>,
    /// What to do with backing files.
    pub backing_files: BackingFiles,
}

/// Opens the image, block device or raw file at `path` for reading.
pub fn open(path: &Path, options: &OpenOptions) -> Result<Box<dyn DiskImage>, OpenError> {
    let disk = raw::Raw::open(path)?;
    let format = match options.format {
        Some(format) => format,
        None => detect::detect(&disk, path)?,
    };
    match format {
        Format::Raw => Ok(Box::new(disk)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2::open(path, options.backing_files)?)),
    }
}
