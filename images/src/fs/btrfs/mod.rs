//! Btrfs on a single device: subvolumes, and content compressed by zlib, LZO or zstd. Layout: "On-disk Format" of the
//! Btrfs documentation, and `include/uapi/linux/btrfs_tree.h` of Linux.
//!
//! A node is an inode and, above 40 bits, the subvolume that it is in. A subvolume within another is a directory. What is
//! shown is what a mount without options shows: the default subvolume. What was synced since the last commit, which is on
//! every disk taken from a running machine, is replayed in memory.

mod chunks;
mod compression;
mod extents;
mod log;
mod superblock;
mod tree;

use std::collections::BTreeMap;

use self::chunks::Chunks;
use self::log::Changes;
use self::superblock::Superblock;
use self::tree::{Key, Tree, Visit};
use super::{DirEntry, FileSystem, FileType, FsError, Node, NodeId, Timestamp, Xattr};
use crate::bytes::{le, part, size, u8};
use crate::{DiskImage, SharedDisk};

/// Types of items.
mod item {
    pub const INODE: u8 = 1;
    pub const REF: u8 = 12;
    pub const LONG_REF: u8 = 13;
    pub const XATTR: u8 = 24;
    /// A range of names that a directory's log speaks of.
    pub const DIR_LOG: u8 = 72;
    pub const DIR: u8 = 84;
    pub const DIR_INDEX: u8 = 96;
    pub const EXTENT: u8 = 108;
    pub const ROOT: u8 = 132;
    pub const CHUNK: u8 = 228;
}
/// The top-level subvolume, and the directory of the root tree that names the default one.
const TOP: u64 = 5;
const ROOT_DIR: u64 = 6;
/// The first inode of a subvolume: its root directory.
const FIRST: u64 = 256;
const INODE_BITS: u32 = 40;
/// Entries after which a page is full.
const PAGE: usize = 1024;

/// An open file system.
pub(super) struct Btrfs {
    disk: SharedDisk,
    chunks: Chunks,
    node_size: u32,
    sector: u32,
    roots: u64,
    default: u64,
    changes: BTreeMap<u64, Changes>,
    notices: Vec<String>,
}

/// Where a subvolume's tree begins.
struct Subvolume {
    id: u64,
    root: u64,
}

impl Btrfs {
    pub(super) fn open(disk: SharedDisk) -> Result<Btrfs, FsError> {
        let sb = Superblock::read(disk.as_ref())?;
        let mut chunks = Chunks::new(sb.device);
        chunks.add_system(&sb.system_chunks)?;
        // The tree of chunks lies in the system's own, which the superblock has.
        let mut found = Vec::new();
        let tree = Tree { disk: disk.as_ref(), chunks: &chunks, node_size: sb.node_size };
        tree.scan(sb.chunk_root, Key::new(0, 0, 0), Key::LAST, &mut |key, data| {
            if key.kind == item::CHUNK {
                found.push((key.offset, data.to_vec()));
            }
            true
        })?;
        for (start, chunk) in found {
            chunks.add(start, &chunk)?;
        }
        let mut fs = Btrfs {
            disk,
            chunks,
            node_size: sb.node_size,
            sector: sb.sector,
            roots: sb.root,
            default: TOP,
            changes: BTreeMap::new(),
            notices: Vec::new(),
        };
        fs.default = fs.default_subvolume()?;
        if sb.log_root != 0 {
            match log::replay(&fs, sb.log_root) {
                Ok((changes, files)) => {
                    fs.changes = changes;
                    let files = if files == 1 { "1 file or folder".to_owned() } else { format!("{files} files and folders") };
                    fs.notices.push(format!("the file system was in use: the log of {files} was replayed in memory"));
                }
                Err(error) => fs.notices.push(format!(
                    "the file system was in use, and its log cannot be replayed ({error}): what was synced last is missing"
                )),
            }
        }
        if sb.devices > 1 {
            fs.notices.push(format!("the file system has {} devices, of which one is read", sb.devices));
        }
        fs.node(fs.root())?;
        Ok(fs)
    }

