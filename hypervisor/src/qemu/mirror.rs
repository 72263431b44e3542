//! [`Mirroring`] with QEMU's `blockdev-mirror`.
//!
//! - The names of the job and of the target's node follow from the disk's position, and a job that has ended stays in
//!   QEMU's list until it is dismissed: whoever asks later finds what there is.
//! - `on-source-error` and `on-target-error` are `stop`, which stops the job and not the guest: the job keeps its place
//!   and its record of what the guest has written, and goes on from there when it is resumed. With `report` a full target
//!   would throw away all that was copied.
//! - The copy runs in the background (`copy-mode=background`): the guest never waits for the target.
//!   `write-blocking` would send every guest write to both sides, so that a slow or hanging target is felt by the guest
//!   for as long as the copy takes. Who wants the two sides equal pauses the guest for the moment it takes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Qemu;
use super::command_line::{block_node, is_network};
use super::qmp::{CommandError, Occurrence};
use crate::definition::DiskSource;
use crate::machine::{MachineError, Pending};
use crate::mirror::{Cause, Copying, DiskLoad, MirrorError, MirrorProgress, MirrorState, Mirroring, Side};

/// How long a target's NBD server may be away before its requests fail. Short: a command that drains the disks waits as
/// long, and the whole machine with it.
const TARGET_RECONNECT_DELAY: u32 = 20;
/// How long a job may take to end that was told to: what it has in flight may wait for a target that is away.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// How long a job may seem paused that nobody has paused.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);
/// How often it is looked at meanwhile: a guest may be paused for that.
const LOOK: Duration = Duration::from_millis(2);

/// Which side failed last, by the name of the job.
pub(super) type Faults = Arc<Mutex<HashMap<String, Side>>>;

const JOB_PREFIX: &str = "mirror-disk";
const TARGET_SUFFIX: &str = "-target";

fn job(disk: usize) -> String {
    format!("{JOB_PREFIX}{disk}")
}

/// The disk that a job copies.
pub(super) fn disk_of_job(job: &str) -> Option<usize> {
    job.strip_prefix(JOB_PREFIX)?.parse().ok()
}

fn source_node(disk: usize) -> String {
    format!("disk{disk}")
}

fn target_node(disk: usize) -> String {
    format!("disk{disk}{TARGET_SUFFIX}")
}

/// `disk0`, whether the disk is on its source or on its target.
pub(super) fn disk_of_node(node: &str) -> &str {
    node.strip_suffix(TARGET_SUFFIX).unwrap_or(node)
}

/// Notes which side failed.
pub(super) fn note_fault(faults: &Faults, occurrence: &Occurrence) {
    if occurrence.name != "BLOCK_JOB_ERROR" {
        return;
    }
    let text = |key| occurrence.data.get(key).and_then(Value::as_str).unwrap_or_default();
    let side = if text("operation") == "write" { Side::Target } else { Side::Source };
    faults.lock().unwrap_or_else(PoisonError::into_inner).insert(text("device").to_owned(), side);
}

/// A job as `query-block-jobs` tells it.
struct Job {
    state: MirrorState,
    /// It has ended, and only waits to be dismissed.
    concluded: bool,
}

impl Qemu {
    fn check_disk(&self, disk: usize) -> Result<(), MirrorError> {
        if disk < self.definition().disks.len() { Ok(()) } else { Err(MirrorError::NoDisk { disk }) }
    }

