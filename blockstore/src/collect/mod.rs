//! Collect: frees the space of chunks that no recovery point needs, beside backups, recoveries and other appliances.
//!
//! ```text
//! lease -> mark -> sweep what is due in quarantine -> repack what is mostly dead -> quarantine what is dead
//! ```
//! A **round** is one look at everything, in an order that makes it safe: leases, points, leases again, index, packs
//! (`mark`). `sweep` says when a pack is deleted and why nobody can miss it; `repack` and `sweep::condemn` say in
//! which order they write. Everything may be cut off between any two steps, by a crash or by the caller: what is left is
//! packs stored twice, packs that no run names, or a quarantine that waits, and the next collect goes on from there.

mod explain;
mod keyless;
mod mark;
mod plan;
mod quarantine;
mod repack;
mod report;
mod summary;
mod sweep;
mod times;

#[cfg(test)]
mod tests;

pub use keyless::KeylessCollect;
pub(crate) use quarantine::packs as quarantined_packs;
pub use report::{Blocker, CollectReport, Holder, PackReport, Quarantined};
pub use summary::Summary;

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use tracing::{info, warn};

use crate::error::ReadError;
use crate::format::FormatError;
use crate::id::{BatchId, ChunkId, LeaseId, PackId};
use crate::lease::{LeaseError, LeaseKind, LeaseState};
use crate::pack::fetch::Fetcher;
use crate::progress::Progress;
use crate::repository::Repository;
use crate::storage::{Object, ObjectKind};
use mark::{Marks, Roots};
use plan::{Plan, Standing, Tally};
use quarantine::Batch;

/// How a collect goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectOptions {
    /// Say what would be done and write nothing.
    pub dry_run: bool,
    /// Do not wait for the dates of what is in quarantine; leases and marks count all the same.
    pub reclaim_now: bool,
    /// How long packs stay in quarantine.
    pub quarantine: Duration,
    /// In per cent: a pack less of which is needed is repacked; 0 repacks nothing.
    pub threshold: u8,
}

impl Default for CollectOptions {
    fn default() -> CollectOptions {
        CollectOptions { dry_run: false, reclaim_now: false, quarantine: Duration::from_secs(24 * 3600), threshold: 50 }
    }
}

/// Why a collect failed. Nothing that any point needs was touched.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// Reading failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Writing or deleting failed.
    #[error("cannot write or delete {object}")]
    Write {
        /// What.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// Its lease cannot be taken, or has lapsed.
    #[error("the collect has no lease of the repository")]
    Lease(#[from] LeaseError),
    /// Another collect is at work.
    #[error("{holder} is at work on this repository")]
    InUse {
        /// Which.
        holder: String,
    },
    /// What is needed cannot be known, so nothing is freed.
    #[error("nothing is freed, because it is not known what {} other object(s) need: {}: {}", .0.len() - 1, .0.first().map_or("", |first| first.object.as_str()), .0.first().map_or("", |first| first.problem.as_str()))]
    Blocked(Vec<Blocker>),
    /// No pack has this name.
    #[error("there is no pack {prefix}")]
    NoSuchPack {
        /// What was asked for.
        prefix: String,
    },
    /// Several packs have names that begin so.
    #[error("{count} packs have names that begin with {prefix}")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// How many.
        count: usize,
    },
    /// The caller cancelled.
    #[error("the collect was cancelled")]
    Cancelled,
}

impl CollectError {
    fn write(object: &str, source: io::Error) -> CollectError {
        CollectError::Write { object: object.to_owned(), source }
    }
}

/// One look at everything.
struct Round {
    /// The leases that stood when it began, stale ones left out.
    leases: Vec<LeaseState>,
    roots: Roots,
    batches: Vec<(BatchId, Result<Batch, FormatError>)>,
    marks: Marks,
    standing: Standing,
    tallies: HashMap<PackId, Tally>,
    lost: u64,
    blockers: Vec<Blocker>,
}

