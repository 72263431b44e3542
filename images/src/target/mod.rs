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
mod temporary;

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::TargetError;

use self::qcow2::Qcow2Target;
use self::raw::RawTarget;

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
    match std::fs::metadata(path) {
        Ok(there) if there.file_type().is_block_device() => {
            return device(path, format, size, overwrite);
        }
        Ok(there) if !there.is_file() => {
            let reason = "it is neither a file nor a block device";
            return Err(TargetError::Unfit { path: path.to_owned(), format: format.name(), reason });
        }
        Ok(_) if overwrite == Overwrite::Refuse => return Err(TargetError::Exists { path: path.to_owned() }),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error(error)),
    }
    match format {
        TargetFormat::Raw => Ok(Box::new(RawTarget::file(path, size, overwrite).map_err(io_error)?)),
        TargetFormat::Qcow2 => Ok(Box::new(Qcow2Target::create(path, size, overwrite).map_err(io_error)?)),
    }
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

fn device(
    path: &Path,
    format: TargetFormat,
    size: u64,
    overwrite: Overwrite,
) -> Result<Box<dyn ImageTarget>, TargetError> {
    if format == TargetFormat::Qcow2 {
        let reason = "on a block device only raw is written";
        return Err(TargetError::Unfit { path: path.to_owned(), format: format.name(), reason });
    }
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

fn check_range(offset: u64, length: usize, size: u64) -> io::Result<()> {
    let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length));
    if end.is_none_or(|end| end > size) {
        let message = format!("{length} bytes at {offset} reach past the disk's end at {size}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(())
}
