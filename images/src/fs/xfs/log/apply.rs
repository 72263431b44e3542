//! What a transaction changes: bytes of buffers, inodes, and blocks of new inodes. From version 5 on, most structures tell
//! which record changed them last, and what is older than that is not written over them: it has been there already.

use std::collections::{HashMap, HashSet};

use super::super::Xfs;
use super::record::SECTOR;
use super::transaction::{Item, kind};
use crate::bytes::{be, part, size};
use crate::fs::{FsError, read_vec};
use crate::patched::Patched;

/// Bytes that one bit of a buffer's map stands for.
const PIECE: usize = 128;
/// Sectors of the longest buffer: a directory block, or a cluster of inodes, of 64 KiB.
const BUFFER_MAX: u16 = 128;
/// Flags of a buffer.
mod flag {
    /// Of the inodes in it, only lists of unlinked ones were logged.
    pub const INODES: u16 = 1;
    pub const CANCELLED: u16 = 2;
    pub const QUOTAS: u16 = 4 | 8 | 16;
}
/// Parts of an inode that were logged.
mod field {
    pub const DATA: u32 = 0x2;
    pub const EXTENTS: u32 = 0x4;
    pub const TREE: u32 = 0x8;
    pub const DEVICE: u32 = 0x10;
    pub const ATTRIBUTES: u32 = 0x40;
    pub const ATTRIBUTE_EXTENTS: u32 = 0x80;
    pub const ATTRIBUTE_TREE: u32 = 0x100;
}
const BIG_TIME: u64 = 0x8;

/// The disk with what has been applied to it.
pub(super) struct Apply<'a> {
    fs: &'a Xfs,
    disk: Patched,
    /// Buffers that were cancelled, by place and length, and how often that is still to come.
    cancelled: HashMap<(u64, u16), u32>,
    /// The record that changed a buffer last, as it stood there before anything was applied; the same for inodes.
    buffers: HashMap<u64, Option<u64>>,
    inodes: HashMap<u64, Option<u64>>,
    begun: HashSet<(u16, u64)>,
}

