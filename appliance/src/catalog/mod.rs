//! What the appliance lists and searches, in sled: a derived cache of the repository's recovery points. Whatever is
//! wrong with it, it is set aside and filled again from the repository; it never holds the only copy of anything.

pub mod spec;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use blockstore::error::ReadError;
use blockstore::{DrillId, Protected, RecoveryPoint, RecoveryPointId, Repository};
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// sled's page cache; the catalog is small and read as a whole.
const CACHE_BYTES: u64 = 16 << 20;

/// A recovery point as `points` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    /// When that ends.
    #[serde(default)]
    pub protected_until: Option<DateTime<Utc>>,
    /// Whether what protects it cannot be read.
    #[serde(default)]
    pub protection_damaged: bool,
    /// The result of its last drill.
    pub drill: Option<serde_json::Value>,
    /// Always absent: see [`DamagedPoint`].
    #[serde(default)]
    pub damaged: Option<String>,
}

/// A recovery point that cannot be read, as `points` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DamagedPoint {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Not known.
    pub machine: Option<String>,
    /// Not known.
    pub time: Option<DateTime<Utc>>,
    /// Not known: none.
    pub disks: Vec<DiskSummary>,
    /// Not known: 0.
    pub size: u64,
    /// Not known: 0.
    pub stored: u64,
    /// Not known: none.
    pub labels: BTreeMap<String, String>,
    /// Not known.
    pub consistency: Option<String>,
    /// Whether it is protected.
    pub protected: bool,
    /// Not known.
    pub drill: Option<serde_json::Value>,
    /// What is wrong with it.
    pub damaged: String,
}

impl DamagedPoint {
    fn of(id: RecoveryPointId, protected: bool, error: &ReadError) -> DamagedPoint {
        DamagedPoint {
            id: id.to_string(),
            machine: None,
            time: None,
            disks: Vec::new(),
            size: 0,
            stored: 0,
            labels: BTreeMap::new(),
            consistency: None,
            protected,
            drill: None,
            damaged: crate::problem::chain(error),
        }
    }
}

/// A point of either kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ListedPoint {
    /// It can be read.
    Whole(PointSummary),
    /// It cannot.
    Damaged(DamagedPoint),
}

/// All recovery points.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// Those that can be read, oldest first.
    pub points: Vec<Arc<PointSummary>>,
    /// Those that cannot, by id.
    pub damaged: Vec<DamagedPoint>,
}

impl Listing {
    /// The damaged point whose id begins with `spec`, if it is one.
    pub fn damaged_by(&self, spec: &str) -> Option<&DamagedPoint> {
        let prefix = spec.to_ascii_lowercase();
        let mut found = self.damaged.iter().filter(|point| point.id.starts_with(&prefix));
        match (found.next(), found.next()) {
            (Some(point), None) if prefix.len() >= spec::PREFIX_MIN => Some(point),
            _ => None,
        }
    }
}

/// A disk of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
            consistency: crate::capture::consistency_word(point.consistency).to_owned(),
            protected: false,
            protected_until: None,
            protection_damaged: false,
            drill: None,
            damaged: None,
        }
    }

    /// The same, with what protects it now.
    fn with_protection(self, protected: Option<&Protected>) -> PointSummary {
        let until = match protected {
            Some(Protected::Until(until)) => i64::try_from(*until).ok().and_then(|s| DateTime::from_timestamp(s, 0)),
            _ => None,
        };
        PointSummary {
            protected: protected.is_some(),
            protected_until: until,
            protection_damaged: matches!(protected, Some(Protected::Damaged(_))),
            ..self
        }
    }

    /// Whether its last drill brought it up; nothing if there was none.
    pub fn came_up(&self) -> Option<bool> {
        self.drill.as_ref().map(|drill| drill["result"] == "passed")
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
            protected_until: None,
            protection_damaged: false,
            drill: None,
            damaged: None,
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
    drills: sled::Tree,
    /// What was listed last, while this process runs.
    last: Mutex<Last>,
}