    async fn job(&self, disk: usize) -> Result<Option<Job>, MachineError> {
        let jobs = self.call("query-block-jobs", Value::Null).await?;
        let name = job(disk);
        let found = jobs.as_array().into_iter().flatten().find(|one| one["device"] == name.as_str());
        let Some(found) = found else { return Ok(None) };
        let flag = |key: &str| found[key].as_bool().unwrap_or(false);
        let number = |key: &str| found[key].as_u64().unwrap_or(0);
        let word = |key: &str| found[key].as_str().unwrap_or_default();
        if word("status") == "concluded" {
            let reason = found["error"].as_str().unwrap_or("it ended").to_owned();
            let side = self.faults.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied();
            let cause = match (side, found["error"].is_null()) {
                (_, true) => Cause::Cancelled,
                (Some(side), _) => Cause::Side(side),
                (None, _) => Cause::Unknown,
            };
            return Ok(Some(Job { state: MirrorState::Failed { cause, reason }, concluded: true }));
        }
        let doing = match (flag("paused"), word("io-status")) {
            (true, status @ ("failed" | "nospace")) => Copying::Stalled {
                side: self.faults.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied(),
                no_space: status == "nospace",
            },
            (true, _) => Copying::Paused,
            (false, _) => Copying::Running,
        };
        let progress = MirrorProgress { copied: number("offset"), total: number("len"), ready: flag("ready"), doing };
        Ok(Some(Job { state: MirrorState::Copying(progress), concluded: false }))
    }

    /// What a command said about a device, as `query-block` and `query-blockstats` list them.
    fn of_device(answer: &Value, disk: usize) -> Option<&Value> {
        let path = format!("/machine/peripheral/device{disk}");
        let ours = |one: &&Value| {
            one["qdev"].as_str().and_then(|qdev| qdev.strip_prefix(&path)).is_some_and(|rest| {
                // Not device1 for device10.
                rest.is_empty() || rest.starts_with('/')
            })
        };
        answer.as_array()?.iter().find(ours)
    }

    /// Whether the guest's device is on the target; and the disk's size.
    async fn device(&self, disk: usize) -> Result<(bool, u64), MirrorError> {
        let answer = self.call("query-block", Value::Null).await?;
        let inserted = Qemu::of_device(&answer, disk).map(|device| &device["inserted"]);
        let Some(inserted) = inserted else { return Err(MirrorError::NoDisk { disk }) };
        let size = inserted["image"]["virtual-size"].as_u64().unwrap_or(0);
        Ok((inserted["node-name"] == target_node(disk).as_str(), size))
    }

    async fn has_node(&self, name: &str) -> Result<bool, MachineError> {
        let nodes = self.call("query-named-block-nodes", json!({ "flat": true })).await?;
        Ok(nodes.as_array().into_iter().flatten().any(|node| node["node-name"] == name))
    }

    async fn remove_node(&self, name: &str) -> Result<(), MachineError> {
        if self.has_node(name).await? {
            self.call("blockdev-del", json!({ "node-name": name })).await?;
        }
        Ok(())
    }

