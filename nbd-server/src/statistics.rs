//! What an export has served since it was added: counters that only grow.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Kinds of operations that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// READ
    Read,
    /// WRITE
    Write,
    /// FLUSH
    Flush,
    /// TRIM
    Trim,
    /// WRITE_ZEROES
    WriteZeroes,
    /// CACHE
    Cache,
    /// BLOCK_STATUS
    BlockStatus,
}

/// All [`Operation`]s in the order in which counters are kept.
pub const OPERATIONS: [Operation; 7] = [
    Operation::Read,
    Operation::Write,
    Operation::Flush,
    Operation::Trim,
    Operation::WriteZeroes,
    Operation::Cache,
    Operation::BlockStatus,
];

#[derive(Debug, Default)]
struct Counter {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

/// Counters of one export, shared by its connections.
#[derive(Debug, Default)]
pub struct Statistics {
    counters: [Counter; OPERATIONS.len()],
    /// Reads answered from memory on the connection's own task.
    resident_reads: AtomicU64,
    /// Requests refused before they reached the export.
    refused: AtomicU64,
}

/// A copy of one kind's counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Requests that reached the export, failed ones included.
    pub requests: u64,
    /// Bytes they covered.
    pub bytes: u64,
    /// How many failed.
    pub errors: u64,
}

impl Statistics {
    /// What was served of a kind so far.
    pub fn count(&self, operation: Operation) -> Count {
        let counter = self.counter(operation);
        Count {
            requests: counter.requests.load(Relaxed),
            bytes: counter.bytes.load(Relaxed),
            errors: counter.errors.load(Relaxed),
        }
    }

    /// Reads answered from memory without leaving the connection's task.
    pub fn resident_reads(&self) -> u64 {
        self.resident_reads.load(Relaxed)
    }

    /// Requests refused before they reached the export: out of range, malformed, not allowed.
    pub fn refused(&self) -> u64 {
        self.refused.load(Relaxed)
    }

    pub(crate) fn record(&self, operation: Operation, bytes: u64, outcome: Outcome) {
        let counter = self.counter(operation);
        counter.requests.fetch_add(1, Relaxed);
        match outcome {
            Outcome::Done => counter.bytes.fetch_add(bytes, Relaxed),
            Outcome::Failed => counter.errors.fetch_add(1, Relaxed),
        };
    }

    /// Counts a batch of reads answered from memory at once.
    pub(crate) fn record_resident(&self, reads: u64, bytes: u64) {
        let counter = self.counter(Operation::Read);
        counter.requests.fetch_add(reads, Relaxed);
        counter.bytes.fetch_add(bytes, Relaxed);
        self.resident_reads.fetch_add(reads, Relaxed);
    }

    pub(crate) fn record_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    fn counter(&self, operation: Operation) -> &Counter {
        let [read, write, flush, trim, zeroes, cache, status] = &self.counters;
        match operation {
            Operation::Read => read,
            Operation::Write => write,
            Operation::Flush => flush,
            Operation::Trim => trim,
            Operation::WriteZeroes => zeroes,
            Operation::Cache => cache,
            Operation::BlockStatus => status,
        }
    }
}

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    Failed,
}
