//! [`Budget`]: the memory for payload in flight, shared by all connections of a server and by servers beside it.
//!
//! Memory comes in shares, one for each export. A share may take no more than it leaves to the others: an export whose
//! clients do not take their replies holds half of the memory at most, a second one a quarter, and the rest serves on.
//! One that holds nothing may take whatever is there. Who cannot take waits, first come first served; those who hold
//! something and want too much more let others pass, but not those of their own share.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Memory that is counted in bytes.
#[derive(Debug)]
pub(crate) struct Budget {
    total: u64,
    ledger: Mutex<Ledger>,
}

#[derive(Debug)]
struct Ledger {
    free: u64,
    held: HashMap<u64, u64>,
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    share: u64,
    bytes: u64,
    grant: oneshot::Sender<Permit>,
}

/// Memory that is set aside; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    budget: Arc<Budget>,
    share: u64,
    bytes: u64,
}

/// Memory, or the wait for it. Dropped, the wait is over.
#[derive(Debug)]
pub(crate) enum Grant {
    Now(Permit),
    Later(oneshot::Receiver<Permit>),
}

/// Whether a share may take bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum May {
    Take,
    /// There is not enough.
    Lack,
    /// It would have more than it leaves to others.
    Over,
}

impl Budget {
    pub(crate) fn new(total: u64) -> Arc<Budget> {
        let ledger = Ledger { free: total, held: HashMap::new(), waiting: VecDeque::new() };
        Arc::new(Budget { total, ledger: Mutex::new(ledger) })
    }

    /// Takes bytes for a share. More than there are in all are never granted.
    pub(crate) fn take(self: &Arc<Budget>, share: u64, bytes: u64) -> Grant {
        let mut ledger = self.lock();
        // Those who no longer wait must not stand before others.
        ledger.waiting.retain(|waiting| !waiting.grant.is_closed());
        let stands_before = |other: &Waiting| other.share == share || ledger.may(other.share, other.bytes) == May::Lack;
        if ledger.may(share, bytes) == May::Take && !ledger.waiting.iter().any(stands_before) {
            ledger.give(share, bytes);
            return Grant::Now(Permit { budget: Arc::clone(self), share, bytes });
        }
        let (grant, granted) = oneshot::channel();
        ledger.waiting.push_back(Waiting { share, bytes, grant });
        Grant::Later(granted)
    }

    /// Whether those who wait are worth disconnecting somebody who does nothing with what he has.
    pub(crate) fn is_short(&self) -> bool {
        let ledger = self.lock();
        ledger.free < self.total / 4 || ledger.waiting.iter().any(|waiting| !waiting.grant.is_closed())
    }

    fn give_back(self: &Arc<Budget>, share: u64, bytes: u64) {
        let mut granted = Vec::new();
        {
            let mut ledger = self.lock();
            ledger.free += bytes;
            if let Some(held) = ledger.held.get_mut(&share) {
                *held -= bytes;
                if *held == 0 {
                    ledger.held.remove(&share);
                }
            }
            let (mut at, mut over) = (0, Vec::new());
            while let Some(waiting) = ledger.waiting.get(at) {
                let (share, bytes) = (waiting.share, waiting.bytes);
                if waiting.grant.is_closed() {
                    ledger.waiting.remove(at);
                    continue;
                }
                match ledger.may(share, bytes) {
                    May::Lack => break,
                    _ if over.contains(&share) => at += 1,
                    May::Over => {
                        over.push(share);
                        at += 1;
                    }
                    May::Take => {
                        ledger.give(share, bytes);
                        let permit = Permit { budget: Arc::clone(self), share, bytes };
                        granted.extend(ledger.waiting.remove(at).map(|waiting| (waiting.grant, permit)));
                    }
                }
            }
        }
        for (grant, permit) in granted {
            let _ = grant.send(permit); // one who has gone meanwhile gives it back
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ledger {
    fn may(&self, share: u64, bytes: u64) -> May {
        match self.held.get(&share) {
            None if bytes <= self.free => May::Take,
            None => May::Lack,
            Some(held) if held.saturating_add(bytes).saturating_add(bytes) <= self.free => May::Take,
            Some(_) => May::Over,
        }
    }

    fn give(&mut self, share: u64, bytes: u64) {
        self.free -= bytes;
        *self.held.entry(share).or_default() += bytes;
    }
}

impl Permit {
    /// Makes one of two of the same share.
    pub(crate) fn merge(&mut self, mut other: Permit) {
        debug_assert_eq!(self.share, other.share, "a connection has one export");
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.budget.give_back(self.share, self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(grant: Grant) -> Permit {
        match grant {
            Grant::Now(permit) => permit,
            Grant::Later(_) => panic!("has to wait"),
        }
    }

    fn later(grant: Grant) -> oneshot::Receiver<Permit> {
        match grant {
            Grant::Now(_) => panic!("has not to wait"),
            Grant::Later(granted) => granted,
        }
    }

    #[test]
    fn a_share_holds_no_more_than_it_leaves_and_one_that_holds_nothing_takes_what_is_there() {
        let budget = Budget::new(1000);
        let mut greedy: Vec<Permit> = (0..5).map(|_| now(budget.take(1, 100))).collect();
        let mut more = later(budget.take(1, 100));
        let _second = [now(budget.take(2, 100)), now(budget.take(2, 100))];
        let _third = now(budget.take(3, 300));
        assert!(more.try_recv().is_err(), "nothing is left, and it is the one that has most");
        assert!(budget.is_short());
        let mut fourth = later(budget.take(4, 100));
        let mut fifth = later(budget.take(5, 10));
        greedy.pop();
        let _fourth = fourth.try_recv().expect("what came back goes to who holds nothing");
        assert!(fifth.try_recv().is_err() && more.try_recv().is_err());
        greedy.pop();
        let _fifth = fifth.try_recv().expect("in turn");
        assert!(more.try_recv().is_err());
    }

    #[test]
    fn a_large_request_is_not_overtaken_for_ever_by_small_ones() {
        let budget = Budget::new(1000);
        let small: Vec<Permit> = (0..8).map(|share| now(budget.take(share, 100))).collect();
        let mut large = later(budget.take(90, 900));
        let mut after = later(budget.take(91, 100));
        assert!(after.try_recv().is_err(), "there would be room, but somebody came first");
        drop(small);
        let large = large.try_recv().expect("all of the others are done");
        let _after = after.try_recv().expect("it fits beside it");
        drop(large);
    }

    #[test]
    fn who_no_longer_waits_stands_before_nobody_and_permits_give_all_back() {
        let budget = Budget::new(100);
        let mut first = now(budget.take(1, 40));
        drop(later(budget.take(2, 90)));
        first.merge(now(budget.take(1, 10)));
        let gone = later(budget.take(3, 80));
        let mut waits = later(budget.take(4, 60));
        drop(gone);
        drop(first);
        let permit = waits.try_recv().expect("all is free");
        drop(permit);
        let _all = now(budget.take(5, 100));
        assert!(budget.lock().waiting.is_empty());
        assert_eq!(budget.lock().held.len(), 1);
    }
}
