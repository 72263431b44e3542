//! [`Run`]: one index run, searched in place.

use std::cmp::Ordering;
use std::io;
use std::ops::Range;

use bytes::Bytes;

use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::pack::{MAX_PACK_LEN, PackKind};
use crate::format::run::{Entry, Layout, PackRow, RawEntry};
use crate::id::{ChunkId, PackId, RepositoryId, RunId};
use crate::mapping::Mapping;
use crate::storage::{Object, Storage};

/// Where a frame is, according to a run. Only the frame itself proves it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Location {
    /// The pack that holds the frame.
    pub pack: PackRow,
    /// Where in it.
    pub entry: Entry,
}

/// An opened run.
#[derive(Debug)]
pub(crate) struct Run {
    pub id: RunId,
    /// Whether it was opened from storage; one that was only built is in memory alone.
    pub stored: bool,
    bytes: Mapping,
    layout: Layout,
    /// Whether one of its packs is gathered.
    pub gathered: bool,
    /// Least and greatest id, for skipping the run.
    span: Option<(ChunkId, ChunkId)>,
}

impl Run {
    /// Opens a stored run; checks all but its entries.
    pub fn open(storage: &dyn Storage, id: RunId, repository: RepositoryId) -> Result<Run, ReadError> {
        let object = Object::IndexRun(id);
        let bytes = storage.map(&object).map_err(|source| ReadError::io(&object, source))?;
        match Layout::decode(&bytes, repository) {
            // Of a later version if the name proves the bytes, else damaged where the version stands.
            Err(FormatError::UnknownVersion { .. } | FormatError::UnknownFeatures { .. })
                if blake3::hash(&bytes).as_bytes() != &id.0 =>
            {
                Err(ReadError::Damaged { object, source: FormatError::Name })
            }
            Err(source) => Err(ReadError::Damaged { object, source }),
            Ok(_) => match Run::of(id, bytes, repository) {
                Ok(run) => Ok(Run { stored: true, ..run }),
                Err(source) => Err(ReadError::Damaged { object, source }),
            },
        }
    }

    /// A run just built.
    pub fn built(bytes: Vec<u8>, repository: RepositoryId) -> Result<Run, FormatError> {
        let id = RunId(*blake3::hash(&bytes).as_bytes());
        Run::of(id, Mapping::Owned(Bytes::from(bytes)), repository)
    }

    fn of(id: RunId, bytes: Mapping, repository: RepositoryId) -> Result<Run, FormatError> {
        let layout = Layout::decode(&bytes, repository)?;
        let entries = layout.entries(&bytes);
        let span = entries.first().zip(entries.last()).map(|(first, last)| (ChunkId(first.id), ChunkId(last.id)));
        let gathered = layout.rows(&bytes).iter().any(|row| row.check().is_ok_and(|row| row.gathered));
        Ok(Run { id, stored: false, bytes, layout, gathered, span })
    }

    /// The run's bytes, for writing.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The least and the greatest id; none if there is no entry.
    pub fn span(&self) -> Option<(ChunkId, ChunkId)> {
        self.span
    }

    /// Number of entries.
    pub fn entry_count(&self) -> u64 {
        self.layout.entries
    }

    /// All entries, sorted by id.
    pub fn entries(&self) -> &[RawEntry] {
        self.layout.entries(&self.bytes)
    }

    /// The packs this run names.
    pub fn packs(&self) -> impl Iterator<Item = PackRow> {
        self.layout.rows(&self.bytes).iter().filter_map(|row| row.check().ok())
    }

    /// Whether the bytes hash to the name. Reads all of it.
    pub fn is_intact(&self) -> bool {
        blake3::hash(&self.bytes).as_bytes() == &self.id.0
    }

    /// Which entry is the first of an id.
    pub fn position(&self, id: &ChunkId) -> Option<usize> {
        let range = self.range(id);
        (!range.is_empty()).then_some(range.start)
    }

    /// Whether there is an entry for an id.
    #[cfg(test)]
    pub fn contains(&self, id: &ChunkId) -> bool {
        !self.range(id).is_empty()
    }

    /// Appends the locations of an id. Entries with impossible numbers are left out.
    pub fn locate(&self, id: &ChunkId, out: &mut Vec<Location>) {
        out.extend(self.locations(id));
    }

    /// The locations of an id.
    pub fn locations(&self, id: &ChunkId) -> impl Iterator<Item = Location> {
        let found = self.entries().get(self.range(id)).unwrap_or_default();
        found.iter().filter_map(|raw| self.location(raw))
    }

    /// The first location of an id.
    pub fn first(&self, id: &ChunkId) -> Option<Location> {
        self.locations(id).next()
    }

