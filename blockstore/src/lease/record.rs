//! [`LeaseRecord`]: what a lease says, and when it counts.

use serde::{Deserialize, Serialize};

use super::surroundings::{Process, Surroundings};
use super::{Verdict, unix};
use crate::format::FormatError;
use crate::id::{ChunkId, RecoveryPointId};
use crate::manifest::MAX_DISK_SIZE;
use crate::point::RecoveryPoint;

/// How long a lease counts after it was put, in seconds.
pub(crate) const LIFE: u64 = 600;
/// The same for a recovery's, whose VM goes on while Lifeboat is away.
pub(crate) const RECOVERY_LIFE: u64 = 30 * 24 * 3600;
/// Clocks of different hosts may differ by this much.
pub(crate) const SKEW: u64 = 300;

/// What somebody does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseKind {
    /// Stores chunks and relies on those it found.
    Backup,
    /// Reads points.
    Reader,
    /// A recovery, which outlives the process that began it.
    Recovery,
    /// Frees space; there is one at a time.
    Collect,
}

/// A disk that must stay readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasedDisk {
    /// Its size in bytes.
    pub size: u64,
    /// The root of its manifest.
    pub root: ChunkId,
}

/// A point that must stay readable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeasedPoint {
    /// Its id.
    pub id: RecoveryPointId,
    /// Whose it is.
    pub machine: String,
    /// Its disks.
    pub disks: Vec<LeasedDisk>,
}

impl LeasedPoint {
    /// What a lease says of a point.
    pub fn of(point: &RecoveryPoint) -> LeasedPoint {
        let disk = |disk: &crate::point::PointedDisk| LeasedDisk { size: disk.size, root: disk.root };
        LeasedPoint { id: point.id, machine: point.machine.clone(), disks: point.disks.iter().map(disk).collect() }
    }
}

/// What a lease says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// What its holder does.
    pub kind: LeaseKind,
    /// The same for people: `backup of web01`.
    pub owner: String,
    /// Who holds it.
    #[serde(flatten)]
    pub process: Process,
    /// When it was taken, in seconds since 1970 UTC.
    pub created: u64,
    /// When it was put last.
    pub renewed: u64,
    /// Until when it counts.
    pub expires: u64,
    /// What must stay readable.
    #[serde(default)]
    pub points: Vec<LeasedPoint>,
}

impl LeaseRecord {
    /// A new lease's text.
    pub(crate) fn new(kind: LeaseKind, owner: &str, points: &[&RecoveryPoint], around: &dyn Surroundings) -> Self {
        let now = unix(around.now());
        let record = LeaseRecord {
            kind,
            owner: owner.to_owned(),
            process: around.process(),
            created: now,
            renewed: now,
            expires: now,
            points: points.iter().map(|point| LeasedPoint::of(point)).collect(),
        };
        record.renewed(now)
    }

    /// The text that follows this one.
    pub(crate) fn renewed(&self, now: u64) -> LeaseRecord {
        let life = if self.kind == LeaseKind::Recovery { RECOVERY_LIFE } else { LIFE };
        LeaseRecord { renewed: now, expires: now.saturating_add(life), ..self.clone() }
    }

    pub(crate) fn check(self) -> Result<LeaseRecord, FormatError> {
        let fits = self.points.iter().flat_map(|point| &point.disks).all(|disk| disk.size <= MAX_DISK_SIZE);
        if fits { Ok(self) } else { Err(FormatError::Field { field: "a disk of the lease" }) }
    }

    pub(super) fn judge(&self, around: &dyn Surroundings) -> Verdict {
        if self.expires.saturating_add(SKEW) < unix(around.now()) {
            Verdict::Expired
        } else if self.kind != LeaseKind::Recovery && around.is_gone(&self.process) {
            Verdict::ProcessGone
        } else {
            Verdict::Alive
        }
    }
}
