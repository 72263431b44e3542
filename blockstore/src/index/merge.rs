//! Merging small runs, so that lookups search few.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::Arc;

use tracing::debug;

use super::build::{RunBuilder, TARGET_ENTRIES};
use super::run::{Run, put_run};
use super::{Index, insert};
use crate::id::{ChunkId, RunId};
use crate::storage::Object;

/// More small runs than this are merged.
pub(super) const SMALL_RUNS_MAX: usize = 8;
/// A run with fewer entries is small.
const SMALL_ENTRIES: u64 = TARGET_ENTRIES as u64 / 2;

impl Index {
    /// Merges the small runs if there are too many.
    ///
    /// Order: (1) the merged runs are durable, (2) the small ones are deleted. Swapped, a crash in between would lose
    /// entries, though a rebuild would bring them back. Damaged runs are not merged: they would spread.
    pub fn merge_small(&self) -> io::Result<()> {
        let small: Vec<Arc<Run>> = self.runs().into_iter().filter(|run| run.entry_count() < SMALL_ENTRIES).collect();
        if small.len() <= SMALL_RUNS_MAX || !small.iter().all(|run| run.is_intact()) {
            return Ok(());
        }
        let mut merged = Vec::new();
        let mut entries = RunBuilder::default();
        let mut last = None;
        let mut heads: BinaryHeap<Reverse<(ChunkId, usize, usize)>> = BinaryHeap::new();
        let head = |run: usize, at: usize| {
            let entry = small.get(run).and_then(|run| run.entries().get(at));
            entry.map(|entry| Reverse((ChunkId(entry.id), run, at)))
        };
        heads.extend((0..small.len()).filter_map(|run| head(run, 0)));
        while let Some(Reverse((id, run, at))) = heads.pop() {
            // Cut only between ids, so that merged runs do not overlap.
            if entries.is_full() && last != Some(id) {
                merged.push(self.put(std::mem::take(&mut entries))?);
            }
            last = Some(id);
            let location = small.get(run).and_then(|run| run.entries().get(at).and_then(|raw| run.location(raw)));
            if let Some(location) = location {
                entries.add(location.pack, location.entry);
            }
            heads.extend(head(run, at + 1));
        }
        if entries.len() > 0 {
            merged.push(self.put(entries)?);
        }
        let kept: Vec<RunId> = merged.iter().map(|run| run.id).collect();
        let old: Vec<RunId> = small.iter().map(|run| run.id).filter(|id| !kept.contains(id)).collect();
        self.change(|runs| {
            runs.retain(|run| !old.contains(&run.id));
            merged.into_iter().for_each(|run| insert(runs, run));
        });
        for id in &old {
            self.storage.delete(&Object::IndexRun(*id))?;
        }
        debug!(from = old.len(), to = kept.len(), "index runs merged");
        Ok(())
    }

    fn put(&self, entries: RunBuilder) -> io::Result<Arc<Run>> {
        let run = self.build(entries)?;
        Ok(Arc::new(put_run(&*self.storage, run, self.repository)?))
    }
}
