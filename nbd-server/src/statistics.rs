//! What an export has served since it was added: counters that only grow.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

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

/// Upper bounds of the classes in which latencies are counted, in microseconds; one more class has what took longer.
pub const LATENCY_BOUNDS_US: [u64; 16] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    10_000_000,
];

#[derive(Debug, Default)]
struct Counter {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    latency: [AtomicU64; LATENCY_BOUNDS_US.len() + 1],
    micros: AtomicU64,
}

/// How long requests of one kind took, from when they were read to when their answer was ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    /// Requests by class: up to the bound of the same place in [`LATENCY_BOUNDS_US`], and longer than all.
    pub classes: [u64; LATENCY_BOUNDS_US.len() + 1],
    /// All of them together.
    pub total: Duration,
}

impl Latency {
    /// The bound under which this share of the requests stayed; the largest bound if it is beyond all, `None` without
    /// requests. `per_mille` is 500 for the median.
    pub fn quantile(&self, per_mille: u64) -> Option<Duration> {
        let count: u64 = self.classes.iter().sum();
        if count == 0 {
            return None;
        }
        let rank = u128::from(count) * u128::from(per_mille.min(1000));
        let mut seen = 0_u128;
        let last = LATENCY_BOUNDS_US.len() - 1;
        for (at, class) in self.classes.iter().enumerate() {
            seen += u128::from(*class) * 1000;
            if seen >= rank && seen > 0 {
                return LATENCY_BOUNDS_US.get(at.min(last)).map(|bound| Duration::from_micros(*bound));
            }
        }
        LATENCY_BOUNDS_US.last().map(|bound| Duration::from_micros(*bound))
    }
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

    /// How long requests of a kind took. What was answered from memory counts with the shortest.
    pub fn latency(&self, operation: Operation) -> Latency {
        let counter = self.counter(operation);
        Latency {
            classes: std::array::from_fn(|at| counter.latency.get(at).map_or(0, |class| class.load(Relaxed))),
            total: Duration::from_micros(counter.micros.load(Relaxed)),
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

    /// Counts how long a request took.
    pub(crate) fn record_latency(&self, operation: Operation, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let counter = self.counter(operation);
        if let Some(class) = counter.latency.get(LATENCY_BOUNDS_US.partition_point(|bound| *bound < micros)) {
            class.fetch_add(1, Relaxed);
        }
        counter.micros.fetch_add(micros, Relaxed);
    }

    /// Counts a batch of reads answered from memory at once.
    pub(crate) fn record_resident(&self, reads: u64, bytes: u64) {
        let counter = self.counter(Operation::Read);
        counter.requests.fetch_add(reads, Relaxed);
        counter.bytes.fetch_add(bytes, Relaxed);
        self.resident_reads.fetch_add(reads, Relaxed);
        let [shortest, ..] = &counter.latency;
        shortest.fetch_add(reads, Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_are_counted_by_class_and_quantiles_are_bounds() {
        let statistics = Statistics::default();
        assert_eq!(statistics.latency(Operation::Write).quantile(500), None);
        for micros in [10, 50, 51, 3_000, 60_000_000] {
            statistics.record_latency(Operation::Write, Duration::from_micros(micros));
        }
        let latency = statistics.latency(Operation::Write);
        assert_eq!((latency.classes[0], latency.classes[1], latency.classes[6]), (2, 1, 1));
        assert_eq!(latency.classes[LATENCY_BOUNDS_US.len()], 1);
        assert_eq!(latency.total, Duration::from_micros(60_003_111));
        let at = |per_mille| latency.quantile(per_mille).expect("there are some").as_micros();
        assert_eq!([at(0), at(400), at(500), at(800), at(1000)], [50, 50, 100, 5_000, 10_000_000]);
        statistics.record_resident(3, 4096);
        assert_eq!(statistics.latency(Operation::Read).classes[0], 3);
    }
}
