//! Extents of a file that its log has, over those that it had.

use std::collections::BTreeMap;

use super::super::extents::INLINE;
use super::super::tree::Key;
use super::super::{item, stored_as};
use super::{Replay, set};
use crate::bytes::le;
use crate::fs::FsError;

impl Replay<'_> {
    /// Puts the logged extents over those of a file, and takes away what begins behind `end`.
    pub(super) fn extents(&mut self, number: u64, logged: &[(u64, &[u8])], end: Option<u64>) -> Result<(), FsError> {
        let mut before = BTreeMap::new();
        let mut cost = self.cost;
        let (from, to) = (Key::new(number, item::EXTENT, 0), Key::new(number, item::EXTENT, u64::MAX));
        self.items(from, to, &mut |key, data| {
            cost += data.len();
            before.insert(key.offset, data.to_vec());
            cost <= super::BYTES_MAX
        })?;
        if cost > super::BYTES_MAX {
            return Err(super::too_large());
        }
        let mut after = before.clone();
        let sector = u64::from(self.fs.sector);
        if let Some(end) = end {
            cut(&mut after, sector, end / sector * sector, u64::MAX);
        }
        for (start, extent) in logged {
            cut(&mut after, sector, *start, end_of(*start, extent, sector));
            after.insert(*start, extent.to_vec());
        }
        for start in before.keys().filter(|start| !after.contains_key(start)) {
            self.remove(Key::new(number, item::EXTENT, *start))?;
        }
        for (start, extent) in after {
            if before.get(&start) != Some(&extent) {
                self.put(Key::new(number, item::EXTENT, start), extent)?;
            }
        }
        Ok(())
    }
}

fn end_of(start: u64, extent: &[u8], sector: u64) -> u64 {
    if stored_as(extent) == INLINE {
        let end = start.saturating_add(le::u64(extent, 8));
        return end.checked_next_multiple_of(sector).unwrap_or(u64::MAX);
    }
    start.saturating_add(le::u64(extent, 45))
}

/// Takes a range away. Of an extent that reaches over its bounds the rest stays.
fn cut(extents: &mut BTreeMap<u64, Vec<u8>>, sector: u64, from: u64, to: u64) {
    // The one before may reach into it; extents do not overlap, so no earlier one does.
    let first = extents.range(..from).next_back().map_or(from, |(start, _)| *start);
    let touched: Vec<u64> = extents.range(first..to).map(|(start, _)| *start).collect();
    for start in touched {
        let end = extents.get(&start).map_or(0, |extent| end_of(start, extent, sector));
        if end <= from {
            continue;
        }
        let Some(extent) = extents.remove(&start) else { continue };
        if stored_as(&extent) == INLINE {
            continue;
        }
        if start < from {
            let mut head = extent.clone();
            set(&mut head, 45, &(from - start).to_le_bytes());
            extents.insert(start, head);
        }
        if end > to {
            let mut tail = extent;
            let skip = le::u64(&tail, 37).saturating_add(to - start);
            set(&mut tail, 37, &skip.to_le_bytes());
            set(&mut tail, 45, &(end - to).to_le_bytes());
            extents.insert(to, tail);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(skip: u64, length: u64) -> Vec<u8> {
        let mut extent = vec![0; 53];
        set(&mut extent, 20, &[1]);
        set(&mut extent, 37, &skip.to_le_bytes());
        set(&mut extent, 45, &length.to_le_bytes());
        extent
    }

    #[test]
    fn what_reaches_over_a_cut_stays() {
        let mut extents = BTreeMap::from([(0, extent(0, 100)), (100, extent(7, 100)), (300, extent(0, 50))]);
        cut(&mut extents, 4096, 50, 120);
        assert_eq!(extents, BTreeMap::from([(0, extent(0, 50)), (120, extent(27, 80)), (300, extent(0, 50))]));
        cut(&mut extents, 4096, 130, 140);
        cut(&mut extents, 4096, 300, u64::MAX);
        assert_eq!(extents, BTreeMap::from([(0, extent(0, 50)), (120, extent(27, 10)), (140, extent(47, 60))]));
    }
}
