//! Restore: a recovery point's disks written to image files or block devices.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blockstore::{Base, PointDisk, Progress, Repository, RestoreError, ZeroPolicy};
use images::{Overwrite, TargetFormat};
use serde::{Deserialize, Serialize};

use crate::catalog::PointSummary;
use crate::exports::{ImageTarget, WrittenImage};
use crate::problem::{Kind, Problem};

/// A target as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The disk, if it was named.
    pub disk: Option<String>,
    /// An absolute path.
    pub path: PathBuf,
}

/// What to restore to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// Where to.
    pub targets: Vec<Target>,
    /// `raw` or `qcow2`; by the target's ending when not given.
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreResult {
    /// The recovery point.
    pub point: String,
    /// Its disks that were restored.
    pub disks: Vec<RestoredDisk>,
    /// How long it took.
    pub seconds: f64,
}

/// A restored disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredDisk {
    /// Its name.
    pub name: String,
    /// Where it is now.
    pub target: PathBuf,
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

/// Which disk goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    steps: Vec<Step>,
    overwrite: Overwrite,
    start: Start,
    verify: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    disk: String,
    size: u64,
    path: PathBuf,
    format: TargetFormat,
}

impl Plan {
    /// All that will be written.
    pub fn targets(&self) -> impl Iterator<Item = &Path> {
        self.steps.iter().map(|step| step.path.as_path())
    }
}

/// A target from the command line: `[DISK=]PATH`. What stands before `=` is a disk only if it can be a name.
pub fn parse_target(text: &str) -> Result<Target, Problem> {
    let (disk, path) = match text.split_once('=') {
        Some((disk, path)) if crate::capture::check_name("disk", disk).is_ok() => (Some(disk.to_owned()), path),
        _ => (None, text),
    };
    if path.is_empty() {
        return Err(Problem::usage(format!("target `{text}` names no file")));
    }
    if path.contains("://") {
        return Err(Problem::usage(format!("cannot restore to {path}")).hint("name a file, a block device or a folder"));
    }
    let path =
        std::path::absolute(path).map_err(|error| Problem::failed(format!("cannot restore to {path}"), &error))?;
    Ok(Target { disk, path })
}

/// Works out which disk goes where, and refuses before anything is written.
pub fn plan(point: &PointSummary, request: &RestoreRequest) -> Result<Plan, Problem> {
    let names = || point.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
    let forced = match request.format.as_deref() {
        None => None,
        Some("raw") => Some(TargetFormat::Raw),
        Some("qcow2") => Some(TargetFormat::Qcow2),
        Some(other) => {
            return Err(Problem::usage(format!("cannot restore to format `{other}`")).hint("use raw or qcow2"));
        }
    };
    let format = |path: &Path| forced.map_or_else(|| by_ending(path), Ok);
    let step = |disk: &crate::catalog::DiskSummary, path: PathBuf| {
        Ok(Step { disk: disk.name.clone(), size: disk.size, format: format(&path)?, path })
    };
    let mut steps: Vec<Step> = Vec::new();
    for target in &request.targets {
        match (&target.disk, point.disks.as_slice()) {
            (Some(name), disks) => {
                let disk = disks.iter().find(|disk| disk.name == *name).ok_or_else(|| {
                    Problem::not_found(format!("the recovery point of {} has no disk `{name}`", point.machine))
                        .hint(format!("it has {}", names()))
                })?;
                steps.push(step(disk, target.path.clone())?);
            }
            (None, disks) if target.path.is_dir() => {
                let ending = if forced == Some(TargetFormat::Qcow2) { "qcow2" } else { "raw" };
                let inside = |name: &str| target.path.join(format!("{}-{name}.{ending}", point.machine));
                for disk in disks {
                    steps.push(step(disk, inside(&disk.name))?);
                }
            }
            (None, [disk]) => steps.push(step(disk, target.path.clone())?),
            (None, _) => {
                return Err(Problem::usage(format!("the recovery point of {} has several disks", point.machine))
                    .hint(format!("write --to DISK=TARGET for each of {}, or name a folder", names())));
            }
        }
    }
    for (at, step) in steps.iter().enumerate() {
        let before = steps.iter().take(at);
        if before.clone().any(|other| other.disk == step.disk || other.path == step.path) {
            return Err(Problem::usage(format!(
                "disk {} or its target {} is given twice",
                step.disk,
                step.path.display()
            )));
        }
    }
    let overwrite = if request.overwrite { Overwrite::Replace } else { Overwrite::Refuse };
    if request.start != Start::New
        && let Some(step) = steps.iter().find(|step| step.format == TargetFormat::Qcow2)
    {
        return Err(Problem::usage(format!("cannot go on with {}: it is qcow2", step.path.display()))
            .hint("--in-place and --resume are for raw files and block devices"));
    }
    Ok(Plan { steps, overwrite, start: request.start, verify: request.verify })
}

