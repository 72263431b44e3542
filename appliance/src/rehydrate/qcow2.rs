//! A qcow2 target, which QEMU writes: made here, and read beside QEMU.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use images::{BackingFiles, DiskImage, Format, OpenOptions, Overwrite, TargetError, TargetFormat};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::target::{Opening, Readback};

/// A qcow2 file as an independent reader sees it.
///
/// QEMU keeps the file's tables in memory and writes them when it flushes the file; data it writes before the tables
/// that point to them. So a reader that opens the file after a flush sees all that was written before, and what QEMU
/// writes meanwhile makes it see at worst what was there before.
pub struct Qcow2Readback {
    path: PathBuf,
    image: RwLock<Box<dyn DiskImage>>,
    /// Keeps other Lifeboats away from the file, and syncs it.
    lock: File,
}

impl fmt::Debug for Qcow2Readback {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Qcow2Readback").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Qcow2Readback {
    /// Makes the file, or opens the one that was begun.
    pub fn open(path: &Path, size: u64, opening: Opening) -> io::Result<Qcow2Readback> {
        let overwrite = match opening {
            Opening::Again => None,
            Opening::New => Some(Overwrite::Refuse),
            Opening::Overwrite => Some(Overwrite::Replace),
        };
        if let Some(overwrite) = overwrite {
            let made =
                images::create_target(path, TargetFormat::Qcow2, size, overwrite).map_err(|error| match error {
                    TargetError::Exists { .. } => io::Error::new(io::ErrorKind::AlreadyExists, error),
                    error => io::Error::other(error),
                })?;
            made.finish()?;
        }
        let lock = File::open(path)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another program has locked it"));
            }
            Err(error) => return Err(error.into()),
        }
        let image = read(path)?;
        if image.size() != size {
            let message = format!("it is of a disk of {} bytes, not {size}", image.size());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(Qcow2Readback { path: path.to_owned(), image: RwLock::new(image), lock })
    }
}

fn read(path: &Path) -> io::Result<Box<dyn DiskImage>> {
    let options = OpenOptions { format: Some(Format::Qcow2), backing_files: BackingFiles::Refuse };
    images::open(path, &options).map_err(io::Error::other)
}

impl Readback for Qcow2Readback {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.image.read().unwrap_or_else(PoisonError::into_inner).read_at(offset, buf)
    }

    fn extent(&self, offset: u64, length: u64) -> io::Result<(u64, bool)> {
        let end = offset + length;
        let data = self.image.read().unwrap_or_else(PoisonError::into_inner).next_data(offset)?;
        Ok(match data {
            Some(data) if data.start <= offset => (data.end.min(end) - offset, false),
            Some(data) => (data.start.min(end) - offset, true),
            None => (length, true),
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.lock.sync_all()
    }

    fn refresh(&self) -> io::Result<()> {
        let image = read(&self.path)?;
        *self.image.write().unwrap_or_else(PoisonError::into_inner) = image;
        Ok(())
    }
}
