//! [`Gate`]: what every request to a disk passes, so that a cutover can hold them for a moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Requests pass it side by side; whoever closes it waits for those inside and keeps the others out.
#[derive(Debug, Default)]
pub struct Gate {
    /// Set before the lock is asked for, so that a stream of requests cannot starve the one who closes.
    closing: AtomicBool,
    lock: RwLock<()>,
}

/// A request inside.
#[derive(Debug)]
pub struct Inside<'a>(#[expect(dead_code, reason = "held, not read")] RwLockReadGuard<'a, ()>);

/// The gate is closed as long as this lives.
#[derive(Debug)]
pub struct Closed<'a> {
    gate: &'a Gate,
    _lock: RwLockWriteGuard<'a, ()>,
}

impl Gate {
    /// Goes in; waits while the gate is closed. A request must not enter twice.
    pub fn enter(&self) -> Inside<'_> {
        Inside(self.lock.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Goes in if that takes no waiting.
    pub fn try_enter(&self) -> Option<Inside<'_>> {
        if self.closing.load(Ordering::Acquire) {
            return None;
        }
        self.lock.try_read().ok().map(Inside)
    }

    /// Waits until nobody is inside, and keeps everybody out.
    pub fn close(&self) -> Closed<'_> {
        self.closing.store(true, Ordering::Release);
        Closed { gate: self, _lock: self.lock.write().unwrap_or_else(PoisonError::into_inner) }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.closing.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc;

    #[test]
    fn closing_waits_for_those_inside_and_holds_the_next() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter();
        let (said, heard) = mpsc::channel();
        let closer = {
            let (gate, said) = (gate.clone(), said.clone());
            std::thread::spawn(move || {
                let closed = gate.close();
                said.send("closed").unwrap();
                std::thread::sleep(std::time::Duration::from_millis(20));
                said.send("opening").unwrap();
                drop(closed);
            })
        };
        while gate.try_enter().is_some() {
            std::thread::yield_now(); // until the closer is there
        }
        said.send("leaving").unwrap();
        drop(inside);
        assert_eq!(heard.recv().unwrap(), "leaving");
        assert_eq!(heard.recv().unwrap(), "closed");
        assert!(gate.try_enter().is_none());
        drop(gate.enter());
        assert_eq!(heard.recv().unwrap(), "opening");
        closer.join().unwrap();
        assert!(gate.try_enter().is_some());
    }
}
