//! [`Mapping`]: the bytes of an immutable object, mapped where they are a local file. Unsafe code of the
//! store is here and in `uring`.
#![expect(unsafe_code, reason = "mapping a file has no safe form")]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

use bytes::Bytes;

/// Bytes of an object that is never changed or shortened.
#[derive(Debug)]
pub enum Mapping {
    /// In memory.
    Owned(Bytes),
    /// A mapped file.
    Mapped(memmap2::Mmap),
}

impl Mapping {
    /// Maps a file of the repository.
    ///
    /// Meant only for objects this program writes once under a temporary name and never opens for writing again.
    pub fn of_immutable_file(path: &Path) -> io::Result<Mapping> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Ok(Mapping::Owned(Bytes::new())); // an empty range cannot be mapped
        }
        // SAFETY: `Mmap::map` requires that the file is not changed or truncated while mapped. Objects of a
        // repository are complete before they get their name, are never opened for writing afterwards, and deleting
        // one only removes the name: the mapping keeps the inode. Whoever else writes into a repository's files
        // breaks the repository itself; the contents are treated as untrusted bytes, so changed bytes lead to a
        // checksum error, and every access is bounds-checked against the length taken here.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Mapping::Mapped(map))
    }
}

impl Deref for Mapping {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Mapping::Owned(bytes) => bytes,
            Mapping::Mapped(map) => map,
        }
    }
}
