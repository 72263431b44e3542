//! [`Index`]: the set of index runs of a repository. Specification: docs/format/index.md
//!
//! Lookups never lock for long: they take the current set and search its runs in place. Adding, refreshing, merging
//! and repairing put a new set in its place.

pub(crate) mod build;
pub(crate) mod layers;
mod merge;
mod repair;
pub(crate) mod run;
pub(crate) mod seen;
mod without;

pub(crate) use repair::read_table;

use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tracing::warn;

use crate::error::ReadError;
use crate::format::FormatError;
use crate::id::{ChunkId, PackId, RepositoryId, RunId};
use crate::storage::{Object, ObjectKind, Storage};
use build::RunBuilder;
use layers::Layers;
pub(crate) use merge::Merger;
use run::{Location, Run, put_run};

/// How often a listing that changes under our eyes is taken again.
const RELIST_MAX: u32 = 8;

/// Where chunks are.
#[derive(Debug)]
pub(crate) struct Index {
    storage: Arc<dyn Storage>,
    repository: RepositoryId,
    set: RwLock<Arc<Set>>,
    repair: Mutex<repair::Repair>,
    /// Held by whoever merges.
    merging: Mutex<()>,
    set_aside: Mutex<Vec<SetAside>>,
}

/// A damaged run that is used no more.
#[derive(Debug)]
pub(crate) struct SetAside {
    pub run: RunId,
    /// What is wrong with it.
    pub reason: FormatError,
    /// Whether it stands under its other name now; else it is still in the way, for others to find.
    pub kept: bool,
}

/// The runs at one moment.
#[derive(Debug, Default)]
pub(crate) struct Set {
    runs: Vec<Arc<Run>>,
    /// The same, for lookups.
    layers: Layers,
    /// Whether any pack is gathered, so that one place may be better than another.
    gathered: bool,
    /// Grows with every change.
    generation: u64,
}

/// What stands in `index/`, opened.
struct Loaded {
    runs: Vec<Arc<Run>>,
    damaged: Vec<(RunId, FormatError)>,
}

impl Index {
    /// Opens all runs. Damaged ones are set aside and rebuilt.
    pub fn open(storage: Arc<dyn Storage>, repository: RepositoryId) -> Result<Index, ReadError> {
        let index = Index {
            storage,
            repository,
            set: RwLock::default(),
            repair: Mutex::default(),
            merging: Mutex::default(),
            set_aside: Mutex::default(),
        };
        let loaded = index.load()?;
        index.change(|runs| *runs = loaded.runs);
        if !loaded.damaged.is_empty() {
            index.replace_damaged(loaded.damaged)?;
        }
        Ok(index)
    }

    /// Sees the runs that others added, and forgets those that others merged. Damaged ones are replaced.
    pub fn refresh(&self) -> Result<(), ReadError> {
        let (_, damaged) = self.relist()?;
        if damaged.is_empty() { Ok(()) } else { self.replace_damaged(damaged) }
    }

    /// Brings the set in line with what is stored: whether that changed it, and which stored runs are damaged.
    fn relist(&self) -> Result<(bool, Vec<(RunId, FormatError)>), ReadError> {
        let Loaded { runs, damaged } = self.load()?;
        let known = self.runs();
        let new: Vec<_> = runs.into_iter().filter(|run| !known.iter().any(|known| known.id == run.id)).collect();
        // Added since the listing, or held in memory because it cannot be stored: not gone.
        let is_gone = |run: &&Arc<Run>| {
            let len = self.storage.len(&Object::IndexRun(run.id));
            run.stored && len.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let gone: Vec<RunId> = known.iter().filter(is_gone).map(|run| run.id).collect();
        let changed = !new.is_empty() || !gone.is_empty();
        if changed {
            self.change(|runs| {
                runs.retain(|run| !gone.contains(&run.id));
                new.into_iter().for_each(|run| insert(runs, run));
            });
        }
        Ok((changed, damaged))
    }

    fn current(&self) -> Arc<Set> {
        self.set.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, with: impl FnOnce(&mut Vec<Arc<Run>>)) {
        let mut set = self.set.write().unwrap_or_else(PoisonError::into_inner);
        let mut runs = set.runs.clone();
        with(&mut runs);
        let (layers, gathered) = (Layers::of(&runs), runs.iter().any(|run| run.gathered));
        *set = Arc::new(Set { runs, layers, gathered, generation: set.generation + 1 });
    }

    /// Which set lookups see now; [`Index::repair`] wants the one a failed lookup used.
    pub fn generation(&self) -> u64 {
        self.current().generation
    }

    /// Whether a chunk or node is said to be anywhere.
    #[cfg(test)]
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.any(id, &mut |_, _| true)
    }

