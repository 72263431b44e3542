//! [`Source`]: a disk to back up, and [`FileSource`], an image file.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom as RawSeek, seek};
use rustix::io::Errno;

/// A disk to back up. Its content must not change while the backup runs. Called from several threads.
pub trait Source: Send + Sync {
    /// Size in bytes, as it was when the source was opened.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`, which lies inside the disk.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The next range that may hold data, at or after `offset`; none if the rest is a hole. What lies between is
    /// never read and taken as zeroes.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// The next range, at or after `offset`, that may differ from the disk of the same name in the backup's parent; none
    /// if the rest is the same. What lies between is taken from the parent and not read. Only asked while there is a
    /// parent whose disk has the same size; without an answer of its own a source is read whole.
    fn next_change(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..u64::MAX))
    }

    /// The size now; asked when the disk has been read, to notice that it changed.
    fn current_size(&self) -> io::Result<u64>;
}

/// An image file or block device of the host.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    size: u64,
}

impl FileSource {
    /// Opens a file or block device for reading.
    pub fn open(path: &Path) -> io::Result<FileSource> {
        let file = File::open(path)?;
        let size = size_of_file(&file)?;
        Ok(FileSource { file, size })
    }
}

fn size_of_file(mut file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok(metadata.len()) } else { file.seek(SeekFrom::End(0)) }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        if offset >= self.size {
            return Ok(None);
        }
        // The file position is shared, but nothing else uses it: reads name their offset.
        let start = match seek(&self.file, RawSeek::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(offset..self.size)), // a device: all is data
            Err(errno) => return Err(errno.into()),
        };
        let end = match seek(&self.file, RawSeek::Hole(start)) {
            Ok(end) => end.max(start + 1),
            Err(_) => self.size,
        };
        Ok((start < self.size).then_some(start..end.min(self.size)))
    }

    fn current_size(&self) -> io::Result<u64> {
        size_of_file(&self.file)
    }
}
