//! [`Summary`]: what the last collect knew, kept so that a host without the key can say what would be freed.

use std::collections::HashMap;
use std::io;

use serde::{Deserialize, Serialize};

use super::CollectError;
use super::mark::Roots;
use super::plan::Tally;
use crate::error::ReadError;
use crate::format::{FormatError, note};
use crate::id::{PackId, RecoveryPointId, RepositoryId};
use crate::lease::unix;
use crate::pack::fetch::Fetcher;
use crate::storage::{Object, Storage};

/// Packs that are named one by one; more are only summed up.
const ROWS_MAX: usize = 50_000;
/// The same for points.
const POINTS_MAX: usize = 50_000;

/// How much of a pack is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The pack.
    pub pack: PackId,
    /// Its length.
    pub bytes: u64,
    /// Stored bytes that points need from it.
    pub live_bytes: u64,
}

/// What the last collect knew.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// When, in seconds since 1970 UTC.
    pub created: u64,
    /// The points it went by, sorted; not all of them if there are more than 50,000.
    pub points: Vec<RecoveryPointId>,
    /// How many there were.
    pub points_count: u64,
    /// Stored bytes that they need.
    pub live_bytes: u64,
    /// The packs that are not needed in full, those with most to free first; not all of them if there are more than
    /// 50,000.
    pub packs: Vec<Row>,
    /// Bytes that nothing needs, in all packs.
    pub dead_bytes: u64,
}

/// Stores what a round found, unless it says nothing new.
pub(super) fn keep(fetcher: &Fetcher, roots: &Roots, packs: &HashMap<PackId, Tally>) -> Result<(), CollectError> {
    let (storage, repository) = (&*fetcher.storage, fetcher.config.repository);
    let mut points = roots.points.clone();
    points.sort_unstable();
    points.truncate(POINTS_MAX);
    let partly = packs.iter().filter(|(_, tally)| tally.live_frames < tally.frames);
    let mut rows: Vec<Row> = partly
        .map(|(pack, tally)| Row { pack: *pack, bytes: u64::from(tally.len), live_bytes: tally.live_bytes })
        .collect();
    rows.sort_unstable_by_key(|row| (std::cmp::Reverse(row.bytes.saturating_sub(row.live_bytes)), row.pack));
    let dead_bytes = rows.iter().map(|row| row.bytes.saturating_sub(row.live_bytes)).sum();
    rows.truncate(ROWS_MAX);
    let known = read(storage, repository)?.and_then(Result::ok);
    let summary = Summary {
        created: known.as_ref().map_or(0, |known| known.created),
        points,
        points_count: roots.points.len() as u64,
        live_bytes: super::sweep::live_bytes(packs),
        packs: rows,
        dead_bytes,
    };
    if known.as_ref() == Some(&summary) {
        return Ok(());
    }
    let summary = Summary { created: unix(storage.surroundings().now()), ..summary };
    let object = Object::Liveness;
    let bytes = note::encode(&note::LIVENESS, repository, &summary).map_err(io::Error::other);
    bytes
        .and_then(|bytes| storage.put(&object, &bytes))
        .map_err(|source| CollectError::write(&object.to_string(), source))
}

/// What the last collect stored, if any did.
pub(super) fn read(
    storage: &dyn Storage,
    repository: RepositoryId,
) -> Result<Option<Result<Summary, FormatError>>, ReadError> {
    let object = Object::Liveness;
    match storage.get(&object, note::MAX_LEN) {
        Ok(bytes) => Ok(Some(note::decode(&note::LIVENESS, repository, &bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            Ok(Some(Err(FormatError::Length { part: "the summary" })))
        }
        Err(source) => Err(ReadError::io(&object, source)),
    }
}
