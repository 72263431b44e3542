//! Who is about to start, and who waits for memory: first in, first out, in memory of the process.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::{Ask, Capacity, Holder, Refusal, Terms};
use crate::problem::Problem;

/// How often the host is looked at for somebody who waits: others than Lifeboat free memory too.
const LOOK: Duration = Duration::from_secs(1);

/// Lets in one VM after the other.
#[derive(Debug, Default)]
pub struct Admission {
    ledger: Mutex<Ledger>,
    /// Somebody who held memory or a place has given it up.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Ledger {
    granted: BTreeMap<u64, Holder>,
    waiting: BTreeMap<u64, Holder>,
    /// Those whose wait somebody else has ended, and who have not heard of it yet.
    ended: BTreeSet<u64>,
    next: u64,
}

/// Memory kept for a VM from its admission until this is dropped, when it runs or has failed.
#[derive(Debug)]
pub struct Grant {
    number: u64,
    admission: Arc<Admission>,
    /// What is odd about the host.
    pub warnings: Vec<String>,
}

impl Drop for Grant {
    fn drop(&mut self) {
        let mut ledger = self.admission.lock();
        ledger.granted.remove(&self.number);
        ledger.waiting.remove(&self.number);
        ledger.ended.remove(&self.number);
        drop(ledger);
        self.admission.look_again();
    }
}

impl Admission {
    /// Those that were let in and have no VM yet, and those that wait.
    pub fn known(&self) -> (Vec<Holder>, Vec<Holder>) {
        let ledger = self.lock();
        (ledger.granted.values().cloned().collect(), ledger.waiting.values().cloned().collect())
    }

    /// Ends the wait of `name`, if it waits.
    pub fn end(&self, name: &str) -> bool {
        let mut ledger = self.lock();
        let found = ledger.waiting.iter().find(|(_, holder)| holder.name == name).map(|(number, _)| *number);
        let Some(number) = found else { return false };
        ledger.waiting.remove(&number);
        ledger.ended.insert(number);
        drop(ledger);
        self.look_again();
        true
    }

    /// Whether `name` waits.
    pub fn waits(&self, name: &str) -> bool {
        self.lock().waiting.values().any(|holder| holder.name == name)
    }

    /// Has those that wait look at the host now rather than in a moment.
    pub fn look_again(&self) {
        self.changed.notify_waiters();
    }

    /// Lets `name` in, refuses it, or has it wait, as `terms` say. `capacity` adds up the host, given those let in and
    /// waiting. Dropped while it waits, the place in the queue is given up.
    pub async fn admit(
        self: &Arc<Self>,
        name: &str,
        ask: Ask,
        terms: Terms,
        capacity: impl Fn(Vec<Holder>, Vec<Holder>) -> Result<Capacity, Problem>,
    ) -> Result<Grant, Problem> {
        let holder = Holder { name: name.to_owned(), ask, resident: 0 };
        let mut grant = {
            let mut ledger = self.lock();
            if ledger.waiting.values().any(|other| other.name == name) {
                return Err(Problem::refused(format!("a recovery {name} waits for memory already"))
                    .hint("give another --name, or interrupt the command that waits"));
            }
            ledger.next += 1;
            Grant { number: ledger.next, admission: self.clone(), warnings: Vec::new() }
        };
        loop {
            if let Some(warnings) = self.try_once(grant.number, &holder, terms, &capacity)? {
                grant.warnings = warnings;
                return Ok(grant);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = self.changed.notified() => {}
            }
        }
    }

    /// Lets `name` in if there is room that nobody waits for; `None` if there is not at present. It takes no place in the
    /// queue: others come first.
    pub fn offer(
        self: &Arc<Self>,
        name: &str,
        ask: Ask,
        capacity: impl Fn(Vec<Holder>, Vec<Holder>) -> Result<Capacity, Problem>,
    ) -> Result<Option<Grant>, Problem> {
        let holder = Holder { name: name.to_owned(), ask, resident: 0 };
        let mut ledger = self.lock();
        let waiting: Vec<Holder> = ledger.waiting.values().cloned().collect();
        let before = waiting.len();
        let capacity = capacity(ledger.granted.values().cloned().collect(), waiting)?;
        match capacity.decide(name, ask, before) {
            Ok(warnings) => {
                ledger.next += 1;
                let number = ledger.next;
                ledger.granted.insert(number, holder);
                Ok(Some(Grant { number, admission: self.clone(), warnings }))
            }
            Err(refusal) if refusal.passes() => Ok(None),
            Err(refusal) => Err(capacity.explain_drill(name, refusal)),
        }
    }

    /// The decision and its entry in the ledger are one step: two askers are not let in for the same memory.
    fn try_once(
        &self,
        number: u64,
        holder: &Holder,
        terms: Terms,
        capacity: impl Fn(Vec<Holder>, Vec<Holder>) -> Result<Capacity, Problem>,
    ) -> Result<Option<Vec<String>>, Problem> {
        let mut ledger = self.lock();
        if ledger.ended.remove(&number) {
            return Err(Problem::refused(format!(
                "{} no longer waits for memory: it was discarded; nothing was started",
                holder.name
            )));
        }
        let waiting: Vec<Holder> = ledger.waiting.range(..number).map(|(_, other)| other.clone()).collect();
        let before = waiting.len();
        let capacity = match capacity(ledger.granted.values().cloned().collect(), waiting) {
            Ok(capacity) => Some(capacity),
            Err(_) if terms == Terms::Force => None,
            Err(problem) => return Err(problem),
        };
        let decided: Result<Vec<String>, Refusal> =
            capacity.as_ref().map_or(Ok(Vec::new()), |capacity| capacity.decide(&holder.name, holder.ask, before));
        let warnings = match (decided, terms, capacity) {
            (Ok(warnings), _, _) => warnings,
            (Err(refusal), Terms::Force, Some(capacity)) => {
                vec![capacity.explain(&holder.name, refusal).title.replace("is not started", "was started by --force")]
            }
            (Err(refusal), Terms::Queue, _) if refusal.passes() => {
                ledger.waiting.insert(number, holder.clone());
                return Ok(None);
            }
            (Err(refusal), _, Some(capacity)) => return Err(capacity.explain(&holder.name, refusal)),
            (Err(_), _, None) => Vec::new(),
        };
        ledger.waiting.remove(&number);
        ledger.granted.insert(number, holder.clone());
        Ok(Some(warnings))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
