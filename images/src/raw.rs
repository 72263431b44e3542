//! Raw files and block devices. Holes of files are found through `SEEK_DATA` and never read.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::SeekFrom as Whence;
use rustix::io::Errno;

use crate::{DiskImage, OpenError};

/// A file or device whose bytes are the disk.
#[derive(Debug)]
pub(crate) struct Raw {
    file: File,
    size: u64,
    device: bool,
}

impl Raw {
    pub(crate) fn open(path: &Path) -> Result<Raw, OpenError> {
        let failed = |source| OpenError::Io { path: path.to_owned(), source };
        // Without it the open of a FIFO waits for its writer.
        let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
        let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        let what = match () {
            () if kind.is_file() || kind.is_block_device() => None,
            () if kind.is_dir() => Some("a folder"),
            () if kind.is_char_device() => Some("a character device"),
            () if kind.is_fifo() => Some("a pipe"),
            () => Some("something else"),
        };
        if let Some(what) = what {
            return Err(OpenError::NotAnImage { path: path.to_owned(), what });
        }
        let device = kind.is_block_device();
        let size = if device { device_size(&file).map_err(failed)? } else { metadata.len() };
        Ok(Raw { file, size, device })
    }
}

impl Raw {
    pub(crate) fn is_device(&self) -> bool {
        self.device
    }
}

/// A block device's size is where its end is.
pub(crate) fn device_size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// The next range that a file does not know to be a hole.
pub(crate) fn next_data(file: &File, offset: u64, size: u64, device: bool) -> io::Result<Option<Range<u64>>> {
    if offset >= size {
        return Ok(None);
    }
    if device {
        return Ok(Some(offset..size));
    }
    let start = match rustix::fs::seek(file, Whence::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system that cannot tell has data everywhere.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..size)),
        Err(error) => return Err(error.into()),
    };
    if start >= size {
        return Ok(None);
    }
    let end = rustix::fs::seek(file, Whence::Hole(start))?.min(size);
    // The file may be changing under us; what is certain is that the range begins with data.
    Ok(Some(start..end.max(start + 1)))
}

impl DiskImage for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                io::Error::new(error.kind(), format!("the file ends before byte {}", offset + buf.len() as u64))
            }
            _ => error,
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        next_data(&self.file, offset, self.size, self.device)
    }

    fn current_size(&self) -> io::Result<u64> {
        if self.device { device_size(&self.file) } else { Ok(self.file.metadata()?.len()) }
    }

    fn describe(&self) -> String {
        if self.device { "block device".to_owned() } else { "raw".to_owned() }
    }
}
