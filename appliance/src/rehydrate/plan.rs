//! What was asked for, and where each disk goes.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::target::Place;
use crate::catalog::DiskSummary;
use crate::problem::Problem;

/// Who copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Lifeboat, for any NBD client.
    Stream,
    /// The QEMU that runs the guest.
    Mirror,
}

impl Mode {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Stream => "stream",
            Mode::Mirror => "mirror",
        }
    }
}

/// A target as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Target {
    /// The disk, if it was named.
    pub disk: Option<String>,
    /// An absolute path or an NBD URI.
    pub place: String,
}

/// Where to rehydrate to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RehydrateRequest {
    /// One for each disk.
    pub targets: Vec<Target>,
    /// Who copies; when not given, QEMU where it can, else Lifeboat.
    #[serde(default)]
    pub mode: Option<Mode>,
    /// `raw` or `qcow2`; by the target's ending when not given.
    #[serde(default)]
    pub format: Option<String>,
    /// Bytes a second at most.
    #[serde(default)]
    pub limit: Option<u64>,
    /// Whether files that exist and block devices may be written.
    #[serde(default)]
    pub overwrite: bool,
}

/// A disk and its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedDisk {
    /// The disk's name.
    pub disk: String,
    /// Where it goes.
    pub place: Place,
    /// Whether the file was made for this, so that it is removed when the rehydration is cancelled.
    pub made: bool,
}

/// A rehydration as it is journalled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// Who copies.
    pub mode: Mode,
    /// The disks, as the recovery point has them.
    pub disks: Vec<PlannedDisk>,
    /// Bytes a second at most.
    pub limit: Option<u64>,
}

/// A target from the command line: `[DISK=]PLACE`. What stands before `=` is a disk only if it can be a name.
pub fn parse_target(text: &str) -> Result<Target, Problem> {
    let (disk, place) = match text.split_once('=') {
        Some((disk, place)) if crate::capture::check_name("disk", disk).is_ok() => (Some(disk.to_owned()), place),
        _ => (None, text),
    };
    if place.is_empty() {
        return Err(Problem::usage(format!("target `{text}` names no place")));
    }
    if place.contains("://") {
        return Ok(Target { disk, place: place.to_owned() });
    }
    let path =
        std::path::absolute(place).map_err(|error| Problem::failed(format!("cannot rehydrate to {place}"), &error))?;
    let place = path.to_str().ok_or_else(|| Problem::usage(format!("target {} is not UTF-8", path.display())))?;
    Ok(Target { disk, place: place.to_owned() })
}

impl Plan {
    /// Works out which disk goes where; touches nothing but to look whether files exist.
    pub fn make(disks: &[DiskSummary], request: &RehydrateRequest, mode: Mode) -> Result<Plan, Problem> {
        let names = || disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
        let mut planned: Vec<Option<PlannedDisk>> = vec![None; disks.len()];
        for target in &request.targets {
            let at = match (&target.disk, disks) {
                (Some(name), _) => disks.iter().position(|disk| disk.name == *name).ok_or_else(|| {
                    Problem::not_found(format!("there is no disk `{name}`")).hint(format!("the disks are {}", names()))
                })?,
                (None, [_]) => 0,
                (None, _) => {
                    return Err(Problem::usage(format!("it is not clear which disk goes to {}", target.place))
                        .hint(format!("write DISK=TARGET for each of {}", names())));
                }
            };
            let (Some(slot), Some(disk)) = (planned.get_mut(at), disks.get(at)) else { continue };
            if slot.is_some() {
                return Err(Problem::usage(format!("disk {} has two targets", disk.name)));
            }
            let place = place(&target.place, request.format.as_deref())?;
            let made = match &place {
                Place::Raw(path) | Place::Qcow2(path) => !path.exists(),
                Place::Nbd(_) => false,
            };
            *slot = Some(PlannedDisk { disk: disk.name.clone(), place, made });
        }
        let missing = disks.iter().zip(&planned).find(|(_, planned)| planned.is_none());
        if let Some((disk, _)) = missing {
            return Err(Problem::usage(format!("disk {} has no target", disk.name))
                .hint("a machine moves with all its disks: give --to DISK=TARGET for each"));
        }
        let planned: Vec<PlannedDisk> = planned.into_iter().flatten().collect();
        for (at, one) in planned.iter().enumerate() {
            if planned.iter().skip(at + 1).any(|other| other.place == one.place) {
                return Err(Problem::usage(format!("two disks go to {}", one.place)));
            }
            if let (Mode::Stream, Place::Qcow2(path)) = (mode, &one.place) {
                return Err(Problem::usage(format!("cannot stream to the qcow2 file {}", path.display()))
                    .hint("only a running VM's own QEMU writes qcow2 (--mode mirror); stream to a raw file, a block device or an NBD export"));
            }
        }
        Ok(Plan { mode, disks: planned, limit: request.limit })
    }