/// A listing, and how long it stands.
#[derive(Debug, Default)]
struct Last {
    /// What the repository was marked with; absent if that was not known.
    mark: Option<[u64; 3]>,
    /// Seconds of the first protection that ends.
    until: u64,
    listing: Listing,
    known: HashMap<RecoveryPointId, Arc<PointSummary>>,
}

impl Catalog {
    /// Opens the catalog in folder `path`, and begins an empty one where there is none or it is damaged.
    pub fn open(path: &Path) -> Result<Catalog, Problem> {
        match open_patiently(path) {
            Ok((points, drills)) => Ok(Catalog::of(path, points, drills)),
            Err(error) => {
                let aside = set_aside(path)
                    .map_err(|error| Problem::failed(format!("cannot set aside catalog {}", path.display()), &error))?;
                tracing::warn!(
                    catalog = %path.display(), set_aside = %aside.display(), %error,
                    "the catalog is damaged; it is set aside and built anew from the repository"
                );
                let (points, drills) = open_trees(path)
                    .map_err(|error| Problem::failed(format!("cannot make catalog {}", path.display()), &error))?;
                Ok(Catalog::of(path, points, drills))
            }
        }
    }

    fn of(path: &Path, points: sled::Tree, drills: sled::Tree) -> Catalog {
        Catalog { path: path.to_owned(), points, drills, last: Mutex::default() }
    }

    /// The recovery points of the repository, after taking up what has come and gone there. One that cannot be read
    /// hides no other.
    pub fn listing(&self, repository: &Repository) -> Result<Listing, Problem> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // Asked for before it is looked: what changes meanwhile is seen next time.
        let mark = repository.mark();
        let now = crate::forget::now();
        if mark.is_none() || mark != last.mark || now >= last.until {
            *last = self.look(repository, &last.known, now)?;
            // One that is damaged may be put back in its place, which no mark shows.
            last.mark = mark.filter(|_| last.listing.damaged.is_empty());
        }
        Ok(last.listing.clone())
    }

    fn look(
        &self,
        repository: &Repository,
        known: &HashMap<RecoveryPointId, Arc<PointSummary>>,
        now: u64,
    ) -> Result<Last, Problem> {
        let ids =
            repository.list_points().map_err(|error| Problem::from_read("cannot list recovery points", &error))?;
        // Only for show: the store looks for itself before it forgets. It must not keep anybody from recovering.
        let protections = repository.protections().unwrap_or_else(|error| {
            tracing::error!(error = %crate::problem::chain(&error), "cannot read what protects recovery points");
            HashMap::new()
        });
        // Only for show, too.
        let drills = repository.drills().unwrap_or_else(|error| {
            tracing::error!(error = %crate::problem::chain(&error), "cannot list drills");
            Vec::new()
        });
        let drills = newest_first(drills);
        let ends = protections.values().filter_map(|protected| match protected {
            Protected::Until(until) if *until > now => Some(*until),
            _ => None,
        });
        let mut found = Last { until: ends.min().unwrap_or(u64::MAX), ..Last::default() };
        found.known.reserve(ids.len());
        found.listing.points.reserve(ids.len());
        for id in &ids {
            let protected = protections.get(id).filter(|protected| protected.holds_at(now));
            let drill = drills.get(id).and_then(|drills| self.newest_drill(repository, drills));
            match self.summary(repository, known, *id, protected, drill) {
                Ok(point) => {
                    found.known.insert(*id, point.clone());
                    found.listing.points.push(point);
                }
                Err(ReadError::NoSuchPoint { .. }) => {} // forgotten since the listing
                Err(error) => found.listing.damaged.push(DamagedPoint::of(*id, protected.is_some(), &error)),
            }
        }
        let gone: Vec<String> =
            known.keys().filter(|id| !found.known.contains_key(id)).map(ToString::to_string).collect();
        for id in gone {
            // What cannot be removed is looked up and left out again next time.
            let _ = self.points.remove(id);
        }
        if known.is_empty() {
            forget_others(&self.points, &ids.iter().map(ToString::to_string).collect());
        }
        forget_others(&self.drills, &drills.values().flatten().map(ToString::to_string).collect());
        found.listing.points.sort_by(|a, b| (a.time, &a.id).cmp(&(b.time, &b.id)));
        found.listing.damaged.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(found)
    }

    /// A point as it is listed: the one that was listed before, if it still is what is to be said.
    fn summary(
        &self,
        repository: &Repository,
        known: &HashMap<RecoveryPointId, Arc<PointSummary>>,
        id: RecoveryPointId,
        protected: Option<&Protected>,
        drill: Option<serde_json::Value>,
    ) -> Result<Arc<PointSummary>, ReadError> {
        let Some(before) = known.get(&id) else {
            let point = self.load(repository, id)?.with_protection(protected);
            return Ok(Arc::new(PointSummary { drill, ..point }));
        };
        if protected.is_none() && !before.protected && drill == before.drill {
            return Ok(before.clone());
        }
        let point = PointSummary::clone(before).with_protection(protected);
        Ok(Arc::new(PointSummary { drill, ..point }))
    }

    fn load(&self, repository: &Repository, id: RecoveryPointId) -> Result<PointSummary, ReadError> {
        if let Some(point) = self.cached(id) {
            return Ok(point);
        }
        let point = PointSummary::of(&repository.load_point(id)?);
        self.remember(&point);
        Ok(point)
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

    /// The summary of a drill.
    pub fn drill(&self, repository: &Repository, id: DrillId) -> Result<serde_json::Value, ReadError> {
        let name = id.to_string();
        let cached = self.drills.get(&name).ok().flatten();
        if let Some(summary) = cached.and_then(|value| serde_json::from_slice(&value).ok()) {
            return Ok(summary);
        }
        let summary = repository.drill_summary(id)?;
        if let Err(error) = self.drills.insert(name, summary.to_string().into_bytes()) {
            tracing::warn!(catalog = %self.path.display(), %error, "cannot keep a drill in the catalog");
        }
        Ok(summary)
    }

    /// What the newest drill that can be read found, in short.
    fn newest_drill(&self, repository: &Repository, drills: &[DrillId]) -> Option<serde_json::Value> {
        let (id, summary) = drills.iter().find_map(|id| Some((id, self.drill(repository, *id).ok()?)))?;
        let mut short = serde_json::json!({ "id": id.to_string() });
        for key in ["result", "time", "stage", "rto_ms", "reason"] {
            short[key] = summary.get(key).cloned().unwrap_or_default();
        }
        Some(short)
    }
}

