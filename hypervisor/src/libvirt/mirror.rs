//! [`Mirroring`] with libvirt's block copy.
//!
//! - libvirt has no pause for a copy: a paused one is let copy a byte a second.
//! - libvirt's copy ends at the first error of either side; the guest then runs on upon its source, and the copy begins
//!   anew. Whether a domain is on the target is read from its description, so that a later process knows it too.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virt::domain::Domain;
use virt_sys as sys;

use super::error::LibvirtError;
use super::ffi::{self, Fault, JobInfo};
use super::machine::{CALL_DEADLINE, LibvirtMachine};
use super::xml;
use crate::definition::DiskSource;
use crate::machine::{MachineError, Pending};
use crate::mirror::{Cause, Copying, DiskLoad, MirrorError, MirrorProgress, MirrorState, Mirroring, Side};

/// How long the end of a copy may take: libvirt waits for what is in flight.
const END_DEADLINE: Duration = Duration::from_secs(90);
const FLUSH: &str = "flush a copy";
/// Bytes a second of a copy that is paused.
const CRAWL: u64 = 1;
/// How long the event may take that says how a copy has ended, and how often it is looked for.
const EVENT_DEADLINE: Duration = Duration::from_secs(2);
const LOOK: Duration = Duration::from_millis(20);

/// What is remembered of copies, by the disks' positions.
pub(super) type Copies = Arc<Mutex<HashMap<usize, Remembered>>>;

/// What libvirt itself does not tell of a copy.
#[derive(Debug, Clone, Default)]
pub(super) struct Remembered {
    limit: Option<u64>,
    paused: bool,
    /// It was there.
    begun: bool,
    /// It ended, and libvirt said so.
    ended: bool,
    /// Somebody gave it up.
    cancelled: bool,
    /// Which side failed, and what QEMU said of it.
    side: Option<Side>,
    said: Option<String>,
}

impl Remembered {
    /// How a copy stands that is gone.
    fn after(self) -> MirrorState {
        let (cause, words) = match (self.side, self.cancelled) {
            _ if !self.begun => return MirrorState::None,
            (_, true) => (Cause::Cancelled, "it was cancelled"),
            (Some(side), _) => (Cause::Side(side), "libvirt's log says why"),
            (None, _) => (Cause::Unknown, "libvirt no longer knows of it"),
        };
        MirrorState::Failed { cause, reason: self.said.unwrap_or_else(|| words.to_owned()) }
    }
}

/// Notes how a job has changed.
pub(super) fn note(copies: &Copies, disk: usize, status: i32) {
    let cancelled = match u32::try_from(status) {
        Ok(sys::VIR_DOMAIN_BLOCK_JOB_FAILED) => false,
        Ok(sys::VIR_DOMAIN_BLOCK_JOB_CANCELED) => true,
        _ => return,
    };
    if let Some(copy) = lock(copies).get_mut(&disk) {
        (copy.ended, copy.cancelled) = (true, cancelled);
    }
}

/// Notes what QEMU says of a copy that fails, which it does before libvirt says that it has.
pub(super) fn note_fault(copies: &Copies, targets: &[String], event: &str, data: &str) {
    let data: Value = serde_json::from_str(data).unwrap_or_default();
    let text = |key: &str| data[key].as_str().unwrap_or_default();
    // libvirt names a job by the disk and the copy's node: copy-vda-libvirt-3-format.
    let is_of = |target: &String| {
        text("device").strip_prefix("copy-").is_some_and(|job| job.starts_with(&format!("{target}-")))
    };
    let Some(disk) = targets.iter().position(is_of) else { return };
    let mut copies = lock(copies);
    let copy = copies.entry(disk).or_default();
    match event {
        "BLOCK_JOB_ERROR" if text("operation") == "write" => copy.side = Some(Side::Target),
        "BLOCK_JOB_ERROR" => copy.side = Some(Side::Source),
        _ if !text("error").is_empty() => copy.said = Some(text("error").to_owned()),
        _ => {}
    }
}

