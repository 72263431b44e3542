//! A dry run without the key: what the last collect knew, and what has changed since.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::report::Quarantined;
use super::{CollectError, quarantine, summary, times};
use crate::error::ReadError;
use crate::id::{PackId, RecoveryPointId};
use crate::index::run::Run;
use crate::keyless::Keyless;
use crate::lease::{LeaseState, unix};
use crate::storage::{Listed, Object, ObjectKind};

/// What can be said about freeing space without the key. Which chunks a point needs is sealed; so this goes by what the
/// last collect with the key found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeylessCollect {
    /// When the last collect with the key looked, in seconds since 1970 UTC; none if no one has yet.
    #[serde(with = "times::option")]
    pub as_of: Option<u64>,
    /// Points it did not see: they may need what it found dead.
    pub points_new: Vec<RecoveryPointId>,
    /// Points it went by that are gone: more may be free than it says.
    pub points_gone: Vec<RecoveryPointId>,
    /// Packs in the repository.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Packs that nothing needed, and that are not in quarantine.
    pub dead_packs: u64,
    /// Their bytes.
    pub dead_bytes: u64,
    /// Bytes that nothing needed, in packs of which something was needed.
    pub partly_dead_bytes: u64,
    /// Packs that no index run names.
    pub unnamed_packs: u64,
    /// Their bytes.
    pub unnamed_bytes: u64,
    /// What is in quarantine.
    pub quarantined: Vec<Quarantined>,
    /// Bytes in quarantine that the next collect with the key may delete.
    pub due_bytes: u64,
    /// Who is at work in the repository.
    pub leases: Vec<String>,
    /// Notes and runs that cannot be read.
    pub damaged: Vec<String>,
}

impl Keyless {
    /// Says what a collect with the key would probably free. Reads names, index runs and notes; writes nothing.
    pub fn rehearse_collect(&self) -> Result<KeylessCollect, CollectError> {
        let (storage, repository) = (&*self.storage, self.config.repository);
        let mut report = KeylessCollect::default();
        let list = |kind, name: &str| {
            let listed = storage.list(kind);
            listed.map_err(|source| ReadError::Io { object: name.to_owned(), source })
        };
        let mut named: HashSet<PackId> = HashSet::new();
        for Listed { object, .. } in list(ObjectKind::IndexRun, "index")? {
            let Object::IndexRun(id) = object else { continue };
            match Run::open(storage, id, repository) {
                Ok(run) => named.extend(run.packs().map(|row| row.pack)),
                Err(error) => report.damaged.push(error.to_string()),
            }
        }
        let batches = quarantine::list(storage, repository)?;
        let mut leases = crate::lease::list(storage, repository)?;
        leases.retain(|lease| !lease.verdict.is_stale());
        report.leases = leases.iter().map(LeaseState::holder).collect();
        let listed = list(ObjectKind::Pack, "packs")?;
        let packs: std::collections::HashMap<PackId, u64> = listed
            .into_iter()
            .filter_map(|listed| match listed.object {
                Object::Pack(pack) => Some((pack, listed.len)),
                _ => None,
            })
            .collect();
        (report.packs, report.pack_bytes) = (packs.len() as u64, packs.values().sum());
        let now = unix(storage.surroundings().now());
        let mut quarantined: HashSet<PackId> = HashSet::new();
        for (id, batch) in &batches {
            let Ok(batch) = batch else {
                report.damaged.push(Object::Quarantine(*id).to_string());
                continue;
            };
            quarantined.extend(&batch.packs);
            let bytes = batch.packs.iter().filter_map(|pack| packs.get(pack)).sum();
            let waits = batch.waits.as_deref().unwrap_or_default();
            let waits_for: Vec<String> =
                leases.iter().filter(|lease| waits.contains(&lease.id)).map(LeaseState::holder).collect();
            if batch.due <= now && batch.waits.is_some() && waits_for.is_empty() {
                report.due_bytes += bytes;
            }
            let (packs, created, due) = (batch.packs.len() as u64, batch.created, batch.due);
            report.quarantined.push(Quarantined { batch: id.to_string(), packs, bytes, created, due, waits_for });
        }
        for (_, bytes) in packs.iter().filter(|(pack, _)| !named.contains(*pack) && !quarantined.contains(*pack)) {
            report.unnamed_packs += 1;
            report.unnamed_bytes += bytes;
        }
        let points: HashSet<RecoveryPointId> = list(ObjectKind::Point, "points")?
            .into_iter()
            .filter_map(|listed| match listed.object {
                Object::Point(id) => Some(id),
                _ => None,
            })
            .collect();
        match summary::read(storage, repository)? {
            None => report.points_new = points.into_iter().collect(),
            Some(Err(error)) => {
                report.damaged.push(format!("{}: {error}", Object::Liveness));
                report.points_new = points.into_iter().collect();
            }
            Some(Ok(summary)) => {
                report.as_of = Some(summary.created);
                let seen: HashSet<RecoveryPointId> = summary.points.iter().copied().collect();
                report.points_new = points.difference(&seen).copied().collect();
                report.points_gone = seen.difference(&points).copied().collect();
                for row in summary.packs.iter().filter(|row| packs.contains_key(&row.pack)) {
                    match (row.live_bytes, quarantined.contains(&row.pack)) {
                        (_, true) => {}
                        (0, false) => {
                            report.dead_packs += 1;
                            report.dead_bytes += row.bytes;
                        }
                        (live, false) => report.partly_dead_bytes += row.bytes.saturating_sub(live),
                    }
                }
            }
        }
        report.points_new.sort_unstable();
        report.points_gone.sort_unstable();
        Ok(report)
    }
}
