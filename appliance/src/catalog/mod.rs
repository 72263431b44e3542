//! What the appliance lists and searches, in sled: a derived cache of the repository's recovery points. Whatever is
//! wrong with it, it is set aside and filled again from the repository; it never holds the only copy of anything.

pub mod spec;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use blockstore::{Consistency, RecoveryPoint, RecoveryPointId, Repository};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// sled's page cache; the catalog is small and read as a whole.
const CACHE_BYTES: u64 = 16 << 20;

/// A recovery point as `points` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointSummary {
    /// 64 hexadecimal digits.
    pub id: String,
    /// The machine it is of.
    pub machine: String,
    /// When it was sealed.
    pub time: DateTime<Utc>,
    /// Its disks in order.
    pub disks: Vec<DiskSummary>,
    /// Sum of the disks' sizes in bytes.
    pub size: u64,
    /// Bytes that this point added to the repository.
    pub stored: u64,
    /// Labels given at backup.
    pub labels: BTreeMap<String, String>,
    /// `crash` or `application`.
    pub consistency: String,
    /// Whether no prune passes it.
    pub protected: bool,
    /// The result of its last drill.
    pub drill: Option<serde_json::Value>,
}

/// A disk of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSummary {
    /// As given at backup.
    pub name: String,
    /// In bytes.
    pub size: u64,
}

impl PointSummary {
    /// What is listed of `point`.
    pub fn of(point: &RecoveryPoint) -> PointSummary {
        let disks: Vec<DiskSummary> =
            point.disks.iter().map(|disk| DiskSummary { name: disk.name.clone(), size: disk.size }).collect();
        PointSummary {
            id: point.id.to_string(),
            machine: point.machine.clone(),
            time: time_of(point),
            size: disks.iter().fold(0, |sum, disk| sum.saturating_add(disk.size)),
            disks,
            stored: point.stats.stored_bytes,
            labels: point.labels.clone(),
            consistency: match point.consistency {
                Consistency::Crash => "crash",
                Consistency::Application => "application",
            }
            .to_owned(),
            protected: false,
            drill: None,
        }
    }

    #[cfg(test)]
    pub(crate) fn example() -> PointSummary {
        PointSummary {
            id: "00".repeat(32),
            machine: "web01".into(),
            time: DateTime::UNIX_EPOCH,
            disks: vec![DiskSummary { name: "disk0".into(), size: 1 << 20 }],
            size: 1 << 20,
            stored: 1234,
            labels: BTreeMap::new(),
            consistency: "crash".into(),
            protected: false,
            drill: None,
        }
    }
}

/// When a point was sealed.
fn time_of(point: &RecoveryPoint) -> DateTime<Utc> {
    DateTime::from_timestamp_nanos(i64::try_from(point.time_unix_ns).unwrap_or(i64::MAX))
}

/// The catalog of one repository.
#[derive(Debug)]
pub struct Catalog {
    path: PathBuf,
    points: sled::Tree,
}

impl Catalog {
    /// Opens the catalog in folder `path`, and begins an empty one where there is none or it is damaged.
    pub fn open(path: &Path) -> Result<Catalog, Problem> {
        match open_patiently(path) {
            Ok(points) => Ok(Catalog { path: path.to_owned(), points }),
            Err(error) => {
                let aside = set_aside(path)
                    .map_err(|error| Problem::failed(format!("cannot set aside catalog {}", path.display()), &error))?;
                tracing::warn!(
                    catalog = %path.display(), set_aside = %aside.display(), %error,
                    "the catalog is damaged; it is set aside and built anew from the repository"
                );
                let points = open_tree(path)
                    .map_err(|error| Problem::failed(format!("cannot make catalog {}", path.display()), &error))?;
                Ok(Catalog { path: path.to_owned(), points })
            }
        }
    }

