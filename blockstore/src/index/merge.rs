//! Merging runs in the background, so that lookups search few. Specification: docs/format/index.md, "Merge"

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, TryLockError};
use std::thread::JoinHandle;

use tracing::{debug, info, warn};

use super::build::{RunBuilder, TARGET_ENTRIES};
use super::layers::Layers;
use super::run::{Run, put_run};
use super::{Index, insert};
use crate::format::FormatError;
use crate::id::{ChunkId, RunId};
use crate::storage::Object;

/// More layers than this of about one size are merged.
const LAYERS_MAX: usize = 8;
/// Layers with fewer entries than this are of one size; above, sizes are the powers of eight of it.
const LEAST_ENTRIES: u64 = TARGET_ENTRIES as u64 / 8;

impl Index {
    /// The layers to merge: of the smallest size of which there are too many. None if there is nothing to do.
    fn to_merge(&self) -> Option<Vec<Vec<Arc<Run>>>> {
        let mut sizes: BTreeMap<u32, Vec<Vec<Arc<Run>>>> = BTreeMap::new();
        for layer in Layers::of(&self.runs()).each() {
            let entries: u64 = layer.iter().map(|run| run.entry_count()).sum();
            sizes.entry((entries / LEAST_ENTRIES).max(1).ilog(8)).or_default().push(layer);
        }
        sizes.into_values().find(|layers| layers.len() > LAYERS_MAX)
    }

    /// Merges until nothing is left to merge or `stop` is set, which is looked at after each run that is written: one is
    /// always written, so that merges advance however short the time.
    /// Whoever else merges in this process is left to it.
    pub fn merge(&self, stop: &AtomicBool) -> io::Result<()> {
        let _merging = match self.merging.try_lock() {
            Err(TryLockError::WouldBlock) => return Ok(()),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Ok(held) => held,
        };
        while let Some(layers) = self.to_merge() {
            self.merge_layers(layers, stop)?;
            if stop.load(Ordering::Acquire) {
                break;
            }
        }
        Ok(())
    }

    /// Streams the entries of some layers into new runs, in the order of ids, until the end, `stop`, or a damaged run,
    /// which is set aside and rebuilt.
    ///
    /// Order, for each new run: (1) it is durable, (2) lookups use it, (3) the runs whose last entry is in it or in an
    /// earlier one are deleted. Swapped, a crash in between would lose entries. What a merge that is cut off leaves is
    /// entries that stand in two runs.
    fn merge_layers(&self, layers: Vec<Vec<Arc<Run>>>, stop: &AtomicBool) -> io::Result<()> {
        let (mut from, mut to) = (0, 0);
        let mut merge = Merge::new(layers, &self.runs());
        while let Some(entries) = merge.next_run() {
            let new = if entries.len() > 0 {
                let run = self.build(entries)?;
                Some(Arc::new(put_run(&*self.storage, run, self.repository)?))
            } else {
                None
            };
            merge.made.extend(new.as_ref().map(|run| run.id));
            to += u64::from(new.is_some());
            // What reads the same as one of the new runs is that run.
            let done: Vec<RunId> = std::mem::take(&mut merge.done);
            let done: Vec<RunId> = done.into_iter().filter(|id| !merge.made.contains(id)).collect();
            self.change(|runs| {
                runs.retain(|run| !done.contains(&run.id));
                new.into_iter().for_each(|run| insert(runs, run));
            });
            for id in &done {
                self.storage.delete(&Object::IndexRun(*id))?;
                from += 1;
            }
            if stop.load(Ordering::Acquire) {
                break;
            }
        }
        debug!(from, to, "index runs merged");
        match merge.damaged {
            Some(run) => self.replace_damaged(vec![(run, FormatError::Name)]).map_err(io::Error::other),
            None => Ok(()),
        }
    }
}

/// Layers on their way into one.
struct Merge {
    layers: Vec<Cursor>,
    /// What may have been made of them before, by a merge that was cut off: what stands there is not written again.
    begun: Layers,
    heads: BinaryHeap<Reverse<(ChunkId, usize)>>,
    /// Runs all of whose entries have been taken.
    done: Vec<RunId>,
    /// Runs that were written.
    made: Vec<RunId>,
    /// A run that is damaged: what it says must not spread.
    damaged: Option<RunId>,
}

/// Where a layer stands.
struct Cursor {
    runs: std::vec::IntoIter<Arc<Run>>,
    run: Option<Arc<Run>>,
    at: usize,
}

impl Merge {
    fn new(layers: Vec<Vec<Arc<Run>>>, all: &[Arc<Run>]) -> Merge {
        let size = |layer: &[Arc<Run>]| layer.iter().map(|run| run.entry_count()).sum::<u64>();
        let total: u64 = layers.iter().map(|layer| size(layer)).sum();
        let merged: HashSet<RunId> = layers.iter().flatten().map(|run| run.id).collect();
        let others: Vec<Arc<Run>> = all.iter().filter(|run| !merged.contains(&run.id)).cloned().collect();
        let begun: Vec<Arc<Run>> = Layers::of(&others).each().filter(|layer| size(layer) <= total).flatten().collect();
        let cursor = |layer: Vec<Arc<Run>>| Cursor { runs: layer.into_iter(), run: None, at: 0 };
        let layers: Vec<Cursor> = layers.into_iter().map(cursor).collect();
        let heads = BinaryHeap::with_capacity(layers.len());
        let mut merge =
            Merge { layers, begun: Layers::of(&begun), heads, done: Vec::new(), made: Vec::new(), damaged: None };
        (0..merge.layers.len()).for_each(|layer| merge.next_of(layer));
        merge
    }

