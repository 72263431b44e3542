//! A disk of which some sectors are others: what replaying a log changes, in memory.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use crate::bytes::{part, size};
use crate::fs::{FsError, read};
use crate::{DiskImage, SharedDisk};

const SECTOR: u64 = 512;
/// Sectors that are changed at most: 256 MiB of them.
const SECTORS_MAX: usize = 512 << 10;

/// A disk with changed sectors.
pub(crate) struct Patched {
    disk: SharedDisk,
    sectors: BTreeMap<u64, Box<[u8; 512]>>,
}

impl Patched {
    pub(crate) fn new(disk: SharedDisk) -> Patched {
        Patched { disk, sectors: BTreeMap::new() }
    }

    /// Replaces the bytes at `offset`.
    pub(crate) fn write(&mut self, object: &dyn std::fmt::Display, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.disk.size()) {
            return Err(FsError::damaged(object, "it leads out of its volume"));
        }
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let within = size(at % SECTOR);
            let (now, later) = rest.split_at((512 - within).min(rest.len()));
            if !self.sectors.contains_key(&(at / SECTOR)) {
                if self.sectors.len() >= SECTORS_MAX {
                    return Err(FsError::unsupported(object, "it changes more than is kept in memory"));
                }
                let mut sector = Box::new([0; 512]);
                let whole = self.disk.size() - at / SECTOR * SECTOR;
                let there = sector.get_mut(..size(whole.min(SECTOR))).unwrap_or_default();
                read(self.disk.as_ref(), object, at / SECTOR * SECTOR, there)?;
                self.sectors.insert(at / SECTOR, sector);
            }
            if let Some(sector) = self.sectors.get_mut(&(at / SECTOR)) {
                sector.iter_mut().skip(within).zip(now).for_each(|(to, from)| *to = *from);
            }
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }
}

impl DiskImage for Patched {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, buf)?;
        let end = offset.saturating_add(buf.len() as u64);
        for (number, sector) in self.sectors.range(offset / SECTOR..end.div_ceil(SECTOR)) {
            let start = number * SECTOR;
            let (from, to) = (start.max(offset), (start + SECTOR).min(end));
            let target = buf.get_mut(size(from - offset)..size(to - offset)).unwrap_or_default();
            target.copy_from_slice(part(sector.as_slice(), size(from - start), target.len()));
        }
        Ok(())
    }

    /// A changed sector is data, whatever the disk has there.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let below = self.disk.next_data(offset)?;
        let changed = self.sectors.range(offset / SECTOR..).next();
        let changed = changed
            .map(|(number, _)| (number * SECTOR).max(offset)..((number + 1) * SECTOR).min(self.size()))
            .filter(|range| range.start < range.end);
        Ok(match (below, changed) {
            (Some(below), Some(changed)) if changed.start < below.start => Some(changed),
            (below, changed) => below.or(changed),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fs::test_support::Memory;

    #[test]
    fn changes_lie_over_the_disk() {
        let mut model = vec![7; 2100];
        let mut disk = Patched::new(Arc::new(Memory(model.clone())));
        for (at, length, byte) in [(510, 4, 1), (0, 1, 2), (2050, 50, 3), (500, 600, 4)] {
            disk.write(&"it", at as u64, &vec![byte; length]).unwrap();
            model[at..at + length].fill(byte);
        }
        assert!(disk.write(&"it", 2099, &[1, 2]).is_err());
        for (offset, length) in [(0, 2100), (511, 2), (1090, 30), (2040, 60), (5, 0)] {
            let mut read = vec![0; length];
            disk.read_at(offset as u64, &mut read).unwrap();
            assert_eq!(read, model[offset..offset + length]);
        }
        assert!(disk.read_at(2100, &mut [0]).is_err());
    }
}
