//! ext2, ext3 and ext4. Layout: "ext4 Data Structures and Algorithms" of the Linux kernel's documentation
//! (`Documentation/filesystems/ext4/`), and for ACLs and the journal `fs/ext4/acl.h` and `include/linux/jbd2.h`.
//!
//! A journal that was not written back, as on every disk taken from a running machine, is replayed in memory.

mod dir;
mod fast;
mod inode;
mod journal;
mod map;
mod superblock;
mod xattr;

use std::sync::Arc;

use self::fast::FastCommits;
use self::inode::Inode;
use self::superblock::Superblock;
use super::{DirEntry, FileSystem, FileType, FsError, Node, NodeId, Xattr, read, read_vec};
use crate::bytes::{le, part, size};
use crate::mapped::{Inline, Mapped};
use crate::{Cached, DiskImage, SharedDisk};

/// The root directory's inode.
const ROOT: u64 = 2;
/// Longest target of a symbolic link.
const LINK_MAX: u64 = 4096;

/// An open file system.
pub(super) struct Ext {
    disk: SharedDisk,
    sb: Superblock,
    fast: FastCommits,
    notices: Vec<String>,
}

impl Ext {
    pub(super) fn open(disk: SharedDisk) -> Result<Ext, FsError> {
        let sb = Superblock::read(disk.as_ref())?;
        let mut fs = Ext { disk, sb, fast: FastCommits::default(), notices: Vec::new() };
        if fs.sb.needs_recovery() {
            match journal::replay(&fs) {
                Ok((replayed, fast)) => {
                    fs.notices.push(replayed.notice(&fast));
                    fs.fast = fast;
                    fs.disk = Arc::new(Cached::new(Arc::new(replayed)));
                    fs.sb = Superblock::read(fs.disk.as_ref())?;
                }
                Err(error) => fs.notices.push(format!(
                    "the journal has changes that were not written back and cannot be read ({error}); files are shown without them"
                )),
            }
        }
        fs.inode(NodeId(ROOT))?;
        Ok(fs)
    }

    /// A block's place on the disk.
    fn block_offset(&self, object: &dyn std::fmt::Display, block: u64) -> Result<u64, FsError> {
        if block >= self.sb.blocks || block == 0 {
            return Err(FsError::damaged(object, "it points outside of the file system"));
        }
        Ok(block << self.sb.block_bits)
    }

    fn read_block(&self, object: &dyn std::fmt::Display, block: u64) -> Result<Vec<u8>, FsError> {
        read_vec(self.disk.as_ref(), object, self.block_offset(object, block)?, size(self.sb.block_size()))
    }

    fn inode(&self, id: NodeId) -> Result<Inode, FsError> {
        let number = u32::try_from(id.0).ok().filter(|number| (1..=self.sb.inodes).contains(number));
        let number = number.ok_or_else(|| FsError::damaged(&id, "there is no such inode"))? - 1;
        let (group, index) = (number / self.sb.inodes_per_group, number % self.sb.inodes_per_group);
        let mut descriptor = [0; 64];
        let descriptor = descriptor.get_mut(..size(self.sb.descriptor_size.min(64))).unwrap_or_default();
        read(self.disk.as_ref(), &format_args!("block group {group}"), self.sb.descriptor_offset(group), descriptor)?;
        let high = if self.sb.descriptor_size >= 64 { le::u32(descriptor, 0x28) } else { 0 };
        let table = u64::from(le::u32(descriptor, 8)) | u64::from(high) << 32;
        let offset = self.block_offset(&id, table)? + u64::from(index) * self.sb.inode_size;
        let raw = read_vec(self.disk.as_ref(), &id, offset, size(self.sb.inode_size))?;
        Inode::decode(id, self.fast.inode(id.0, raw))
    }

    fn content(&self, inode: &Inode) -> Result<Box<dyn DiskImage>, FsError> {
        if inode.is_encrypted() {
            return Err(FsError::unsupported(&inode.id, "it is encrypted"));
        }
        if inode.is_inline() {
            let bytes = self.inline(inode)?;
            return Ok(Box::new(Inline { bytes, size: inode.size }));
        }
        self.mapped(inode).map(|mapped| Box::new(mapped) as Box<dyn DiskImage>)
    }

    fn mapped(&self, inode: &Inode) -> Result<Mapped, FsError> {
        let mut runs = if inode.has_extents() { map::extents(self, inode)? } else { map::blocks(self, inode)? };
        let moved = self.fast.moved(inode.id.0);
        if !moved.is_empty() {
            let bits = self.sb.block_bits;
            let inside = |count: u64, block: u64| block.saturating_add(count) <= self.sb.blocks;
            if moved.iter().any(|(_, count, block)| block.is_some_and(|block| !inside(*count, block))) {
                return Err(FsError::damaged(&inode.id, "a fast commit points outside of the file system"));
            }
            let bytes = moved
                .iter()
                .map(|(first, count, block)| (first << bits, count << bits, block.map(|block| block << bits)));
            runs = runs.moved(&inode.id, bytes)?;
        }
        Ok(runs.over(self.disk.clone(), inode.size))
    }

    /// Content that lies in the inode, and goes on in an attribute of it.
    fn inline(&self, inode: &Inode) -> Result<Vec<u8>, FsError> {
        let mut bytes = inode.block().to_vec();
        if let Some((_, more)) = xattr::inline(self, inode)?.into_iter().find(|(name, _)| name == b"system.data") {
            bytes.extend_from_slice(&more);
        }
        bytes.truncate(size(inode.size));
        Ok(bytes)
    }
}

impl FileSystem for Ext {
    fn root(&self) -> NodeId {
        NodeId(ROOT)
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        self.inode(id).map(|inode| inode.node())
    }

    fn read_dir(&self, id: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        let inode = self.inode(id)?;
        if inode.kind != FileType::Directory {
            return Err(FsError::NotADirectory { path: id.to_string() });
        }
        dir::with_fast_commits(&self.fast, id, cursor, &mut |cursor| {
            if inode.is_inline() {
                dir::inline(&inode, &self.inline(&inode)?, cursor)
            } else {
                dir::read(self, &inode, cursor)
            }
        })
    }

    fn open(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let inode = self.inode(id)?;
        if inode.kind != FileType::File {
            return Err(FsError::damaged(&id, "it is not a regular file"));
        }
        self.content(&inode)
    }

    fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(id)?;
        if inode.kind != FileType::Symlink || inode.size > LINK_MAX {
            return Err(FsError::damaged(&id, "it is no symbolic link"));
        }
        if inode.size < 60 && !inode.has_extents() && !inode.is_inline() && !inode.is_encrypted() {
            return Ok(part(inode.block(), 0, size(inode.size)).to_vec());
        }
        let mut target = vec![0; size(inode.size)];
        read(self.content(&inode)?.as_ref(), &id, 0, &mut target)?;
        Ok(target)
    }

    fn xattrs(&self, id: NodeId) -> Result<Vec<Xattr>, FsError> {
        let inode = self.inode(id)?;
        let mut found = xattr::inline(self, &inode)?;
        found.retain(|(name, _)| name != b"system.data");
        found.extend(xattr::block(self, &inode)?);
        Ok(found)
    }

    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }
}