    /// Puts the next head of a layer on the heap. A run is hashed before its first entry is.
    fn next_of(&mut self, layer: usize) {
        let Some(cursor) = self.layers.get_mut(layer) else { return };
        loop {
            if let Some(run) = &cursor.run {
                if let Some(entry) = run.entries().get(cursor.at) {
                    self.heads.push(Reverse((ChunkId(entry.id), layer)));
                    return;
                }
                self.done.push(run.id);
            }
            cursor.at = 0;
            cursor.run = cursor.runs.next();
            match &cursor.run {
                None => return,
                Some(run) if !run.is_intact() => {
                    self.damaged = Some(run.id);
                    return;
                }
                Some(_) => {}
            }
        }
    }

    /// The next entries, as many as a run has. They end between two ids, so that what is made does not overlap. None at
    /// the end, or before a damaged run.
    fn next_run(&mut self) -> Option<RunBuilder> {
        if self.damaged.is_some() || (self.heads.is_empty() && self.done.is_empty()) {
            return None;
        }
        let mut entries = RunBuilder::default();
        let mut last = None;
        while let Some(Reverse((id, layer))) = self.heads.pop() {
            if entries.is_full() && last != Some(id) {
                self.heads.push(Reverse((id, layer)));
                break;
            }
            last = Some(id);
            if let Some(cursor) = self.layers.get_mut(layer) {
                let run = cursor.run.as_ref();
                let location = run.and_then(|run| run.location(run.entries().get(cursor.at)?));
                let there = |run: &Arc<Run>, pack| run.locations(&id).any(|location| location.pack.pack == pack);
                if let Some(location) = location
                    && !self.begun.holding(&id).any(|run| there(run, location.pack.pack))
                {
                    entries.add(location.pack, location.entry);
                }
                cursor.at += 1;
            }
            self.next_of(layer);
            if self.damaged.is_some() {
                // The layer's next ids are not known: what comes now might be out of order. What was taken is whole.
                break;
            }
        }
        Some(entries)
    }
}

/// Merges in a thread of its own until it is dropped, which waits for the run that is being written.
#[derive(Debug)]
pub(crate) struct Merger {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Merger {
    /// Starts merging. Without a thread the next one will.
    pub fn start(index: Arc<Index>) -> Merger {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = std::thread::Builder::new().name("index-merge".to_owned()).spawn(move || {
            if let Err(error) = index.merge(&seen) {
                warn!(%error, "index runs not merged, the next backup will try again");
            }
        });
        let thread = thread.inspect_err(|error| info!(%error, "no thread to merge index runs")).ok();
        Merger { stop, thread }
    }
}

impl Drop for Merger {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic was printed already
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::id::{PackId, RepositoryId};
    use crate::index::build::tests::{entry_of, row_of};
    use crate::repository::test_support::{Numbers, sim_storage};
    use crate::sim::SimFolder;

    /// Which packs hold what.
    type Model = BTreeMap<ChunkId, BTreeSet<PackId>>;

    fn open(folder: &SimFolder) -> Index {
        Index::open(sim_storage(folder), RepositoryId([0; 16])).expect("opens")
    }

    /// Adds runs of some of `ids` ids each.
    fn grow(index: &Index, model: &mut Model, numbers: &mut Numbers, runs: u64, ids: u64) {
        for _ in 0..runs {
            let mut entries = RunBuilder::default();
            for _ in 0..numbers.below(400) + 1 {
                let pack = row_of(numbers.below(200).to_le_bytes()[0]);
                let id = ChunkId(*blake3::hash(&numbers.below(ids).to_le_bytes()).as_bytes());
                entries.add(pack, entry_of(id));
                model.entry(id).or_default().insert(pack.pack);
            }
            index.add(entries).expect("stored");
        }
    }

    fn check(index: &Index, model: &Model, context: &str) {
        for (id, packs) in model {
            let found: BTreeSet<PackId> = index.locate(id).iter().map(|location| location.pack.pack).collect();
            assert_eq!(&found, packs, "{context}: {id}");
            assert!(index.contains(id) && packs.contains(&index.first(id).expect("there").pack.pack), "{context}");
        }
        for absent in 0..50u64 {
            let id = ChunkId(*blake3::hash(&[&absent.to_le_bytes()[..], b"x"].concat()).as_bytes());
            assert!(!index.contains(&id) && index.locate(&id).is_empty(), "{context}");
        }
    }

    fn layers(index: &Index) -> usize {
        Layers::of(&index.runs()).each().count()
    }

