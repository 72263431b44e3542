//! Which disk goes where and in which format, settled before anything is written.

use std::path::Path;

use images::Overwrite;

use super::{RestoreRequest, Start, Target};
use crate::capture::{absolute_certificates, check_name, is_uri};
use crate::catalog::{DiskSummary, PointSummary};
use crate::problem::Problem;

/// The formats that a file can have.
pub const FORMATS: [&str; 6] = ["raw", "qcow2", "vmdk", "vhdx", "vhd", "vdi"];

/// Endings of formats that are read and not written.
const NOT_WRITTEN: [&str; 3] = ["qcow", "qed", "ova"];

/// What a disk is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Its bytes as they are: a file or a block device.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// VMware's, sparse and in one file.
    Vmdk,
    /// Hyper-V's, dynamic.
    Vhdx,
    /// Hyper-V's older one, dynamic.
    Vhd,
    /// VirtualBox's, dynamic.
    Vdi,
    /// An NBD export.
    Export,
}

impl Format {
    fn named(name: &str) -> Option<Format> {
        Some(match name {
            "raw" => Format::Raw,
            "qcow2" => Format::Qcow2,
            "vmdk" => Format::Vmdk,
            "vhdx" => Format::Vhdx,
            "vhd" | "vpc" => Format::Vhd,
            "vdi" => Format::Vdi,
            _ => return None,
        })
    }

    /// The ending of a file of this format.
    fn ending(self) -> &'static str {
        match self {
            Format::Raw | Format::Export => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
            Format::Vhd => "vhd",
            Format::Vdi => "vdi",
        }
    }

    /// What a file of this format has to be read as, where looking could be led astray by what the disk holds.
    pub(super) fn to_read(self) -> Option<&'static str> {
        match self {
            Format::Raw => Some("raw"),
            Format::Qcow2 => Some("qcow2"),
            Format::Vmdk | Format::Vhdx | Format::Vhd | Format::Vdi | Format::Export => None,
        }
    }
}

/// Which disk goes where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub(super) steps: Vec<Step>,
    pub(super) overwrite: Overwrite,
    pub(super) start: Start,
    pub(super) verify: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) disk: String,
    pub(super) size: u64,
    /// A path or a URI, as the format says.
    pub(super) location: String,
    pub(super) format: Format,
}

impl Plan {
    /// All files and devices that will be written.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.steps.iter().filter(|step| step.format != Format::Export).map(|step| Path::new(&step.location))
    }
}

/// A target from the command line: `[DISK=]PATH` or `[DISK=]URI`. What stands before `=` is a disk only if it can be a
/// name.
pub fn parse_target(text: &str) -> Result<Target, Problem> {
    let named = text.split_once('=').filter(|(disk, _)| check_name("disk", disk).is_ok() && !is_uri(text));
    let (disk, location) = match named {
        Some((disk, location)) => (Some(disk.to_owned()), location),
        None => (None, text),
    };
    if location.is_empty() {
        return Err(Problem::usage(format!("target `{text}` names no file")));
    }
    if is_uri(location) {
        return Ok(Target { disk, location: absolute_certificates(location)? });
    }
    if location.contains("://") {
        return Err(Problem::usage(format!("cannot restore to {location}"))
            .hint("name a file, a block device, a folder, or an NBD export by its URI"));
    }
    let path = std::path::absolute(location)
        .map_err(|error| Problem::failed(format!("cannot restore to {location}"), &error))?;
    let location = path.to_str().ok_or_else(|| Problem::usage(format!("the path {} is not UTF-8", path.display())))?;
    Ok(Target { disk, location: location.to_owned() })
}

/// Works out which disk goes where, and refuses before anything is written.
pub fn plan(point: &PointSummary, request: &RestoreRequest) -> Result<Plan, Problem> {
    let forced = match request.format.as_deref() {
        None => None,
        Some(name) => Some(Format::named(name).ok_or_else(|| {
            Problem::usage(format!("cannot restore to format `{name}`")).hint(format!("use {}", FORMATS.join(", ")))
        })?),
    };
    let mut steps: Vec<Step> = Vec::new();
    for target in &request.targets {
        steps.extend(steps_to(point, target, forced)?);
    }
    for (at, step) in steps.iter().enumerate() {
        let before = steps.iter().take(at);
        if before.clone().any(|other| other.disk == step.disk || other.location == step.location) {
            return Err(Problem::usage(format!("disk {} or its target {} is given twice", step.disk, step.location)));
        }
    }
    let overwrite = if request.overwrite { Overwrite::Replace } else { Overwrite::Refuse };
    if request.start != Start::New
        && let Some(step) = steps.iter().find(|step| !matches!(step.format, Format::Raw | Format::Export))
    {
        return Err(Problem::usage(format!("cannot go on with {}: it is {}", step.location, step.format.ending()))
            .hint("--in-place and --resume are for raw files, block devices and NBD exports"));
    }
    Ok(Plan { steps, overwrite, start: request.start, verify: request.verify })
}