    fn tree(&self) -> Tree<'_> {
        Tree { disk: self.disk.as_ref(), chunks: &self.chunks, node_size: self.node_size }
    }

    /// Gives `visit` the items of a subvolume from one key to another, with what its log changes.
    fn items(&self, subvolume: &Subvolume, from: Key, to: Key, visit: Visit<'_>) -> Result<(), FsError> {
        self.items_over(self.changes.get(&subvolume.id), subvolume.root, (from, to), visit)
    }

    /// The same with changes that are given.
    fn items_over(
        &self,
        changes: Option<&Changes>,
        root: u64,
        (from, to): (Key, Key),
        visit: Visit<'_>,
    ) -> Result<(), FsError> {
        let Some(changes) = changes else { return self.tree().scan(root, from, to, visit) };
        let mut waiting = changes.range(from..=to).peekable();
        let mut more = true;
        self.tree().scan(root, from, to, &mut |key, data| {
            while let Some((changed, item)) = waiting.next_if(|(changed, _)| **changed < key) {
                more = item.as_ref().is_none_or(|item| visit(*changed, item));
                if !more {
                    return false;
                }
            }
            more = match waiting.next_if(|(changed, _)| **changed == key) {
                Some((_, item)) => item.as_ref().is_none_or(|item| visit(key, item)),
                None => visit(key, data),
            };
            more
        })?;
        for (key, item) in waiting {
            more = more && item.as_ref().is_none_or(|item| visit(*key, item));
        }
        Ok(())
    }

    /// The subvolume that the root tree's directory calls `default`.
    fn default_subvolume(&self) -> Result<u64, FsError> {
        let mut found = TOP;
        self.tree().scan(
            self.roots,
            Key::new(ROOT_DIR, item::DIR, 0),
            Key::new(ROOT_DIR, item::DIR, u64::MAX),
            &mut |_, data| {
                if let Some(entry) = entries(data).into_iter().find(|entry| entry.name == b"default") {
                    found = entry.target.id;
                }
                true
            },
        )?;
        Ok(found)
    }

    fn subvolume(&self, id: u64) -> Result<Subvolume, FsError> {
        let mut root = None;
        self.tree().scan(
            self.roots,
            Key::new(id, item::ROOT, 0),
            Key::new(id, item::ROOT, u64::MAX),
            &mut |_, data| {
                root = Some(le::u64(data, 176));
                true
            },
        )?;
        let root = root.ok_or_else(|| FsError::damaged(&format_args!("subvolume {id}"), "it is not there"))?;
        Ok(Subvolume { id, root })
    }

    /// The subvolume and the inode's number in it.
    fn split(&self, id: NodeId) -> Result<(Subvolume, u64), FsError> {
        Ok((self.subvolume(id.0 >> INODE_BITS)?, id.0 & ((1 << INODE_BITS) - 1)))
    }

    fn inode(&self, id: NodeId) -> Result<(Subvolume, u64, Vec<u8>), FsError> {
        let (subvolume, number) = self.split(id)?;
        let mut found = None;
        let key = Key::new(number, item::INODE, 0);
        self.items(&subvolume, key, key, &mut |_, data| {
            found = Some(data.to_vec());
            false
        })?;
        let inode = found.filter(|data| data.len() >= 160).ok_or_else(|| FsError::damaged(&id, "it has no inode"))?;
        Ok((subvolume, number, inode))
    }

    fn node_id(&self, entry: &Entry<'_>, subvolume: u64) -> Option<NodeId> {
        let (subvolume, number) = match entry.target.kind {
            item::ROOT => (entry.target.id, FIRST),
            item::INODE => (subvolume, entry.target.id),
            _ => return None,
        };
        let fits = subvolume < 1 << (64 - INODE_BITS) && number < 1 << INODE_BITS;
        fits.then_some(NodeId((subvolume << INODE_BITS) | number))
    }
}

/// An entry of a directory, or an extended attribute.
struct Entry<'a> {
    target: Key,
    name: &'a [u8],
    data: &'a [u8],
}

