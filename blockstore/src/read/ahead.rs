//! Reading ahead: sequential readers are recognised, and what they will want is fetched by a few threads.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Sequential readers followed at once, per disk.
const STREAMS: usize = 4;
/// A reader that came this often in sequence is followed.
const HITS_MIN: u32 = 3;
/// How far ahead of a reader, at most.
const AHEAD_BYTES: u64 = 4 << 20;
/// One job fetches about this much.
const JOB_BYTES: u64 = 1 << 20;
/// Jobs that may wait; more are dropped, they are only a guess.
const QUEUE_MAX: usize = 32;
const THREADS_MAX: usize = 4;

/// What reading ahead needs from the cache to be worth it.
pub(super) const CACHE_MIN: u64 = 4 * AHEAD_BYTES;

type Job = Box<dyn FnOnce() + Send>;

/// A few threads, started when first wanted.
#[derive(Default)]
pub(super) struct Pool {
    shared: Arc<PoolShared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct PoolShared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Pool")
    }
}

impl Pool {
    /// Runs a job some time, or never if there are too many.
    pub fn offer(&self, job: Job) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.jobs.len() < QUEUE_MAX && !queue.closed {
            queue.jobs.push_back(job);
            drop(queue);
            self.start();
            self.shared.changed.notify_one();
        }
    }

    fn start(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.is_empty() {
            let count = thread::available_parallelism().map_or(2, |cores| cores.get().min(THREADS_MAX));
            for _ in 0..count {
                let shared = self.shared.clone();
                let thread = thread::Builder::new().name("read-ahead".to_owned());
                threads.extend(thread.spawn(move || shared.run())); // without threads there is no reading ahead
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        queue.jobs.clear();
        drop(queue);
        self.shared.changed.notify_all();
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // The last owner may be a job of ours: a thread cannot wait for itself.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl PoolShared {
    fn run(&self) {
        loop {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let job = loop {
                if queue.closed {
                    return;
                }
                match queue.jobs.pop_front() {
                    Some(job) => break job,
                    None => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(queue);
            job();
        }
    }
}

/// The sequential readers of one disk.
#[derive(Debug, Default)]
pub(super) struct Streams {
    /// The chunk touched last: many small reads of one chunk are one step.
    last: AtomicU64,
    streams: Mutex<[Stream; STREAMS]>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The chunk that would continue it.
    next: u64,
    hits: u32,
    /// Up to here it was read ahead.
    ahead: u64,
    used: u64,
}

impl Streams {
    /// Notes a read of chunks `first..=last` and says which chunks to fetch now. Never waits.
    pub fn note(&self, first: u64, last: u64, chunk_size: u64, chunks: u64) -> Option<std::ops::Range<u64>> {
        if self.last.swap(last, Ordering::Relaxed) == last && first == last {
            return None;
        }
        let mut streams = self.streams.try_lock().ok()?;
        let clock = streams.iter().map(|stream| stream.used).max().unwrap_or(0) + 1;
        let found = streams.iter_mut().find(|stream| stream.hits > 0 && (first..=last + 1).contains(&stream.next));
        let Some(stream) = found else {
            if let Some(oldest) = streams.iter_mut().min_by_key(|stream| stream.used) {
                *oldest = Stream { next: last + 1, hits: 1, ahead: 0, used: clock };
            }
            return None;
        };
        stream.next = last + 1;
        stream.hits = stream.hits.saturating_add(1);
        stream.used = clock;
        if stream.hits < HITS_MIN {
            return None;
        }
        let window = (AHEAD_BYTES / chunk_size).max(2);
        let step = (JOB_BYTES / chunk_size).max(1);
        let start = stream.ahead.max(last + 1);
        let end = (last + 1 + window).min(chunks);
        // Whole jobs only, so that neighbours are read together; and not all at once for a reader that just began.
        if end < start + step && end < chunks || start >= end {
            return None;
        }
        let end = end.min(start + step * u64::from(stream.hits.min(4)));
        stream.ahead = end;
        Some(start..end)
    }
}

/// Cuts a range into jobs.
pub(super) fn jobs(range: std::ops::Range<u64>, chunk_size: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    let step = (JOB_BYTES / chunk_size).max(1);
    let count = (range.end - range.start).div_ceil(step);
    (0..count).map(move |n| range.start + n * step..(range.start + (n + 1) * step).min(range.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_is_followed_and_a_random_one_is_not() {
        let streams = Streams::default();
        let mut fetched = Vec::new();
        for chunk in 0..200 {
            fetched.extend(streams.note(chunk, chunk, 65536, 200));
        }
        for pair in fetched.windows(2) {
            assert_eq!(pair[0].end, pair[1].start, "no gap, nothing twice");
        }
        assert!(fetched.first().is_some_and(|range| range.start < 8));
        assert_eq!(fetched.last().map(|range| range.end), Some(200));
        let streams = Streams::default();
        for n in 0u64..500 {
            assert_eq!(streams.note(n * 7919 % 5000, n * 7919 % 5000, 65536, 5000), None);
        }
    }

    #[test]
    fn jobs_cover_the_range() {
        let all: Vec<_> = jobs(5..40, 65536).collect();
        assert_eq!(all, [5..21, 21..37, 37..40]);
    }
}
