//! Quarantine: packs that nothing needed when they were looked at, and that are deleted after a while if that stays so.
//! Specification: docs/format/note.md, docs/format/repository.md

use std::collections::HashSet;
use std::io;

use serde::{Deserialize, Serialize};

use crate::error::ReadError;
use crate::format::{FormatError, note};
use crate::id::{BatchId, LeaseId, PackId, RepositoryId};
use crate::storage::{Object, ObjectKind, Storage};

/// Packs of one batch.
pub(super) const BATCH_MAX: usize = 64 << 10;

/// What a quarantine object says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// When it was made, in seconds since 1970 UTC.
    pub created: u64,
    /// When its packs may be deleted.
    pub due: u64,
    /// The leases that may be of backups which found its packs in the index; none as long as they are not listed yet.
    pub waits: Option<Vec<LeaseId>>,
    /// The packs.
    pub packs: Vec<PackId>,
}

/// A batch that stands in a repository, if it can be read.
pub(crate) type Found = (BatchId, Result<Batch, FormatError>);

/// The batches that stand in a repository; an error for one that cannot be read.
pub(crate) fn list(storage: &dyn Storage, repository: RepositoryId) -> Result<Vec<Found>, ReadError> {
    let listed = storage.list(ObjectKind::Quarantine);
    let listed = listed.map_err(|source| ReadError::Io { object: "quarantine".to_owned(), source })?;
    let mut batches = Vec::new();
    for listed in listed {
        let object = listed.object;
        let Object::Quarantine(id) = object else { continue };
        let read = match storage.get(&object, note::MAX_LEN) {
            Ok(bytes) => note::decode::<Batch>(&note::QUARANTINE, repository, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // ended meanwhile
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                Err(FormatError::Length { part: "the quarantine object" })
            }
            Err(source) => return Err(ReadError::io(&object, source)),
        };
        batches.push((id, read));
    }
    batches.sort_by_key(|(id, batch)| (batch.as_ref().map(|batch| batch.created).unwrap_or(0), *id));
    Ok(batches)
}

/// The packs a backup must not count on.
pub(crate) fn packs(storage: &dyn Storage, repository: RepositoryId) -> Result<HashSet<PackId>, ReadError> {
    let batches = list(storage, repository)?;
    Ok(batches.into_iter().filter_map(|(_, batch)| batch.ok()).flat_map(|batch| batch.packs).collect())
}

pub(super) fn put(storage: &dyn Storage, repository: RepositoryId, id: BatchId, batch: &Batch) -> io::Result<()> {
    let bytes = note::encode(&note::QUARANTINE, repository, batch).map_err(io::Error::other)?;
    storage.put(&Object::Quarantine(id), &bytes)
}
