//! [`Dispatcher`]: the threads on which export operations block, shared by all connections of a server.
//!
//! Waking a thread costs more than a short operation, so threads are woken one after the other: each that takes work
//! wakes the next only if there is more, and never two wake-ups are under way. Quick operations then stay on few
//! threads, slow ones spread over as many as the limit allows. The threads come from the runtime's blocking pool and go
//! back to it when there has been no work for a moment.
//!
//! Work comes in shares, one for each export, that take turns. A share may hold no more threads than are left for the
//! others: an export whose storage hangs keeps half of the threads, a second one a quarter, and the rest serve on.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a thread waits for more work before it goes back to the runtime's pool. Short, since a runtime that shuts
/// down waits for it.
const LINGER: Duration = Duration::from_millis(50);

pub(crate) type Job = Box<dyn FnOnce() + Send>;

pub(crate) struct Dispatcher {
    queue: Mutex<Queue>,
    work: Condvar,
    threads_max: usize,
}

#[derive(Default)]
struct Queue {
    shares: HashMap<u64, Share>,
    /// Shares that have work waiting, the one whose turn is next first; each once.
    turns: VecDeque<u64>,
    /// Jobs that run, over all shares.
    running: usize,
    threads: usize,
    idle: usize,
    /// A thread has been woken or started and has not looked at the queue yet.
    waking: bool,
}

#[derive(Default)]
struct Share {
    jobs: VecDeque<Job>,
    running: usize,
}

impl Queue {
    fn add(&mut self, share: u64, jobs: impl IntoIterator<Item = Job>) {
        let entry = self.shares.entry(share).or_default();
        let waited = !entry.jobs.is_empty();
        entry.jobs.extend(jobs);
        if !waited && !entry.jobs.is_empty() {
            self.turns.push_back(share);
        }
    }

    /// Whether a share may begin one more job. One that runs nothing always may: then a thread is all it needs.
    fn may_run(&self, share: u64, threads_max: usize) -> bool {
        let running = self.shares.get(&share).map_or(0, |share| share.running);
        running == 0 || running < threads_max.saturating_sub(self.running)
    }

    /// The place among the turns of the first share that may begin a job.
    fn next_turn(&self, threads_max: usize) -> Option<usize> {
        self.turns.iter().position(|share| self.may_run(*share, threads_max))
    }

    /// Takes the next job; [`Queue::done`] when it has run.
    fn take(&mut self, threads_max: usize) -> Option<(u64, Job)> {
        let at = self.next_turn(threads_max)?;
        let number = self.turns.remove(at)?;
        let share = self.shares.get_mut(&number)?;
        let job = share.jobs.pop_front()?;
        share.running += 1;
        self.running += 1;
        if !share.jobs.is_empty() {
            self.turns.push_back(number);
        }
        Some((number, job))
    }

    fn done(&mut self, number: u64) {
        self.running -= 1;
        if let Some(share) = self.shares.get_mut(&number) {
            share.running -= 1;
            if share.running == 0 && share.jobs.is_empty() {
                self.shares.remove(&number);
            }
        }
    }
}

enum Wake {
    Nobody,
    Idle,
    New,
}

impl Dispatcher {
    pub(crate) fn new(threads_max: usize) -> Dispatcher {
        Dispatcher { queue: Mutex::default(), work: Condvar::new(), threads_max: threads_max.max(1) }
    }

    /// Queues work; the caller bounds how much. Must be called inside a runtime.
    pub(crate) fn submit(self: &Arc<Dispatcher>, share: u64, jobs: impl IntoIterator<Item = Job>) {
        let wake = {
            let mut queue = self.lock();
            queue.add(share, jobs);
            self.next_wake(&mut queue)
        };
        self.wake(wake);
    }

    fn next_wake(&self, queue: &mut Queue) -> Wake {
        if queue.waking || queue.next_turn(self.threads_max).is_none() {
            Wake::Nobody
        } else if queue.idle > 0 {
            queue.waking = true;
            Wake::Idle
        } else if queue.threads < self.threads_max {
            queue.waking = true;
            queue.threads += 1;
            Wake::New
        } else {
            Wake::Nobody
        }
    }

    fn wake(self: &Arc<Dispatcher>, wake: Wake) {
        match wake {
            Wake::Nobody => {}
            Wake::Idle => self.work.notify_one(),
            Wake::New => {
                let dispatcher = Arc::clone(self);
                tokio::task::spawn_blocking(move || dispatcher.run());
            }
        }
    }

    fn run(self: Arc<Dispatcher>) {
        let mut queue = self.lock();
        queue.waking = false;
        loop {
            if let Some((share, job)) = queue.take(self.threads_max) {
                let wake = self.next_wake(&mut queue);
                drop(queue);
                self.wake(wake);
                job();
                queue = self.lock();
                queue.done(share);
                continue;
            }
            queue.idle += 1;
            let (woken, timeout) = self.work.wait_timeout(queue, LINGER).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            // Whoever returns from waiting looks at the queue next, whether the wake-up was meant for it or not.
            queue.waking = false;
            if timeout.timed_out() && queue.next_turn(self.threads_max).is_none() {
                queue.threads -= 1;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jobs(count: usize) -> impl Iterator<Item = Job> {
        (0..count).map(|_| -> Job { Box::new(|| {}) })
    }

    fn taken(queue: &mut Queue, threads: usize) -> Vec<u64> {
        std::iter::from_fn(|| queue.take(threads).map(|(share, _)| share)).collect()
    }

    #[test]
    fn a_share_holds_no_more_threads_than_it_leaves() {
        let mut queue = Queue::default();
        queue.add(1, jobs(100));
        assert_eq!(taken(&mut queue, 16), [1; 8]);
        queue.add(2, jobs(100));
        assert_eq!(taken(&mut queue, 16), [2; 4]);
        queue.add(3, jobs(1));
        assert_eq!(taken(&mut queue, 16), [3]);
        queue.done(1);
        assert_eq!(taken(&mut queue, 16), [0; 0], "the first has seven and only four are free");
        for _ in 0..7 {
            queue.done(1);
        }
        assert!(queue.take(16).is_some());
    }

    #[test]
    fn shares_take_turns_and_are_forgotten_when_done() {
        let mut queue = Queue::default();
        queue.add(1, jobs(3));
        queue.add(2, jobs(2));
        assert_eq!(taken(&mut queue, 100), [1, 2, 1, 2, 1]);
        for share in [1, 2, 1, 2, 1] {
            queue.done(share);
        }
        assert!(queue.shares.is_empty() && queue.turns.is_empty() && queue.running == 0);
    }

    #[test]
    fn a_share_that_runs_nothing_is_always_next() {
        let mut queue = Queue::default();
        queue.add(1, jobs(2));
        assert_eq!(taken(&mut queue, 1), [1]);
        queue.done(1);
        assert_eq!(taken(&mut queue, 1), [1]);
    }
}
