//! [`Dispatcher`]: the threads on which export operations block, shared by all connections of a server.
//!
//! Waking a thread costs more than a short operation, so threads are woken one after the other: each that takes work
//! wakes the next only if there is more, and never two wake-ups are under way. Quick operations then stay on few
//! threads, slow ones spread over as many as the limit allows. The threads come from the runtime's blocking pool and go
//! back to it when there has been no work for a moment.

use std::collections::VecDeque;
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
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// A thread has been woken or started and has not looked at the queue yet.
    waking: bool,
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
    pub(crate) fn submit(self: &Arc<Dispatcher>, jobs: impl IntoIterator<Item = Job>) {
        let wake = {
            let mut queue = self.lock();
            queue.jobs.extend(jobs);
            self.next_wake(&mut queue)
        };
        self.wake(wake);
    }

    fn next_wake(&self, queue: &mut Queue) -> Wake {
        if queue.waking || queue.jobs.is_empty() {
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
            if let Some(job) = queue.jobs.pop_front() {
                let wake = self.next_wake(&mut queue);
                drop(queue);
                self.wake(wake);
                job();
                queue = self.lock();
                continue;
            }
            queue.idle += 1;
            let (woken, timeout) = self.work.wait_timeout(queue, LINGER).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            queue.idle -= 1;
            // Whoever returns from waiting looks at the queue next, whether the wake-up was meant for it or not.
            queue.waking = false;
            if timeout.timed_out() && queue.jobs.is_empty() {
                queue.threads -= 1;
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
