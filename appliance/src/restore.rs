//! Restore: a recovery point's disks written to image files or block devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use blockstore::{Progress, Repository, ZeroPolicy};
use images::{Overwrite, TargetFormat};
use serde::{Deserialize, Serialize};

use crate::catalog::PointSummary;
use crate::exports::ImageTarget;
use crate::problem::Problem;

/// A target as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The disk, if it was named.
    pub disk: Option<String>,
    /// An absolute path.
    pub path: PathBuf,
}

/// What to restore to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// Where to.
    pub targets: Vec<Target>,
    /// `raw` or `qcow2`; by the target's ending when not given.
    #[serde(default)]
    pub format: Option<String>,
    /// Whether what exists may be replaced.
    #[serde(default)]
    pub overwrite: bool,
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
    /// Bytes written; the rest are holes.
    pub written: u64,
}

/// Which disk goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    steps: Vec<Step>,
    overwrite: Overwrite,
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
    Ok(Plan { steps, overwrite })
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

/// Restores disk by disk. A disk that fails leaves no target; those before it stay.
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
        let target = images::create_target(&step.path, step.format, step.size, plan.overwrite)
            .map_err(|error| Problem::from_target(&what, &error))?;
        let zeroes = if target.starts_zeroed() { ZeroPolicy::TargetIsZero } else { ZeroPolicy::WriteZeroes };
        let stats = blockstore::restore(&disk, &ImageTarget(target.as_ref()), zeroes, progress)
            .map_err(|error| Problem::from_restore(&what, &error))?;
        target.finish().map_err(|error| Problem::failed(format!("cannot restore {what}"), &error))?;
        disks.push(RestoredDisk {
            name: step.disk.clone(),
            target: step.path.clone(),
            size: step.size,
            written: stats.data,
        });
    }
    Ok(RestoreResult { point: point.id.clone(), disks, seconds: started.elapsed().as_secs_f64() })
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
        let request = RestoreRequest { targets, format: None, overwrite: false };
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
