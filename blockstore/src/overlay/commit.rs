//! Flushes: one sync of both files for everybody who waits. The order is that of docs/format/overlay.md, "Flush" and
//! "Compaction".

use std::mem;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use super::error::{Action, OverlayError};
use super::intervals::Intervals;
use super::journal::{self, Journal};
use super::recent::Recent;
use super::{DATA_NAME, Overlay};

/// So many changes may wait for a flush; the next writer then flushes. Bounds memory to some tens of megabytes.
pub(super) const DIRTY_MAX: usize = 1 << 18;

/// Grains whose state is not journalled.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    grains: Intervals,
    changes: usize,
}

impl Dirty {
    pub(super) fn insert(&mut self, range: Range<u64>) {
        self.grains.insert(range);
        self.changes += 1;
    }
}

/// Who waits for which flush. Flush `n` covers everybody who came before it started.
#[derive(Debug, Default)]
pub(super) struct Commits {
    /// The last one that began, that ended, and that ended well.
    started: u64,
    finished: u64,
    durable: u64,
    running: bool,
    /// [`Overlay::writes`] as of the last sync of the data file.
    synced: u64,
}

/// Frees the leader's place whatever happens to it; if it panicked, nothing is known and the overlay is poisoned.
struct Leader<'a> {
    overlay: &'a Overlay,
    done: bool,
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.overlay.poisoned.store(true, Ordering::Release);
        }
        self.overlay.commits().running = false;
        self.overlay.committed.notify_all();
    }
}

impl Overlay {
    fn commits(&self) -> MutexGuard<'_, Commits> {
        self.commits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dirty(&self) -> MutexGuard<'_, Dirty> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes grains whose state changed.
    pub(super) fn note(&self, range: Range<u64>) {
        self.dirty().insert(range);
    }

    /// Flushes for a writer when too much waits for it.
    pub(super) fn relieve(&self) -> Result<(), OverlayError> {
        if self.wants_relief() { self.flush() } else { Ok(()) }
    }

    /// Whether the next writer has to flush first.
    pub(super) fn wants_relief(&self) -> bool {
        self.dirty().changes >= DIRTY_MAX
    }

    /// Returns once every write that returned before this call is durable. Concurrent callers share one pair of syncs.
    ///
    /// After [`OverlayError::NoSpace`] nothing is lost: what was to be flushed still is. Any other error is for ever.
    pub fn flush(&self) -> Result<(), OverlayError> {
        let mut commits = self.commits();
        let mine = commits.started + 1; // one under way may have looked before the caller's last write
        loop {
            if commits.durable >= mine {
                return Ok(());
            }
            self.check_poison()?;
            if commits.finished >= mine {
                return Err(OverlayError::NoSpace { dir: self.place.shown("") }); // all else poisons
            }
            if !commits.running {
                break;
            }
            commits = self.committed.wait(commits).unwrap_or_else(PoisonError::into_inner);
        }
        commits.running = true;
        commits.started += 1;
        let this = commits.started;
        let synced = commits.synced;
        drop(commits);

        let mut leader = Leader { overlay: self, done: false };
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.commit(&mut journal, synced).map_err(|error| self.judge(error));
        let mut commits = self.commits();
        commits.finished = this;
        if let Ok(synced) = result {
            commits.durable = this;
            commits.synced = synced;
        }
        drop(commits);
        self.committed.notify_all();
        let result = result.map(|_| ());
        if result.is_ok() {
            let settled = self.recent.as_ref().map_or(Ok(()), Recent::settle);
            if let Err(error) = settled.and_then(|()| journal.reserve()) {
                self.judge(error);
            }
        }
        self.journal_bytes.store(journal.bytes(), Ordering::Relaxed);
        leader.done = true;
        result
    }

    /// One flush. Returns the count of writes it covers.
    fn commit(&self, journal: &mut Journal, synced: u64) -> Result<u64, OverlayError> {
        // A write counts itself after it noted its grains, so what is counted here is among what is taken next.
        let writes = self.writes.load(Ordering::Acquire);
        let taken = mem::take(&mut *self.dirty());
        if let Some(recent) = &self.recent {
            recent.turn_over();
        }
        if taken.grains.is_empty() && writes == synced {
            return Ok(writes);
        }
        if !taken.grains.is_empty() && journal.must_compact() {
            match self.compact(journal) {
                Ok(true) => return Ok(writes),
                Ok(false) => journal.postpone_compaction(),
                Err(error) => return Err(error),
            }
        }
        // The states are read before the sync begins: see the page.
        let mut records = Vec::new();
        for range in taken.grains.iter() {
            records.extend(self.map.runs(range).flat_map(|(run, state)| journal::split(run.start, run.end, state)));
        }
        self.sync_data()?;
        if records.is_empty() {
            return Ok(writes);
        }
        let appended = journal.append(&records);
        if matches!(appended, Err(OverlayError::NoSpace { .. })) {
            let mut dirty = self.dirty();
            taken.grains.iter().for_each(|range| dirty.grains.insert(range));
            dirty.changes += taken.changes;
        }
        appended?;
        journal.sync()?;
        Ok(writes)
    }

    pub(super) fn sync_data(&self) -> Result<(), OverlayError> {
        self.data.sync().map_err(|error| Action::Sync.failed(&self.place.shown(DATA_NAME), error))
    }
}
