//! The superblock, checked.

use crate::DiskImage;
use crate::bytes::{le, part, size};
use crate::fs::{FsError, read_vec};

/// Features that a reader has to know: mixed backrefs, default subvolume, mixed groups, LZO, zstd, big metadata,
/// extended references, RAID 5 and 6, skinny metadata, no holes, metadata UUID, RAID 1 on more devices, extent tree v2
/// not, and simple quotas.
const KNOWN: u64 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800 | 0x1_0000;

/// What the superblock says.
pub(super) struct Superblock {
    pub root: u64,
    pub chunk_root: u64,
    /// The root of the tree of logs, or 0.
    pub log_root: u64,
    pub devices: u64,
    pub device: u64,
    pub sector: u32,
    pub node_size: u32,
    pub system_chunks: Vec<u8>,
}

impl Superblock {
    pub(super) fn read(disk: &dyn DiskImage) -> Result<Superblock, FsError> {
        let object = "the superblock";
        let raw = read_vec(disk, &object, 64 << 10, 4096)?;
        if part(&raw, 64, 8) != b"_BHRfS_M" {
            return Err(FsError::damaged(&object, "it has no signature"));
        }
        let unknown = le::u64(&raw, 188) & !KNOWN;
        if unknown != 0 {
            return Err(FsError::Unsupported {
                object: format!("a Btrfs with the features {unknown:#x}"),
                reason: "they are not known here",
            });
        }
        let (sector, node_size) = (le::u32(&raw, 144), le::u32(&raw, 148));
        let chunks = size(le::u32(&raw, 160).into());
        let sane = |number: u32| number.is_power_of_two() && (4096..=64 << 10).contains(&number);
        if !sane(sector) || !sane(node_size) || chunks > 2048 {
            return Err(FsError::damaged(&object, "its numbers make no sense"));
        }
        Ok(Superblock {
            root: le::u64(&raw, 80),
            chunk_root: le::u64(&raw, 88),
            log_root: le::u64(&raw, 96),
            devices: le::u64(&raw, 136),
            device: le::u64(&raw, 201),
            sector,
            node_size,
            system_chunks: part(&raw, 811, chunks).to_vec(),
        })
    }
}
