//! The walk through all manifests, on all cores: every node once, and for every id whether some place gives it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use super::{Bad, Blame, Verifier, VerifyError};
use crate::error::ReadError;
use crate::id::{ChunkId, IdHash, PackId};
use crate::index::run::Location;
use crate::index::seen::Seen;
use crate::manifest::{FAN_OUT, Shape};
use crate::storage::Object;

/// How long a worker without work waits before it looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(100);

/// A manifest node to look at, and how many bytes of a disk go with it.
struct Task {
    id: ChunkId,
    level: u8,
    bytes: u64,
}

#[derive(Default)]
struct Queue {
    tasks: Vec<Task>,
    working: usize,
}

/// What a worker found.
#[derive(Default)]
struct Found {
    nodes: u64,
    chunks: u64,
    referenced: HashSet<PackId>,
    bad: Bad,
    fragile: HashMap<ChunkId, Option<u8>, IdHash>,
    wrong: HashMap<PackId, String>,
    /// Packs that were not in the listing.
    fresh: HashMap<PackId, Option<u64>>,
}

impl Found {
    fn join(&mut self, other: Found) {
        self.nodes += other.nodes;
        self.chunks += other.chunks;
        self.referenced.extend(other.referenced);
        self.bad.extend(other.bad);
        self.fragile.extend(other.fragile);
        self.wrong.extend(other.wrong);
        self.fresh.extend(other.fresh);
    }
}

struct Walk<'a> {
    verifier: &'a Verifier<'a>,
    seen: Seen,
    queue: Mutex<Queue>,
    changed: Condvar,
    stop: AtomicBool,
    /// Whether the progress shows this walk.
    shown: bool,
}

impl Verifier<'_> {
    /// Walks all points and keeps what was found, in place of what an earlier walk found.
    pub(super) fn walk(&mut self) -> Result<(), VerifyError> {
        let shown = self.read.is_empty();
        let mut tasks = Vec::new();
        for disk in self.points.iter().flat_map(|point| &point.disks) {
            let Some(shape) = Shape::of(disk.size, disk.chunk_size) else { continue }; // refused when loaded
            tasks.push(Task { id: disk.root, level: shape.levels - 1, bytes: disk.size });
        }
        let walk = Walk {
            verifier: self,
            seen: Seen::new(&self.repository.fetcher().index),
            queue: Mutex::new(Queue { tasks, working: 0 }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            shown,
        };
        let all = Mutex::new(Ok(Found::default()));
        let work = || {
            let mine = walk.work().inspect_err(|_| walk.stop.store(true, Ordering::Release));
            walk.changed.notify_all();
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            match (&mut *all, mine) {
                (Ok(all), Ok(mine)) => all.join(mine),
                (Ok(_), Err(error)) => *all = Err(error),
                (Err(_), _) => {}
            }
        };
        thread::scope(|scope| {
            for _ in 1..thread::available_parallelism().map_or(2, |cores| cores.get().min(32)) {
                let _ = thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, work); // or fewer
            }
            work();
        });
        let found: Found = all.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        self.stop_if_cancelled()?;
        (self.report.nodes, self.report.chunks) = (found.nodes, found.chunks);
        (self.referenced, self.bad, self.wrong) = (found.referenced, found.bad, found.wrong);
        self.fragile = found.fragile;
        self.packs.extend(found.fresh.into_iter().filter_map(|(pack, len)| Some((pack, len?))));
        Ok(())
    }
}

