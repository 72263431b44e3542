//! [`Seen`]: a bit for every entry of the index, for walks that must not go twice where they have been.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Index;
use super::run::Run;
use crate::id::ChunkId;

/// A set of ids that the index knew when this was made: one bit an entry (1.3 MB for ten million), shared by threads.
#[derive(Debug)]
pub(crate) struct Seen {
    runs: Vec<(Arc<Run>, Vec<AtomicU64>)>,
}

impl Seen {
    /// Nothing yet.
    pub fn new(index: &Index) -> Seen {
        let words = |run: &Run| (0..run.entries().len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Seen { runs: index.runs().into_iter().map(|run| (run.clone(), words(&run))).collect() }
    }

    fn find(&self, id: &ChunkId) -> Option<(&AtomicU64, u64)> {
        self.runs.iter().find_map(|(run, words)| {
            let at = run.position(id)?;
            Some((words.get(at / 64)?, 1 << (at % 64)))
        })
    }

    /// Adds an id; false if it was there. One that the index did not know is always new.
    pub fn insert(&self, id: &ChunkId) -> bool {
        self.find(id).is_none_or(|(word, bit)| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }

    /// Whether an id was added.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.find(id).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }
}
