//! Commit: what a recovery's guest has written becomes a recovery point, while it runs. The rules: docs/design/commit.md

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use blockstore::{Consistency, PointDetails, Progress, RecoveryPoint};
use chrono::Utc;
use hypervisor::Machine;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::machine;
use super::one::{Driver, Recovery};
use super::quiet::Quiet;
use super::record::Record;
use super::schedule::Committed;
use crate::capture::{BackupResult, check_labels, consistency_word};
use crate::disks;
use crate::frozen::{self, Frozen};
use crate::hardware::Hardware;
use crate::problem::Problem;
use crate::rehydrate::LiveDisk;

/// How to commit a recovery.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommitRequest {
    /// Kept with the point.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether the guest is asked to hold still.
    #[serde(default)]
    pub consistency: Wish,
}

/// How consistent a commit has to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// File systems frozen by the guest agent if it answers, else as after a power cut.
    #[default]
    Auto,
    /// File systems frozen, or no point at all.
    Application,
    /// The guest is not asked.
    Crash,
}

/// What to do if nothing has changed since the last point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unchanged {
    /// A point all the same.
    Commit,
    /// No point.
    Skip,
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
    /// Why the guest did not hold still; none if it did.
    restless: Option<String>,
    /// What the disks' counts of changes added up to.
    changes: u64,
}

#[derive(Debug)]
struct FrozenDisk {
    name: String,
    live: Arc<LiveDisk>,
    frozen: Arc<Frozen>,
}

impl Recovery {
    /// Freezes all disks at one instant. The order: docs/design/commit.md
    pub(super) async fn freeze(self: &Arc<Self>, wish: Wish) -> Result<Commit, Problem> {
        let driver = self.driver.lock().await;
        let mut commit = tokio::task::block_in_place(|| self.prepare(&driver))?;
        let began = Instant::now();
        let (quiet, restless) = self.hold_still(&driver, wish).await?;
        tokio::task::block_in_place(|| commit.take_instant());
        if let Some(quiet) = quiet {
            quiet.end().await;
            let milliseconds = began.elapsed().as_millis();
            tracing::info!(recovery = %self.name(), milliseconds, "the guest held still to be committed");
        }
        commit.restless = restless;
        Ok(commit)
    }

    /// Takes note of what the overlays hold, while the guest goes on.
    fn prepare(self: &Arc<Self>, driver: &Driver) -> Result<Commit, Problem> {
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
        let cannot = |error: &std::io::Error| Problem::failed(format!("cannot commit recovery {name}"), error);
        let hardware = machine::as_it_is(self.dir(), &self.definition.request, driver.machine.as_ref())
            .map_err(|error| cannot(&error))?;
        let asides = overlays.iter().map(|overlay| frozen::aside(&self.dir().join("disks"), overlay.size()));
        let asides = asides.collect::<Result<Vec<_>, _>>().map_err(|error| cannot(&error))?;
        let mut parents: Vec<String> = self.lock().commits.last.iter().map(|last| last.point.clone()).collect();
        parents.push(self.definition.point.clone());
        // From here on a failure, too, ends with the disks as they were: that is what dropping it does.
        let mut commit =
            Commit { recovery: self.clone(), disks: Vec::new(), parents, hardware, restless: None, changes: 0 };
        let named = self.definition.disks.iter().map(|disk| disk.name.clone());
        for (((name, live), overlay), aside) in named.zip(live).zip(overlays).zip(asides) {
            let frozen = Arc::new(Frozen::new(overlay, aside));
            // A change in flight would be noted nowhere.
            let closed = live.close();
            live.freeze(&closed, frozen.clone());
            drop(closed);
            commit.disks.push(FrozenDisk { name, live, frozen });
        }
        commit.disks.iter().for_each(|disk| disk.frozen.look());
        Ok(commit)
    }

