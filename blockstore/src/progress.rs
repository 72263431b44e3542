//! [`Progress`]: what long work shows and the flag that stops it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counters a long operation keeps up to date, and a wish to cancel it. Share it in an `Arc`.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    expected: AtomicU64,
    done: AtomicU64,
    read: AtomicU64,
    new_chunks: AtomicU64,
    new_bytes: AtomicU64,
    stored: AtomicU64,
    cancelled: AtomicBool,
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $add:ident) => {
        $(#[$doc])*
        pub fn $name(&self) -> u64 {
            self.$name.load(Ordering::Relaxed)
        }
        pub(crate) fn $add(&self, count: u64) {
            self.$name.fetch_add(count, Ordering::Relaxed);
        }
    };
}

impl Progress {
    /// Nothing done yet.
    pub fn new() -> Progress {
        Progress::default()
    }

    /// Bytes (of the disks, holes included) that are to be gone through, as far as known.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed).max(self.expected.load(Ordering::Relaxed))
    }

    pub(crate) fn add_total(&self, count: u64) {
        self.total.fetch_add(count, Ordering::Relaxed);
    }

    /// Says beforehand how many bytes several operations will go through together, each of which knows its own only.
    pub fn expect(&self, total: u64) {
        self.expected.fetch_max(total, Ordering::Relaxed);
    }

    counter!(
        /// How many of them are.
        done,
        add_done
    );
    counter!(
        /// Bytes read from the source.
        read,
        add_read
    );
    counter!(
        /// Chunks that were not in the repository yet.
        new_chunks,
        add_new_chunks
    );
    counter!(
        /// Their length before compression.
        new_bytes,
        add_new_bytes
    );
    counter!(
        /// Bytes written to storage.
        stored,
        add_stored
    );

    /// Asks the operation to stop soon.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whether it was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}
