//! Mark: which index entries the recovery points need. One bit an entry, in memory; nothing else grows with the
//! repository but one byte a pack row.
//!
//! Order, and why: (1) the leases are listed (by the caller, who judges by them which backups have ended), (2) the points
//! are listed and read, (3) the leases are listed again, (4) the index is brought up to date. A point sealed by a backup
//! that had ended at 1 is seen at 2. A point that is forgotten before it is read at 2 is seen at 3 if anybody holds it,
//! because its holder had its lease before it made sure that the point is there. What the points of 2 and 3 name was
//! durable in the index before they were, so 4 sees it.

use std::collections::HashMap;
use std::sync::Arc;

use tracing::warn;

use super::plan::{Rank, Standing};
use super::{Blocker, CollectError};
use crate::error::ReadError;
use crate::format::run::{PackRow, RawEntry};
use crate::id::{ChunkId, PackId, RecoveryPointId, RunId};
use crate::index::layers::Layers;
use crate::index::run::{Location, Run};
use crate::lease::LeaseRecord;
use crate::manifest::{FAN_OUT, Shape};
use crate::pack::fetch::Fetcher;
use crate::progress::Progress;
use crate::repository::Repository;

/// How often a mark begins anew because the index did not know a chunk, and did after it repaired itself.
const TRIES_MAX: u32 = 4;

/// A disk whose chunks are needed.
#[derive(Debug, Clone)]
pub(super) struct Root {
    pub point: RecoveryPointId,
    pub machine: String,
    size: u64,
    root: ChunkId,
    level: u8,
}

/// Everything that must stay readable, and what cannot be known.
#[derive(Debug, Default)]
pub(super) struct Roots {
    pub disks: Vec<Root>,
    /// Points listed, and points only leases name.
    pub points: Vec<RecoveryPointId>,
    pub blockers: Vec<Blocker>,
}

impl Roots {
    /// Steps 2 and 3.
    pub fn gather(repository: &Repository) -> Result<Roots, CollectError> {
        let mut roots = Roots::default();
        let chunk_size = repository.chunk_size();
        let mut add = |point: RecoveryPointId, machine: &str, disks: &mut dyn Iterator<Item = (u64, ChunkId)>| {
            if roots.points.contains(&point) {
                return;
            }
            roots.points.push(point);
            for (size, root) in disks {
                let Some(shape) = Shape::of(size, chunk_size) else { continue }; // refused when decoded
                let level = shape.levels - 1;
                roots.disks.push(Root { point, machine: machine.to_owned(), size, root, level });
            }
        };
        let mut blockers = Vec::new();
        for id in repository.list_points()? {
            match repository.load_point(id) {
                Ok(point) => {
                    add(id, &point.machine, &mut point.disks.iter().map(|disk| (disk.size, disk.root)));
                }
                Err(ReadError::NoSuchPoint { .. }) => {} // forgotten since the listing; a lease may name it
                Err(error @ ReadError::Damaged { .. }) => blockers.push(Blocker::point(id, &error)),
                Err(error) => return Err(error.into()),
            }
        }
        for lease in repository.leases()? {
            match &lease.record {
                None => blockers.push(Blocker::lease(&lease)),
                Some(_) if lease.verdict.is_stale() => {}
                Some(LeaseRecord { points, .. }) => {
                    for point in points {
                        let mut disks = point.disks.iter().map(|disk| (disk.size, disk.root));
                        add(point.id, &point.machine, &mut disks);
                    }
                }
            }
        }
        roots.blockers = blockers;
        Ok(roots)
    }
}

/// A bit for every entry of the runs of one moment.
#[derive(Debug)]
pub(crate) struct Marks {
    runs: Vec<Arc<Run>>,
    /// The same, for lookups, and which is which.
    layers: Layers,
    numbers: HashMap<RunId, usize>,
    bits: Vec<Vec<u64>>,
    ranks: Vec<Vec<Rank>>,
    /// Marked places in packs that are damaged or missing.
    poor: u64,
}

