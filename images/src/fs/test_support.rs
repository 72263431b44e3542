//! Disks in memory.

use std::io;
use std::ops::Range;

use crate::DiskImage;

/// A disk without holes.
pub(crate) struct Memory(pub Vec<u8>);

impl DiskImage for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let found = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..buf.len()));
        buf.copy_from_slice(found.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "past the end"))?);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size()).then(|| offset..self.size()))
    }
}
