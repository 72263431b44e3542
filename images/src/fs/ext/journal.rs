//! The journal (jbd2), replayed in memory: blocks of complete transactions are read from the journal instead of from
//! their own places. Nothing is written.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;

use super::Ext;
use super::fast::{self, FastCommits};
use crate::bytes::{be, part, size};
use crate::fs::{FsError, NodeId, read};
use crate::mapped::Mapped;
use crate::{DiskImage, SharedDisk};

const MAGIC: u32 = 0xc03b_3998;
/// Longest journal read, in blocks: 1 GiB of 1 KiB.
const BLOCKS_MAX: u32 = 1 << 20;
/// What a block of the journal is.
mod block_type {
    pub const DESCRIPTOR: u32 = 1;
    pub const COMMIT: u32 = 2;
    pub const SUPERBLOCK: u32 = 3;
    pub const SUPERBLOCK_2: u32 = 4;
    pub const REVOKE: u32 = 5;
}
/// Features of a journal.
mod feature {
    pub const REVOKE: u32 = 1;
    pub const BIT64: u32 = 2;
    pub const ASYNC_COMMIT: u32 = 4;
    pub const CHECKSUM_2: u32 = 8;
    pub const CHECKSUM_3: u32 = 0x10;
    pub const FAST_COMMIT: u32 = 0x20;
    pub const KNOWN: u32 = REVOKE | BIT64 | ASYNC_COMMIT | CHECKSUM_2 | CHECKSUM_3 | FAST_COMMIT;
}
/// Flags of a block in a descriptor.
mod tag {
    /// Its first four bytes look like the journal's signature and were replaced by zeroes.
    pub const ESCAPED: u32 = 1;
    pub const SAME_UUID: u32 = 2;
    pub const LAST: u32 = 8;
}

/// A volume with its journal's changes over it.
pub(super) struct Replayed {
    disk: SharedDisk,
    journal: Mapped,
    block_size: u64,
    blocks: BTreeMap<u64, Logged>,
    transactions: u32,
}

#[derive(Clone, Copy)]
struct Logged {
    at: u64,
    escaped: bool,
    sequence: u32,
}

struct Layout {
    block_size: u64,
    first: u32,
    end: u32,
    features: u32,
}

impl Layout {
    fn tag_size(&self) -> usize {
        match () {
            () if self.features & feature::CHECKSUM_3 != 0 => 16,
            () => {
                8 + if self.features & feature::CHECKSUM_2 != 0 { 2 } else { 0 }
                    + if self.features & feature::BIT64 != 0 { 4 } else { 0 }
            }
        }
    }

    fn next(&self, at: u32) -> u32 {
        if at + 1 >= self.end { self.first } else { at + 1 }
    }

    fn usable(&self) -> usize {
        let tail = if self.features & (feature::CHECKSUM_2 | feature::CHECKSUM_3) != 0 { 4 } else { 0 };
        size(self.block_size) - tail
    }
}

/// Reads the journal of `fs`.
pub(super) fn replay(fs: &Ext) -> Result<(Replayed, FastCommits), FsError> {
    let object = "the journal";
    if fs.sb.journal == 0 {
        return Err(FsError::unsupported(&object, "it is on another disk"));
    }
    let inode = fs.inode(NodeId(fs.sb.journal.into()))?;
    let journal = fs.mapped(&inode)?;
    let mut head = [0; 1024];
    read(&journal, &object, 0, &mut head)?;
    let kind = be::u32(&head, 4);
    if be::u32(&head, 0) != MAGIC || !matches!(kind, block_type::SUPERBLOCK | block_type::SUPERBLOCK_2) {
        return Err(FsError::damaged(&object, "it has no signature"));
    }
    let features = if kind == block_type::SUPERBLOCK_2 { be::u32(&head, 0x28) } else { 0 };
    if features & !feature::KNOWN != 0 {
        return Err(FsError::unsupported(&object, "it has features that are not known here"));
    }
    let fast_commits = features & feature::FAST_COMMIT != 0;
    let reserved = match be::u32(&head, 0x54) {
        _ if !fast_commits => 0,
        0 => 256,
        blocks => blocks,
    };
    let layout = Layout {
        block_size: be::u32(&head, 0xc).into(),
        first: be::u32(&head, 0x14),
        end: be::u32(&head, 0x10).saturating_sub(reserved),
        features,
    };
    let bytes = u64::from(layout.end) * layout.block_size;
    if layout.block_size != fs.sb.block_size()
        || layout.first == 0
        || layout.first >= layout.end
        || layout.end > BLOCKS_MAX
        || bytes > journal.size()
    {
        return Err(FsError::damaged(&object, "its superblock makes no sense"));
    }
    let mut replayed = Replayed {
        disk: fs.disk.clone(),
        journal,
        block_size: layout.block_size,
        blocks: BTreeMap::new(),
        transactions: 0,
    };
    let mut fast = FastCommits::default();
    let start = be::u32(&head, 0x1c);
    if start != 0 {
        if !(layout.first..layout.end).contains(&start) {
            return Err(FsError::damaged(&object, "it begins outside of itself"));
        }
        let next = replayed.read_log(&layout, start, be::u32(&head, 0x18))?;
        if fast_commits {
            // They begin a block behind the transactions' end.
            let blocks = u64::from(layout.end) + 1..be::u32(&head, 0x10).min(BLOCKS_MAX).into();
            fast = fast::read(&replayed.journal, blocks, layout.block_size, next)?;
        }
    }
    Ok((replayed, fast))
}