/// The disks that a target is for.
fn steps_to(point: &PointSummary, target: &Target, forced: Option<Format>) -> Result<Vec<Step>, Problem> {
    let names = || point.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
    let step = |disk: &DiskSummary, location: String| {
        let format = format_of(&location, forced)?;
        Ok(Step { disk: disk.name.clone(), size: disk.size, location, format })
    };
    match (&target.disk, point.disks.as_slice()) {
        (Some(name), disks) => {
            let disk = disks.iter().find(|disk| disk.name == *name).ok_or_else(|| {
                Problem::not_found(format!("the recovery point of {} has no disk `{name}`", point.machine))
                    .hint(format!("it has {}", names()))
            })?;
            Ok(vec![step(disk, target.location.clone())?])
        }
        (None, disks) if !is_uri(&target.location) && Path::new(&target.location).is_dir() => {
            let ending = forced.unwrap_or(Format::Raw).ending();
            let inside = |disk: &DiskSummary| {
                step(disk, format!("{}/{}-{}.{ending}", target.location, point.machine, disk.name))
            };
            disks.iter().map(inside).collect()
        }
        (None, [disk]) => Ok(vec![step(disk, target.location.clone())?]),
        (None, _) => Err(Problem::usage(format!("the recovery point of {} has several disks", point.machine))
            .hint(format!("write --to DISK=TARGET for each of {}, or name a folder", names()))),
    }
}

fn format_of(location: &str, forced: Option<Format>) -> Result<Format, Problem> {
    if is_uri(location) {
        return match forced {
            None | Some(Format::Raw) => Ok(Format::Export),
            Some(format) => Err(Problem::usage(format!("{location} cannot be written as {}", format.ending()))
                .hint("an NBD export holds a disk as it is; leave out --format")),
        };
    }
    if let Some(format) = forced {
        return Ok(format);
    }
    let ending = Path::new(location).extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    if NOT_WRITTEN.contains(&ending.as_str()) {
        return Err(Problem::usage(format!("cannot write {location} in the format of its ending"))
            .hint(format!("use an ending of {}, or give --format", FORMATS.join(", "))));
    }
    Ok(Format::named(&ending).unwrap_or(Format::Raw))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Kind;

    fn point(disks: &[&str]) -> PointSummary {
        let disks = disks.iter().map(|name| DiskSummary { name: (*name).into(), size: 4096 }).collect();
        PointSummary { disks, ..PointSummary::example() }
    }

    fn planned(disks: &[&str], targets: &[&str], format: Option<&str>) -> Result<Vec<(String, String, Format)>, Kind> {
        let targets = targets.iter().map(|target| parse_target(target).unwrap()).collect();
        let request = RestoreRequest { targets, format: format.map(str::to_owned), ..RestoreRequest::default() };
        plan(&point(disks), &request)
            .map(|plan| plan.steps.into_iter().map(|step| (step.disk, step.location, step.format)).collect())
            .map_err(|problem| problem.kind)
    }

    #[test]
    fn each_disk_finds_its_target() {
        let step = |disk: &str, path: &str, format| vec![(disk.to_owned(), path.to_owned(), format)];
        assert_eq!(planned(&["a"], &["/x/y.raw"], None), Ok(step("a", "/x/y.raw", Format::Raw)));
        assert_eq!(planned(&["a"], &["/x/k=v.raw"], None), Ok(step("a", "/x/k=v.raw", Format::Raw)));
        assert_eq!(planned(&["a", "b"], &["b=/x/b.VHDX"], None), Ok(step("b", "/x/b.VHDX", Format::Vhdx)));
        assert_eq!(planned(&["a"], &["/x/b.vhdx"], Some("vmdk")), Ok(step("a", "/x/b.vhdx", Format::Vmdk)));
        let export = "nbd+unix:///x?socket=/a=b";
        assert_eq!(planned(&["a"], &[export], None), Ok(step("a", export, Format::Export)));
        assert_eq!(planned(&["a", "b"], &[&format!("b={export}")], None), Ok(step("b", export, Format::Export)));
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap();
        let both = planned(&["a", "b"], &[folder], Some("vdi")).unwrap();
        assert_eq!(both[1], ("b".to_owned(), format!("{folder}/web01-b.vdi"), Format::Vdi));
    }

    #[test]
    fn targets_that_do_not_fit_are_refused() {
        assert_eq!(planned(&["a", "b"], &["/x/y"], None), Err(Kind::Usage));
        assert_eq!(planned(&["a", "b"], &["c=/x/y"], None), Err(Kind::NotFound));
        assert_eq!(planned(&["a", "b"], &["a=/x", "b=/x"], None), Err(Kind::Usage));
        assert_eq!(planned(&["a", "b"], &["a=/x", "a=/y"], None), Err(Kind::Usage));
        assert_eq!(planned(&["a"], &["/x/y.ova"], None), Err(Kind::Usage));
        assert_eq!(planned(&["a"], &["nbd://h/x"], Some("qcow2")), Err(Kind::Usage));
        assert!(parse_target("s3://bucket/x").is_err() && parse_target("a=").is_err());
    }
}
