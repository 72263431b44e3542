//! File systems of foreign disks, read-only, through one trait.
//!
//! Every byte is hostile: counts, depths and lengths are bounded, a pointer out of its volume is an error of the object
//! that has it, and nothing is trusted because something else pointed at it. Readers keep no lock, so that many can
//! read at once; where something lies is looked up again each time, through a block cache ([`crate::Cached`]).

mod btrfs;
mod error;
mod exfat;
mod ext;
mod fat;
mod iso;
mod ntfs;
mod remembered;
#[cfg(test)]
pub(crate) mod test_support;
mod time;
mod walk;
mod xfs;

use std::sync::Arc;

pub use error::FsError;
pub(crate) use fat::Geometry as FatGeometry;
pub use walk::{Located, Walk, WalkStep, find_path};

use self::remembered::fold;
use crate::volume::Kind;
use crate::{Cached, DiskImage, SharedDisk};

/// What a file system calls one of its objects: an inode number, or the place of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// What kind of object it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A pipe.
    Fifo,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A socket.
    Socket,
}

impl FileType {
    /// From the type bits of a Unix mode.
    pub fn from_mode(mode: u32) -> Option<FileType> {
        Some(match mode & 0o170_000 {
            0o100_000 => FileType::File,
            0o040_000 => FileType::Directory,
            0o120_000 => FileType::Symlink,
            0o010_000 => FileType::Fifo,
            0o020_000 => FileType::CharDevice,
            0o060_000 => FileType::BlockDevice,
            0o140_000 => FileType::Socket,
            _ => return None,
        })
    }
}

/// A time since 1970, UTC.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// The rest, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// What is known of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name within the file system.
    pub id: NodeId,
    /// What it is.
    pub kind: FileType,
    /// Permission bits, set-user-id, set-group-id and sticky bit.
    pub mode: u32,
    /// Its owner; 0 where the file system knows none.
    pub uid: u32,
    /// Its group; 0 where the file system knows none.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Names that refer to it.
    pub links: u32,
    /// When its content was changed.
    pub modified: Timestamp,
    /// When it was read.
    pub accessed: Timestamp,
    /// When its metadata was changed.
    pub changed: Timestamp,
    /// Major and minor number of a device.
    pub device: (u32, u32),
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name as it is stored; UTF-8 where the file system stores UTF-16.
    pub name: Vec<u8>,
    /// What it refers to.
    pub id: NodeId,
    /// The cursor that reads on behind it.
    pub next: u64,
}

/// An extended attribute: its name with its namespace, and its value as Linux gives it.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// Content that an object has beside its own, with its name.
pub type Stream = (Vec<u8>, Box<dyn DiskImage>);

/// A file system that is read.
pub trait FileSystem: Send + Sync {
    /// The root directory.
    fn root(&self) -> NodeId;

    /// What is known of an object.
    fn node(&self, id: NodeId) -> Result<Node, FsError>;

    /// The next entries of a directory from a cursor, which is 0 or [`DirEntry::next`]; none at its end. `.` and `..` are
    /// not among them.
    fn read_dir(&self, dir: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError>;

    /// The content of a file.
    fn open(&self, file: NodeId) -> Result<Box<dyn DiskImage>, FsError>;

    /// Where a symbolic link points.
    fn read_link(&self, link: NodeId) -> Result<Vec<u8>, FsError> {
        Err(FsError::damaged(&link, "it is no symbolic link"))
    }

    /// Extended attributes.
    fn xattrs(&self, _id: NodeId) -> Result<Vec<Xattr>, FsError> {
        Ok(Vec::new())
    }

    /// Streams that are too long to be extended attributes.
    fn streams(&self, _id: NodeId) -> Result<Vec<Stream>, FsError> {
        Ok(Vec::new())
    }

    /// Whether names that differ in case alone are the same.
    fn ignores_case(&self) -> bool {
        false
    }

    /// The object that a directory calls `name`.
    fn lookup(&self, dir: NodeId, name: &[u8]) -> Result<Option<NodeId>, FsError> {
        let folded = self.ignores_case().then(|| fold(name));
        let mut cursor = 0;
        let mut similar = None;
        loop {
            let entries = self.read_dir(dir, cursor)?;
            let Some(last) = entries.last() else { return Ok(similar) };
            cursor = last.next;
            for entry in entries {
                if entry.name == name {
                    return Ok(Some(entry.id));
                }
                if similar.is_none() && folded.as_ref().is_some_and(|folded| fold(&entry.name) == *folded) {
                    similar = Some(entry.id);
                }
            }
        }
    }

    /// What a reader of this file system should know: a journal that was replayed, for one.
    fn notices(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Opens the file system of this kind on a volume.
pub fn open(kind: Kind, volume: SharedDisk) -> Result<Box<dyn FileSystem>, FsError> {
    let volume: SharedDisk = Arc::new(Cached::new(volume));
    let fs: Box<dyn FileSystem> = match kind {
        Kind::Ext => Box::new(ext::Ext::open(volume)?),
        Kind::Fat => Box::new(fat::Fat::open(volume)?),
        Kind::ExFat => Box::new(exfat::ExFat::open(volume)?),
        Kind::Ntfs => Box::new(ntfs::Ntfs::open(volume)?),
        Kind::Iso => Box::new(iso::Iso::open(volume)?),
        Kind::Xfs => Box::new(xfs::Xfs::open(volume)?),
        Kind::Btrfs => Box::new(btrfs::Btrfs::open(volume)?),
        other => {
            return Err(FsError::Unsupported { object: format!("a volume with {other}"), reason: other.why_not() });
        }
    };
    Ok(Box::new(remembered::Remembered::new(fs)))
}

/// Reads a range that must lie inside the volume.
pub(crate) fn read(
    disk: &dyn DiskImage,
    object: &dyn std::fmt::Display,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), FsError> {
    match offset.checked_add(buf.len() as u64) {
        Some(end) if end <= disk.size() => {
            disk.read_at(offset, buf).map_err(|source| FsError::Io { object: object.to_string(), source })
        }
        _ => Err(FsError::damaged(object, "it points outside of its volume")),
    }
}

/// Reads a range of known length.
pub(crate) fn read_vec(
    disk: &dyn DiskImage,
    object: &dyn std::fmt::Display,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, FsError> {
    if offset.checked_add(length as u64).is_none_or(|end| end > disk.size()) {
        return Err(FsError::damaged(object, "it points outside of its volume"));
    }
    let mut bytes = vec![0; length];
    read(disk, object, offset, &mut bytes)?;
    Ok(bytes)
}