    /// The recovery points of the repository, oldest first, after taking up what has come and gone there.
    ///
    /// A point object that cannot be read is left out and logged: one damaged point must not hide the others.
    pub fn points(&self, repository: &Repository) -> Result<Vec<PointSummary>, Problem> {
        let ids =
            repository.list_points().map_err(|error| Problem::from_read("cannot list recovery points", &error))?;
        let mut points = Vec::with_capacity(ids.len());
        let mut known = HashSet::with_capacity(ids.len());
        for id in ids {
            known.insert(id);
            if let Some(point) = self.cached(id) {
                points.push(point);
                continue;
            }
            match repository.load_point(id) {
                Ok(point) => {
                    let point = PointSummary::of(&point);
                    self.remember(&point);
                    points.push(point);
                }
                Err(error) => {
                    tracing::error!(point = %id, error = %crate::problem::chain(&error), "left out of the list: cannot read it")
                }
            }
        }
        self.forget_others(&known);
        points.sort_by(|a, b| (a.time, &a.id).cmp(&(b.time, &b.id)));
        Ok(points)
    }

    fn cached(&self, id: RecoveryPointId) -> Option<PointSummary> {
        let value = self.points.get(id.to_string()).ok()??;
        serde_json::from_slice(&value).ok()
    }

    fn remember(&self, point: &PointSummary) {
        let Ok(value) = serde_json::to_vec(point) else { return };
        if let Err(error) = self.points.insert(&point.id, value) {
            tracing::warn!(catalog = %self.path.display(), %error, "cannot keep a recovery point in the catalog");
        }
    }

    fn forget_others(&self, known: &HashSet<RecoveryPointId>) {
        let known: HashSet<String> = known.iter().map(ToString::to_string).collect();
        let gone = |key: &sled::IVec| std::str::from_utf8(key).map_or(true, |id| !known.contains(id));
        for key in self.points.iter().keys().flatten().filter(gone) {
            // What cannot be removed is looked up and left out again next time.
            let _ = self.points.remove(key);
        }
    }
}

/// A process that has just ended may hold sled's own lock for a moment longer.
fn open_patiently(path: &Path) -> Result<sled::Tree, sled::Error> {
    const TRIES: u32 = 40;
    for _ in 1..TRIES {
        match open_tree(path) {
            Err(sled::Error::Io(_)) => std::thread::sleep(Duration::from_millis(50)),
            opened => return opened,
        }
    }
    open_tree(path)
}

/// sled panics on some kinds of damage and reports others; both count.
fn open_tree(path: &Path) -> Result<sled::Tree, sled::Error> {
    let open = || {
        let db = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).mode(sled::Mode::LowSpace).open()?;
        let tree = db.open_tree("points")?;
        for item in tree.iter() {
            item?;
        }
        Ok(tree)
    };
    std::panic::catch_unwind(open).unwrap_or_else(|_| Err(sled::Error::Corruption { at: None, bt: () }))
}

fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    for number in 0..1000 {
        let aside = path.with_extension(format!("damaged-{number}"));
        if !aside.exists() {
            std::fs::rename(path, &aside)?;
            return Ok(aside);
        }
    }
    Err(std::io::Error::other("too many damaged catalogs lie here already; remove them"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_catalog_is_set_aside_and_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog");
        let catalog = Catalog::open(&path).unwrap();
        for number in 0..200 {
            catalog.remember(&PointSummary { id: format!("{number:064}"), ..PointSummary::example() });
        }
        catalog.points.flush().unwrap();
        drop(catalog);
        for entry in std::fs::read_dir(&path).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            let mut bytes = std::fs::read(entry.path()).unwrap();
            for byte in &mut bytes {
                *byte ^= 0x5a;
            }
            std::fs::write(entry.path(), bytes).unwrap();
        }
        let catalog = Catalog::open(&path).unwrap();
        assert_eq!(catalog.points.iter().count(), 0);
        assert!(dir.path().join("catalog.damaged-0").exists());
    }
}