fn lock(copies: &Copies) -> std::sync::MutexGuard<'_, HashMap<usize, Remembered>> {
    copies.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LibvirtMachine {
    fn disk(&self, disk: usize) -> Result<(String, DiskSource), MirrorError> {
        self.disks().get(disk).cloned().ok_or(MirrorError::NoDisk { disk })
    }

    fn remember(&self, disk: usize, change: impl FnOnce(&mut Remembered)) {
        change(lock(self.copies()).entry(disk).or_default());
    }

    async fn found(&self, disk: usize) -> Result<(xml::LiveDisk, Option<JobInfo>), MirrorError> {
        let (target, source) = self.disk(disk)?;
        let asked = target.clone();
        let (description, info) = self
            .on_domain("tell how a copy stands", CALL_DEADLINE, move |domain| {
                // The job first: one that pivots in between is seen in the description.
                let info = ffi::block_job_info(domain, &asked)?;
                Ok((domain.get_xml_desc(0)?, info))
            })
            .await?;
        let live = xml::live_disk(&description, &target, &source).map_err(|source| MachineError::Libvirt {
            name: self.name().to_owned(),
            source: LibvirtError::Xml { domain: self.name().to_owned(), source },
        })?;
        Ok((live, info))
    }

    async fn state_of(&self, disk: usize) -> Result<MirrorState, MirrorError> {
        let (live, info) = self.found(disk).await?;
        if !live.on_source {
            return Ok(MirrorState::Pivoted { source_held: false });
        }
        let known = || lock(self.copies()).get(&disk).cloned().unwrap_or_default();
        if let Some(info) = info {
            self.remember(disk, |copy| copy.begun = true);
            return Ok(MirrorState::Copying(MirrorProgress {
                copied: info.current,
                total: info.end,
                ready: live.copy_ready,
                doing: if known().paused { Copying::Paused } else { Copying::Running },
            }));
        }
        // That it is gone may be seen before the event that says why.
        let gone = Instant::now();
        while known().begun && !known().ended && gone.elapsed() < EVENT_DEADLINE {
            tokio::time::sleep(LOOK).await;
        }
        Ok(known().after())
    }

    async fn begin(&self, disk: usize, target: &DiskSource, limit: Option<u64>) -> Result<(), MirrorError> {
        match self.state_of(disk).await? {
            MirrorState::Copying(_) => return Err(MirrorError::Busy { disk }),
            MirrorState::Pivoted { .. } => return Err(MirrorError::Pivoted { disk }),
            MirrorState::None | MirrorState::Failed { .. } => {}
        }
        let (name, _) = self.disk(disk)?;
        let target_of_copy = target.clone();
        self.remember(disk, |copy| *copy = Remembered { limit, begun: true, ..Remembered::default() });
        let begin = move |domain: &Domain| {
            let size = domain.get_block_info(&name, 0)?.capacity;
            ffi::block_copy(domain, &name, &xml::copy_target(&target_of_copy, size), limit)
        };
        let begun = self.on_domain("begin to copy a disk", END_DEADLINE, begin).await;
        if begun.is_err() {
            lock(self.copies()).remove(&disk);
        }
        begun.map_err(|source| MirrorError::Target { disk, source })
    }

    /// Tells the copy of a disk something it must be there for.
    async fn tell(
        &self,
        disk: usize,
        what: &'static str,
        work: impl FnOnce(&Domain, &str) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(), MirrorError> {
        match self.state_of(disk).await? {
            MirrorState::Copying(_) => {}
            _ => return Err(MirrorError::NotMirrored { disk }),
        }
        let (name, _) = self.disk(disk)?;
        Ok(self.on_domain(what, END_DEADLINE, move |domain| work(domain, &name)).await?)
    }

    async fn set_speed(&self, disk: usize, bytes: u64) -> Result<(), MirrorError> {
        let what = "change the rate of a copy";
        self.tell(disk, what, move |domain, name| ffi::block_job_set_speed(domain, name, bytes)).await
    }

    async fn flush(&self, disk: usize) -> Result<(), MirrorError> {
        let (live, _) = self.found(disk).await?;
        let Some(index) = live.copy_index else { return Err(MirrorError::NotMirrored { disk }) };
        let unusable = |source| MirrorError::Target { disk, source };
        let mut said = self.flush_node(&format!("libvirt-{index}-format")).await.map_err(unusable)?;
        if said.contains("Cannot find device") {
            // From libvirt 10.1 on what is raw has no node of its own for the format.
            said = self.flush_node(&format!("libvirt-{index}-storage")).await.map_err(unusable)?;
        }
        if said.is_empty() {
            return Ok(());
        }
        Err(unusable(MachineError::Libvirt {
            name: self.name().to_owned(),
            source: LibvirtError::Refused { what: FLUSH, reason: super::Reason::Other, message: said },
        }))
    }

    /// Neither libvirt nor QMP has a flush of a copy's target. Returns QEMU's complaint, empty if it has none.
    async fn flush_node(&self, node: &str) -> Result<String, MachineError> {
        let line = format!("qemu-io {node} flush");
        let command = json!({ "execute": "human-monitor-command", "arguments": { "command-line": line } }).to_string();
        let asked = self.on_domain(FLUSH, END_DEADLINE, move |domain| Ok(domain.qemu_monitor_command(&command, 0)?));
        let text = asked.await?;
        let answer: Value = serde_json::from_str(&text).unwrap_or_default();
        Ok(answer["return"].as_str().map_or(text, |said| said.trim().to_owned()))
    }

    async fn pivot(&self, disk: usize) -> Result<(), MirrorError> {
        match self.state_of(disk).await? {
            MirrorState::Pivoted { .. } => return Ok(()),
            MirrorState::Copying(MirrorProgress { ready: true, doing: Copying::Running, .. }) => {}
            MirrorState::Copying(_) => return Err(MirrorError::NotReady { disk }),
            MirrorState::None | MirrorState::Failed { .. } => return Err(MirrorError::NotMirrored { disk }),
        }
        let (name, _) = self.disk(disk)?;
        let end = move |domain: &Domain| ffi::block_job_abort(domain, &name, true);
        let ended = self.on_domain("move a domain to the copy of a disk", END_DEADLINE, end).await;
        // Whatever was answered: where the domain is, is what counts.
        match (self.state_of(disk).await?, ended) {
            (MirrorState::Pivoted { .. }, _) => Ok(()),
            (_, Err(error @ MachineError::Gone { .. })) => Err(error.into()),
            (_, Err(error)) => Err(MirrorError::PivotFailed { disk, reason: chain(&error) }),
            (MirrorState::Failed { reason, .. }, Ok(())) => Err(MirrorError::PivotFailed { disk, reason }),
            (_, Ok(())) => Err(MirrorError::PivotFailed { disk, reason: "libvirt left it where it was".to_owned() }),
        }
    }
}

fn chain(error: &MachineError) -> String {
    match error {
        MachineError::Libvirt { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}

impl Mirroring for LibvirtMachine {
    fn mirror<'a>(
        &'a self,
        disk: usize,
        target: &'a DiskSource,
        limit: Option<u64>,
    ) -> Pending<'a, Result<(), MirrorError>> {
        Box::pin(self.begin(disk, target, limit))
    }

    fn mirror_state(&self, disk: usize) -> Pending<'_, Result<MirrorState, MirrorError>> {
        Box::pin(self.state_of(disk))
    }

    fn mirror_limit(&self, disk: usize, limit: Option<u64>) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            let paused = lock(self.copies()).get(&disk).is_some_and(|copy| copy.paused);
            self.set_speed(disk, if paused { CRAWL } else { limit.unwrap_or(0) }).await?;
            self.remember(disk, |copy| copy.limit = limit);
            Ok(())
        })
    }

    fn mirror_pause(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            self.set_speed(disk, CRAWL).await?;
            self.remember(disk, |copy| copy.paused = true);
            Ok(())
        })
    }

    fn mirror_resume(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            let limit = lock(self.copies()).get(&disk).and_then(|copy| copy.limit);
            self.set_speed(disk, limit.unwrap_or(0)).await?;
            self.remember(disk, |copy| copy.paused = false);
            Ok(())
        })
    }

    fn mirror_cancel(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(async move {
            match self.state_of(disk).await? {
                MirrorState::Pivoted { .. } => return Err(MirrorError::Pivoted { disk }),
                MirrorState::None | MirrorState::Failed { .. } => {}
                MirrorState::Copying(_) => {
                    let what = "give a copy up";
                    let given_up =
                        self.tell(disk, what, |domain, name| ffi::block_job_abort(domain, name, false)).await;
                    match given_up {
                        Ok(()) | Err(MirrorError::NotMirrored { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
            lock(self.copies()).remove(&disk);
            Ok(())
        })
    }

    fn mirror_flush(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(self.flush(disk))
    }

    fn mirror_pivot(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        Box::pin(self.pivot(disk))
    }

    fn mirror_release(&self, _disk: usize) -> Pending<'_, Result<(), MirrorError>> {
        // libvirt lets go of the source as it pivots.
        Box::pin(async { Ok(()) })
    }

    fn disk_load(&self, disk: usize) -> Pending<'_, Result<DiskLoad, MirrorError>> {
        Box::pin(async move {
            let (name, _) = self.disk(disk)?;
            let stats =
                self.on_domain("tell a disk's load", CALL_DEADLINE, move |domain| ffi::block_stats(domain, &name));
            let stats = stats.await?;
            let sum = |names: &[&str]| {
                let of = |wanted: &&str| stats.iter().find(|(name, _)| name == wanted).map_or(0, |(_, value)| *value);
                names.iter().map(of).sum()
            };
            Ok(DiskLoad {
                requests: sum(&["rd_operations", "wr_operations", "flush_operations"]),
                nanos: sum(&["rd_total_times", "wr_total_times", "flush_total_times"]),
                changed: sum(&["wr_bytes"]),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(cause: Cause, reason: &str) -> MirrorState {
        MirrorState::Failed { cause, reason: reason.to_owned() }
    }

    #[test]
    fn what_a_copy_ended_by_is_read_from_what_qemu_and_libvirt_say() {
        let targets = ["vda".to_owned(), "vdaa".to_owned()];
        let after = |says: &[(&str, &str)], status: Option<u32>| {
            let copies = Copies::default();
            lock(&copies).insert(1, Remembered { begun: true, ..Remembered::default() });
            for (event, data) in says {
                note_fault(&copies, &targets, event, data);
            }
            if let Some(status) = status {
                note(&copies, 1, i32::try_from(status).expect("it is small"));
            }
            let copy = lock(&copies).get(&1).cloned().expect("it is there");
            assert_eq!(copy.ended, status.is_some());
            copy.after()
        };
        let error = |operation: &str| {
            format!("{{\"device\":\"copy-vdaa-libvirt-3-format\",\"operation\":\"{operation}\",\"action\":\"report\"}}")
        };
        let (write, read) = (error("write"), error("read"));
        let full = "{\"device\":\"copy-vdaa-libvirt-3-format\",\"error\":\"No space left on device\"}";
        let says = [("BLOCK_JOB_ERROR", write.as_str()), ("BLOCK_JOB_COMPLETED", full)];
        let ended = Some(sys::VIR_DOMAIN_BLOCK_JOB_FAILED);
        assert_eq!(after(&says, ended), failed(Cause::Side(Side::Target), "No space left on device"));
        let reads = after(&[("BLOCK_JOB_ERROR", &read)], ended);
        assert_eq!(reads, failed(Cause::Side(Side::Source), "libvirt's log says why"));
        let cancelled = after(&[], Some(sys::VIR_DOMAIN_BLOCK_JOB_CANCELED));
        assert_eq!(cancelled, failed(Cause::Cancelled, "it was cancelled"));
        // Of another disk, of something else, or no JSON at all.
        let other = "{\"device\":\"copy-vda-libvirt-2-format\",\"operation\":\"write\"}";
        let nothing = after(&[("BLOCK_JOB_ERROR", other), ("BLOCK_JOB_ERROR", "{}"), ("X", "no")], None);
        assert_eq!(nothing, failed(Cause::Unknown, "libvirt no longer knows of it"));
        assert_eq!(Remembered::default().after(), MirrorState::None);
    }
}
