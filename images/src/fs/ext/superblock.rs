//! The superblock, checked: what is in here makes sense.

use crate::DiskImage;
use crate::bytes::{le, u8};
use crate::fs::{FsError, read};

/// Feature bits that a reader has to know.
mod incompat {
    pub const FILETYPE: u32 = 0x2;
    pub const RECOVER: u32 = 0x4;
    pub const META_BG: u32 = 0x10;
    /// filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data, encrypt,
    /// casefold.
    pub const KNOWN: u32 = FILETYPE
        | RECOVER
        | META_BG
        | 0x40
        | 0x80
        | 0x100
        | 0x200
        | 0x400
        | 0x2000
        | 0x4000
        | 0x8000
        | 0x1_0000
        | 0x2_0000;
    pub const BIT64: u32 = 0x80;
}
/// Only some groups have a copy of the superblock: groups 0, 1 and powers of 3, 5 and 7.
const SPARSE_SUPER: u32 = 0x1;
/// Only the two groups that the superblock names have one.
const SPARSE_SUPER2: u32 = 0x200;

/// What the superblock says.
pub(super) struct Superblock {
    pub inodes: u32,
    pub blocks: u64,
    pub block_bits: u32,
    pub inodes_per_group: u32,
    pub inode_size: u64,
    pub descriptor_size: u64,
    pub journal: u32,
    first_block: u64,
    blocks_per_group: u64,
    compat: u32,
    incompat: u32,
    ro_compat: u32,
    first_meta_group: u32,
    backups: [u32; 2],
}

impl Superblock {
    pub(super) fn read(disk: &dyn DiskImage) -> Result<Superblock, FsError> {
        let object = "the superblock";
        let mut raw = [0; 1024];
        read(disk, &object, 1024, &mut raw)?;
        let damaged = |reason| Err(FsError::damaged(&object, reason));
        if le::u16(&raw, 0x38) != 0xef53 {
            return damaged("it has no signature");
        }
        let incompat = le::u32(&raw, 0x60);
        let unknown = incompat & !incompat::KNOWN;
        if unknown != 0 {
            return Err(FsError::Unsupported {
                object: format!("a file system with the features {unknown:#x}"),
                reason: "they are not known here",
            });
        }
        let block_bits = le::u32(&raw, 0x18).saturating_add(10);
        if block_bits > 16 {
            return damaged("its block size makes no sense");
        }
        let wide = incompat & incompat::BIT64 != 0;
        let high = if wide { le::u32(&raw, 0x150) } else { 0 };
        let dynamic = le::u32(&raw, 0x4c) > 0;
        let sb = Superblock {
            inodes: le::u32(&raw, 0),
            blocks: u64::from(le::u32(&raw, 4)) | u64::from(high) << 32,
            block_bits,
            inodes_per_group: le::u32(&raw, 0x28),
            inode_size: if dynamic { le::u16(&raw, 0x58).into() } else { 128 },
            descriptor_size: if wide { le::u16(&raw, 0xfe).into() } else { 32 },
            journal: if le::u32(&raw, 0xe4) == 0 { le::u32(&raw, 0xe0) } else { 0 },
            first_block: le::u32(&raw, 0x14).into(),
            blocks_per_group: le::u32(&raw, 0x20).into(),
            compat: le::u32(&raw, 0x5c),
            incompat,
            ro_compat: le::u32(&raw, 0x64),
            first_meta_group: le::u32(&raw, 0x104),
            backups: [le::u32(&raw, 0x24c), le::u32(&raw, 0x250)],
        };
        let block_size = sb.block_size();
        if sb.inodes_per_group == 0 || sb.blocks_per_group == 0 || u64::from(sb.inodes_per_group) > block_size * 8 {
            return damaged("its groups make no sense");
        }
        if !(128..=block_size).contains(&sb.inode_size) || !sb.inode_size.is_power_of_two() {
            return damaged("its inode size makes no sense");
        }
        if !(32..=block_size).contains(&sb.descriptor_size) || !sb.descriptor_size.is_power_of_two() {
            return damaged("its group descriptors make no sense");
        }
        if sb.blocks >= u64::MAX >> block_bits || u8(&raw, 0x38) == 0 {
            return damaged("its size makes no sense");
        }
        Ok(sb)
    }

    pub(super) fn block_size(&self) -> u64 {
        1 << self.block_bits
    }

    pub(super) fn needs_recovery(&self) -> bool {
        self.incompat & incompat::RECOVER != 0
    }

    /// Whether directory entries tell what they refer to; if not, the length of a name has two bytes.
    pub(super) fn has_file_types(&self) -> bool {
        self.incompat & incompat::FILETYPE != 0
    }

    /// Where a group's descriptor lies.
    pub(super) fn descriptor_offset(&self, group: u32) -> u64 {
        let per_block = self.block_size() / self.descriptor_size;
        let (row, within) = (u64::from(group) / per_block, u64::from(group) % per_block);
        let block = if self.incompat & incompat::META_BG == 0 || row < u64::from(self.first_meta_group) {
            self.first_block + 1 + row
        } else {
            // Each block of descriptors is in the first of the groups that it describes.
            let first = row * per_block;
            self.first_block + first * self.blocks_per_group + u64::from(self.has_backup(first))
        };
        // Both fit: block numbers are below 2^48 by their fields, block sizes below 2^17.
        block.saturating_mul(self.block_size()).saturating_add(within * self.descriptor_size)
    }

    fn has_backup(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & SPARSE_SUPER2 != 0 {
            return self.backups.iter().any(|backup| u64::from(*backup) == group);
        }
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group == 1 || self.ro_compat & SPARSE_SUPER == 0 || [3, 5, 7].into_iter().any(power_of)
    }
}