    /// Has the guest hold still if it is to and does. Else says why it does not.
    async fn hold_still(
        &self,
        driver: &Driver,
        wish: Wish,
    ) -> Result<(Option<Quiet<dyn Machine>>, Option<String>), Problem> {
        let quiet = match (wish, &driver.vm) {
            (Wish::Crash, _) => return Ok((None, Some("it was not asked to".to_owned()))),
            (_, None) => Err("there is no VM".to_owned()),
            (_, Some(vm)) => Quiet::begin(self.dir(), vm).await,
        };
        match (quiet, wish) {
            (Ok(quiet), _) => Ok((Some(quiet), None)),
            (Err(why), Wish::Application) => Err(Problem::refused(format!(
                "the guest of recovery {} does not freeze its file systems: {why}",
                self.name()
            ))
            .hint("see to its guest agent, or commit it as after a power cut: --consistency crash")),
            (Err(why), _) => {
                tracing::info!(recovery = %self.name(), why, "the guest does not hold still to be committed");
                Ok((None, Some(why)))
            }
        }
    }

    /// Whether no disk was changed since the last commit.
    pub(super) fn is_as_committed(&self) -> bool {
        let shown = self.lock();
        shown.commits.changes.is_some_and(|then| then == shown.disks.iter().map(|disk| disk.changes()).sum::<u64>())
    }
}

impl Commit {
    /// As long as all gates are closed nothing is in flight anywhere: that is the instant.
    fn take_instant(&mut self) {
        let began = Instant::now();
        let closed: Vec<_> = self.disks.iter().map(|disk| disk.live.close()).collect();
        for disk in &self.disks {
            disk.frozen.freeze();
        }
        self.changes = self.disks.iter().map(|disk| disk.live.changes()).sum();
        drop(closed);
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::info!(recovery = %self.recovery.name(), pause_us = micros, "recovery frozen to be committed");
    }

    /// Makes the recovery point; `None` if nothing has changed and that was to be skipped. The order:
    /// docs/design/commit.md
    pub fn run(
        self,
        request: &CommitRequest,
        progress: &Arc<Progress>,
        unchanged: Unchanged,
    ) -> Result<Option<BackupResult>, Problem> {
        let started = Instant::now();
        let (recovery, definition) = (&self.recovery, &self.recovery.definition);
        recovery.show(|shown| shown.committing = Some(progress.clone()));
        let result = self.store(request, progress, unchanged);
        recovery.show(|shown| shown.committing = None);
        let Some(point) = result? else {
            recovery.show(|shown| shown.commits.changes = Some(self.changes));
            return Ok(None);
        };
        let committed = Committed {
            point: point.id.to_string(),
            time: Some(Utc::now()),
            consistency: Some(consistency_word(point.consistency).to_owned()),
        };
        let mut driver = recovery.driver.blocking_lock();
        if driver.state.commits() {
            // Without it the next commit builds on an older point, and reads as much.
            match driver.journal.append(&Record::Committed(committed.clone())) {
                Ok(()) => recovery.show(|shown| {
                    shown.commits.last = Some(committed);
                    shown.commits.changes = Some(self.changes);
                }),
                Err(error) => tracing::warn!(recovery = %definition.name, %error, "cannot note a commit"),
            }
        }
        Ok(Some(BackupResult { why_crash: self.restless.clone(), ..BackupResult::of(&point, started) }))
    }

    fn store(
        &self,
        request: &CommitRequest,
        progress: &Arc<Progress>,
        unchanged: Unchanged,
    ) -> Result<Option<RecoveryPoint>, Problem> {
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
        if unchanged == Unchanged::Skip && backup.is_like_parent() {
            return Ok(None);
        }
        let told = parent.as_ref().map_or(serde_json::Value::Null, |parent| parent.hardware.clone());
        let hardware = match Hardware::read(&told) {
            Ok(known) => self.hardware.clone().over(known).to_value(),
            // What a later version has written is kept.
            Err(_) => told,
        };
        let consistency = if self.restless.is_none() { Consistency::Application } else { Consistency::Crash };
        let details = PointDetails { labels: request.labels.clone(), consistency, hardware };
        backup.seal(details).map(Some).map_err(|error| failed(&error))
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