/// The entries of an item; those whose names have the same hash share one.
fn entries(bytes: &[u8]) -> Vec<Entry<'_>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at + 30 <= bytes.len() {
        let (data_length, name_length) = (usize::from(le::u16(bytes, at + 25)), usize::from(le::u16(bytes, at + 27)));
        let name = part(bytes, at + 30, name_length);
        let data = part(bytes, at + 30 + name_length, data_length);
        if name.len() != name_length || data.len() != data_length {
            break;
        }
        found.push(Entry { target: Key::decode(part(bytes, at, 17)), name, data });
        at += 30 + name_length + data_length;
    }
    found
}

impl FileSystem for Btrfs {
    fn root(&self) -> NodeId {
        NodeId((self.default << INODE_BITS) | FIRST)
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        let (_, _, inode) = self.inode(id)?;
        let mode = le::u32(&inode, 52);
        let kind = FileType::from_mode(mode).ok_or_else(|| FsError::damaged(&id, "it is of no known type"))?;
        let time = |at: usize| Timestamp {
            seconds: le::u64(&inode, at).cast_signed(),
            nanoseconds: le::u32(&inode, at + 8).min(999_999_999),
        };
        let device = le::u64(&inode, 56);
        let number = |number: u64| u32::try_from(number).unwrap_or(0);
        let length = le::u64(&inode, 16);
        if length > i64::MAX.unsigned_abs() {
            return Err(FsError::damaged(&id, "its size makes no sense"));
        }
        Ok(Node {
            id,
            kind,
            mode: mode & 0o7777,
            uid: le::u32(&inode, 44),
            gid: le::u32(&inode, 48),
            size: length,
            links: le::u32(&inode, 40),
            modified: time(136),
            accessed: time(112),
            changed: time(124),
            device: (number((device >> 20) & 0xfff), number(device & 0xf_ffff)),
        })
    }

    fn read_dir(&self, id: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        let (subvolume, number) = self.split(id)?;
        let mut found = Vec::new();
        let (from, to) = (Key::new(number, item::DIR_INDEX, cursor), Key::new(number, item::DIR_INDEX, u64::MAX));
        self.items(&subvolume, from, to, &mut |key, data| {
            for entry in entries(data) {
                if let Some(target) = self.node_id(&entry, subvolume.id) {
                    found.push(DirEntry { name: entry.name.to_vec(), id: target, next: key.offset.saturating_add(1) });
                }
            }
            found.len() < PAGE
        })?;
        Ok(found)
    }

    fn open(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let (subvolume, number, inode) = self.inode(id)?;
        let length = self.node(id)?.size;
        if FileType::from_mode(le::u32(&inode, 52)) != Some(FileType::File) {
            return Err(FsError::damaged(&id, "it is not a regular file"));
        }
        extents::open(self, id, &subvolume, number, length)
    }

    fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        let (subvolume, number, inode) = self.inode(id)?;
        let length = le::u64(&inode, 16);
        if FileType::from_mode(le::u32(&inode, 52)) != Some(FileType::Symlink) || length > 4096 {
            return Err(FsError::damaged(&id, "it is no symbolic link"));
        }
        let content = extents::open(self, id, &subvolume, number, length)?;
        super::read_vec(content.as_ref(), &id, 0, size(length))
    }

    fn xattrs(&self, id: NodeId) -> Result<Vec<Xattr>, FsError> {
        let (subvolume, number) = self.split(id)?;
        let mut found = Vec::new();
        let (from, to) = (Key::new(number, item::XATTR, 0), Key::new(number, item::XATTR, u64::MAX));
        self.items(&subvolume, from, to, &mut |_, data| {
            let own = entries(data).into_iter().filter(|entry| !entry.name.starts_with(b"btrfs."));
            found.extend(own.map(|entry| (entry.name.to_vec(), entry.data.to_vec())));
            true
        })?;
        Ok(found)
    }

    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }
}

/// A byte that says how an extent is stored.
fn stored_as(extent: &[u8]) -> u8 {
    u8(extent, 20)
}