    /// Waits until the job has ended, and says how it did; `None` if it is gone.
    async fn ended(&self, disk: usize, doing: &'static str) -> Result<Option<MirrorState>, MachineError> {
        let began = Instant::now();
        loop {
            match self.job(disk).await? {
                None => return Ok(None),
                Some(Job { state, concluded: true }) => return Ok(Some(state)),
                Some(_) if began.elapsed() > END_DEADLINE => {
                    let source = CommandError::TimedOut { command: doing.to_owned(), waited: END_DEADLINE };
                    return Err(MachineError::Command { name: self.definition().name.clone(), source });
                }
                Some(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Tells the job of a disk something it must be there for.
    async fn tell(&self, command: &'static str, disk: usize, mut arguments: Value) -> Result<(), MirrorError> {
        self.check_disk(disk)?;
        match self.job(disk).await? {
            Some(Job { concluded: false, .. }) => {}
            _ => return Err(MirrorError::NotMirrored { disk }),
        }
        arguments["device"] = json!(job(disk));
        Ok(self.call(command, arguments).await.map(drop)?)
    }

    async fn begin_mirror(&self, disk: usize, target: &DiskSource, limit: Option<u64>) -> Result<(), MirrorError> {
        match self.mirror_state(disk).await? {
            MirrorState::Copying(_) => return Err(MirrorError::Busy { disk }),
            MirrorState::Pivoted { .. } => return Err(MirrorError::Pivoted { disk }),
            MirrorState::None | MirrorState::Failed { .. } => self.clear(disk).await?,
        }
        let (_, size) = self.device(disk).await?;
        let mut node = block_node(&target_node(disk), target, TARGET_RECONNECT_DELAY);
        if is_network(target) || matches!(target, DiskSource::Device(_)) {
            // It may be larger, and the guest's disk must not grow when it moves.
            node = sized(node, &target_node(disk), size);
        }
        let unusable = |source| MirrorError::Target { disk, source };
        self.call("blockdev-add", node).await.map_err(unusable)?;
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).remove(&job(disk));
        let arguments = json!({
            "job-id": job(disk), "device": source_node(disk), "target": target_node(disk), "sync": "full",
            "speed": limit.unwrap_or(0), "copy-mode": "background", "on-source-error": "stop",
            "on-target-error": "stop", "auto-dismiss": false,
        });
        if let Err(source) = self.call("blockdev-mirror", arguments).await {
            self.remove_node(&target_node(disk)).await?;
            return Err(unusable(source));
        }
        Ok(())
    }

    /// Takes a job that has ended off QEMU's list.
    async fn dismiss(&self, disk: usize) -> Result<(), MachineError> {
        if self.job(disk).await?.is_some_and(|job| job.concluded) {
            self.call("job-dismiss", json!({ "id": job(disk) })).await?;
        }
        Ok(())
    }

    /// Takes away what a job that has ended, or was never begun, has left.
    async fn clear(&self, disk: usize) -> Result<(), MachineError> {
        self.dismiss(disk).await?;
        self.remove_node(&target_node(disk)).await
    }

    async fn state(&self, disk: usize) -> Result<MirrorState, MirrorError> {
        self.check_disk(disk)?;
        // The job first: one that pivots in between is seen on the device.
        let job = self.job(disk).await?;
        if self.device(disk).await?.0 {
            return Ok(MirrorState::Pivoted { source_held: self.has_node(&source_node(disk)).await? });
        }
        Ok(job.map_or(MirrorState::None, |job| job.state))
    }

    async fn pivot(&self, disk: usize) -> Result<(), MirrorError> {
        let began = Instant::now();
        let state = loop {
            match self.state(disk).await? {
                // QEMU pauses a job for a moment whenever it drains its disks.
                MirrorState::Copying(MirrorProgress { ready: true, doing: Copying::Paused, .. })
                    if began.elapsed() < DRAIN_DEADLINE =>
                {
                    tokio::time::sleep(LOOK).await;
                }
                state => break state,
            }
        };
        match state {
            MirrorState::Pivoted { .. } => {}
            MirrorState::Copying(MirrorProgress { ready: true, doing: Copying::Running, .. }) => {
                self.call("block-job-complete", json!({ "device": job(disk) })).await?;
                let ended = self.ended(disk, "block-job-complete").await?;
                if !self.device(disk).await?.0 {
                    let reason = match ended {
                        Some(MirrorState::Failed { reason, .. }) => reason,
                        _ => "the job has ended".to_owned(),
                    };
                    return Err(MirrorError::PivotFailed { disk, reason });
                }
            }
            MirrorState::Copying(_) => return Err(MirrorError::NotReady { disk }),
            MirrorState::None | MirrorState::Failed { .. } => return Err(MirrorError::NotMirrored { disk }),
        }
        Ok(self.dismiss(disk).await?)
    }
}

/// The node, cut to `size` bytes by a `raw` node above it, which takes over its name and options.
fn sized(mut node: Value, name: &str, size: u64) -> Value {
    if node["driver"] == "raw" {
        node["size"] = json!(size);
        return node;
    }
    if let Some(inner) = node.as_object_mut() {
        inner.remove("node-name");
        inner.remove("detect-zeroes");
    }
    json!({
        "driver": "raw", "node-name": name, "size": size, "discard": "unmap", "detect-zeroes": "unmap", "file": node,
    })
}

impl Mirroring for Qemu {
    fn mirror<'a>(
        &'a self,
        disk: usize,
        target: &'a DiskSource,
        limit: Option<u64>,
    ) -> Pending<'a, Result<(), MirrorError>> {
        Box::pin(self.begin_mirror(disk, target, limit))
    }

    fn mirror_state(&self, disk: usize) -> Pending<'_, Result<MirrorState, MirrorError>> {
        Box::pin(self.state(disk))
    }