impl<'a> Apply<'a> {
    pub(super) fn new(fs: &'a Xfs, disk: Patched) -> Apply<'a> {
        Apply {
            fs,
            disk,
            cancelled: HashMap::new(),
            buffers: HashMap::new(),
            inodes: HashMap::new(),
            begun: HashSet::new(),
        }
    }

    pub(super) fn into_disk(self) -> Patched {
        self.disk
    }

    /// Changes that were begun, and whose end is not in the log.
    pub(super) fn unfinished(&self) -> usize {
        self.begun.len()
    }

    /// Remembers that a buffer is not to be written.
    pub(super) fn note_cancelled(&mut self, item: &Item) {
        let buffer = Buffer::decode(item);
        if buffer.flags & flag::CANCELLED != 0 {
            *self.cancelled.entry((buffer.place, buffer.sectors)).or_default() += 1;
        }
    }

    /// Buffers come first: inodes of the same transaction may lie in them. That one is cancelled comes last.
    pub(super) fn transaction(&mut self, sequence: u64, items: &[Item]) -> Result<(), FsError> {
        for item in items {
            match item.kind() {
                kind::BUFFER => self.buffer(sequence, item)?,
                kind::NEW_INODES => self.new_inodes(item)?,
                found => {
                    let id = item.order.u64(item.region(0), 8);
                    if kind::BEGUN.contains(&found) {
                        self.begun.insert((found, id));
                    } else if kind::DONE.contains(&found) {
                        self.begun.remove(&(found - 1, id));
                    }
                }
            }
        }
        for item in items.iter().filter(|item| item.kind() == kind::INODE) {
            self.inode(sequence, item)?;
        }
        for item in items.iter().filter(|item| item.kind() == kind::BUFFER) {
            let buffer = Buffer::decode(item);
            if buffer.flags & flag::CANCELLED != 0
                && let Some(count) = self.cancelled.get_mut(&(buffer.place, buffer.sectors))
            {
                *count = count.saturating_sub(1);
            }
        }
        Ok(())
    }

    fn is_cancelled(&self, place: u64, sectors: u16) -> bool {
        self.cancelled.get(&(place, sectors)).is_some_and(|count| *count > 0)
    }

    fn buffer(&mut self, sequence: u64, item: &Item) -> Result<(), FsError> {
        let buffer = Buffer::decode(item);
        if buffer.flags & (flag::CANCELLED | flag::INODES | flag::QUOTAS) != 0
            || self.is_cancelled(buffer.place, buffer.sectors)
        {
            return Ok(());
        }
        if buffer.sectors > BUFFER_MAX {
            return Err(damaged());
        }
        let offset = buffer.place.checked_mul(SECTOR).ok_or_else(damaged)?;
        let length = usize::from(buffer.sectors) * 512;
        let known = match self.buffers.get(&offset) {
            Some(known) => *known,
            None => {
                let there = read_vec(&self.disk, &"the log", offset, length)?;
                let known = if self.fs.sb.version >= 5 { changed_by(&there) } else { None };
                self.buffers.insert(offset, known);
                known
            }
        };
        if known.is_some_and(|known| known >= sequence) {
            return Ok(());
        }
        let mut region = 1;
        let mut bit = 0;
        while bit < buffer.map.len() * 32 {
            let run = (bit..buffer.map.len() * 32).take_while(|bit| buffer.is_set(*bit)).count();
            if run == 0 {
                bit += 1;
                continue;
            }
            // What follows each other may still be logged in several regions.
            let bytes = item.region(region);
            let pieces = run.min(bytes.len() / PIECE);
            if pieces == 0 || (bit + pieces) * PIECE > length {
                return Err(damaged());
            }
            let at = offset + (bit * PIECE) as u64;
            self.disk.write(&"the log", at, part(bytes, 0, pieces * PIECE))?;
            region += 1;
            bit += pieces;
        }
        Ok(())
    }

    /// An inode is logged with its numbers in the machine's order, its forks as they stand on disk.
    fn inode(&mut self, sequence: u64, item: &Item) -> Result<(), FsError> {
        let (order, format) = (item.order, item.region(0));
        // 32-bit machines do not align the number.
        let number_at = if format.len() >= 56 { 16 } else { 12 };
        let fields = order.u32(format, 4);
        let number = order.u64(format, number_at);
        let (place, sectors) = (order.u64(format, number_at + 24), order.u32(format, number_at + 32));
        if self.is_cancelled(place, u16::try_from(sectors).unwrap_or(u16::MAX)) {
            return Ok(());
        }
        let offset = self.fs.sb.inode_offset(number).ok_or_else(damaged)?;
        let length = size(self.fs.sb.inode_size);
        let mut inode = read_vec(&self.disk, &"the log", offset, length)?;
        let logged = item.region(1);
        if part(&inode, 0, 2) != b"IN" || order.u16(logged, 0) != u16::from_be_bytes(*b"IN") {
            return Err(damaged());
        }
        let version = part(logged, 4, 1).first().copied().unwrap_or(0);
        let core = if version >= 3 { 176 } else { 96 };
        if logged.len() < core {
            return Err(damaged());
        }
        let known = *self.inodes.entry(offset).or_insert_with(|| (version >= 3).then(|| be::u64(&inode, 112)));
        if known.is_some_and(|known| known != u64::MAX && known > sequence) {
            return Ok(());
        }
        // Versions before count how often an inode was written instead.
        let (writes, there) = (order.u16(logged, 30), be::u16(&inode, 30));
        if version < 3 && writes < there && !(there == u16::MAX && writes < u16::MAX / 2) {
            return Ok(());
        }
        // Who the next unlinked inode is stands in the inode alone, and does not matter here.
        let next_unlinked = part(&inode, 96, 4).to_vec();
        inode.iter_mut().zip(swapped(item, version)).for_each(|(to, from)| *to = from);
        inode.iter_mut().skip(96).zip(next_unlinked).for_each(|(to, from)| *to = from);
        let forks = if version >= 3 { 176 } else { 100 };
        let attributes_at = forks + usize::from(part(&inode, 82, 1).first().copied().unwrap_or(0)) * 8;
        let data_end = if attributes_at == forks { length } else { attributes_at.min(length) };
        if fields & field::DEVICE != 0 {
            let device = order.u32(format, number_at + 8).to_be_bytes();
            inode.iter_mut().skip(forks).zip(device).for_each(|(to, from)| *to = from);
        }
        let mut region = 2;
        for (begin, end, plain, tree) in [
            (forks, data_end, field::DATA | field::EXTENTS, field::TREE),
            (attributes_at, length, field::ATTRIBUTES | field::ATTRIBUTE_EXTENTS, field::ATTRIBUTE_TREE),
        ] {
            if fields & (plain | tree) == 0 {
                continue;
            }
            let room = inode.get_mut(begin..end).ok_or_else(damaged)?;
            let bytes = item.region(region);
            region += 1;
            if fields & tree != 0 {
                self.root(bytes, room)?;
            } else {
                // Regions are filled up to a multiple of four.
                room.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            }
        }
        self.disk.write(&"the log", offset, &inode)
    }

    /// The root of a tree of extents is logged as it is in memory, as a block: with the block's header, and the pointers
    /// behind as many keys as there is room for.
    fn root(&self, block: &[u8], room: &mut [u8]) -> Result<(), FsError> {
        let header = if self.fs.sb.version >= 5 { 72 } else { 24 };
        let count = usize::from(be::u16(block, 6));
        let (there, here) = (block.len().saturating_sub(header) / 16, room.len().saturating_sub(4) / 16);
        if count > there || count > here {
            return Err(damaged());
        }
        room.fill(0);
        let mut put = |at: usize, bytes: &[u8]| {
            room.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0, part(block, 4, 4));
        put(4, part(block, header, 8 * count));
        put(4 + 8 * here, part(block, header + 8 * there, 8 * count));
        Ok(())
    }

    /// Blocks of inodes that nobody uses yet; their numbers are big-endian in the log, too.
    fn new_inodes(&mut self, item: &Item) -> Result<(), FsError> {
        let bytes = item.region(0);
        let (group, block, count) = (be::u32(bytes, 4), be::u32(bytes, 8), be::u32(bytes, 12));
        let blocks = be::u32(bytes, 20);
        let sb = &self.fs.sb;
        let first = sb.inode_in_group(group, block).ok_or_else(damaged)?;
        if u64::from(be::u32(bytes, 16)) != sb.inode_size || u64::from(count) * sb.inode_size > 64 << 10 {
            return Err(damaged());
        }
        let begin = sb.inode_offset(first).ok_or_else(damaged)?;
        // None of it is written when one of its buffers was cancelled: the inodes were freed again.
        let area = begin / SECTOR..(begin + u64::from(blocks) * sb.block_size()) / SECTOR;
        if self.cancelled.iter().any(|((place, _), count)| *count > 0 && area.contains(place)) {
            return Ok(());
        }
        let generation = part(bytes, 24, 4).to_vec();
        for number in first..first + u64::from(count) {
            let offset = sb.inode_offset(number).ok_or_else(damaged)?;
            let mut inode = vec![0; size(sb.inode_size)];
            let mut put = |at: usize, bytes: &[u8]| {
                inode.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
            };
            put(0, b"IN");
            put(4, &[if sb.version >= 5 { 3 } else { 2 }]);
            put(92, &generation);
            put(96, &[0xff; 4]);
            if sb.version >= 5 {
                put(152, &number.to_be_bytes());
            }
            self.disk.write(&"the log", offset, &inode)?;
            self.inodes.insert(offset, None);
        }
        Ok(())
    }
}

fn damaged() -> FsError {
    FsError::damaged(&"the log", "a change in it makes no sense")
}

/// A logged buffer: where it lies, and a bit for each piece of it that was logged.
struct Buffer {
    flags: u16,
    sectors: u16,
    place: u64,
    map: Vec<u32>,
}

impl Buffer {
    fn decode(item: &Item) -> Buffer {
        let (order, bytes) = (item.order, item.region(0));
        let words = size(order.u32(bytes, 16).into());
        let map = part(bytes, 20, words.saturating_mul(4)).chunks_exact(4).map(|word| order.u32(word, 0)).collect();
        Buffer { flags: order.u16(bytes, 4), sectors: order.u16(bytes, 6), place: order.u64(bytes, 8), map }
    }