    #[test]
    fn merging_loses_nothing_and_leaves_few_layers_of_bounded_runs() {
        for seed in 1..6 {
            let context = format!("seed {seed}");
            let (folder, mut model, mut numbers) = (SimFolder::new(seed), Model::new(), Numbers(seed));
            let (index, other) = (open(&folder), open(&folder));
            for _ in 0..4 {
                grow(&index, &mut model, &mut numbers, 40, 20_000);
                let before = layers(&index);
                index.merge(&AtomicBool::new(false)).expect("merges");
                assert!(layers(&index) < before && layers(&index) <= 3 * LAYERS_MAX, "{context}: {}", layers(&index));
                check(&index, &model, &context);
                assert!(index.runs().iter().all(|run| run.entry_count() <= TARGET_ENTRIES as u64 + 200), "{context}");
            }
            assert!(index.runs().iter().map(|run| run.entry_count()).max() > Some(LEAST_ENTRIES * 4), "{context}");
            check(&open(&folder), &model, &context);
            other.refresh().expect("sees what was done");
            check(&other, &model, &context);
        }
    }

    #[test]
    fn a_merge_that_is_stopped_goes_on_where_it_was() {
        let (folder, mut model, mut numbers) = (SimFolder::new(1), Model::new(), Numbers(1));
        let index = open(&folder);
        grow(&index, &mut model, &mut numbers, 60, 1_000_000);
        let entries = |index: &Index| index.runs().iter().map(|run| run.entry_count()).sum::<u64>();
        let (all, mut rounds) = (entries(&index), 0);
        while index.to_merge().is_some() {
            index.merge_layers(index.to_merge().expect("asked"), &AtomicBool::new(true)).expect("one run");
            check(&index, &model, "stopped");
            rounds += 1;
            assert!(rounds < 100, "it ends");
        }
        assert!(rounds > 3 && entries(&index) <= all, "{rounds}");
        check(&open(&folder), &model, "opened again");
    }

    #[test]
    fn several_processes_that_merge_while_others_add_lose_nothing() {
        for seed in 1..4 {
            let (folder, mut model, mut numbers) = (SimFolder::new(seed), Model::new(), Numbers(seed));
            grow(&open(&folder), &mut model, &mut numbers, 50, 20_000);
            let indexes: Vec<Arc<Index>> = (0..3).map(|_| Arc::new(open(&folder))).collect();
            let mergers: Vec<Merger> = indexes.iter().map(|index| Merger::start(index.clone())).collect();
            grow(&indexes[0], &mut model, &mut numbers, 30, 20_000);
            for index in &indexes[1..] {
                index.refresh().expect("lists");
                index.merge(&AtomicBool::new(false)).expect("merges");
            }
            drop(mergers);
            for index in &indexes {
                index.refresh().expect("lists");
                check(index, &model, &format!("seed {seed}"));
            }
            check(&open(&folder), &model, &format!("seed {seed}, opened again"));
        }
    }

    #[test]
    fn a_crash_at_any_operation_of_a_merge_loses_no_entry() {
        for seed in 1..4 {
            let (folder, mut model, mut numbers) = (SimFolder::new(seed), Model::new(), Numbers(seed));
            grow(&open(&folder), &mut model, &mut numbers, 30, 1_000_000);
            let ready = folder.after_crash();
            let rehearsal = ready.after_crash();
            open(&rehearsal).merge(&AtomicBool::new(false)).expect("merges");
            assert!(rehearsal.operations() > 30, "it writes and deletes");
            for cut in 0..rehearsal.operations() {
                let folder = ready.after_crash().crash_at(cut);
                if let Ok(index) = Index::open(sim_storage(&folder), RepositoryId([0; 16])) {
                    assert!(index.merge(&AtomicBool::new(false)).is_err(), "seed {seed}, cut {cut}");
                }
                for outcome in 0..3 {
                    let folder = folder.after_crash_with(outcome);
                    check(&open(&folder), &model, &format!("seed {seed}, cut {cut}, outcome {outcome}"));
                }
            }
        }
    }

    #[test]
    fn a_damaged_run_is_not_merged_but_set_aside() {
        let (folder, mut model, mut numbers) = (SimFolder::new(1), Model::new(), Numbers(1));
        let index = open(&folder);
        grow(&index, &mut model, &mut numbers, 20, 1_000_000);
        let victim = index.runs()[7].clone();
        let mut bytes = victim.bytes().to_vec();
        let at = bytes.len() - 40; // in the last entry
        bytes[at] ^= 1;
        sim_storage(&folder).put(&Object::IndexRun(victim.id), &bytes).expect("damaged");
        let index = open(&folder);
        index.merge(&AtomicBool::new(false)).expect("merges the others");
        assert_eq!(index.take_set_aside().iter().map(|aside| aside.run).collect::<Vec<_>>(), [victim.id]);
        let lost: BTreeSet<ChunkId> = victim.entries().iter().map(|entry| ChunkId(entry.id)).collect();
        model.retain(|id, _| !lost.contains(id));
        check(&index, &model, "the others");
    }
}
