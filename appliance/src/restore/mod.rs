//! Restore: a recovery point's disks written to image files, block devices or NBD exports.

mod plan;
mod target;

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use blockstore::{Base, PointDisk, Progress, Repository, RestoreError, ZeroPolicy};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::plan::{FORMATS, Plan, parse_target, plan};
use self::plan::{Format, Step};
use crate::capture::{SourceSpec, open_source};
use crate::catalog::PointSummary;
use crate::exports::{ImageTarget, WrittenDisk};
use crate::problem::{Kind, Problem};

/// A target as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Target {
    /// The disk, if it was named.
    pub disk: Option<String>,
    /// An absolute path, or the URI of an NBD export.
    pub location: String,
}

/// What to restore to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreRequest {
    /// Where to.
    pub targets: Vec<Target>,
    /// One of [`FORMATS`]; by the target's ending when not given.
    #[serde(default)]
    pub format: Option<String>,
    /// Whether what exists may be replaced.
    #[serde(default)]
    pub overwrite: bool,
    /// What to begin with.
    #[serde(default)]
    pub start: Start,
    /// Read everything back and compare it.
    #[serde(default)]
    pub verify: bool,
}

/// What a restore begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// A new file.
    #[default]
    New,
    /// What the target holds: only what differs is written.
    InPlace,
    /// What an interrupted restore left, if it left something. Interrupted again, it leaves it again.
    Resume,
}

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RestoreResult {
    /// The recovery point.
    pub point: String,
    /// Its disks that were restored.
    pub disks: Vec<RestoredDisk>,
    /// How long it took.
    pub seconds: f64,
}

/// A restored disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RestoredDisk {
    /// Its name.
    pub name: String,
    /// Where it is now.
    pub target: String,
    /// In bytes.
    pub size: u64,
    /// Bytes written; the rest are holes, or were right already.
    pub written: u64,
    /// Bytes of the disk that were found to be right already; none where nothing was looked at.
    #[serde(default)]
    pub unchanged: Option<u64>,
    /// Whether all of it was read back and compared.
    #[serde(default)]
    pub verified: bool,
}

/// Restores disk by disk. A disk that fails leaves no target, unless it was to go on with one; those before it stay.
pub fn restore(
    repository: &Repository,
    point: &PointSummary,
    plan: &Plan,
    progress: &Arc<Progress>,
) -> Result<RestoreResult, Problem> {
    let started = Instant::now();
    let loaded = crate::disks::load_point(repository, &point.id)?;
    let _held = crate::disks::hold(repository, "restore", &loaded)?;
    progress.expect(plan.steps.iter().fold(0, |sum, step| sum.saturating_add(step.size)));
    let mut disks = Vec::with_capacity(plan.steps.len());
    for step in &plan.steps {
        let what = format!("disk {} of {} to {}", step.disk, point.machine, step.location);
        let disk = repository
            .open_disk(&loaded, &step.disk)
            .map_err(|error| Problem::from_read(&format!("cannot restore {what}"), &error))?;
        let (target, held) =
            target::open(step, plan.start, plan.overwrite).map_err(|error| Problem::from_target(&what, &error))?;
        let left_behind = |problem: Problem| {
            let hints = [problem.hint.as_deref(), Some(plan.start.left_behind())];
            let hint = hints.into_iter().flatten().collect::<Vec<_>>().join("; ");
            problem.hint(hint)
        };
        let done = write(&disk, target.as_ref(), held, progress)
            .map_err(|error| left_behind(Problem::from_restore(&what, &error)))?;
        target.finish().map_err(|error| left_behind(Problem::failed(format!("cannot restore {what}"), &error)))?;
        if plan.verify {
            read_back(&disk, step, &what, progress)?;
        }
        disks.push(RestoredDisk {
            name: step.disk.clone(),
            target: step.location.clone(),
            size: step.size,
            written: done.written,
            unchanged: done.unchanged,
            verified: plan.verify,
        });
    }
    Ok(RestoreResult { point: point.id.clone(), disks, seconds: started.elapsed().as_secs_f64() })
}

impl Start {
    /// What becomes of the target when a restore does not come to its end.
    fn left_behind(self) -> &'static str {
        match self {
            Start::New => "a file is as it was; a block device or an export holds part of the disk",
            Start::InPlace => "the target holds part of the disk; the same command goes on with it",
            Start::Resume => "what is written is kept; the same command goes on with it",
        }
    }
}

struct Done {
    written: u64,
    unchanged: Option<u64>,
}

fn write(
    disk: &PointDisk,
    target: &dyn images::ImageTarget,
    held: bool,
    progress: &Progress,
) -> Result<Done, RestoreError> {
    let place = ImageTarget(target);
    if !held {
        let zeroes = if target.starts_zeroed() { ZeroPolicy::TargetIsZero } else { ZeroPolicy::WriteZeroes };
        let stats = blockstore::restore(disk, &place, zeroes, progress)?;
        return Ok(Done { written: stats.data, unchanged: None });
    }
    let differences = blockstore::compare(disk, &place, progress)?;
    blockstore::restore_changed(disk, &place, &differences, progress)?;
    let unchanged = Base::size(disk).saturating_sub(differences.bytes());
    Ok(Done { written: differences.bytes(), unchanged: Some(unchanged) })
}

/// Reads the finished target again, from where it is stored and not from memory, and compares it with the point.
fn read_back(disk: &PointDisk, step: &Step, what: &str, progress: &Progress) -> Result<(), Problem> {
    if step.format != Format::Export {
        let file = File::open(&step.location);
        let file = file.map_err(|error| Problem::failed(format!("cannot read back {what}"), &error))?;
        // All is synced: what is dropped from memory comes from the device. Where it cannot be, memory has to do.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    }
    let spec = SourceSpec { disk: step.disk.clone(), location: step.location.clone() };
    let written = open_source(&spec, step.format.to_read())?;
    let found = blockstore::compare(disk, &WrittenDisk(written), progress)
        .map_err(|error| Problem::from_restore(what, &error))?;
    match found.first_offset() {
        None => Ok(()),
        Some(offset) => Err(Problem::new(
            Kind::Failed,
            format!("{what}: {} bytes read back otherwise than they were written, first at {offset}", found.bytes()),
        )
        .hint("see to the target's disk; `restore --in-place` writes what differs once more")),
    }
}