    fn is_set(&self, bit: usize) -> bool {
        self.map.get(bit / 32).is_some_and(|word| word >> (bit % 32) & 1 != 0)
    }
}

/// The record that changed a block last, where the block tells.
fn changed_by(block: &[u8]) -> Option<u64> {
    let at = match part(block, 0, 4) {
        b"AB3B" | b"AB3C" | b"RMB3" | b"R3FC" | b"FIB3" | b"IAB3" => 24,
        b"BMA3" => 32,
        b"XDB3" | b"XDD3" | b"XDF3" => 16,
        b"XSLM" => 48,
        b"XFSB" => 240,
        _ => match be::u16(block, 8) {
            0x3df1 | 0x3dff | 0x3bee | 0x3ebe => 24,
            _ => return None,
        },
    };
    Some(be::u64(block, at)).filter(|sequence| *sequence != 0 && *sequence != u64::MAX)
}

/// An inode's fields in the order of the disk.
fn swapped(item: &Item, version: u8) -> Vec<u8> {
    /// Widths of the fields, of which single bytes stay; they fill all up to the next unlinked inode.
    const FIELDS: [(usize, usize); 22] = [
        (0, 2),
        (2, 2),
        (6, 2),
        (8, 4),
        (12, 4),
        (16, 4),
        (20, 2),
        (22, 2),
        (24, 8),
        (32, 8),
        (40, 8),
        (48, 8),
        (56, 8),
        (64, 8),
        (72, 4),
        (76, 4),
        (80, 2),
        (84, 4),
        (88, 2),
        (90, 2),
        (92, 4),
        (96, 0),
    ];
    const MORE: [(usize, usize); 6] = [(104, 8), (112, 8), (120, 8), (128, 4), (144, 8), (152, 8)];
    let logged = item.region(1);
    let mut bytes = part(logged, 0, if version >= 3 { 176 } else { 96 }).to_vec();
    if item.order == super::record::Order::Big {
        return bytes;
    }
    let big_times = version >= 3 && item.order.u64(logged, 120) & BIG_TIME != 0;
    let more: &[(usize, usize)] = if version >= 3 { &MORE } else { &[] };
    for (at, width) in FIELDS.iter().chain(more).copied() {
        let is_time = matches!(at, 32 | 40 | 48 | 144);
        // Times were seconds and nanoseconds; before version 3, a count of writes lies in the last bytes of a field.
        let fields = match (at, width) {
            _ if is_time && !big_times => vec![(at, 4), (at + 4, 4)],
            (24, 8) if version < 3 => vec![(30, 2)],
            field => vec![field],
        };
        for (at, width) in fields {
            bytes.get_mut(at..at + width).unwrap_or_default().reverse();
        }
    }
    bytes
}
