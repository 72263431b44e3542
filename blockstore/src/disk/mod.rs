//! The one door to persistent storage. Everything the store and the overlay keep passes [`Disk`] (one file or
//! device) and [`Folder`] (a tree of files), so that a simulated folder can cut the power at every operation.

#[cfg(test)]
pub(crate) mod conformance;
mod local;

pub(crate) use local::check_path;
pub use local::{LocalDisk, LocalFolder};

use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where data for [`Disk::write_past_cache`] has to begin, in the file and in memory. No device wants more.
pub const DIRECT_ALIGN: usize = 4096;

/// One of several reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadAt {
    /// Where it begins.
    pub offset: u64,
    /// Filled to its length.
    pub buffer: Vec<u8>,
}

/// One file, or one block device, addressed by byte offset. All methods may be called from several threads.
pub trait Disk: Send + Sync + Debug {
    /// Fills `buf` from `offset`. Bytes past the end are an [`io::ErrorKind::UnexpectedEof`] error.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Fills `buf` from `offset` if that needs no waiting for a device, else returns false and leaves anything in it.
    fn read_resident_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let _ = (offset, buf);
        Ok(false)
    }

    /// Fills the buffer of each read; what waits for the device waits together. After an error the buffers hold anything.
    fn read_many(&self, reads: &mut [ReadAt]) -> io::Result<()> {
        reads.iter_mut().try_for_each(|read| self.read_at(read.offset, &mut read.buffer))
    }

    /// Lets go of what is kept in memory of a range, so that the next read of it comes from the device. A hint.
    fn forget(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }

    /// Writes all of `data` at `offset`, extending the file if needed. Durable only after [`Disk::sync`].
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Like [`Disk::write_at`], for data that nobody reads soon: where `offset` and `data` stand at multiples of
    /// [`DIRECT_ALIGN`], it may go to the device without passing the page cache.
    fn write_past_cache(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_at(offset, data)
    }

    /// Makes every completed write, punch and length change durable. An error means that nothing is known about
    /// what reached the disk; the caller poisons itself and never calls `sync` again.
    fn sync(&self) -> io::Result<()>;

    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Cuts or extends (with a hole) to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Gives back the space of `length` bytes at `offset`, which read as zeroes afterwards. Where the file system
    /// cannot punch holes, zeroes are written.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Whether the length is zero.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// A name and length, as [`Folder::list`] returns them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path relative to the folder's root.
    pub path: PathBuf,
    /// Length in bytes.
    pub len: u64,
}

/// A directory tree of files. All paths are relative to its root and never contain `..`.
///
/// A created, renamed or removed name is durable only after [`Folder::sync_dir`] of its directory.
pub trait Folder: Send + Sync + Debug {
    /// Creates a file that must not exist yet, readable and writable.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn Disk>>;

    /// Opens an existing file for reading and writing, and locks it against a second opener for as long as the
    /// returned disk lives ([`io::ErrorKind::ResourceBusy`] when somebody else holds it).
    fn open_exclusive(&self, path: &Path) -> io::Result<Arc<dyn Disk>>;

    /// Opens an existing file for reading.
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn Disk>>;

    /// Renames within the tree; an existing destination is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// The regular files directly in `dir`, in no particular order; an absent directory is an empty list.
    fn list(&self, dir: &Path) -> io::Result<Vec<Entry>>;

    /// The directories directly in `dir`.
    fn list_dirs(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;

    /// Creates `dir` and its parents, durably; existing ones are fine.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Makes the names in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Bytes that are free for the caller on the file system of `dir`, and its size; `None` where nobody knows.
    fn space(&self, dir: &Path) -> io::Result<Option<(u64, u64)>> {
        let _ = dir;
        Ok(None)
    }

    /// What tells one start of the machine from another; while it is the same, what was written can be read back,
    /// whatever became of the process that wrote it. None where nobody knows.
    fn boot_id(&self) -> Option<[u8; 16]> {
        None
    }

    /// The real path of a file, where there is one to map or to name in a message.
    fn real_path(&self, path: &Path) -> Option<PathBuf>;
}