/// Drills by their points, the newest of each first.
fn newest_first(drills: Vec<DrillId>) -> HashMap<RecoveryPointId, Vec<DrillId>> {
    let mut by_point: HashMap<RecoveryPointId, Vec<DrillId>> = HashMap::new();
    for id in drills {
        by_point.entry(id.point).or_default().push(id);
    }
    by_point.values_mut().for_each(|drills| drills.sort_unstable_by_key(|id| std::cmp::Reverse(id.time_unix_ms)));
    by_point
}

/// Removes what is not `known` any more.
fn forget_others(tree: &sled::Tree, known: &HashSet<String>) {
    let gone = |key: &sled::IVec| std::str::from_utf8(key).map_or(true, |id| !known.contains(id));
    for key in tree.iter().keys().flatten().filter(gone) {
        // What cannot be removed is looked up and left out again next time.
        let _ = tree.remove(key);
    }
}

/// A process that has just ended may hold sled's own lock for a moment longer.
fn open_patiently(path: &Path) -> Result<(sled::Tree, sled::Tree), sled::Error> {
    const TRIES: u32 = 40;
    for _ in 1..TRIES {
        match open_trees(path) {
            Err(sled::Error::Io(_)) => std::thread::sleep(Duration::from_millis(50)),
            opened => return opened,
        }
    }
    open_trees(path)
}

/// sled panics on some kinds of damage and reports others; both count.
fn open_trees(path: &Path) -> Result<(sled::Tree, sled::Tree), sled::Error> {
    let open = || {
        let db = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).mode(sled::Mode::LowSpace).open()?;
        let (points, drills) = (db.open_tree("points")?, db.open_tree("drills")?);
        for item in points.iter().chain(drills.iter()) {
            item?;
        }
        Ok((points, drills))
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
