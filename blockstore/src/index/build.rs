//! [`RunBuilder`]: collects entries in memory and makes the bytes of a run of them.

use std::collections::HashMap;

use crate::format::pack::{Frame, Header};
use crate::format::run::{Entry, MAX_PACKS, PackRow, encode};
use crate::id::{PackId, RepositoryId};

/// Writers end a run at this many entries.
pub(crate) const TARGET_ENTRIES: usize = if cfg!(test) { 1 << 11 } else { 1 << 20 };

/// Entries of a run to be, in any order.
#[derive(Debug, Default)]
pub(crate) struct RunBuilder {
    rows: Vec<PackRow>,
    row_of: HashMap<PackId, u32>,
    entries: Vec<Entry>,
}

impl RunBuilder {
    /// Number of entries so far.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the run is as large as runs get.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= TARGET_ENTRIES || self.rows.len() >= MAX_PACKS as usize
    }

    /// Adds entries of a pack. Their `row` is ignored.
    pub fn add_pack(&mut self, pack: PackRow, entries: &[Entry]) {
        let row = self.row(pack);
        self.entries.extend(entries.iter().map(|entry| Entry { row, ..*entry }));
    }

    /// Adds one entry of a pack.
    pub fn add(&mut self, pack: PackRow, entry: Entry) {
        let row = self.row(pack);
        self.entries.push(Entry { row, ..entry });
    }

    /// The ids added so far.
    pub fn ids(&self) -> impl Iterator<Item = crate::id::ChunkId> {
        self.entries.iter().map(|entry| entry.id)
    }

    fn row(&mut self, pack: PackRow) -> u32 {
        *self.row_of.entry(pack.pack).or_insert_with(|| {
            let row = u32::try_from(self.rows.len()).unwrap_or(u32::MAX); // far above MAX_PACKS
            self.rows.push(pack);
            row
        })
    }

    /// The run's bytes. The same entries give the same bytes, whatever the order they were added in.
    pub fn finish(self, repository: RepositoryId) -> Vec<u8> {
        let RunBuilder { rows, mut entries, .. } = self;
        let mut order: Vec<(PackRow, usize)> = rows.into_iter().enumerate().map(|(old, row)| (row, old)).collect();
        order.sort_unstable_by_key(|(row, _)| row.pack);
        let mut new_row = vec![0; order.len()];
        for (new, (_, old)) in order.iter().enumerate() {
            if let Some(place) = new_row.get_mut(*old) {
                *place = u32::try_from(new).unwrap_or(u32::MAX);
            }
        }
        for entry in &mut entries {
            entry.row = new_row.get(entry.row as usize).copied().unwrap_or(u32::MAX);
        }
        entries.sort_unstable_by(|a, b| a.id.cmp(&b.id).then(a.row.cmp(&b.row)));
        entries.dedup_by(|a, b| a.id == b.id && a.row == b.row);
        let mut rows: Vec<PackRow> = order.into_iter().map(|(row, _)| PackRow { entries: 0, ..row }).collect();
        for entry in &entries {
            if let Some(row) = rows.get_mut(entry.row as usize) {
                row.entries += 1;
            }
        }
        encode(repository, &rows, &entries)
    }
}

/// What an index says of a whole pack.
pub(crate) fn describe_pack(pack: PackId, header: &Header, len: u32, frames: &[Frame]) -> (PackRow, Vec<Entry>) {
    let row = PackRow {
        pack,
        salt: header.salt,
        len,
        frames: u32::try_from(frames.len()).unwrap_or(u32::MAX), // decoded tables have at most 65,535
        entries: 0,
        kind: header.kind,
        encryption: header.encryption,
        gathered: header.gathered,
    };
    let entry = |(number, frame): (usize, &Frame)| Entry {
        id: frame.id,
        row: 0,
        offset: frame.offset,
        stored_len: frame.stored_len,
        frame: u16::try_from(number).unwrap_or(u16::MAX),
        flags: frame.flags,
        level: frame.level,
    };
    (row, frames.iter().enumerate().map(entry).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::format::Encryption;
    use crate::format::pack::PackKind;
    use crate::id::ChunkId;

    pub fn row_of(byte: u8) -> PackRow {
        PackRow {
            pack: PackId([byte; 32]),
            salt: [byte; 32],
            len: 1 << 20,
            frames: 700,
            entries: 0,
            kind: PackKind::Data,
            encryption: Encryption::None,
            gathered: false,
        }
    }

    pub fn entry_of(id: ChunkId) -> Entry {
        Entry { id, row: 0, offset: 80, stored_len: 100, frame: 0, flags: 0, level: 0 }
    }

    #[test]
    fn the_order_of_adding_does_not_matter_and_repeats_are_dropped() {
        let (a, b) = (entry_of(ChunkId([1; 32])), entry_of(ChunkId([2; 32])));
        let mut one = RunBuilder::default();
        one.add_pack(row_of(1), &[a, b]);
        one.add_pack(row_of(2), &[a]);
        let mut two = RunBuilder::default();
        two.add(row_of(2), a);
        two.add(row_of(1), b);
        two.add(row_of(1), a);
        two.add(row_of(1), a);
        assert_eq!(one.finish(RepositoryId([0; 16])), two.finish(RepositoryId([0; 16])));
    }
}
