//! Protecting recovery points, and forgetting them. What protects is checked here, under the repository's lock, so that
//! nobody who forgets gets past it. Specification: docs/format/protection.md

use std::collections::HashMap;
use std::{fmt, io};

use tracing::info;

use super::Repository;
use crate::format::FormatError;
use crate::format::point::{HEADER_LEN, MAX_PAYLOAD_LEN};
use crate::format::protection::{PROTECTION_LEN, StoredProtection};
use crate::id::{RecoveryPointId, RepositoryId};
use crate::storage::{Object, ObjectKind, Storage};

/// How long a point is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Protected {
    /// Until somebody takes the protection away.
    Always,
    /// Until this second since 1970 UTC.
    Until(u64),
    /// The protection cannot be read. It protects until it is made anew or taken away.
    Damaged(FormatError),
}

impl Protected {
    /// Whether it still protects.
    pub fn holds_at(&self, now_unix_s: u64) -> bool {
        match self {
            Protected::Always | Protected::Damaged(_) => true,
            Protected::Until(until) => now_unix_s < *until,
        }
    }
}

/// Why a point cannot be protected, set free or forgotten.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// There is no such point.
    #[error("there is no recovery point {point}")]
    NoSuchPoint {
        /// The id asked for.
        point: RecoveryPointId,
    },
    /// It may not be forgotten yet.
    #[error("recovery point {point} is protected")]
    Protected {
        /// The point.
        point: RecoveryPointId,
        /// How long.
        protected: Protected,
    },
    /// The end of a protection lies in the past.
    #[error("a protection cannot end in the past")]
    Past,
    /// The point that was to stay in its place is not there, or damaged.
    #[error("recovery point {heir}, which was to stay, is gone or damaged")]
    HeirGone {
        /// That point.
        heir: RecoveryPointId,
    },
    /// Another process holds the repository's lock.
    #[error("another process is changing the repository")]
    Busy(#[source] io::Error),
    /// Storage failed.
    #[error("cannot read or write {object}")]
    Io {
        /// What could not be read or written.
        object: String,
        /// Why.
        source: io::Error,
    },
}

impl PointError {
    pub(crate) fn io(object: impl ToString) -> impl FnOnce(io::Error) -> PointError {
        move |source| PointError::Io { object: object.to_string(), source }
    }
}

impl Repository {
    /// All protections, those that have ended and those of points that are gone too.
    pub fn protections(&self) -> Result<HashMap<RecoveryPointId, Protected>, PointError> {
        let mut found = HashMap::new();
        for listed in self.storage().list(ObjectKind::Protection).map_err(PointError::io("protections"))? {
            let Object::Protection(point) = listed.object else { continue };
            if let Some(protected) = self.protection(point)? {
                found.insert(point, protected);
            }
        }
        Ok(found)
    }

    /// The protection of a point, whether it has ended or not.
    pub fn protection(&self, point: RecoveryPointId) -> Result<Option<Protected>, PointError> {
        read_protection(self.storage(), self.id(), point)
    }

    /// Protects a point until `until_unix_s`, or without end, in the place of what protected it before. Durable when it
    /// returns: no prune or forget that begins after that passes it.
    pub fn protect(
        &self,
        point: RecoveryPointId,
        until_unix_s: Option<u64>,
        now_unix_s: u64,
    ) -> Result<(), PointError> {
        if until_unix_s.is_some_and(|until| until <= now_unix_s) {
            return Err(PointError::Past);
        }
        let storage = self.storage();
        let _held = storage.hold().map_err(busy)?;
        self.expect_point(point)?;
        let stored = StoredProtection { repository: self.id(), point, created_unix_s: now_unix_s, until_unix_s };
        let object = Object::Protection(point);
        storage.put(&object, &stored.encode()).map_err(PointError::io(object))?;
        info!(%point, until = until_unix_s, "recovery point protected");
        Ok(())
    }

    /// Takes a point's protection away. Whether it had one.
    pub fn unprotect(&self, point: RecoveryPointId) -> Result<bool, PointError> {
        let storage = self.storage();
        let _held = storage.hold().map_err(busy)?;
        let had = self.protection(point)?.is_some();
        if !had {
            self.expect_point(point)?;
        }
        let object = Object::Protection(point);
        storage.delete(&object).map_err(PointError::io(object))?;
        if had {
            info!(%point, "recovery point no longer protected");
        }
        Ok(had)
    }