impl Round {
    fn look(repository: &Repository, progress: &Progress) -> Result<Round, CollectError> {
        let fetcher = repository.fetcher();
        let mut leases = repository.leases()?;
        leases.retain(|lease| !lease.verdict.is_stale());
        let roots = Roots::gather(repository)?;
        let batches = quarantine::list(repository.storage(), repository.id())?;
        let marked = mark::mark(fetcher, &roots, &|| stand(fetcher, &batches), progress)?;
        let tallies = plan::tally(&marked.marks);
        Ok(Round {
            leases,
            roots,
            batches,
            tallies,
            standing: marked.standing,
            marks: marked.marks,
            lost: marked.lost,
            blockers: marked.blockers,
        })
    }

    /// A look that things can be freed by. The points it did not find must be gone for good: one that a killed forget has
    /// removed, and no sync covered, would come back with the next power cut.
    fn look_durably(repository: &Repository, progress: &Progress) -> Result<Round, CollectError> {
        let round = Round::look(repository, progress)?;
        let settled = repository.storage().settle(ObjectKind::Point);
        settled.map_err(|source| CollectError::write("the names of the points", source))?;
        Ok(round)
    }

    /// Those of some leases that still stand.
    fn held_up(&self, waits: &[LeaseId]) -> Vec<&LeaseState> {
        #[cfg(test)]
        if tests::broken(tests::Rule::WaitForBackups) {
            return Vec::new();
        }
        self.leases.iter().filter(|lease| waits.contains(&lease.id)).collect()
    }

    fn plan(&self, threshold: u8) -> Plan {
        let mut plan = plan::plan(&self.tallies, &self.standing, threshold);
        // A running backup's last packs are in no run yet. Where something is damaged, one of these may hold a good copy.
        if self.leases.iter().any(LeaseState::may_write) || self.marks.poor() > 0 || self.lost > 0 {
            plan.unnamed.clear();
        }
        plan
    }

    fn report(&self, options: &CollectOptions) -> CollectReport {
        CollectReport {
            dry_run: options.dry_run,
            points: self.roots.points.len() as u64,
            packs: self.standing.packs.len() as u64,
            pack_bytes: self.standing.packs.values().sum(),
            live_bytes: sweep::live_bytes(&self.tallies),
            lost_chunks: self.lost,
            lost_packs: self.lost_packs(),
            leases: self.leases.iter().map(LeaseState::holder).collect(),
            blocked: self.blockers.clone(),
            mark_bytes: self.marks.bytes(),
            ..CollectReport::default()
        }
    }

    /// Packs that points need, and that are not whole: nowhere is a better place for what they hold.
    fn lost_packs(&self) -> Vec<Blocker> {
        let needed = self.tallies.iter().filter(|(_, tally)| tally.live_frames > 0);
        let mut lost: Vec<Blocker> = needed
            .filter_map(|(pack, tally)| {
                let wrong = match (self.standing.rank(pack, tally.len), self.standing.packs.get(pack)) {
                    (plan::Rank::Missing, None) => "it is missing".to_owned(),
                    (plan::Rank::Missing, Some(len)) => format!("it has {len} bytes in the place of {}", tally.len),
                    (plan::Rank::Damaged, _) => "it was found damaged".to_owned(),
                    (plan::Rank::Gathered | plan::Rank::Good | plan::Rank::Quarantined, _) => return None,
                };
                let problem = format!("{wrong}, and recovery points need {} of its frames", tally.live_frames);
                Some(Blocker { object: Object::Pack(*pack).to_string(), problem })
            })
            .collect();
        lost.sort_unstable_by(|a, b| a.object.cmp(&b.object));
        lost
    }