impl Replayed {
    /// Transactions are taken in order, as far as they are complete; the first block that does not belong is the end.
    /// Returns the number of the one that would come next.
    fn read_log(&mut self, layout: &Layout, start: u32, first_sequence: u32) -> Result<u32, FsError> {
        let object = "the journal";
        let (mut at, mut sequence) = (start, first_sequence);
        let mut pending: Vec<(u64, Logged)> = Vec::new();
        let mut pending_revokes: Vec<u64> = Vec::new();
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let mut block = vec![0; size(layout.block_size)];
        let mut left = layout.end;
        while left > 0 {
            left -= 1;
            read(&self.journal, &object, u64::from(at) * layout.block_size, &mut block)?;
            if be::u32(&block, 0) != MAGIC || be::u32(&block, 8) != sequence {
                break;
            }
            match be::u32(&block, 4) {
                block_type::DESCRIPTOR => {
                    for (number, escaped) in tags(layout, &block) {
                        at = layout.next(at);
                        left = left.saturating_sub(1);
                        pending.push((number, Logged { at: at.into(), escaped, sequence }));
                    }
                }
                block_type::REVOKE => pending_revokes.extend(revokes(layout, &block)),
                block_type::COMMIT => {
                    self.blocks.extend(pending.drain(..));
                    revoked.extend(pending_revokes.drain(..).map(|number| (number, sequence)));
                    self.transactions += 1;
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
            at = layout.next(at);
        }
        // A revoked block was freed in that transaction or before: what was logged of it until then is void.
        let end = self.disk.size() / self.block_size;
        self.blocks.retain(|number, logged| {
            *number < end
                && revoked.get(number).is_none_or(|until| until.wrapping_sub(logged.sequence).cast_signed() < 0)
        });
        Ok(sequence)
    }

    /// What a person should know.
    pub(super) fn notice(&self, fast: &FastCommits) -> String {
        let counted = |count: u32, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        let mut parts = counted(self.transactions, "transaction");
        if fast.count > 0 {
            parts = format!("{parts} and {}", counted(fast.count, "fast commit"));
        }
        format!("the file system was in use: {parts} of its journal were replayed in memory")
    }
}

/// The blocks that a descriptor announces.
fn tags(layout: &Layout, block: &[u8]) -> Vec<(u64, bool)> {
    let mut found = Vec::new();
    let mut at = 12;
    while at + layout.tag_size() <= layout.usable() {
        let (flags, high_at) = if layout.features & feature::CHECKSUM_3 != 0 {
            (be::u32(block, at + 4), at + 8)
        } else {
            (be::u16(block, at + 6).into(), at + 8)
        };
        let high = if layout.features & feature::BIT64 != 0 { be::u32(block, high_at) } else { 0 };
        found.push((u64::from(be::u32(block, at)) | u64::from(high) << 32, flags & tag::ESCAPED != 0));
        at += layout.tag_size() + if flags & tag::SAME_UUID == 0 { 16 } else { 0 };
        if flags & tag::LAST != 0 {
            break;
        }
    }
    found
}

/// The blocks that a revoke block names.
fn revokes(layout: &Layout, block: &[u8]) -> Vec<u64> {
    let used = size(be::u32(block, 12).into()).min(layout.usable());
    let records = part(block, 16, used.saturating_sub(16));
    if layout.features & feature::BIT64 != 0 {
        records.chunks_exact(8).map(|record| be::u64(record, 0)).collect()
    } else {
        records.chunks_exact(4).map(|record| be::u32(record, 0).into()).collect()
    }
}

impl DiskImage for Replayed {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, buf)?;
        if buf.is_empty() {
            return Ok(());
        }
        let end = offset + buf.len() as u64;
        let (first, last) = (offset / self.block_size, (end - 1) / self.block_size);
        for (&number, logged) in self.blocks.range(first..=last) {
            let mut block = vec![0; size(self.block_size)];
            self.journal.read_at(logged.at * self.block_size, &mut block)?;
            if logged.escaped {
                block.get_mut(..4).unwrap_or_default().copy_from_slice(&MAGIC.to_be_bytes());
            }
            let start = number * self.block_size;
            let (from, to) = (start.max(offset), (start + self.block_size).min(end));
            let target = buf.get_mut(size(from - offset)..size(to - offset)).unwrap_or_default();
            target.copy_from_slice(part(&block, size(from - start), size(to - from)));
        }
        Ok(())
    }

    /// Blocks of the journal are metadata and, with `data=journal`, file content that may not have reached its place.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let below = self.disk.next_data(offset)?;
        let logged = self
            .blocks
            .range(offset / self.block_size..)
            .next()
            .map(|(number, _)| (number * self.block_size).max(offset)..(number + 1) * self.block_size);
        Ok(match (below, logged) {
            (Some(below), Some(logged)) => Some(if logged.start < below.start { logged } else { below }),
            (below, logged) => below.or(logged),
        })
    }
}
