//! What a collect says: done, planned, or held back, and by whom.

use serde::{Deserialize, Serialize};

use super::times;
use crate::error::ReadError;
use crate::id::{PackId, RecoveryPointId};
use crate::lease::LeaseState;
use crate::storage::Object;

/// An object that is damaged or missing, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Which object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
}

impl Blocker {
    pub(super) fn point(id: RecoveryPointId, error: &ReadError) -> Blocker {
        Blocker { object: Object::Point(id).to_string(), problem: told(error) }
    }

    pub(super) fn lease(lease: &LeaseState) -> Blocker {
        let problem = "it cannot be read, so what it holds is not known".to_owned();
        Blocker { object: Object::Lease(lease.id).to_string(), problem }
    }
}

fn told(error: &ReadError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Packs that wait for their deletion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantined {
    /// The name of the quarantine object.
    pub batch: String,
    /// How many packs.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// When they were put there, in seconds since 1970 UTC.
    #[serde(with = "times")]
    pub created: u64,
    /// When they may be deleted.
    #[serde(with = "times")]
    pub due: u64,
    /// Who must end first, whatever the date: backups that may have found them in the index.
    pub waits_for: Vec<String>,
}

/// What a collect did; with `dry_run`, what it would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectReport {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// Points that hold something: those listed, and those that only leases name.
    pub points: u64,
    /// Packs in the repository before.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Stored bytes that points need.
    pub live_bytes: u64,
    /// Packs deleted.
    pub freed_packs: u64,
    /// Their bytes.
    pub freed_bytes: u64,
    /// Packs that nothing needs, put into quarantine by this collect; those repacked are among them.
    pub condemned_packs: u64,
    /// Their bytes.
    pub condemned_bytes: u64,
    /// Packs whose live frames were copied.
    pub repacked_packs: u64,
    /// Bytes of the copies.
    pub repacked_bytes: u64,
    /// Packs that no index run names: what interrupted backups left, or a running one has just stored.
    pub unnamed_packs: u64,
    /// Their bytes.
    pub unnamed_bytes: u64,
    /// Packs taken out of quarantine, because a point needs them after all.
    pub reprieved_packs: u64,
    /// Chunks that points need and no pack holds.
    pub lost_chunks: u64,
    /// Packs that points need and that are missing or damaged.
    pub lost_packs: Vec<Blocker>,
    /// What waits for its deletion.
    pub quarantined: Vec<Quarantined>,
    /// Who is at work in the repository.
    pub leases: Vec<String>,
    /// What keeps collect from knowing what is needed, so that nothing is freed.
    pub blocked: Vec<Blocker>,
    /// Memory the marks took.
    pub mark_bytes: u64,
}

/// Who needs a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The point.
    pub point: RecoveryPointId,
    /// Its machine.
    pub machine: String,
    /// How many of the pack's frames it needs.
    pub frames: u64,
    /// Whether only a lease holds it: the point itself is forgotten.
    pub forgotten: bool,
    /// Who holds the point.
    pub leases: Vec<String>,
}

/// What is known about a pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackReport {
    /// The pack.
    pub pack: PackId,
    /// `data` or `metadata`; none if no run names it.
    pub kind: Option<String>,
    /// Its length.
    pub bytes: u64,
    /// Stored bytes that points need from it.
    pub live_bytes: u64,
    /// Its frames.
    pub frames: u64,
    /// How many of them points need.
    pub live_frames: u64,
    /// `kept`, `to be repacked`, `dead`, `quarantined`, `unnamed`, `missing`.
    pub state: String,
    /// When it may be deleted, if it is in quarantine.
    #[serde(with = "times::option")]
    pub due: Option<u64>,
    /// Which backups must end before that.
    pub waits_for: Vec<String>,
    /// Who needs it; filled where one pack was asked for.
    pub holders: Vec<Holder>,
}