    fn quarantined(&self, batch: &Batch, id: BatchId) -> Quarantined {
        let waits = batch.waits.as_deref().unwrap_or_default();
        Quarantined {
            batch: id.to_string(),
            packs: batch.packs.len() as u64,
            bytes: sweep::bytes_of(&self.standing, &batch.packs),
            created: batch.created,
            due: batch.due,
            waits_for: self.held_up(waits).into_iter().map(LeaseState::holder).collect(),
        }
    }
}

fn stand(fetcher: &Fetcher, batches: &[(BatchId, Result<Batch, FormatError>)]) -> Result<Standing, CollectError> {
    let storage = &*fetcher.storage;
    let listed = storage.list(ObjectKind::Pack);
    let listed = listed.map_err(|source| ReadError::Io { object: "packs".to_owned(), source })?;
    let packs = listed.into_iter().filter_map(|listed| match listed.object {
        Object::Pack(pack) => Some((pack, listed.len)),
        _ => None,
    });
    fetcher.damaged.load(storage).map_err(|source| ReadError::Io { object: "damaged".to_owned(), source })?;
    Ok(Standing {
        packs: packs.collect(),
        quarantined: batches
            .iter()
            .filter_map(|(_, batch)| batch.as_ref().ok())
            .flat_map(|b| &b.packs)
            .copied()
            .collect(),
        damaged: fetcher.damaged.all().into_iter().collect(),
    })
}

impl Repository {
    /// Frees what no point needs, in steps; see the module.
    pub fn collect(&self, options: &CollectOptions, progress: &Progress) -> Result<CollectReport, CollectError> {
        if options.dry_run {
            return self.rehearse_collect(options, progress);
        }
        let lease = self.lease(LeaseKind::Collect, "collect", &[])?;
        for other in self.leases()? {
            let collects = other.record.as_ref().is_some_and(|record| record.kind == LeaseKind::Collect);
            if other.verdict.is_stale() {
                // Before anything relies on it: whoever wakes up finds it gone and knows that it has lapsed.
                warn!(holder = other.holder(), "a stale lease is removed");
                let object = Object::Lease(other.id);
                self.storage().delete(&object).map_err(|source| CollectError::write(&object.to_string(), source))?;
            } else if collects && Some(other.id) != lease.id() {
                return Err(CollectError::InUse { holder: other.holder() });
            }
        }
        if let Err(error) = self.drop_stray_drills() {
            warn!(%error, "drills of points that are gone stay until the next collect");
        }
        let fetcher = self.fetcher();
        let mut round = Round::look_durably(self, progress)?;
        let mut report = round.report(options);
        if !round.blockers.is_empty() {
            return Err(CollectError::Blocked(round.blockers));
        }
        let plan = round.plan(options.threshold);
        let swept = sweep::sweep(fetcher, &round, &lease, options, &plan.gone, progress)?;
        note(&mut report, &swept);
        let repacked = repack::repack(fetcher, &round.marks, &round.tallies, &plan.repack, progress)?;
        (report.repacked_packs, report.repacked_bytes) = (repacked.packs.len() as u64, repacked.written);
        let condemned: Vec<PackId> = plan.dead.iter().chain(&repacked.packs).chain(&plan.unnamed).copied().collect();
        report.condemned_packs = condemned.len() as u64;
        report.condemned_bytes = sweep::bytes_of(&round.standing, &condemned);
        report.unnamed_packs = plan.unnamed.len() as u64;
        report.unnamed_bytes = sweep::bytes_of(&round.standing, &plan.unnamed);
        mark::stop(progress)?;
        sweep::condemn(fetcher, &condemned, options, &lease)?;
        let changed = !condemned.is_empty() || swept.packs > 0;
        let fresh = !condemned.is_empty() || swept.settled > 0;
        if fresh && (options.reclaim_now || options.quarantine.is_zero()) {
            round = Round::look_durably(self, progress)?;
            if !round.blockers.is_empty() {
                return Err(CollectError::Blocked(round.blockers));
            }
            let gone = round.plan(0).gone;
            note(&mut report, &sweep::sweep(fetcher, &round, &lease, options, &gone, progress)?);
        }
        for (id, batch) in quarantine::list(self.storage(), self.id())? {
            if let Ok(batch) = batch {
                report.quarantined.push(round.quarantined(&batch, id));
            }
        }
        summary::keep(fetcher, &round.roots, &round.tallies)?;
        if changed {
            info!(freed = report.freed_bytes, condemned = report.condemned_bytes, "collect done");
        }
        Ok(report)
    }