/// Formats that a target's name may promise and that are not written.
const NOT_WRITTEN: [&str; 7] = ["vmdk", "vhd", "vhdx", "vdi", "qcow", "qed", "ova"];

fn by_ending(path: &Path) -> Result<TargetFormat, Problem> {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    if NOT_WRITTEN.contains(&ending.as_str()) {
        return Err(Problem::usage(format!("cannot write {} in the format of its ending", path.display()))
            .hint("restore to .raw or .qcow2 and convert it with qemu-img, or give --format"));
    }
    Ok(if ending == "qcow2" { TargetFormat::Qcow2 } else { TargetFormat::Raw })
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
        let what = format!("disk {} of {} to {}", step.disk, point.machine, step.path.display());
        let disk = repository
            .open_disk(&loaded, &step.disk)
            .map_err(|error| Problem::from_read(&format!("cannot restore {what}"), &error))?;
        let (target, held) = open_target(plan, step).map_err(|error| Problem::from_target(&what, &error))?;
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
            target: step.path.clone(),
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
            Start::New => "a file is as it was; a block device holds part of the disk",
            Start::InPlace => "the target holds part of the disk; the same command goes on with it",
            Start::Resume => "what is written is kept; the same command goes on with it",
        }
    }
}

/// The target, and whether it may hold something already.
fn open_target(plan: &Plan, step: &Step) -> Result<(Box<dyn images::ImageTarget>, bool), images::TargetError> {
    match plan.start {
        Start::New => {
            images::create_target(&step.path, step.format, step.size, plan.overwrite).map(|target| (target, false))
        }
        Start::InPlace => images::open_in_place(&step.path, step.size).map(|target| (target, true)),
        Start::Resume => images::resume_target(&step.path, step.size, plan.overwrite),
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
    let title = format!("cannot read back {what}");
    let format = match step.format {
        TargetFormat::Raw => images::Format::Raw,
        TargetFormat::Qcow2 => images::Format::Qcow2,
    };
    let file = File::open(&step.path).map_err(|error| Problem::failed(&title, &error))?;
    // Everything is synced: what is dropped from memory comes from the device. Where it cannot be, memory has to do.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    let options = images::OpenOptions { format: Some(format), backing_files: images::BackingFiles::Refuse };
    let image = images::open(&step.path, &options).map_err(|error| Problem::failed(&title, &error))?;
    let found = blockstore::compare(disk, &WrittenImage(image), progress)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::DiskSummary;
    use crate::problem::Kind;

    fn point(disks: &[&str]) -> PointSummary {
        let disks = disks.iter().map(|name| DiskSummary { name: (*name).into(), size: 4096 }).collect();
        PointSummary { disks, ..PointSummary::example() }
    }

    fn planned(disks: &[&str], targets: &[&str]) -> Result<Vec<(String, PathBuf)>, Kind> {
        let targets = targets.iter().map(|target| parse_target(target).unwrap()).collect();
        let request = RestoreRequest { targets, ..RestoreRequest::default() };
        plan(&point(disks), &request)
            .map(|plan| plan.steps.into_iter().map(|step| (step.disk, step.path)).collect())
            .map_err(|problem| problem.kind)
    }

    #[test]
    fn each_disk_finds_its_target() {
        let step = |disk: &str, path: &str| (disk.to_owned(), PathBuf::from(path));
        assert_eq!(planned(&["a"], &["/x/y.raw"]), Ok(vec![step("a", "/x/y.raw")]));
        assert_eq!(planned(&["a"], &["/x/k=v.raw"]), Ok(vec![step("a", "/x/k=v.raw")]));
        assert_eq!(planned(&["a", "b"], &["b=/x/b"]), Ok(vec![step("b", "/x/b")]));
        let dir = tempfile::tempdir().unwrap();
        let both = planned(&["a", "b"], &[dir.path().to_str().unwrap()]).unwrap();
        assert_eq!(both[1], ("b".to_owned(), dir.path().join("web01-b.raw")));
    }

    #[test]
    fn targets_that_do_not_fit_are_refused() {
        assert_eq!(planned(&["a", "b"], &["/x/y"]), Err(Kind::Usage));
        assert_eq!(planned(&["a"], &["c=/x/y"]), Err(Kind::NotFound));
        assert_eq!(planned(&["a", "b"], &["a=/x", "b=/x"]), Err(Kind::Usage));
        assert_eq!(planned(&["a", "b"], &["a=/x", "a=/y"]), Err(Kind::Usage));
    }
}
