//! Leases: who is at work in a repository, and what must stay readable for them. Specification: docs/format/note.md
//!
//! Collect frees nothing that a lease names or that a backup with a lease may have found in the index. So a backup takes
//! one before it reads the index, and whoever serves or reads a recovery point takes one that names the point.

mod guard;
mod record;
mod surroundings;

#[cfg(test)]
mod tests;

pub use guard::Lease;
pub use record::{LeaseKind, LeaseRecord, LeasedDisk, LeasedPoint};
pub use surroundings::{Process, Surroundings, System};

use std::io;
use std::time::SystemTime;

use tracing::warn;

use crate::error::ReadError;
use crate::format::{FormatError, note};
use crate::id::{LeaseId, RecoveryPointId, RepositoryId};
use crate::point::RecoveryPoint;
use crate::repository::Repository;
use crate::storage::{Object, ObjectKind, Storage};

/// Why a lease cannot be taken, or is worth nothing any more.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Storage or the system's randomness failed.
    #[error("cannot write {object}")]
    Io {
        /// What could not be written.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// What it is to say is more than a note holds.
    #[error("the lease cannot be written down")]
    Format(#[from] FormatError),
    /// It was not renewed in time, so others may have judged it stale.
    #[error("lease {lease} of {owner} has lapsed: this host or the repository's storage was away for too long")]
    Lapsed {
        /// Which lease.
        lease: LeaseId,
        /// Whose it was.
        owner: String,
    },
}

/// Whether a lease that stands in the repository counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Its holder is at work.
    Alive,
    /// It was not renewed for so long that nobody holds it.
    Expired,
    /// The process that took it on this host has ended.
    ProcessGone,
    /// It cannot be read; it may be anybody's.
    Unreadable(FormatError),
}

impl Verdict {
    /// Whether nobody holds it.
    pub fn is_stale(&self) -> bool {
        matches!(self, Verdict::Expired | Verdict::ProcessGone)
    }
}

/// A lease that stands in the repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseState {
    /// Its name.
    pub id: LeaseId,
    /// Whether it counts.
    pub verdict: Verdict,
    /// What it says; none if it cannot be read.
    pub record: Option<LeaseRecord>,
}

impl LeaseState {
    /// Who holds it, for people.
    pub fn holder(&self) -> String {
        match &self.record {
            Some(record) => format!("{} (process {} on {})", record.owner, record.process.pid, record.process.host),
            None => format!("leases/{}, which cannot be read", self.id),
        }
    }

    /// Whether it counts and names a point.
    pub fn holds(&self, point: RecoveryPointId) -> bool {
        !self.verdict.is_stale()
            && self.record.as_ref().is_some_and(|record| record.points.iter().any(|held| held.id == point))
    }

    /// Whether it may be a backup's, which may rely on any chunk it found when it began.
    pub(crate) fn may_write(&self) -> bool {
        !self.verdict.is_stale() && self.record.as_ref().is_none_or(|record| record.kind == LeaseKind::Backup)
    }
}

impl Repository {
    /// Takes a lease and keeps it until it is dropped. What it names is not looked up: see [`Repository::hold_point`].
    pub fn lease(&self, kind: LeaseKind, owner: &str, points: &[&RecoveryPoint]) -> Result<Lease, LeaseError> {
        Lease::take(self.storage_handle(), self.id(), None, kind, owner, points)
    }

    /// Takes a reader's lease of a point, so that it can be read even when it is forgotten meanwhile.
    /// [`ReadError::NoSuchPoint`] if it is gone already. Where the storage cannot be written, there is only a warning.
    pub fn hold_point(&self, owner: &str, point: &RecoveryPoint) -> Result<Lease, ReadError> {
        let taken = self.lease(LeaseKind::Reader, owner, &[point]);
        self.held(taken, owner, point)
    }

    /// As [`Repository::hold_point`], for a recovery: `name` tells it from all other recoveries of all hosts. The lease
    /// outlives this process; it is renewed while the returned guard lives, and ends by
    /// [`Repository::release_recovery`].
    pub fn hold_recovery(&self, name: &str, owner: &str, point: &RecoveryPoint) -> Result<Lease, ReadError> {
        let id = Some(recovery_lease(name));
        let taken = Lease::take(self.storage_handle(), self.id(), id, LeaseKind::Recovery, owner, &[point]);
        self.held(taken, owner, point)
    }

    /// Ends a recovery's lease, whoever took it.
    pub fn release_recovery(&self, name: &str) -> Result<(), LeaseError> {
        let object = Object::Lease(recovery_lease(name));
        self.storage().delete(&object).map_err(|source| LeaseError::Io { object: object.to_string(), source })
    }

    fn held(&self, taken: Result<Lease, LeaseError>, owner: &str, point: &RecoveryPoint) -> Result<Lease, ReadError> {
        let lease = taken.unwrap_or_else(|error| {
            warn!(owner, %error, "goes on without a lease: do not forget and collect the point meanwhile");
            Lease::none()
        });
        // Only now: a point that is listed after the lease stands cannot be collected any more.
        let object = Object::Point(point.id);
        match self.storage().len(&object) {
            Ok(_) => Ok(lease),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                lease.release(); // a recovery's too: there is nothing left that it could hold
                Err(ReadError::NoSuchPoint { point: point.id })
            }
            Err(source) => Err(ReadError::io(&object, source)),
        }
    }

    /// The leases that stand in the repository, stale ones too.
    pub fn leases(&self) -> Result<Vec<LeaseState>, ReadError> {
        list(self.storage(), self.id())
    }
}

/// The leases that stand in a repository.
pub(crate) fn list(storage: &dyn Storage, repository: RepositoryId) -> Result<Vec<LeaseState>, ReadError> {
    let listed = storage.list(ObjectKind::Lease);
    let listed = listed.map_err(|source| ReadError::Io { object: "leases".to_owned(), source })?;
    let mut leases = Vec::new();
    for listed in listed {
        let object = listed.object;
        let Object::Lease(id) = object else { continue };
        let read = match storage.get(&object, note::MAX_LEN) {
            Ok(bytes) => note::decode::<LeaseRecord>(&note::LEASE, repository, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // released meanwhile
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Err(FormatError::Length { part: "the lease" }),
            Err(source) => return Err(ReadError::io(&object, source)),
        };
        leases.push(match read.and_then(LeaseRecord::check) {
            Ok(record) => {
                let verdict = record.judge(storage.surroundings());
                LeaseState { id, verdict, record: Some(record) }
            }
            Err(error) => LeaseState { id, verdict: Verdict::Unreadable(error), record: None },
        });
    }
    leases.sort_by_key(|lease| (lease.record.as_ref().map(|record| record.created), lease.id));
    Ok(leases)
}

fn recovery_lease(name: &str) -> LeaseId {
    let mut hasher = blake3::Hasher::new_derive_key("lifeboat 1 recovery lease");
    hasher.update(name.as_bytes());
    let mut id = [0; 16];
    hasher.finalize_xof().fill(&mut id);
    LeaseId(id)
}

/// Seconds since 1970.
pub(crate) fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
