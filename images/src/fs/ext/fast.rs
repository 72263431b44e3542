//! Fast commits: what a synced file changed since the last transaction, in a few bytes at the journal's end. Layout:
//! "Fast Commit Area" of the ext4 documentation, and `fs/ext4/fast_commit.h` of Linux.
//!
//! They speak of inodes, ranges and names, not of blocks, so they cannot be replayed as blocks: the reader asks for what
//! they say of an inode or a directory where it reads one.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::DiskImage;
use crate::bytes::{le, part, size};
use crate::fs::{FsError, NodeId, read_vec};

/// The features that a head may tell: none yet.
const KNOWN: u32 = 0;
/// What is told.
mod tag {
    pub const ADD_RANGE: u16 = 1;
    pub const REMOVE_RANGE: u16 = 2;
    pub const CREATE: u16 = 3;
    pub const LINK: u16 = 4;
    pub const UNLINK: u16 = 5;
    pub const INODE: u16 = 6;
    pub const FILLER: u16 = 7;
    pub const TAIL: u16 = 8;
    pub const HEAD: u16 = 9;
}
/// Blocks of an extent from this count on are only reserved.
const RESERVED: u64 = 0x8000;
/// Where an inode's map of blocks begins and ends.
const MAP: std::ops::Range<usize> = 0x28..0x64;
const EXTENTS: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xf30a;

/// Blocks of a file, and where they lie now; nothing where they read as zeroes.
pub(super) type Moved = (u64, u64, Option<u64>);

/// All that fast commits say.
#[derive(Debug, Default)]
pub(super) struct FastCommits {
    /// How many there are.
    pub count: u32,
    inodes: HashMap<u64, Vec<u8>>,
    ranges: HashMap<u64, Vec<Moved>>,
    names: HashMap<u64, BTreeMap<Vec<u8>, Option<NodeId>>>,
    /// Directories that have nothing but what is told here.
    created: HashSet<u64>,
}

/// Reads the fast commits behind a transaction from the blocks of the journal that are theirs.
pub(super) fn read(
    journal: &dyn DiskImage,
    blocks: std::ops::Range<u64>,
    block_size: u64,
    transaction: u32,
) -> Result<FastCommits, FsError> {
    let mut found = FastCommits::default();
    let mut waiting: Vec<(u16, Vec<u8>)> = Vec::new();
    // The checksum is CRC-32C without its last inversion.
    let mut sum = u32::MAX;
    for (index, number) in blocks.enumerate() {
        let Some(offset) = number.checked_mul(block_size) else { break };
        let block = read_vec(journal, &"the journal", offset, size(block_size))?;
        if index == 0 && le::u16(&block, 0) != tag::HEAD {
            return Ok(found);
        }
        let mut at = 0;
        while at + 4 <= block.len() {
            let (kind, length) = (le::u16(&block, at), usize::from(le::u16(&block, at + 2)));
            let value = part(&block, at + 4, length);
            let shortest = match kind {
                tag::ADD_RANGE => 16,
                tag::REMOVE_RANGE => 12,
                tag::CREATE | tag::LINK | tag::UNLINK => 9,
                tag::INODE => 4 + 128,
                tag::TAIL | tag::HEAD => 8,
                tag::FILLER => 0,
                _ => return Ok(found),
            };
            if value.len() != length || length < shortest {
                return Ok(found);
            }
            let summed = if kind == tag::TAIL { 4 + 4 } else { 4 + length };
            sum = crc32c::crc32c_append(sum, part(&block, at, summed));
            at += 4 + length;
            match kind {
                tag::HEAD if le::u32(value, 0) & !KNOWN != 0 || le::u32(value, 4) != transaction => return Ok(found),
                // What stands behind the last whole one is older, or was torn.
                tag::TAIL if le::u32(value, 0) != transaction || le::u32(value, 4) != !sum => return Ok(found),
                tag::TAIL => {
                    waiting.drain(..).for_each(|(kind, value)| found.apply(kind, &value));
                    found.count += 1;
                    sum = u32::MAX;
                }
                tag::HEAD | tag::FILLER => {}
                _ => waiting.push((kind, value.to_vec())),
            }
        }
    }
    Ok(found)
}