    /// Whether a chunk or node stands in a pack that `accept` accepts, given the run that says so.
    pub fn any(&self, id: &ChunkId, accept: &mut dyn FnMut(&Run, &PackId) -> bool) -> bool {
        let set = self.current();
        set.layers.holding(id).any(|run| run.any(id, &mut |pack| accept(run, pack)))
    }

    /// Where a chunk or node is said to be; where it is best read, if it is in several places.
    pub fn first(&self, id: &ChunkId) -> Option<Location> {
        let set = self.set.read().unwrap_or_else(PoisonError::into_inner);
        if set.gathered {
            let locations = set.layers.holding(id).flat_map(|run| run.locations(id));
            return locations.min_by_key(|location| !location.pack.gathered);
        }
        set.layers.holding(id).find_map(|run| run.first(id))
    }

    /// Everywhere a chunk or node is said to be, the best place first.
    pub fn locate(&self, id: &ChunkId) -> Vec<Location> {
        let mut locations = Vec::new();
        self.current().layers.holding(id).for_each(|run| run.locate(id, &mut locations));
        locations.sort_by_key(|location| !location.pack.gathered);
        locations
    }

    /// The runs in use.
    pub fn runs(&self) -> Vec<Arc<Run>> {
        self.current().runs.clone()
    }

    /// Stores a run of these entries, durably, and uses it. Nothing is stored for no entries.
    pub fn add(&self, entries: RunBuilder) -> io::Result<()> {
        if entries.len() == 0 {
            return Ok(());
        }
        let run = self.build(entries)?;
        let run = Arc::new(put_run(&*self.storage, run, self.repository)?);
        self.change(|runs| insert(runs, run));
        Ok(())
    }

    /// Builds a run and parses it back before it is written.
    fn build(&self, entries: RunBuilder) -> io::Result<Run> {
        Run::built(entries.finish(self.repository), self.repository).map_err(io::Error::other)
    }

    /// Lists and opens the runs. A run that vanishes in between was merged, and the merged run was there before it
    /// vanished: list again.
    fn load(&self) -> Result<Loaded, ReadError> {
        let known = self.runs();
        let mut tries = 0;
        'list: loop {
            tries += 1;
            let mut loaded = Loaded { runs: Vec::new(), damaged: Vec::new() };
            let listed = self.storage.list(ObjectKind::IndexRun);
            for listed in listed.map_err(|source| ReadError::Io { object: "index".to_owned(), source })? {
                let Object::IndexRun(id) = listed.object else { continue };
                if let Some(run) = known.iter().find(|run| run.id == id) {
                    loaded.runs.push(run.clone());
                    continue;
                }
                match Run::open(&*self.storage, id, self.repository) {
                    Ok(run) => loaded.runs.push(Arc::new(run)),
                    Err(ReadError::Damaged { source: FormatError::OtherRepository, object }) => {
                        warn!(%object, "left out: it belongs to another repository");
                    }
                    // What a later version made must not be set aside by this one.
                    Err(error @ ReadError::Damaged { source: FormatError::UnknownVersion { .. }, .. })
                    | Err(error @ ReadError::Damaged { source: FormatError::UnknownFeatures { .. }, .. }) => {
                        return Err(error);
                    }
                    Err(ReadError::Damaged { source, .. }) => loaded.damaged.push((id, source)),
                    Err(ReadError::Io { source, .. })
                        if source.kind() == io::ErrorKind::NotFound && tries < RELIST_MAX =>
                    {
                        continue 'list;
                    }
                    Err(error) => return Err(error),
                }
            }
            return Ok(loaded);
        }
    }
}

fn insert(runs: &mut Vec<Arc<Run>>, run: Arc<Run>) {
    if !runs.iter().any(|known| known.id == run.id) {
        runs.push(run);
    }
}
