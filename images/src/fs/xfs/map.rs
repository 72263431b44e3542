//! Where a fork's blocks lie: a list of extents, or a tree of them.

use super::Xfs;
use super::inode::{Format, Inode};
use crate::bytes::{be, part, size};
use crate::fs::{FsError, read_vec};
use crate::mapped::Runs;

/// Deepest tree.
const DEPTH_MAX: u16 = 9;
/// Blocks of a tree that are read.
const BLOCKS_MAX: u64 = 1 << 18;

/// The runs of a fork. Extents that were only reserved read as zeroes, as what is not mapped does.
pub(super) fn runs(fs: &Xfs, inode: &Inode, format: Format, fork: &[u8]) -> Result<Runs, FsError> {
    let mut walk = Walk { fs, inode, runs: Runs::default(), blocks: 0 };
    match format {
        Format::Extents => {
            let count = if std::ptr::eq(fork, inode.data_fork()) { inode.extents } else { inode.attribute_extents };
            let records = part(fork, 0, size(count).saturating_mul(16));
            if (records.len() as u64) < count.saturating_mul(16) {
                return Err(walk.damaged("it has more extents than there is room for"));
            }
            walk.records(records)?;
        }
        Format::Tree => {
            let (level, count) = (be::u16(fork, 0), usize::from(be::u16(fork, 2)));
            let room = fork.len().saturating_sub(4) / 16;
            if level == 0 || level > DEPTH_MAX || count > room {
                return Err(walk.damaged("the root of its tree of extents makes no sense"));
            }
            for pointer in part(fork, 4 + 8 * room, 8 * count).chunks_exact(8) {
                walk.block(be::u64(pointer, 0), level - 1)?;
            }
        }
        Format::Local | Format::Device => return Err(walk.damaged("its content is not in blocks")),
    }
    Ok(walk.runs)
}

struct Walk<'a> {
    fs: &'a Xfs,
    inode: &'a Inode,
    runs: Runs,
    blocks: u64,
}

impl Walk<'_> {
    fn damaged(&self, reason: &'static str) -> FsError {
        FsError::damaged(&self.inode.id, reason)
    }

    fn block(&mut self, block: u64, level: u16) -> Result<(), FsError> {
        self.blocks += 1;
        let offset = self.fs.sb.block_offset(block, 1).filter(|_| self.blocks <= BLOCKS_MAX);
        let offset = offset.ok_or_else(|| self.damaged("its tree of extents leads out of the file system"))?;
        let bytes = read_vec(self.fs.disk.as_ref(), &self.inode.id, offset, size(self.fs.sb.block_size()))?;
        let header = match part(&bytes, 0, 4) {
            b"BMAP" => 24,
            b"BMA3" => 72,
            _ => return Err(self.damaged("a block of its tree of extents has no signature")),
        };
        let count = usize::from(be::u16(&bytes, 6));
        let room = (bytes.len() - header) / 16;
        if be::u16(&bytes, 4) != level || count > room {
            return Err(self.damaged("a block of its tree of extents makes no sense"));
        }
        let Some(below) = level.checked_sub(1) else {
            return self.records(part(&bytes, header, 16 * count));
        };
        for pointer in part(&bytes, header + 8 * room, 8 * count).chunks_exact(8) {
            self.block(be::u64(pointer, 0), below)?;
        }
        Ok(())
    }

    /// Extents of 128 bits: a flag for reserved ones, 54 bits of place in the file, 52 of place on the disk, 21 of length.
    fn records(&mut self, records: &[u8]) -> Result<(), FsError> {
        let bits = self.fs.sb.block_bits;
        for record in records.chunks_exact(16) {
            let (high, low) = (be::u64(record, 0), be::u64(record, 8));
            let start = (high & (u64::MAX >> 1)) >> 9;
            let block = (high & 0x1ff) << 43 | low >> 21;
            let count = low & 0x1f_ffff;
            let offset = self.fs.sb.block_offset(block, count);
            let offset = offset.ok_or_else(|| self.damaged("it points outside of the file system"))?;
            let start = start.checked_mul(1 << bits).ok_or_else(|| self.damaged("an extent is too far out"))?;
            if high >> 63 == 0 {
                self.runs.push(&self.inode.id, (start, count << bits, offset))?;
            }
        }
        Ok(())
    }
}