    fn mirror_limit(&self, disk: usize, limit: Option<u64>) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(self.tell("block-job-set-speed", disk, json!({ "speed": limit.unwrap_or(0) })))
    }

    fn mirror_pause(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            match self.state(disk).await? {
                MirrorState::Copying(MirrorProgress { doing: Copying::Paused | Copying::Stalled { .. }, .. }) => Ok(()),
                _ => self.tell("block-job-pause", disk, json!({})).await,
            }
        })
    }

    fn mirror_resume(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            match self.state(disk).await? {
                MirrorState::Copying(MirrorProgress { doing: Copying::Running, .. }) => Ok(()),
                _ => self.tell("block-job-resume", disk, json!({})).await,
            }
        })
    }

    fn mirror_cancel(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            match self.state(disk).await? {
                MirrorState::Pivoted { .. } => return Err(MirrorError::Pivoted { disk }),
                MirrorState::None | MirrorState::Failed { .. } => {}
                MirrorState::Copying(_) => {
                    // Without force a copy that is ready would be completed first, and a paused one is refused.
                    self.tell("block-job-cancel", disk, json!({ "force": true })).await?;
                    self.ended(disk, "block-job-cancel").await?;
                }
            }
            Ok(self.clear(disk).await?)
        })
    }

    fn mirror_flush(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            self.check_disk(disk)?;
            // QMP has no flush. This monitor command needs no permission on the node that the job would not share.
            let line = format!("qemu-io {} \"flush\"", target_node(disk));
            let said = self.call("human-monitor-command", json!({ "command-line": line })).await?;
            match said.as_str().map(str::trim) {
                Some("") | None => Ok(()),
                Some(message) => {
                    let source = CommandError::Refused {
                        command: "qemu-io flush".to_owned(),
                        class: "GenericError".to_owned(),
                        message: message.to_owned(),
                    };
                    let name = self.definition().name.clone();
                    Err(MirrorError::Target { disk, source: MachineError::Command { name, source } })
                }
            }
        })
    }

    fn mirror_pivot(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(self.pivot(disk))
    }

    fn mirror_release(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            self.check_disk(disk)?;
            if !self.device(disk).await?.0 {
                return Err(MirrorError::NotReady { disk });
            }
            self.dismiss(disk).await?;
            Ok(self.remove_node(&source_node(disk)).await?)
        })
    }

    fn disk_load(&self, disk: usize) -> Pending<'_, Result<DiskLoad, MirrorError>> {
        Box::pin(async move {
            self.check_disk(disk)?;
            let answer = self.call("query-blockstats", Value::Null).await?;
            let stats = Qemu::of_device(&answer, disk).map(|device| &device["stats"]);
            let Some(stats) = stats else { return Err(MirrorError::NoDisk { disk }) };
            let sum = |keys: &[&str]| keys.iter().map(|key| stats[*key].as_u64().unwrap_or(0)).sum();
            Ok(DiskLoad {
                requests: sum(&["rd_operations", "wr_operations", "flush_operations"]),
                nanos: sum(&["rd_total_time_ns", "wr_total_time_ns", "flush_total_time_ns"]),
                changed: sum(&["wr_bytes", "unmap_bytes"]),
            })
        })
    }
}