impl FastCommits {
    fn apply(&mut self, kind: u16, value: &[u8]) {
        let number = u64::from(le::u32(value, 0));
        match kind {
            tag::INODE => {
                self.inodes.insert(number, part(value, 4, value.len()).to_vec());
            }
            tag::ADD_RANGE => {
                let (first, count) = (le::u32(value, 4), u64::from(le::u16(value, 8)));
                let block = u64::from(le::u16(value, 10)) << 32 | u64::from(le::u32(value, 12));
                let (count, block) = if count > RESERVED { (count - RESERVED, None) } else { (count, Some(block)) };
                self.ranges.entry(number).or_default().push((first.into(), count, block));
            }
            tag::REMOVE_RANGE => {
                let range = (le::u32(value, 4).into(), le::u32(value, 8).into(), None);
                self.ranges.entry(number).or_default().push(range);
            }
            _ => {
                let (id, name) = (u64::from(le::u32(value, 4)), part(value, 8, value.len()).to_vec());
                if kind == tag::CREATE {
                    self.created.insert(id);
                }
                let target = (kind != tag::UNLINK).then_some(NodeId(id));
                self.names.entry(number).or_default().insert(name, target);
            }
        }
    }

    /// An inode as it is now. Its map of blocks is told by ranges, if it is one of extents.
    pub(super) fn inode(&self, number: u64, mut raw: Vec<u8>) -> Vec<u8> {
        let Some(told) = self.inodes.get(&number) else { return raw };
        let has_extents = le::u32(told, 0x20) & EXTENTS != 0;
        for (at, (to, from)) in raw.iter_mut().zip(told).enumerate() {
            if !(has_extents && MAP.contains(&at)) {
                *to = *from;
            }
        }
        if has_extents && (le::u16(&raw, MAP.start) != EXTENT_MAGIC || self.created.contains(&number)) {
            let empty = [&EXTENT_MAGIC.to_le_bytes()[..], &[0, 0, 4, 0], &[0; 54]].concat();
            raw.iter_mut().skip(MAP.start).zip(empty).for_each(|(to, from)| *to = from);
        }
        raw
    }

    /// What of a file lies elsewhere now, in order.
    pub(super) fn moved(&self, number: u64) -> &[Moved] {
        self.ranges.get(&number).map_or(&[], Vec::as_slice)
    }

    /// Names that a directory got, or lost.
    pub(super) fn names(&self, dir: u64) -> Option<&BTreeMap<Vec<u8>, Option<NodeId>>> {
        self.names.get(&dir)
    }

    /// Whether a directory was made by them; its blocks are not written then.
    pub(super) fn has_created(&self, dir: u64) -> bool {
        self.created.contains(&dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::test_support::Memory;

    fn told(kind: u16, value: &[u8]) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &u16::try_from(value.len()).unwrap().to_le_bytes(), value].concat()
    }

    fn ended(mut bytes: Vec<u8>, begin: usize, transaction: u32) -> Vec<u8> {
        bytes.extend([&tag::TAIL.to_le_bytes()[..], &8_u16.to_le_bytes(), &transaction.to_le_bytes()].concat());
        let sum = !crc32c::crc32c_append(u32::MAX, &bytes[begin..]);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    #[test]
    fn only_whole_fast_commits_of_the_transaction_count() {
        let head = told(tag::HEAD, &[0, 0, 0, 0, 9, 0, 0, 0]);
        let link = told(tag::LINK, &[2, 0, 0, 0, 12, 0, 0, 0, b'a']);
        let unlink = told(tag::UNLINK, &[2, 0, 0, 0, 13, 0, 0, 0, b'b']);
        let first = ended([head, link].concat(), 0, 9);
        let mut bytes = ended([first.clone(), unlink].concat(), first.len(), 9);
        bytes.resize(1024, 0);
        let read_it = |bytes: &[u8], transaction| read(&Memory(bytes.to_vec()), 0..1, 1024, transaction).unwrap();
        let found = read_it(&bytes, 9);
        assert_eq!(found.count, 2);
        assert_eq!(found.names(2).unwrap().get(&b"a"[..]), Some(&Some(NodeId(12))));
        assert_eq!(found.names(2).unwrap().get(&b"b"[..]), Some(&None));
        assert_eq!(read_it(&bytes, 8).count, 0, "they belong to another transaction");
        bytes[first.len() + 6] ^= 1;
        assert_eq!(read_it(&bytes, 9).count, 1, "the second is torn");
    }
}