    /// Drops a point that nothing protects. `heir` is a point that the decision rests on: the machine's newest. Without
    /// it, or if it is damaged, the point stays.
    ///
    /// Order, under the repository's lock: (1) the heir is put again: the backup that wrote it may have been killed
    /// before its name was durable; (2) the point is deleted; (3) a protection that has ended is deleted; (4) so are the point's drills. 2 before 1
    /// could leave a machine without any point after a power cut.
    pub fn forget(
        &self,
        point: RecoveryPointId,
        heir: Option<RecoveryPointId>,
        now_unix_s: u64,
    ) -> Result<(), PointError> {
        let storage = self.storage();
        let _held = storage.hold().map_err(busy)?;
        self.expect_point(point)?;
        let protection = self.protection(point)?;
        if let Some(protected) = protection.clone().filter(|protected| protected.holds_at(now_unix_s)) {
            return Err(PointError::Protected { point, protected });
        }
        if let Some(heir) = heir {
            self.settle(heir)?;
        }
        let object = Object::Point(point);
        storage.delete(&object).map_err(PointError::io(object))?;
        info!(%point, "recovery point forgotten");
        if protection.is_some() {
            let object = Object::Protection(point);
            storage.delete(&object).map_err(PointError::io(object))?;
        }
        self.forget_drills(point)
    }

    /// Makes sure that a point is whole and durable.
    fn settle(&self, heir: RecoveryPointId) -> Result<(), PointError> {
        let object = Object::Point(heir);
        let bytes = self.storage().get(&object, u64::from(MAX_PAYLOAD_LEN) + HEADER_LEN as u64);
        let bytes = bytes.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::FileTooLarge => PointError::HeirGone { heir },
            _ => PointError::io(object)(error),
        })?;
        if blake3::hash(&bytes).as_bytes() != &heir.0 {
            return Err(PointError::HeirGone { heir });
        }
        self.storage().put(&object, &bytes).map_err(PointError::io(object))
    }

    /// Holds off everybody else who decides by what points there are.
    pub(crate) fn hold(&self) -> Result<Box<dyn Send>, PointError> {
        self.storage().hold().map_err(busy)
    }

    pub(crate) fn expect_point(&self, point: RecoveryPointId) -> Result<(), PointError> {
        let object = Object::Point(point);
        match self.storage().len(&object) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(PointError::NoSuchPoint { point }),
            Err(error) => Err(PointError::io(object)(error)),
        }
    }
}

/// The protection of a point, whether it has ended or not.
pub(crate) fn read_protection(
    storage: &dyn Storage,
    repository: RepositoryId,
    point: RecoveryPointId,
) -> Result<Option<Protected>, PointError> {
    let object = Object::Protection(point);
    let bytes = match storage.get(&object, PROTECTION_LEN as u64) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            return Ok(Some(Protected::Damaged(FormatError::Length { part: "the protection" })));
        }
        Err(error) => return Err(PointError::io(object)(error)),
    };
    let checked = StoredProtection::decode(&bytes).and_then(|stored| {
        if stored.repository != repository {
            Err(FormatError::OtherRepository)
        } else if stored.point != point {
            Err(FormatError::Name)
        } else {
            Ok(stored)
        }
    });
    Ok(Some(match checked {
        Ok(StoredProtection { until_unix_s: None, .. }) => Protected::Always,
        Ok(StoredProtection { until_unix_s: Some(until), .. }) => Protected::Until(until),
        Err(error) => Protected::Damaged(error),
    }))
}

/// What is said of a damaged protection, and what is to be done about it.
pub(crate) fn damaged_protection(point: &str, problem: &dyn fmt::Display) -> String {
    format!(
        "{problem}; recovery point {point} stays protected until `lifeboat protect` makes it anew or \
         `lifeboat unprotect` takes it away"
    )
}

fn busy(error: io::Error) -> PointError {
    match error.kind() {
        io::ErrorKind::ResourceBusy => PointError::Busy(error),
        _ => PointError::io("the repository's lock")(error),
    }
}