    /// The files it writes.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.disks.iter().filter_map(|disk| disk.place.path())
    }
}

impl Place {
    /// The file or device, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Place::Raw(path) | Place::Qcow2(path) => Some(path),
            Place::Nbd(_) => None,
        }
    }
}

fn place(text: &str, format: Option<&str>) -> Result<Place, Problem> {
    if let Some((scheme, _)) = text.split_once("://") {
        return match scheme {
            "nbd" | "nbd+unix" => Ok(Place::Nbd(text.to_owned())),
            other => Err(Problem::usage(format!("cannot rehydrate to a {other}:// URL"))
                .hint("name a file, a block device, or an nbd:// or nbd+unix:// URI")),
        };
    }
    let path = PathBuf::from(text);
    if !path.is_absolute() {
        return Err(Problem::usage(format!("target {text} is not an absolute path")));
    }
    let ending = path.extension().is_some_and(|ending| ending == "qcow2");
    match (format, ending) {
        (Some("qcow2"), _) | (None, true) => Ok(Place::Qcow2(path)),
        (Some("raw"), _) | (None, false) => Ok(Place::Raw(path)),
        (Some(other), _) => {
            Err(Problem::usage(format!("cannot rehydrate to format `{other}`")).hint("use raw or qcow2"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(names: &[&str]) -> Vec<DiskSummary> {
        names.iter().map(|name| DiskSummary { name: (*name).to_owned(), size: 1 << 20 }).collect()
    }

    fn plan(names: &[&str], targets: &[&str]) -> Result<Plan, Problem> {
        let targets = targets.iter().map(|text| parse_target(text)).collect::<Result<_, _>>()?;
        let request = RehydrateRequest { targets, mode: None, format: None, limit: None, overwrite: false };
        Plan::make(&disks(names), &request, Mode::Stream)
    }

    #[test]
    fn the_only_disk_needs_no_name_and_several_do() {
        let one = plan(&["disk0"], &["/prod/web01.raw"]).unwrap();
        assert_eq!(one.disks[0].place, Place::Raw("/prod/web01.raw".into()));
        let two = plan(&["root", "data"], &["data=/dev/no-such-vg/data", "root=nbd://127.0.0.1:10809/root"]).unwrap();
        assert_eq!(two.disks[0].place, Place::Nbd("nbd://127.0.0.1:10809/root".into()));
        assert_eq!(two.disks[1].disk, "data");
        assert!(plan(&["root", "data"], &["/prod/web01.raw"]).is_err());
    }

    #[test]
    fn plans_that_make_no_sense_are_refused() {
        for targets in [
            &["root=/a"][..],
            &["root=/a", "data=/a"],
            &["root=/a", "root=/b", "data=/c"],
            &["root=/a", "data=/b", "swap=/c"],
            &["root=http://a/b", "data=/b"],
            &["root=/a.qcow2", "data=/b"],
        ] {
            assert!(plan(&["root", "data"], targets).is_err(), "{targets:?}");
        }
    }
}
