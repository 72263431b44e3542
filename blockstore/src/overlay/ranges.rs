//! [`RangeLocks`]: writers of the same grains take turns, in the order they came; others do not meet.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    queue: Mutex<Queue>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// Holders and waiters, oldest first. Few: at most one per thread.
    entries: Vec<(u64, Range<u64>)>,
    next_ticket: u64,
    waiting: usize,
}

impl Queue {
    /// Whether an older entry overlaps. Waiting only for older ones is fair and cannot deadlock.
    fn blocked(&self, ticket: u64, range: &Range<u64>) -> bool {
        let older = self.entries.iter().take_while(|(other, _)| *other < ticket);
        older.into_iter().any(|(_, other)| other.start < range.end && range.start < other.end)
    }
}

/// Holds a range until dropped.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    ticket: u64,
}

impl RangeLocks {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let mut queue = self.queue();
        let ticket = queue.next_ticket;
        queue.next_ticket += 1;
        queue.entries.push((ticket, range.clone()));
        while queue.blocked(ticket, &range) {
            queue.waiting += 1;
            queue = self.released.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
        RangeGuard { locks: self, ticket }
    }

    /// The range if nobody holds or waits for a part of it.
    pub(super) fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        let mut queue = self.queue();
        let ticket = queue.next_ticket;
        if queue.blocked(ticket, &range) {
            return None;
        }
        queue.next_ticket += 1;
        queue.entries.push((ticket, range));
        Some(RangeGuard { locks: self, ticket })
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.locks.queue();
        queue.entries.retain(|(ticket, _)| *ticket != self.ticket);
        if queue.waiting > 0 {
            self.locks.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::thread;

    #[test]
    fn overlapping_ranges_exclude_each_other_and_others_do_not() {
        let locks = RangeLocks::default();
        let _far = locks.lock(1000..2000);
        assert!(locks.try_lock(500..1001).is_none());
        assert!(locks.try_lock(500..1000).is_some());
        let cells: Vec<AtomicBool> = (0..16).map(|_| AtomicBool::new(false)).collect();
        let turns = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..4u64 {
                let (locks, cells, turns) = (&locks, &cells, &turns);
                scope.spawn(move || {
                    for step in 0..2000 {
                        let start = (thread * 7 + step * 5) % 12;
                        let end = start + 1 + step % 4;
                        let _guard = locks.lock(start..end);
                        let mine = &cells[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
                        mine.iter().for_each(|cell| assert!(!cell.swap(true, Ordering::SeqCst)));
                        mine.iter().for_each(|cell| assert!(cell.swap(false, Ordering::SeqCst)));
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(turns.load(Ordering::SeqCst), 8000);
        assert_eq!(locks.queue().entries.len(), 1);
    }
}
