//! The boot sector, checked, and the table of clusters.

use std::io;

use crate::DiskImage;
use crate::bytes::{label, le, part, size, u8};

/// Where everything lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Width of the table's entries: 12, 16 or 32.
    pub bits: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Where cluster 2 lies.
    pub data: u64,
    /// Bytes of the root directory where it has a place of its own.
    pub fixed_root: Option<u64>,
    /// The root directory's first cluster where it has none.
    pub root_cluster: u32,
    table: u64,
    clusters: u32,
}

impl Geometry {
    /// From the first sector, if it is one of FAT.
    pub(crate) fn decode(head: &[u8]) -> Option<Geometry> {
        let sector = u64::from(le::u16(head, 11));
        let per_cluster = u64::from(u8(head, 13));
        let (reserved, tables) = (u64::from(le::u16(head, 14)), u64::from(u8(head, 16)));
        let jump = matches!(u8(head, 0), 0xeb | 0xe9);
        let signed = le::u16(head, 510) == 0xaa55 || part(head, 54, 3) == b"FAT" || part(head, 82, 3) == b"FAT";
        if !jump || !signed || !matches!(sector, 512 | 1024 | 2048 | 4096) || !per_cluster.is_power_of_two() {
            return None;
        }
        if reserved == 0 || !(1..=4).contains(&tables) || u8(head, 21) < 0xf0 {
            return None;
        }
        let either = |short: u16, long: u32| if short == 0 { u64::from(long) } else { short.into() };
        let table_length = either(le::u16(head, 22), le::u32(head, 36));
        let total = either(le::u16(head, 19), le::u32(head, 32));
        let root = (u64::from(le::u16(head, 17)) * 32).div_ceil(sector);
        let before = reserved + tables * table_length + root;
        let clusters = u32::try_from(total.checked_sub(before)? / per_cluster).ok()?;
        let bits = match clusters {
            _ if le::u16(head, 22) == 0 && root == 0 => 32,
            0 => return None,
            1..4085 => 12,
            4085..65_525 => 16,
            _ => return None,
        };
        // Every cluster has its entry in the table.
        let entries = table_length * sector * 8 / u64::from(bits);
        if table_length == 0 || entries < 2 {
            return None;
        }
        let clusters = clusters.min(u32::try_from(entries - 2).unwrap_or(u32::MAX)).min(0x0fff_fff0);
        let active =
            if bits == 32 && u8(head, 40) & 0x80 != 0 { u64::from(u8(head, 40) & 15).min(tables - 1) } else { 0 };
        Some(Geometry {
            bits,
            cluster_size: per_cluster * sector,
            data: before * sector,
            fixed_root: (bits != 32).then_some(root * sector),
            root_cluster: if bits == 32 { le::u32(head, 44) & 0x0fff_ffff } else { 0 },
            table: (reserved + active * table_length) * sector,
            clusters,
        })
    }

    /// Where the root directory begins.
    pub(crate) fn root_offset(&self) -> u64 {
        match self.fixed_root {
            Some(length) => self.data - length,
            None => self.cluster_offset(self.root_cluster).unwrap_or(self.data),
        }
    }

    /// Where a cluster lies, unless it is none: the end of a chain, a bad or a free one.
    pub(crate) fn cluster_offset(&self, cluster: u32) -> Option<u64> {
        let index = cluster.checked_sub(2).filter(|index| *index < self.clusters)?;
        Some(self.data + u64::from(index) * self.cluster_size)
    }

    /// What the table says of a cluster.
    pub(crate) fn next(&self, disk: &dyn DiskImage, cluster: u32) -> io::Result<u32> {
        let at = u64::from(cluster);
        let mut bytes = [0; 4];
        let (offset, length) = match self.bits {
            12 => (at + at / 2, 2),
            16 => (at * 2, 2),
            _ => (at * 4, 4),
        };
        disk.read_at(self.table + offset, bytes.get_mut(..length).unwrap_or_default())?;
        let value = le::u32(&bytes, 0);
        Ok(match self.bits {
            12 if cluster % 2 == 1 => value >> 4,
            12 => value & 0xfff,
            16 => value,
            _ => value & 0x0fff_ffff,
        })
    }

    /// The label in the root directory's first entries.
    pub(crate) fn label(&self, disk: &dyn DiskImage) -> Option<String> {
        let mut entries = vec![0; size(self.fixed_root.unwrap_or(self.cluster_size).min(4096))];
        disk.read_at(self.root_offset(), &mut entries).ok()?;
        let entry = entries
            .chunks_exact(32)
            .take_while(|entry| u8(entry, 0) != 0)
            .find(|entry| u8(entry, 0) != 0xe5 && u8(entry, 11) & 0x18 == 0x08 && u8(entry, 11) & 0x3f != 0x0f)?;
        label(part(entry, 0, 11))
    }
}
