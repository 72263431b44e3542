//! Commit: what a recovery's guest has written becomes a recovery point, while it runs. The rules: docs/design/commit.md

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use blockstore::{Consistency, PointDetails, Progress, RecoveryPoint};
use serde::{Deserialize, Serialize};

use super::machine;
use super::one::Recovery;
use super::record::Record;
use crate::capture::{BackupResult, check_labels};
use crate::disks;
use crate::frozen::{self, Frozen};
use crate::hardware::Hardware;
use crate::problem::Problem;
use crate::rehydrate::LiveDisk;

/// How to commit a recovery.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRequest {
    /// Kept with the point.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl CommitRequest {
    /// Checks the labels.
    pub fn check(&self) -> Result<(), Problem> {
        check_labels(&self.labels)
    }
}

/// A recovery's disks, frozen at one instant. The guest goes on, and they stay as they are until this is dropped.
#[derive(Debug)]
pub struct Commit {
    recovery: Arc<Recovery>,
    /// In the order of the recovery point's.
    disks: Vec<FrozenDisk>,
    /// The points to build on, the best first.
    parents: Vec<String>,
    /// The machine as it ran.
    hardware: Hardware,
}

#[derive(Debug)]
struct FrozenDisk {
    name: String,
    live: Arc<LiveDisk>,
    frozen: Arc<Frozen>,
}

impl Recovery {
    /// Freezes all disks at one instant.
    pub(super) async fn freeze(self: &Arc<Self>) -> Result<Commit, Problem> {
        let driver = self.driver.lock().await;
        let name = self.name();
        if !driver.state.commits() {
            return Err(Problem::refused(format!(
                "recovery {name} is {}; this cannot be done with it now",
                driver.state
            )));
        }
        let live = self.lock().disks.clone();
        let overlays: Option<Vec<_>> = live.iter().map(|disk| Some(disk.overlay()?.overlay.clone())).collect();
        let overlays = overlays.filter(|overlays| !overlays.is_empty()).ok_or_else(|| {
            Problem::refused(format!("the disks of recovery {name} are not served"))
                .hint(format!("`lifeboat recovery {name}` says why"))
        })?;
        if live.iter().any(|disk| disk.frozen().is_some()) {
            return Err(Problem::refused(format!("recovery {name} is being committed already")));
        }
        let mut parents: Vec<String> = driver.committed.iter().cloned().collect();
        parents.push(self.definition.point.clone());
        let cannot = |error: &std::io::Error| Problem::failed(format!("cannot commit recovery {name}"), error);
        let (disks, hardware) = tokio::task::block_in_place(|| {
            let asides = overlays.iter().map(|overlay| frozen::aside(&self.dir().join("disks"), overlay.size()));
            let asides = asides.collect::<Result<Vec<_>, _>>().map_err(|error| cannot(&error))?;
            let hardware = machine::as_it_is(self.dir(), &self.definition.request, driver.machine.as_ref())
                .map_err(|error| cannot(&error))?;
            let began = Instant::now();
            // As long as all are closed nothing is in flight anywhere: that is the instant.
            let closed: Vec<_> = live.iter().map(|disk| disk.close()).collect();
            let mut disks = Vec::with_capacity(live.len());
            let named = self.definition.disks.iter().map(|disk| disk.name.clone());
            for ((((name, live), overlay), aside), closed) in named.zip(&live).zip(overlays).zip(asides).zip(&closed) {
                let frozen = Arc::new(Frozen::new(overlay, aside));
                live.freeze(closed, frozen.clone());
                disks.push(FrozenDisk { name, live: live.clone(), frozen });
            }
            drop(closed);
            let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            tracing::info!(recovery = %name, pause_us = micros, "recovery frozen to be committed");
            Ok::<_, Problem>((disks, hardware))
        })?;
        Ok(Commit { recovery: self.clone(), disks, parents, hardware })
    }
}

impl Commit {
    /// Makes the recovery point. The order: docs/design/commit.md
    pub fn run(self, request: &CommitRequest, progress: &Arc<Progress>) -> Result<BackupResult, Problem> {
        let started = Instant::now();
        let (recovery, definition) = (&self.recovery, &self.recovery.definition);
        recovery.show(|shown| shown.committing = Some(progress.clone()));
        let result = self.store(request, progress);
        recovery.show(|shown| shown.committing = None);
        let point = result?;
        let mut driver = recovery.driver.blocking_lock();
        if driver.state.commits() {
            // Without it the next commit builds on an older point, and reads as much.
            match driver.journal.append(&Record::Committed { point: point.id.to_string() }) {
                Ok(()) => driver.committed = Some(point.id.to_string()),
                Err(error) => tracing::warn!(recovery = %definition.name, %error, "cannot note a commit"),
            }
        }
        Ok(BackupResult::of(&point, started))
    }

    fn store(&self, request: &CommitRequest, progress: &Arc<Progress>) -> Result<RecoveryPoint, Problem> {
        let definition = &self.recovery.definition;
        let repository = &self.recovery.context.repository;
        let what = format!("cannot commit recovery {}", definition.name);
        let sizes = self.disks.iter().map(|disk| blockstore::Source::size(&*disk.frozen));
        progress.expect(sizes.fold(0, u64::saturating_add));
        // The next commit takes what the overlays then do not hold from this one: after a power cut they must hold at
        // least what they held at the instant.
        for disk in &self.disks {
            let Some(export) = disk.live.overlay() else { continue };
            export.overlay.flush().map_err(|error| Problem::from_overlay(&what, &error))?;
        }
        let parent = self.parents.iter().find_map(|id| {
            let loaded = disks::load_point(repository, id);
            loaded.inspect_err(|problem| tracing::warn!(%problem, "a commit cannot build on this point")).ok()
        });
        let failed = |error: &blockstore::BackupError| self.failed(&what, error);
        let mut backup = repository
            .begin_backup(&definition.machine, parent.as_ref(), progress.clone())
            .map_err(|error| failed(&error))?;
        for disk in &self.disks {
            backup.add_disk(&disk.name, &*disk.frozen).map_err(|error| failed(&error))?;
        }
        let told = parent.as_ref().map_or(serde_json::Value::Null, |parent| parent.hardware.clone());
        let hardware = match Hardware::read(&told) {
            Ok(known) => self.hardware.clone().over(known).to_value(),
            // What a later version has written is kept.
            Err(_) => told,
        };
        let details = PointDetails { labels: request.labels.clone(), consistency: Consistency::Crash, hardware };
        backup.seal(details).map_err(|error| failed(&error))
    }

    fn failed(&self, what: &str, error: &blockstore::BackupError) -> Problem {
        let problem = Problem::from_backup(&self.recovery.definition.machine, error);
        match self.disks.iter().find_map(|disk| Some((&disk.name, disk.frozen.lost()?))) {
            None => problem,
            Some((disk, why)) => {
                Problem::new(problem.kind, format!("{what}: disk {disk} could not be kept as it was: {why}"))
                    .hint("the guest runs on and has lost nothing; commit again when the cause is gone")
            }
        }
    }
}

impl Drop for Commit {
    fn drop(&mut self) {
        for disk in &self.disks {
            disk.live.thaw();
        }
    }
}