impl Walk<'_> {
    fn work(&self) -> Result<Found, VerifyError> {
        let mut found = Found::default();
        while let Some(task) = self.take() {
            let children = self.look_at(&task, &mut found);
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.working -= 1;
            queue.tasks.extend(children?);
            drop(queue);
            self.changed.notify_all();
        }
        Ok(found)
    }

    /// The next node; none when all is done, or somebody failed or cancelled. The newest first: that keeps them few.
    fn take(&self) -> Option<Task> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if self.stop.load(Ordering::Acquire) || self.verifier.progress.is_cancelled() {
                return None;
            }
            if let Some(task) = queue.tasks.pop() {
                queue.working += 1;
                return Some(task);
            }
            if queue.working == 0 {
                return None;
            }
            queue = self.changed.wait_timeout(queue, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn look_at(&self, task: &Task, found: &mut Found) -> Result<Vec<Task>, VerifyError> {
        let mut children = Vec::new();
        let new = !task.id.is_zero() && self.seen.insert(&task.id);
        if new && self.look_up(&task.id, Some(task.level), found)? {
            match self.verifier.repository.fetcher().node(&task.id, task.level) {
                Ok(node) => {
                    found.nodes += 1;
                    for id in (0..FAN_OUT).map(|at| node.child(at)).filter(|id| !id.is_zero()) {
                        if task.level > 0 {
                            children.push(Task { id, level: task.level - 1, bytes: 0 });
                        } else {
                            found.chunks += 1;
                            self.look_up(&id, None, found)?;
                        }
                    }
                }
                Err(error) => self.node_damage(task, &error, found),
            }
        }
        if self.shown {
            // A disk's bytes count when its last node is looked at; about, that is when its children are.
            let share = task.bytes / (children.len() as u64 + 1);
            self.verifier.progress.add_done(task.bytes - share * children.len() as u64);
            children.iter_mut().for_each(|child| child.bytes = share);
        }
        Ok(children)
    }

    fn node_damage(&self, task: &Task, error: &ReadError, found: &mut Found) {
        let id = &task.id;
        let packs: Vec<PackId> = match error {
            ReadError::CorruptChunk { pack, .. } => vec![*pack],
            ReadError::MissingChunk { .. } => Vec::new(),
            _ => self.locate(id).iter().map(|location| location.pack.pack).collect(),
        };
        let what = match error {
            ReadError::Io { source, .. } => super::head::cannot_be_read(source),
            _ => format!("manifest node {id} in it is damaged"),
        };
        packs.iter().for_each(|pack| drop(found.wrong.insert(*pack, what.clone())));
        found.bad.insert(*id, Blame { packs, level: Some(task.level) });
    }

    fn locate(&self, id: &ChunkId) -> Vec<Location> {
        self.verifier.repository.fetcher().index.locate(id)
    }

    /// Whether an id has a place in a pack that exists at the right length and is not known to hold it damaged; else it
    /// is noted. Of several places the best counts, so that a damaged pack is needed only for what is in no other.
    fn look_up(&self, id: &ChunkId, level: Option<u8>, found: &mut Found) -> Result<bool, VerifyError> {
        let verifier = self.verifier;
        let index = &verifier.repository.fetcher().index;
        let mut locations = self.locate(id);
        if locations.is_empty() && index.repair(index.generation())? {
            locations = self.locate(id);
        }
        let mut blamed = Vec::new();
        let mut marked = Vec::new();
        for location in &locations {
            let pack = location.pack.pack;
            if let Some(what) = self.pack_problem(location, found) {
                found.wrong.insert(pack, what);
                blamed.push(pack);
            } else if verifier.rotten.contains_key(&pack) || verifier.repository.fetcher().damaged.contains(&pack) {
                marked.push(pack);
            } else {
                found.referenced.insert(pack);
                return Ok(true);
            }
        }
        found.referenced.extend(&marked);
        for pack in marked {
            match verifier.rotten.get(&pack) {
                Some(rotten) if rotten.holds(id) => {
                    found.wrong.insert(pack, rotten.what.clone());
                    blamed.push(pack);
                }
                _ => {
                    found.fragile.insert(*id, level);
                    return Ok(true); // marked, but this frame is good, or was not read yet
                }
            }
        }
        found.bad.insert(*id, Blame { packs: blamed, level });
        Ok(false)
    }

    fn pack_problem(&self, location: &Location, found: &mut Found) -> Option<String> {
        let pack = location.pack.pack;
        let len = self.verifier.packs.get(&pack).copied().or_else(|| {
            // Not in the listing: perhaps a backup that runs at the same time stored it since.
            let storage = self.verifier.repository.storage();
            *found.fresh.entry(pack).or_insert_with(|| storage.len(&Object::Pack(pack)).ok())
        });
        match len {
            None => Some("it is missing".to_owned()),
            Some(len) if len != u64::from(location.pack.len) => {
                Some(format!("it has {len} bytes instead of {}", location.pack.len))
            }
            Some(_) => None,
        }
    }
}
