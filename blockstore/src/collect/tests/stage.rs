//! Storage on which several actors take turns, one storage operation at a time, in an order that a policy decides.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::lease::{Process, Surroundings};
use crate::mapping::Mapping;
use crate::repository::test_support::Numbers;
use crate::storage::{Listed, Object, ObjectKind, Storage};

/// Nobody computes that long between two operations.
const STUCK: Duration = Duration::from_secs(120);

/// Who goes next.
#[derive(Debug, Clone)]
pub enum Policy {
    /// Anybody; whoever has begun is likely to go on.
    Random(u64),
    /// Whoever has begun goes on; at these steps another one does.
    Switch(Vec<(u64, usize)>),
}

/// A play of some actors.
#[derive(Debug)]
pub struct Stage {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    policy: Policy,
    numbers: Numbers,
    /// Threads of an actor that wait for its turn; none of an actor that has ended.
    waiting: Vec<Option<u32>>,
    turn: Option<usize>,
    busy: bool,
    last: usize,
    step: u64,
    trace: Vec<String>,
    ended: HashSet<u32>,
    now: u64,
}

impl Stage {
    /// A stage for some actors, none of whom has begun.
    pub fn new(actors: usize, policy: Policy) -> Arc<Stage> {
        let seed = if let Policy::Random(seed) = policy { seed } else { 0 };
        let state = State {
            policy,
            numbers: Numbers(seed),
            waiting: vec![Some(0); actors],
            turn: None,
            busy: false,
            last: 0,
            step: 0,
            trace: Vec::new(),
            ended: HashSet::new(),
            now: 1_800_000_000,
        };
        Arc::new(Stage { state: Mutex::new(state), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who did what, in order.
    pub fn trace(&self) -> String {
        self.lock().trace.join("\n")
    }

    /// How many operations there were.
    pub fn steps(&self) -> u64 {
        self.lock().step
    }

    /// An actor ends: nobody waits for it any more, and its process is gone.
    pub fn leave(&self, actor: usize) {
        let mut state = self.lock();
        state.waiting[actor] = None;
        state.ended.insert(pid(actor));
        self.changed.notify_all();
    }

    fn enter(&self, actor: usize, what: &dyn fmt::Display) {
        let mut state = self.lock();
        if let Some(waiting) = state.waiting[actor].as_mut() {
            *waiting += 1;
        }
        self.changed.notify_all();
        loop {
            state.choose();
            if state.turn == Some(actor) {
                break;
            }
            self.changed.notify_all();
            let (back, late) = self.changed.wait_timeout(state, STUCK).unwrap_or_else(PoisonError::into_inner);
            state = back;
            assert!(!late.timed_out(), "nobody goes on:\n{}", state.trace.join("\n"));
        }
        state.turn = None;
        state.busy = true;
        if let Some(waiting) = state.waiting[actor].as_mut() {
            *waiting -= 1;
        }
        let line = format!("{:>4} actor {actor}: {what}", state.step);
        state.trace.push(line);
        state.step += 1;
    }

    fn leave_operation(&self) {
        self.lock().busy = false;
        self.changed.notify_all();
    }
}

impl State {
    /// Gives the turn to somebody, once everybody who has not ended waits for it.
    fn choose(&mut self) {
        if self.turn.is_some() || self.busy || self.waiting.contains(&Some(0)) {
            return;
        }
        let ready: Vec<usize> = (0..self.waiting.len()).filter(|actor| self.waiting[*actor].is_some()).collect();
        let Some(first) = ready.first() else { return };
        let goes_on = if ready.contains(&self.last) { self.last } else { *first };
        let next = match &self.policy {
            Policy::Random(_) if self.numbers.below(4) > 0 => goes_on,
            Policy::Random(_) => ready[usize::try_from(self.numbers.below(ready.len() as u64)).unwrap()],
            Policy::Switch(at) => {
                let other = at.iter().find(|(step, actor)| *step == self.step && ready.contains(actor));
                other.map_or(goes_on, |(_, actor)| *actor)
            }
        };
        self.last = next;
        self.turn = Some(next);
    }
}

fn pid(actor: usize) -> u32 {
    u32::try_from(actor).unwrap() + 1
}

/// One actor's view of storage that all share: as of a process of its own.
#[derive(Debug)]
pub struct Staged {
    inner: Arc<dyn Storage>,
    stage: Arc<Stage>,
    actor: usize,
    /// Before the play begins, nothing waits.
    open: std::sync::atomic::AtomicBool,
}

impl Staged {
    /// The view of an actor; its operations wait for their turn after [`Staged::begin`].
    pub fn new(inner: Arc<dyn Storage>, stage: Arc<Stage>, actor: usize) -> Arc<Staged> {
        Arc::new(Staged { inner, stage, actor, open: true.into() })
    }

    /// From now on operations wait for their turn.
    pub fn begin(&self) {
        self.open.store(false, std::sync::atomic::Ordering::SeqCst);
    }

    fn turn<T>(&self, what: &dyn fmt::Display, work: impl FnOnce() -> T) -> T {
        if self.open.load(std::sync::atomic::Ordering::SeqCst) {
            return work();
        }
        self.stage.enter(self.actor, what);
        let result = work();
        self.stage.leave_operation();
        result
    }
}

impl Surroundings for Staged {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.stage.lock().now)
    }
    fn process(&self) -> Process {
        Process {
            host: "stage".into(),
            boot: "1".into(),
            namespace: "1".into(),
            pid: pid(self.actor),
            process_started: 1,
        }
    }
    fn is_gone(&self, process: &Process) -> bool {
        self.stage.lock().ended.contains(&process.pid)
    }
}

impl Storage for Staged {
    fn put(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        self.turn(&format_args!("put {object}"), || self.inner.put(object, bytes))
    }
    fn create(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        self.turn(&format_args!("create {object}"), || self.inner.create(object, bytes))
    }
    fn get(&self, object: &Object, max: u64) -> io::Result<Bytes> {
        self.turn(&format_args!("get {object}"), || self.inner.get(object, max))
    }
    fn get_range(&self, object: &Object, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.turn(&format_args!("read {object}"), || self.inner.get_range(object, offset, buf))
    }
    fn len(&self, object: &Object) -> io::Result<u64> {
        self.turn(&format_args!("look at {object}"), || self.inner.len(object))
    }
    fn list(&self, kind: ObjectKind) -> io::Result<Vec<Listed>> {
        self.turn(&format_args!("list {kind:?}"), || self.inner.list(kind))
    }
    fn delete(&self, object: &Object) -> io::Result<()> {
        self.turn(&format_args!("delete {object}"), || self.inner.delete(object))
    }
    fn settle(&self, kind: ObjectKind) -> io::Result<()> {
        self.inner.settle(kind)
    }
    fn map(&self, object: &Object) -> io::Result<Mapping> {
        self.turn(&format_args!("map {object}"), || self.inner.map(object))
    }
    fn surroundings(&self) -> &dyn Surroundings {
        self
    }
    fn is_vacant(&self) -> io::Result<bool> {
        self.inner.is_vacant()
    }
}
