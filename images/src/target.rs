//! Where a restore writes to: a raw file, a qcow2 file or a block device.
//!
//! A file is written under a temporary name in its folder and renamed when it is whole and synced, so that a failed
//! restore leaves nothing that looks like a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2 as Driver;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use crate::TargetError;
use crate::raw::device_size;

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
    /// Writes `data` at `offset` of the disk.
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
    let (temporary, file) = Temporary::create(path).map_err(io_error)?;
    match format {
        TargetFormat::Raw => {
            file.set_len(size).map_err(io_error)?;
            Ok(Box::new(RawTarget { file, temporary: Some(temporary) }))
        }
        TargetFormat::Qcow2 => {
            let image = make_qcow2(&file, &temporary.path, size).map_err(io_error)?;
            Ok(Box::new(Qcow2Target { image, file, temporary }))
        }
    }
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
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(io_error)?;
    let available = device_size(&file).map_err(io_error)?;
    if available < size {
        return Err(TargetError::TooSmall { path: path.to_owned(), available, needed: size });
    }
    Ok(Box::new(RawTarget { file, temporary: None }))
}

fn make_qcow2(file: &File, path: &Path, size: u64) -> io::Result<FormatAccess<imago::file::File>> {
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

/// A file under a temporary name, removed when dropped before it got its own.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    name: PathBuf,
}

impl Temporary {
    fn create(name: &Path) -> io::Result<(Temporary, File)> {
        let base = name.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        for number in 0..100 {
            let mut temporary = base.to_owned();
            temporary.push(format!(".lifeboat-{}-{number}", std::process::id()));
            let path = name.with_file_name(temporary);
            match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((Temporary { path, name: name.to_owned() }, file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Durable order: the content (synced by the caller), the new name, the folder.
    fn publish(self) -> io::Result<()> {
        std::fs::rename(&self.path, &self.name)?;
        let parent = self.name.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After `publish` there is nothing under this name.
        let _ = std::fs::remove_file(&self.path);
    }
}

struct RawTarget {
    file: File,
    /// None for a device.
    temporary: Option<Temporary>,
}

impl ImageTarget for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn starts_zeroed(&self) -> bool {
        self.temporary.is_some()
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        self.file.sync_all()?;
        self.temporary.map_or(Ok(()), Temporary::publish)
    }
}

struct Qcow2Target {
    image: FormatAccess<imago::file::File>,
    file: File,
    temporary: Temporary,
}

impl ImageTarget for Qcow2Target {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.image.write(data, offset)
    }

    fn starts_zeroed(&self) -> bool {
        true
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        let Qcow2Target { image, file, temporary } = *self;
        image.flush()?;
        image.sync()?;
        drop(image);
        file.sync_all()?;
        temporary.publish()
    }
}
