//! XFS, versions 4 and 5. Layout: "XFS Algorithms & Data Structures", 3rd edition, and `fs/xfs/libxfs/xfs_format.h`,
//! `xfs_da_format.h` of Linux for what is newer.
//!
//! Numbers are big-endian. A log that was not written back, as on every disk taken from a running machine, is replayed in
//! memory.

mod dir;
mod inode;
mod log;
mod map;
mod superblock;
mod xattr;

use self::inode::{Format, Inode};
use self::superblock::Superblock;
use super::{DirEntry, FileSystem, FileType, FsError, Node, NodeId, Xattr, read_vec};
use crate::bytes::{part, size};
use crate::mapped::{Inline, Mapped};
use crate::{DiskImage, SharedDisk};

/// Longest target of a symbolic link.
const LINK_MAX: u64 = 1024;
/// Header of each block of a symbolic link in version 5.
const LINK_HEADER: usize = 56;

/// An open file system.
pub(super) struct Xfs {
    disk: SharedDisk,
    sb: Superblock,
    notices: Vec<String>,
}

impl Xfs {
    pub(super) fn open(disk: SharedDisk) -> Result<Xfs, FsError> {
        let sb = Superblock::read(disk.as_ref())?;
        let mut fs = Xfs { disk, sb, notices: Vec::new() };
        match log::replay(&fs) {
            Ok(log::Log::Clean) => {}
            Ok(log::Log::Replayed(disk, notice)) => {
                fs.notices.push(notice);
                fs.sb = Superblock::read(disk.as_ref())?;
                fs.disk = disk;
            }
            Err(error) => fs.notices.push(format!(
                "the log cannot be replayed ({error}): if the file system was in use, its newest changes are missing, and \
                 what they touched may not be readable"
            )),
        }
        fs.inode(NodeId(fs.sb.root))?;
        Ok(fs)
    }

    fn inode(&self, id: NodeId) -> Result<Inode, FsError> {
        let offset = self.sb.inode_offset(id.0).ok_or_else(|| FsError::damaged(&id, "there is no such inode"))?;
        Inode::decode(&self.sb, id, read_vec(self.disk.as_ref(), &id, offset, size(self.sb.inode_size))?)
    }

    fn mapped(&self, inode: &Inode) -> Result<Mapped, FsError> {
        let runs = map::runs(self, inode, inode.format, inode.data_fork())?;
        Ok(runs.over(self.disk.clone(), inode.size))
    }
}

impl FileSystem for Xfs {
    fn root(&self) -> NodeId {
        NodeId(self.sb.root)
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        self.inode(id).map(|inode| inode.node())
    }

    fn read_dir(&self, id: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        let inode = self.inode(id)?;
        if inode.kind != FileType::Directory {
            return Err(FsError::NotADirectory { path: id.to_string() });
        }
        match inode.format {
            Format::Local => dir::short(&self.sb, &inode, cursor),
            _ => dir::blocks(self, &inode, cursor),
        }
    }

    fn open(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let inode = self.inode(id)?;
        if inode.kind != FileType::File {
            return Err(FsError::damaged(&id, "it is not a regular file"));
        }
        if inode.is_realtime() {
            return Err(FsError::unsupported(&id, "it is on a realtime device"));
        }
        if inode.format == Format::Local {
            let bytes = part(inode.data_fork(), 0, size(inode.size)).to_vec();
            return Ok(Box::new(Inline { bytes, size: inode.size }));
        }
        Ok(Box::new(self.mapped(&inode)?))
    }

    fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        let inode = self.inode(id)?;
        if inode.kind != FileType::Symlink || inode.size > LINK_MAX {
            return Err(FsError::damaged(&id, "it is no symbolic link"));
        }
        let length = size(inode.size);
        if inode.format == Format::Local {
            return Ok(part(inode.data_fork(), 0, length).to_vec());
        }
        let header = if self.sb.version == 5 { LINK_HEADER } else { 0 };
        let block = size(self.sb.block_size());
        let blocks = length.div_ceil(block - header);
        let runs = map::runs(self, &inode, inode.format, inode.data_fork())?;
        let stored = runs.over(self.disk.clone(), (blocks * block) as u64);
        let bytes = read_vec(&stored, &id, 0, blocks * block)?;
        let mut target: Vec<u8> =
            bytes.chunks(block).flat_map(|block| part(block, header, block.len())).copied().collect();
        target.truncate(length);
        Ok(target)
    }

    fn xattrs(&self, id: NodeId) -> Result<Vec<Xattr>, FsError> {
        xattr::read(self, &self.inode(id)?)
    }

    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }
}
