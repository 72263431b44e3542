//! Where a restore writes to: a raw file, a qcow2 file or a block device.
//!
//! A file is written under a temporary name in its folder and gets its own only when it is whole:
//!
//! 1. the content is written and synced;
//! 2. the file is renamed to its name (or, where nothing may be replaced, linked to it);
//! 3. the folder is synced.
//!
//! A crash before 2 leaves what was there and a temporary file, which the next target of that name removes; after 2 the
//! new file is whole, since 1 came first. A target dropped unfinished takes its temporary file with it. On a block device
//! the first write destroys what was.

mod direct;
mod qcow2;
mod raw;
mod staging;
mod temporary;

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::TargetError;

use self::qcow2::Qcow2Target;
use self::raw::RawTarget;

pub use self::staging::Staging;

/// What a target is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetFormat {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's format, version 3 with clusters of 64 KiB.
    Qcow2,
}

/// What to do with what exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overwrite {
    /// Leave it alone and fail.
    Refuse,
    /// Replace a file once the new one is whole; write to a block device.
    Replace,
}

/// A disk being written, in any order and from several threads. Dropped unfinished, it leaves no file.
pub trait ImageTarget: Send + Sync {
    /// Writes `data` at `offset`; the range must lie inside the disk.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Whether what is not written reads as zeroes.
    fn starts_zeroed(&self) -> bool;

    /// Fills `buf` from `offset`. Only what was opened to go on with can be read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let _ = (offset, buf);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The next range at or after `offset` that may hold something else than zeroes.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..u64::MAX))
    }

    /// Makes a range read as zeroes, giving its space back where that is possible.
    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        write_zeroes(length, |at, zeroes| self.write_at(offset + at, zeroes))
    }

    /// Makes all of it durable and gives it its name.
    fn finish(self: Box<Self>) -> io::Result<()>;
}

/// Makes a target of `size` bytes at `path`.
pub fn create_target(
    path: &Path,
    format: TargetFormat,
    size: u64,
    overwrite: Overwrite,
) -> Result<Box<dyn ImageTarget>, TargetError> {
    let io_error = |source| TargetError::Io { path: path.to_owned(), source };
    if format == TargetFormat::Raw && is_device(path) {
        return device(path, size, overwrite);
    }
    check_place(path, format.name(), overwrite)?;
    match format {
        TargetFormat::Raw => Ok(Box::new(RawTarget::file(path, size, overwrite).map_err(io_error)?)),
        TargetFormat::Qcow2 => Ok(Box::new(Qcow2Target::create(path, size, overwrite).map_err(io_error)?)),
    }
}

fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device())
}

/// Refuses what no file of `format` can be made in place of.
fn check_place(path: &Path, format: &'static str, overwrite: Overwrite) -> Result<(), TargetError> {
    let unfit = |reason| TargetError::Unfit { path: path.to_owned(), format, reason };
    match std::fs::metadata(path) {
        Ok(there) if there.file_type().is_block_device() => Err(unfit("on a block device only raw is written")),
        Ok(there) if !there.is_file() => Err(unfit("it is neither a file nor a block device")),
        Ok(_) if overwrite == Overwrite::Refuse => Err(TargetError::Exists { path: path.to_owned() }),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(TargetError::Io { path: path.to_owned(), source }),
    }
}

/// Opens a raw file or block device that exists, to change what is in it. A file gets `size` bytes: what is beyond is cut
/// off, what is missing is a hole.
pub fn open_in_place(path: &Path, size: u64) -> Result<Box<dyn ImageTarget>, TargetError> {
    let io_error = |source| TargetError::Io { path: path.to_owned(), source };
    let unfit = |reason| TargetError::Unfit { path: path.to_owned(), format: TargetFormat::Raw.name(), reason };
    let there = std::fs::metadata(path).map_err(io_error)?;
    if there.file_type().is_block_device() {
        return device(path, size, Overwrite::Replace);
    }
    if !there.is_file() {
        return Err(unfit("it is neither a file nor a block device"));
    }
    match RawTarget::in_place(path, size).map_err(io_error)? {
        Some(target) => Ok(Box::new(target)),
        None => Err(unfit("it is a qcow2 image, and only raw disks are changed in place")),
    }
}

/// Takes up a raw target that an interrupted restore left, which may hold anything, or makes a new one; the second value
/// tells which. It stays for the next one to take up, should this one be interrupted, too.
pub fn resume_target(
    path: &Path,
    size: u64,
    overwrite: Overwrite,
) -> Result<(Box<dyn ImageTarget>, bool), TargetError> {
    let io_error = |source| TargetError::Io { path: path.to_owned(), source };
    if is_device(path) {
        return Ok((device(path, size, overwrite)?, true));
    }
    check_place(path, TargetFormat::Raw.name(), overwrite)?;
    let (target, resumed) = RawTarget::resume(path, size, overwrite).map_err(io_error)?;
    Ok((Box::new(target), resumed))
}

/// Makes a raw target: [`create_target`] with [`TargetFormat::Raw`].
pub fn create_raw(path: &Path, size: u64, overwrite: Overwrite) -> Result<Box<dyn ImageTarget>, TargetError> {
    create_target(path, TargetFormat::Raw, size, overwrite)
}

impl TargetFormat {
    fn name(self) -> &'static str {
        match self {
            TargetFormat::Raw => "raw",
            TargetFormat::Qcow2 => "qcow2",
        }
    }
}

fn device(path: &Path, size: u64, overwrite: Overwrite) -> Result<Box<dyn ImageTarget>, TargetError> {
    if overwrite == Overwrite::Refuse {
        return Err(TargetError::Exists { path: path.to_owned() });
    }
    let io_error = |source| TargetError::Io { path: path.to_owned(), source };
    let target = RawTarget::device(path, size).map_err(io_error)?;
    if target.available() < size {
        return Err(TargetError::TooSmall { path: path.to_owned(), available: target.available(), needed: size });
    }
    Ok(Box::new(target))
}

fn write_zeroes(length: u64, mut write: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
    let mut done = 0;
    while done < length {
        let step = usize::try_from(length - done).unwrap_or(usize::MAX).min(ZEROES.len());
        write(done, ZEROES.get(..step).unwrap_or(&ZEROES))?;
        done += step as u64;
    }
    Ok(())
}

fn check_range(offset: u64, length: usize, size: u64) -> io::Result<()> {
    let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length));
    if end.is_none_or(|end| end > size) {
        let message = format!("{length} bytes at {offset} reach past the disk's end at {size}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(())
}
