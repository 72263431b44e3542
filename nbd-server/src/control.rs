//! Ending connections from outside: a [`Control`] per connection, a [`Registry`] per export and per listener.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The handle by which a connection is woken and told to end.
#[derive(Debug, Default)]
pub(crate) struct Control {
    stopped: AtomicBool,
    evicted: AtomicBool,
    stopping: Notify,
    wake: Notify,
}

impl Control {
    /// Tells the connection to finish what is in flight and to end.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.stopping.notify_waiters();
        self.wake.notify_one();
    }

    /// Tells the connection to end without another word, for somebody else needs its place.
    fn evict(&self) {
        self.evicted.store(true, Ordering::SeqCst);
        self.stop();
    }

    pub(crate) fn is_evicted(&self) -> bool {
        self.evicted.load(Ordering::SeqCst)
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Makes the connection look again at its state.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Returns after a [`Control::wake`] or [`Control::stop`], also one from before the call. For one waiter at a time.
    pub(crate) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// Returns once the connection has been told to end; for any number of waiters.
    pub(crate) async fn stopped(&self) {
        let stopping = self.stopping.notified();
        tokio::pin!(stopping);
        stopping.as_mut().enable(); // from here on a stop is seen, so the check below cannot miss it
        if !self.is_stopped() {
            stopping.await;
        }
    }
}

/// The connections that use something which may end before them.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    members: Mutex<Members>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Members {
    closed: bool,
    next: u64,
    controls: HashMap<u64, Arc<Control>>,
}

/// Membership; ends when dropped.
#[derive(Debug)]
pub(crate) struct Membership {
    registry: Arc<Registry>,
    id: u64,
}

impl Registry {
    /// Registers a connection, unless the registry is closed or already has `max` members.
    pub(crate) fn join(self: &Arc<Registry>, control: &Arc<Control>, max: usize) -> Option<Membership> {
        let mut members = self.lock();
        if members.closed || members.controls.len() >= max {
            return None;
        }
        let id = members.next;
        members.next += 1;
        members.controls.insert(id, Arc::clone(control));
        Some(Membership { registry: Arc::clone(self), id })
    }

    /// Lets nobody in any more and tells everybody to end.
    pub(crate) fn close(&self) {
        let mut members = self.lock();
        members.closed = true;
        for control in members.controls.values() {
            control.stop();
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().controls.len()
    }

    /// Returns once the registry has no members.
    pub(crate) async fn emptied(&self) {
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable(); // from here on a departure is seen, so the check below cannot miss the last one
            if self.lock().controls.is_empty() {
                return;
            }
            left.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connections that are still in their handshake, oldest first.
#[derive(Debug, Default)]
pub(crate) struct HalfOpen(Mutex<BTreeMap<u64, Arc<Control>>>);

/// A handshake; over when dropped.
#[derive(Debug)]
pub(crate) struct Opening {
    half_open: Arc<HalfOpen>,
    number: u64,
}

impl HalfOpen {
    pub(crate) fn enter(self: &Arc<HalfOpen>, number: u64, control: &Arc<Control>) -> Opening {
        self.lock().insert(number, Arc::clone(control));
        Opening { half_open: Arc::clone(self), number }
    }

    /// Tells the oldest to end; false if there is none.
    pub(crate) fn end_oldest(&self) -> bool {
        let oldest = self.lock().pop_first();
        oldest.is_some_and(|(_, control)| {
            control.evict();
            true
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Control>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        self.half_open.lock().remove(&self.number);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.registry.lock().controls.remove(&self.id);
        self.registry.left.notify_waiters();
    }
}