    /// What an entry of this run says.
    pub fn location(&self, raw: &RawEntry) -> Option<Location> {
        let entry = raw.get();
        let pack = self.layout.rows(&self.bytes).get(entry.row as usize)?.check().ok()?;
        let end = entry.offset.checked_add(entry.stored_len)?;
        let level_fits = pack.kind == PackKind::Metadata || entry.level == 0;
        (end <= pack.len && pack.len <= MAX_PACK_LEN && level_fits).then_some(Location { pack, entry })
    }

    /// Whether an id has a place in a pack that `accept` accepts.
    pub fn any(&self, id: &ChunkId, accept: &mut dyn FnMut(&PackId) -> bool) -> bool {
        let found = self.entries().get(self.range(id)).unwrap_or_default();
        found.iter().filter_map(|raw| self.location(raw)).any(|location| accept(&location.pack.pack))
    }

    /// Which entries are of an id.
    pub fn range(&self, id: &ChunkId) -> Range<usize> {
        match self.span {
            Some((first, last)) if first <= *id && *id <= last => {}
            _ => return 0..0,
        }
        let entries = self.entries();
        let start = lower_bound(entries, id);
        let same = entries.get(start..).unwrap_or_default().iter().take_while(|entry| entry.id == id.0).count();
        start..start + same
    }
}

/// The first entry not below `id`. Interpolates, because ids are uniform; bisects when that does not close in, so
/// that entries out of order (damage) cost time but never more than a bisection and a few steps.
fn lower_bound(entries: &[RawEntry], id: &ChunkId) -> usize {
    let prefix = |at: usize| entries.get(at).map_or(0, |entry| ChunkId(entry.id).prefix());
    let wanted = id.prefix();
    let (mut low, mut high) = (0, entries.len()); // below `low` all are less, from `high` none is
    let mut steps = 0;
    while low < high {
        let last = high - 1;
        let (from, to) = (prefix(low), prefix(last));
        let middle = if steps < 6 && high - low > 8 && from < wanted && wanted < to {
            let share = u128::from(wanted - from) * (last - low) as u128 / u128::from(to - from);
            low + usize::try_from(share).unwrap_or(0).min(last - low)
        } else {
            low + (high - low) / 2
        };
        steps += 1;
        match entries.get(middle).map(|entry| entry.id.cmp(&id.0)) {
            Some(Ordering::Less) => low = middle + 1,
            _ => high = middle,
        }
    }
    low
}

/// Stores a run and opens it where it is stored; durable when this returns.
pub(crate) fn put_run(storage: &dyn Storage, run: Run, repository: RepositoryId) -> io::Result<Run> {
    let object = Object::IndexRun(run.id);
    storage.put(&object, run.bytes())?;
    let id = run.id;
    match Run::open(storage, id, repository) {
        Ok(mapped) => Ok(mapped),
        Err(_) => Ok(run), // what is in memory is as good
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::build::RunBuilder;
    use crate::index::build::tests::{entry_of, row_of};

    #[test]
    fn every_entry_is_found_and_nothing_else() {
        for count in [0u32, 1, 2, 9, 100, 5000] {
            let mut builder = RunBuilder::default();
            let ids: Vec<ChunkId> = (0..count).map(|n| ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes())).collect();
            for (pack, ids) in (0..).zip(ids.chunks(700)) {
                let entries = ids.iter().map(|id| entry_of(*id)).collect::<Vec<_>>();
                builder.add_pack(row_of(pack), &entries);
            }
            let run = Run::built(builder.finish(RepositoryId([0; 16])), RepositoryId([0; 16])).expect("valid");
            for id in &ids {
                assert!(run.contains(id));
                assert_eq!(run.first(id).expect("present").entry.id, *id);
            }
            for n in 0..200u32 {
                let absent = ChunkId(*blake3::hash(&[&n.to_le_bytes()[..], b"x"].concat()).as_bytes());
                assert!(!run.contains(&absent));
            }
            assert!(!run.contains(&ChunkId([0; 32])) && !run.contains(&ChunkId([0xff; 32])));
        }
    }

    #[test]
    fn equal_prefixes_and_the_ends_are_found() {
        let mut builder = RunBuilder::default();
        let ids: Vec<ChunkId> = (0..40u8)
            .map(|n| {
                let mut id = [5; 32];
                id[31] = n;
                ChunkId(id)
            })
            .collect();
        builder.add_pack(row_of(1), &ids.iter().map(|id| entry_of(*id)).collect::<Vec<_>>());
        let run = Run::built(builder.finish(RepositoryId([0; 16])), RepositoryId([0; 16])).expect("valid");
        assert!(ids.iter().all(|id| run.contains(id)));
    }
}
