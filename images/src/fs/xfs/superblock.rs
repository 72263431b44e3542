//! The superblock, checked.

use crate::DiskImage;
use crate::bytes::{be, part, u8};
use crate::fs::{FsError, read};

/// Features of version 5 that a reader has to know: ftype, sparse inodes, meta_uuid, bigtime, needs-repair, nrext64,
/// exchange-range, parent pointers.
const KNOWN: u32 = 0xff;
const FTYPE: u32 = 0x1;
/// The same in version 4's second word of features.
const FTYPE_4: u32 = 0x200;
const MORE_FEATURES: u16 = 0x8000;

/// What the superblock says.
pub(super) struct Superblock {
    pub version: u16,
    pub root: u64,
    pub inode_size: u64,
    pub block_bits: u32,
    pub dir_block_bits: u32,
    pub has_types: bool,
    pub log_start: u64,
    pub log_blocks: u64,
    blocks: u64,
    groups: u64,
    group_blocks: u64,
    /// The width of a block's number within its group, and of an inode's within its block.
    group_bits: u32,
    inode_bits: u32,
}

impl Superblock {
    pub(super) fn read(disk: &dyn DiskImage) -> Result<Superblock, FsError> {
        let object = "the superblock";
        let mut raw = [0; 512];
        read(disk, &object, 0, &mut raw)?;
        let damaged = |reason| Err(FsError::damaged(&object, reason));
        if part(&raw, 0, 4) != b"XFSB" {
            return damaged("it has no signature");
        }
        let version = be::u16(&raw, 100) & 0xf;
        let unsupported = |what: &str| {
            Err(FsError::Unsupported { object: format!("an XFS with {what}"), reason: "it is not known here" })
        };
        if !(4..=5).contains(&version) {
            return unsupported("this version");
        }
        let incompat = if version == 5 { be::u32(&raw, 216) } else { 0 };
        if incompat & !KNOWN != 0 {
            return unsupported(&format!("the features {:#x}", incompat & !KNOWN));
        }
        let more = be::u16(&raw, 100) & MORE_FEATURES != 0;
        let block_bits = u32::from(u8(&raw, 120));
        let sb = Superblock {
            version,
            root: be::u64(&raw, 56),
            inode_size: be::u16(&raw, 104).into(),
            block_bits,
            dir_block_bits: block_bits + u32::from(u8(&raw, 192)),
            has_types: incompat & FTYPE != 0 || (version == 4 && more && be::u32(&raw, 200) & FTYPE_4 != 0),
            log_start: be::u64(&raw, 48),
            log_blocks: be::u32(&raw, 96).into(),
            blocks: be::u64(&raw, 8),
            groups: be::u32(&raw, 88).into(),
            group_blocks: be::u32(&raw, 84).into(),
            group_bits: u8(&raw, 124).into(),
            inode_bits: u8(&raw, 123).into(),
        };
        let sane = (9..=16).contains(&block_bits)
            && (block_bits..=16).contains(&sb.dir_block_bits)
            && sb.inode_size.is_power_of_two()
            && (256..=2048).contains(&sb.inode_size)
            && sb.inode_size << sb.inode_bits.min(9) == 1 << block_bits
            && (1..=31).contains(&sb.group_bits)
            && sb.group_blocks > 0
            && sb.group_blocks <= 1 << sb.group_bits
            && sb.groups > 0
            && sb.blocks < 1 << 47;
        if sane { Ok(sb) } else { damaged("its numbers make no sense") }
    }

    pub(super) fn block_size(&self) -> u64 {
        1 << self.block_bits
    }

    /// Where a block lies, of which `count` follow each other.
    pub(super) fn block_offset(&self, block: u64, count: u64) -> Option<u64> {
        let (group, within) = (block >> self.group_bits, block & ((1 << self.group_bits) - 1));
        let last = within.checked_add(count.checked_sub(1)?)?;
        if group >= self.groups || last >= self.group_blocks {
            return None;
        }
        let block = group * self.group_blocks + within;
        (block < self.blocks).then_some(block << self.block_bits)
    }

    /// The number of the first inode in a block of a group.
    pub(super) fn inode_in_group(&self, group: u32, block: u32) -> Option<u64> {
        let inside = u64::from(group) < self.groups && u64::from(block) < self.group_blocks;
        inside.then_some((u64::from(group) << self.group_bits | u64::from(block)) << self.inode_bits)
    }

    /// Where an inode lies.
    pub(super) fn inode_offset(&self, number: u64) -> Option<u64> {
        let block = self.block_offset(number >> self.inode_bits, 1)?;
        Some(block + (number & ((1 << self.inode_bits) - 1)) * self.inode_size)
    }
}