/// What became of an id that is to be marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marked {
    New,
    Before,
    /// No run knows it.
    Nowhere,
}

impl Marks {
    /// No entry is marked yet.
    pub fn new(runs: Vec<Arc<Run>>, rank: impl Fn(&PackId, u32) -> Rank) -> Marks {
        let words = |run: &Arc<Run>| usize::try_from(run.entry_count().div_ceil(64)).unwrap_or(usize::MAX); // in memory
        let bits = runs.iter().map(|run| vec![0; words(run)]).collect();
        let rank_of = |row: &PackRow| match rank(&row.pack, row.len) {
            Rank::Good if row.gathered => Rank::Gathered,
            rank => rank,
        };
        let ranks = runs.iter().map(|run| run.packs().map(|row| rank_of(&row)).collect()).collect();
        let numbers = runs.iter().enumerate().map(|(number, run)| (run.id, number)).collect();
        Marks { layers: Layers::of(&runs), numbers, runs, bits, ranks, poor: 0 }
    }

    /// Marks one place of an id, the best.
    pub fn mark(&mut self, id: &ChunkId) -> Marked {
        let mut best: Option<(Rank, usize, usize)> = None;
        for run in self.layers.holding(id) {
            let Some(number) = self.numbers.get(&run.id).copied() else { continue };
            for at in run.range(id) {
                if self.is_marked(number, at) {
                    return Marked::Before;
                }
                let Some(raw) = run.entries().get(at).filter(|raw| run.location(raw).is_some()) else { continue };
                let rank = self.rank(number, raw);
                if best.is_none_or(|(known, ..)| rank < known) {
                    best = Some((rank, number, at));
                }
            }
        }
        let Some((rank, run, at)) = best else { return Marked::Nowhere };
        self.poor += u64::from(rank >= Rank::Damaged);
        if let Some(word) = self.bits.get_mut(run).and_then(|bits| bits.get_mut(at / 64)) {
            *word |= 1 << (at % 64);
        }
        Marked::New
    }

    fn rank(&self, run: usize, raw: &RawEntry) -> Rank {
        let row = raw.get().row as usize;
        self.ranks.get(run).and_then(|ranks| ranks.get(row)).copied().unwrap_or(Rank::Missing)
    }

    fn is_marked(&self, run: usize, at: usize) -> bool {
        self.bits.get(run).and_then(|bits| bits.get(at / 64)).is_some_and(|word| word >> (at % 64) & 1 == 1)
    }

    /// The runs.
    pub fn runs(&self) -> &[Arc<Run>] {
        &self.runs
    }

    /// The places marked in a run.
    pub fn marked(&self, run: usize) -> impl Iterator<Item = Location> {
        let entries = self.runs.get(run).map(|run| (run, run.entries()));
        entries.into_iter().flat_map(move |(of, entries)| {
            let marked = entries.iter().enumerate().filter(move |(at, _)| self.is_marked(run, *at));
            marked.filter_map(move |(_, raw)| of.location(raw))
        })
    }

    /// How many places were marked in packs that are damaged or missing, because there was no other.
    pub fn poor(&self) -> u64 {
        self.poor
    }

    /// Memory taken.
    pub fn bytes(&self) -> u64 {
        let bits: usize = self.bits.iter().map(|bits| bits.len() * 8).sum();
        let ranks: usize = self.ranks.iter().map(Vec::len).sum();
        (bits + ranks) as u64
    }
}

/// A mark that was completed.
#[derive(Debug)]
pub(super) struct Mark {
    pub marks: Marks,
    pub standing: Standing,
    /// Chunks that no pack holds: lost, but nothing depends on them.
    pub lost: u64,
    pub blockers: Vec<Blocker>,
}