    fn rehearse_collect(&self, options: &CollectOptions, progress: &Progress) -> Result<CollectReport, CollectError> {
        let round = Round::look(self, progress)?;
        let plan = round.plan(options.threshold);
        let mut report = round.report(options);
        let now = crate::lease::unix(self.storage().surroundings().now());
        for (id, batch) in &round.batches {
            let Ok(batch) = batch else { continue };
            let waits = batch.waits.as_ref().is_none_or(|waits| !round.held_up(waits).is_empty());
            let needed = |pack: &&PackId| round.tallies.get(*pack).is_some_and(|tally| tally.live_frames > 0);
            report.reprieved_packs += batch.packs.iter().filter(needed).count() as u64;
            if round.blockers.is_empty() && !waits && (options.reclaim_now || batch.due <= now) {
                let dying: Vec<&PackId> = batch.packs.iter().filter(|pack| !needed(pack)).collect();
                report.freed_packs += dying.len() as u64;
                report.freed_bytes += sweep::bytes_of(&round.standing, dying);
            }
            report.quarantined.push(round.quarantined(batch, *id));
        }
        let live = |pack: &PackId| round.tallies.get(pack).map_or(0, |tally| tally.live_bytes);
        report.repacked_packs = plan.repack.len() as u64;
        report.repacked_bytes = plan.repack.iter().map(live).sum();
        let condemned: Vec<&PackId> = plan.dead.iter().chain(&plan.repack).chain(&plan.unnamed).collect();
        report.condemned_packs = condemned.len() as u64;
        report.condemned_bytes = sweep::bytes_of(&round.standing, condemned);
        report.unnamed_packs = plan.unnamed.len() as u64;
        report.unnamed_bytes = sweep::bytes_of(&round.standing, &plan.unnamed);
        Ok(report)
    }

    /// Marks what `live` says and plans, with the index alone: no point, node or pack is read, and the packs are taken
    /// to be as the index names them. For measuring. What is dead and what would be repacked are counted in the report.
    pub fn plan_collect(&self, threshold: u8, live: impl Fn(&ChunkId) -> bool) -> CollectReport {
        let runs = self.fetcher().index.runs();
        let mut marks = Marks::new(runs.clone(), |_, _| plan::Rank::Good);
        for entry in runs.iter().flat_map(|run| run.entries()) {
            let id = ChunkId(entry.id);
            if live(&id) {
                marks.mark(&id);
            }
        }
        let tallies = plan::tally(&marks);
        let packs: HashMap<PackId, u64> = tallies.iter().map(|(pack, tally)| (*pack, u64::from(tally.len))).collect();
        let standing = Standing { packs, ..Standing::default() };
        let plan = plan::plan(&tallies, &standing, threshold);
        CollectReport {
            dry_run: true,
            packs: standing.packs.len() as u64,
            pack_bytes: standing.packs.values().sum(),
            live_bytes: sweep::live_bytes(&tallies),
            condemned_packs: (plan.dead.len() + plan.repack.len()) as u64,
            condemned_bytes: sweep::bytes_of(&standing, plan.dead.iter().chain(&plan.repack)),
            repacked_packs: plan.repack.len() as u64,
            mark_bytes: marks.bytes(),
            ..CollectReport::default()
        }
    }
}

fn note(report: &mut CollectReport, swept: &sweep::Swept) {
    report.freed_packs += swept.packs;
    report.freed_bytes += swept.bytes;
    report.reprieved_packs += swept.reprieved;
}
