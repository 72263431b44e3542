//! Where a file's blocks lie: extent trees, and the block lists of ext2 and ext3.

use super::Ext;
use super::inode::Inode;
use crate::bytes::{le, part, size};
use crate::fs::FsError;
use crate::mapped::Runs;

/// Deepest extent tree.
const DEPTH_MAX: u16 = 5;
/// Blocks of a file's map that are read: a list of 4 TiB in blocks of 4 KiB, and every extent tree.
const MAP_BLOCKS_MAX: u64 = 1 << 20;

/// The runs of an extent tree. Extents that were only reserved read as zeroes, as what is not mapped does.
pub(super) fn extents(fs: &Ext, inode: &Inode) -> Result<Runs, FsError> {
    let mut walk = Walk { fs, inode, runs: Runs::default(), blocks: 0 };
    let depth = le::u16(inode.block(), 6);
    if depth > DEPTH_MAX {
        return Err(FsError::damaged(&inode.id, "its extent tree is too deep"));
    }
    walk.node(inode.block(), depth)?;
    Ok(walk.runs)
}

/// The runs of a block list.
pub(super) fn blocks(fs: &Ext, inode: &Inode) -> Result<Runs, FsError> {
    let mut walk = Walk { fs, inode, runs: Runs::default(), blocks: 0 };
    let end = inode.size.div_ceil(fs.sb.block_size());
    let mut at = 0;
    for (index, pointer) in inode.block().chunks_exact(4).enumerate() {
        if at >= end {
            break;
        }
        let depth = u32::try_from(index.saturating_sub(11)).unwrap_or(0);
        at = walk.pointer(le::u32(pointer, 0).into(), depth, at, end)?;
    }
    Ok(walk.runs)
}

struct Walk<'a> {
    fs: &'a Ext,
    inode: &'a Inode,
    runs: Runs,
    blocks: u64,
}

impl Walk<'_> {
    fn damaged(&self, reason: &'static str) -> FsError {
        FsError::damaged(&self.inode.id, reason)
    }

    fn read(&mut self, block: u64) -> Result<Vec<u8>, FsError> {
        self.blocks += 1;
        if self.blocks > MAP_BLOCKS_MAX {
            return Err(self.damaged("its map is larger than any file's"));
        }
        self.fs.read_block(&self.inode.id, block)
    }

    fn push(&mut self, first: u64, count: u64, block: u64) -> Result<(), FsError> {
        let bits = self.fs.sb.block_bits;
        let last = block.checked_add(count.saturating_sub(1)).ok_or_else(|| self.damaged("an extent is too long"))?;
        self.fs.block_offset(&self.inode.id, last)?;
        let offset = self.fs.block_offset(&self.inode.id, block)?;
        self.runs.push(&self.inode.id, (first << bits, count << bits, offset))
    }

    fn node(&mut self, bytes: &[u8], depth: u16) -> Result<(), FsError> {
        if le::u16(bytes, 0) != 0xf30a || le::u16(bytes, 6) != depth {
            return Err(self.damaged("a node of its extent tree makes no sense"));
        }
        let count = usize::from(le::u16(bytes, 2));
        if 12 + 12 * count > bytes.len() {
            return Err(self.damaged("a node of its extent tree is too full"));
        }
        for entry in part(bytes, 12, 12 * count).chunks_exact(12) {
            if let Some(below) = depth.checked_sub(1) {
                let block = u64::from(le::u32(entry, 4)) | u64::from(le::u16(entry, 8)) << 32;
                let child = self.read(block)?;
                self.node(&child, below)?;
                continue;
            }
            let length = u64::from(le::u16(entry, 4));
            let start = u64::from(le::u32(entry, 8)) | u64::from(le::u16(entry, 6)) << 32;
            // Above 32768 it is the length of an extent that is reserved and not written.
            if (1..=0x8000).contains(&length) {
                self.push(le::u32(entry, 0).into(), length, start)?;
            }
        }
        Ok(())
    }

    /// What `pointer`, which is `depth` lists away from data, maps from block `at` on. Returns the block behind it.
    fn pointer(&mut self, pointer: u64, depth: u32, at: u64, end: u64) -> Result<u64, FsError> {
        let per_list = self.fs.sb.block_size() / 4;
        let Some(below) = depth.checked_sub(1) else {
            if pointer != 0 {
                self.push(at, 1, pointer)?;
            }
            return Ok(at + 1);
        };
        let after = at + per_list.pow(depth);
        if pointer == 0 {
            return Ok(after);
        }
        let list = self.read(pointer)?;
        let mut at = at;
        for pointer in list.chunks_exact(4).take(size(per_list)) {
            if at >= end {
                break;
            }
            at = self.pointer(le::u32(pointer, 0).into(), below, at, end)?;
        }
        Ok(after)
    }
}
