//! Writing past the page cache. What a restore writes is not read again soon, and to copy it into the cache costs more
//! processor time than to make it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

/// What every device of today takes.
const ALIGNMENT: usize = 4096;

/// A second way to a file or device, where the file system has one.
pub(super) struct Direct {
    file: Option<File>,
    refused: AtomicBool,
}

impl Direct {
    /// Opens `file` once more; needs /proc, without which everything goes through the page cache.
    pub(super) fn of(file: &File) -> Direct {
        let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap_or(0);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        Direct { file: file.ok(), refused: AtomicBool::new(false) }
    }

    /// The file, if a transfer of these bytes fits it.
    fn fitting(&self, offset: u64, bytes: &[u8]) -> Option<&File> {
        let aligned = bytes.as_ptr().addr().is_multiple_of(ALIGNMENT)
            && bytes.len().is_multiple_of(ALIGNMENT)
            && offset.is_multiple_of(ALIGNMENT as u64);
        self.file.as_ref().filter(|_| aligned && !self.refused.load(Ordering::Relaxed))
    }

    /// Writes all of `data`, or returns false: then the caller writes it by the usual way.
    pub(super) fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        let Some(file) = self.fitting(offset, data) else { return Ok(false) };
        match file.write_all_at(data, offset) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                self.refused.store(true, Ordering::Relaxed); // a stricter device: no use to try again
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
