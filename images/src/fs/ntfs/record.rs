//! The boot sector, and records of the master file table with their update sequence undone.

use super::attribute::Attribute;
use crate::DiskImage;
use crate::bytes::{le, part, size, u8};
use crate::fs::{FsError, NodeId, read, read_vec};

/// Where everything lies.
pub(super) struct Boot {
    pub cluster: u64,
    pub record_size: u64,
    pub table_offset: u64,
}

impl Boot {
    pub(super) fn read(disk: &dyn DiskImage) -> Result<Boot, FsError> {
        let mut head = [0; 512];
        read(disk, &"the boot sector", 0, &mut head)?;
        let bad = || FsError::damaged(&"the boot sector", "it makes no sense");
        if part(&head, 3, 8) != b"NTFS    " {
            return Err(bad());
        }
        let sector = u64::from(le::u16(&head, 11));
        let sectors = match u8(&head, 13) {
            exponent @ 0xf4..=0xff => 1 << (256 - u64::from(exponent)),
            sectors => sectors.into(),
        };
        let cluster = sector * sectors;
        // A record is so many clusters, or, as a negative power of two, bytes.
        let record_size = match u8(&head, 64) {
            exponent @ 0xf0..=0xff => 1 << (256 - u64::from(exponent)),
            clusters => cluster * u64::from(clusters),
        };
        let table_offset = le::u64(&head, 48).checked_mul(cluster).ok_or_else(bad)?;
        let sane = matches!(sector, 256 | 512 | 1024 | 2048 | 4096)
            && cluster.is_power_of_two()
            && (512..=2 << 20).contains(&cluster)
            && record_size.is_power_of_two()
            && (512..=64 << 10).contains(&record_size)
            && table_offset < disk.size();
        if sane { Ok(Boot { cluster, record_size, table_offset }) } else { Err(bad()) }
    }
}

/// A record as it was before it was written: the last two bytes of each 512 are put back.
pub(super) struct Record {
    id: NodeId,
    bytes: Vec<u8>,
}

impl Record {
    pub(super) fn read(table: &dyn DiskImage, boot: &Boot, id: NodeId, offset: u64) -> Result<Record, FsError> {
        let mut bytes = read_vec(table, &id, offset, size(boot.record_size))?;
        if part(&bytes, 0, 4) != b"FILE" {
            return Err(FsError::damaged(&id, "its record has no signature"));
        }
        undo(&id, &mut bytes)?;
        Ok(Record { id, bytes })
    }

    pub(super) fn sequence(&self) -> u16 {
        le::u16(&self.bytes, 16)
    }

    pub(super) fn in_use(&self) -> bool {
        le::u16(&self.bytes, 22) & 1 != 0
    }

    pub(super) fn is_directory(&self) -> bool {
        le::u16(&self.bytes, 22) & 2 != 0
    }

    /// The reference of the record that this one adds to.
    pub(super) fn base(&self) -> u64 {
        le::u64(&self.bytes, 32)
    }

    pub(super) fn attributes(&self) -> Result<Vec<Attribute>, FsError> {
        let mut found = Vec::new();
        let mut at = usize::from(le::u16(&self.bytes, 20));
        while at + 8 <= self.bytes.len() && le::u32(&self.bytes, at) != u32::MAX {
            let length = size(le::u32(&self.bytes, at + 4).into());
            let bytes = part(&self.bytes, at, length);
            if length < 24 || !length.is_multiple_of(8) || bytes.len() != length {
                return Err(FsError::damaged(&self.id, "an attribute makes no sense"));
            }
            found.push(Attribute::decode(self.id, bytes)?);
            at += length;
        }
        Ok(found)
    }
}

/// Puts the last two bytes of each 512 back, which were replaced by a number that tells torn writes.
pub(super) fn undo(id: &NodeId, bytes: &mut [u8]) -> Result<(), FsError> {
    let (at, count) = (usize::from(le::u16(bytes, 4)), usize::from(le::u16(bytes, 6)));
    if count == 0 || at + 2 * count > bytes.len() || (count - 1) * 512 > bytes.len() {
        return Err(FsError::damaged(id, "its update sequence makes no sense"));
    }
    let sequence = part(bytes, at, 2 * count).to_vec();
    for (index, saved) in sequence.chunks_exact(2).enumerate().skip(1) {
        let end = index * 512;
        let last = bytes.get_mut(end - 2..end).unwrap_or_default();
        if *last != *part(&sequence, 0, 2) {
            return Err(FsError::damaged(id, "it was not written as a whole"));
        }
        last.copy_from_slice(saved);
    }
    Ok(())
}