/// Step 4, then the walk. `stand` lists the packs, after the runs of the mark are known: a pack that a run names was
/// durable before the run, so one that is not listed is gone.
pub(super) fn mark(
    fetcher: &Fetcher,
    roots: &Roots,
    stand: &dyn Fn() -> Result<Standing, CollectError>,
    progress: &Progress,
) -> Result<Mark, CollectError> {
    fetcher.index.refresh()?;
    progress.add_total(roots.disks.iter().map(|disk| disk.size).sum());
    let mut tries = 0;
    loop {
        tries += 1;
        let seen = fetcher.index.generation();
        let runs = fetcher.index.runs();
        let standing = stand()?;
        let marks = Marks::new(runs, |pack, len| standing.rank(pack, len));
        let mut walk = Walk { fetcher, marks, progress, lost: 0, nowhere: false };
        let mut blockers = roots.blockers.clone();
        for disk in &roots.disks {
            match walk.node(disk.root, disk.level) {
                Ok(()) => {}
                Err(CollectError::Read(error)) if is_damage(&error) => {
                    blockers.push(Blocker::point(disk.point, &error))
                }
                Err(error) => return Err(error),
            }
            if tries == 1 {
                progress.add_done(disk.size);
            }
        }
        if walk.nowhere && tries < TRIES_MAX && fetcher.index.repair(seen)? {
            continue; // what was in no run may be in one now
        }
        if walk.lost > 0 {
            warn!(chunks = walk.lost, "chunks that points need are in no pack; `verify` names whom it hits");
        }
        return Ok(Mark { marks: walk.marks, standing, lost: walk.lost, blockers });
    }
}

/// The holders of some chunks: per point, how many of them it needs.
pub(super) fn holders(
    fetcher: &Fetcher,
    roots: &Roots,
    wanted: &dyn Fn(&ChunkId) -> bool,
    progress: &Progress,
) -> Result<HashMap<RecoveryPointId, u64>, CollectError> {
    let mut holders = HashMap::new();
    for disk in &roots.disks {
        let mut seen = std::collections::HashSet::new();
        let mut stack = vec![(disk.root, disk.level)];
        let mut count = 0;
        while let Some((id, level)) = stack.pop() {
            if id.is_zero() || !seen.insert(id) {
                continue;
            }
            stop(progress)?;
            count += u64::from(wanted(&id));
            let Ok(node) = fetcher.node(&id, level) else { continue }; // damage is the mark's to tell
            for at in 0..FAN_OUT {
                let child = node.child(at);
                if level > 0 {
                    stack.push((child, level - 1));
                } else if !child.is_zero() && wanted(&child) && seen.insert(child) {
                    count += 1;
                }
            }
        }
        if count > 0 {
            *holders.entry(disk.point).or_default() += count;
        }
    }
    Ok(holders)
}

struct Walk<'a> {
    fetcher: &'a Fetcher,
    marks: Marks,
    progress: &'a Progress,
    lost: u64,
    nowhere: bool,
}

impl Walk<'_> {
    /// Marks a node and all below it, unless it is marked already. At most 7 levels deep.
    fn node(&mut self, id: ChunkId, level: u8) -> Result<(), CollectError> {
        if id.is_zero() {
            return Ok(());
        }
        stop(self.progress)?;
        match self.marks.mark(&id) {
            Marked::Before => return Ok(()),
            Marked::New => {}
            Marked::Nowhere => self.nowhere = true, // the read below says that it is missing, or finds it
        }
        let node = self.fetcher.node(&id, level)?;
        for at in 0..FAN_OUT {
            let child = node.child(at);
            if level > 0 {
                self.node(child, level - 1)?;
            } else if !child.is_zero() && self.marks.mark(&child) == Marked::Nowhere {
                self.nowhere = true;
                self.lost += 1;
            }
        }
        Ok(())
    }
}

pub(super) fn stop(progress: &Progress) -> Result<(), CollectError> {
    if progress.is_cancelled() { Err(CollectError::Cancelled) } else { Ok(()) }
}

/// Whether reading failed because of what is stored, not because storage is away.
fn is_damage(error: &ReadError) -> bool {
    match error {
        ReadError::Io { source, .. } => {
            matches!(source.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::UnexpectedEof)
        }
        ReadError::Cancelled => false,
        _ => true,
    }
}
