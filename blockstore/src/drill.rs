//! What drills of recovery points found, kept in the repository. Specification: docs/format/drill.md

use std::collections::HashSet;
use std::io;

use serde_json::Value;
use tracing::warn;

pub use crate::format::drill::{
    Attachments, BootTrace, MAX_CONSOLE_LEN, MAX_SCREENSHOT_LEN, MAX_TRACE_CHUNKS, TracedDisk,
};

use crate::error::ReadError;
use crate::format::config::Config;
use crate::format::drill::{Envelope, MAX_HEAD_LEN, MAX_LEN};
use crate::format::{Encryption, FormatError};
use crate::id::{DrillId, RecoveryPointId};
use crate::keys::{Keyring, frame_nonce, random};
use crate::repository::{PointError, Repository};
use crate::storage::{Object, ObjectKind, Storage};

/// So many drills of a point are kept.
pub const KEPT: usize = 8;
const ZSTD_LEVEL: i32 = 3;
const SUMMARY: FormatError = FormatError::Field { field: "the drill's summary" };

/// A drill's result.
#[derive(Debug, Clone, PartialEq)]
pub struct DrillRecord {
    /// What is to be known without the rest; the caller's own.
    pub summary: Value,
    /// Console log, screenshot, boot trace.
    pub attached: Attachments,
}

impl DrillRecord {
    /// The sealed object. Parsed back before anybody writes it.
    fn seal(&self, id: DrillId, salt: [u8; 32], config: &Config, keyring: &Keyring) -> Result<Vec<u8>, FormatError> {
        let text = serde_json::to_vec(&self.summary).map_err(|_| SUMMARY)?;
        let rest = self.attached.encode();
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX); // refused when parsed back
        let cipher = keyring.drill_cipher(&salt);
        let envelope = Envelope {
            encryption: if cipher.is_some() { Encryption::Aes256Gcm } else { Encryption::None },
            repository: config.repository,
            id,
            salt,
            text_len: len(&text),
            rest_len: len(&rest),
        };
        let store = |plain: &[u8], number| {
            let mut stored = zstd::bulk::compress(plain, ZSTD_LEVEL).map_err(|_| SUMMARY)?;
            if let Some(cipher) = &cipher {
                let tag = cipher.seal(&frame_nonce(number), &envelope.associated_data(), &mut stored);
                stored.extend_from_slice(&tag.ok_or(SUMMARY)?);
            }
            Ok(stored)
        };
        let bytes = envelope.encode(&store(&text, 0)?, &store(&rest, 1)?);
        DrillRecord::decode(id, &bytes, config, keyring)?;
        Ok(bytes)
    }

    fn decode(id: DrillId, bytes: &[u8], config: &Config, keyring: &Keyring) -> Result<DrillRecord, FormatError> {
        let (envelope, text, rest) = Envelope::decode(bytes)?;
        let summary = decode_summary(id, &envelope, text, config, keyring)?;
        let rest = open(&envelope, rest, 1, envelope.rest_len, keyring)?;
        Ok(DrillRecord { summary, attached: Attachments::decode(&rest)? })
    }
}

fn decode_summary(
    id: DrillId,
    envelope: &Envelope,
    text: &[u8],
    config: &Config,
    keyring: &Keyring,
) -> Result<Value, FormatError> {
    check(id, envelope, config)?;
    serde_json::from_slice(&open(envelope, text, 0, envelope.text_len, keyring)?).map_err(|_| SUMMARY)
}

/// Whether an envelope is what stands around the drill of this name.
fn check(id: DrillId, envelope: &Envelope, config: &Config) -> Result<(), FormatError> {
    if envelope.repository != config.repository {
        return Err(FormatError::OtherRepository);
    }
    if envelope.id != id {
        return Err(FormatError::Name);
    }
    if envelope.encryption != config.encryption {
        return Err(FormatError::Field { field: "encryption" });
    }
    Ok(())
}

fn open(
    envelope: &Envelope,
    stored: &[u8],
    number: u32,
    plain_len: u32,
    keyring: &Keyring,
) -> Result<Vec<u8>, FormatError> {
    let mut stored = stored.to_vec();
    let compressed: &[u8] = match keyring.drill_cipher(&envelope.salt) {
        Some(cipher) => {
            cipher.open(&frame_nonce(number), &envelope.associated_data(), &mut stored).ok_or(FormatError::Seal)?
        }
        None => &stored,
    };
    let wrong = FormatError::Length { part: "a part of the drill" };
    // The envelope's lengths are bounded.
    let plain = zstd::bulk::decompress(compressed, plain_len as usize).map_err(|_| wrong.clone())?;
    if plain.len() == plain_len as usize { Ok(plain) } else { Err(wrong) }
}

/// Why a drill's result is not kept.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The point is gone, or storage failed.
    #[error(transparent)]
    Point(#[from] PointError),
    /// It is too large.
    #[error("the drill's result cannot be stored")]
    Format(#[from] FormatError),
    /// No random bytes.
    #[error("cannot draw a salt")]
    Random(#[source] io::Error),
}

impl Repository {
    /// The names of all drills, those of points that are gone too.
    pub fn drills(&self) -> Result<Vec<DrillId>, ReadError> {
        list(self.storage())
    }

    /// What is to be known of a drill without its attachments, which are not read.
    pub fn drill_summary(&self, id: DrillId) -> Result<Value, ReadError> {
        let object = Object::Drill(id);
        let io = |source| ReadError::io(&object, source);
        let len = self.storage().len(&object).map_err(io)?.min(MAX_HEAD_LEN);
        let mut head = vec![0; usize::try_from(len).unwrap_or(0)]; // at most a few pages
        self.storage().get_range(&object, 0, &mut head).map_err(io)?;
        let fetcher = self.fetcher();
        let summary = Envelope::decode_head(&head)
            .and_then(|(envelope, text)| decode_summary(id, &envelope, text, &fetcher.config, &fetcher.keyring));
        summary.map_err(|source| ReadError::Damaged { object, source })
    }

    /// All of a drill.
    pub fn drill(&self, id: DrillId) -> Result<DrillRecord, ReadError> {
        let object = Object::Drill(id);
        let bytes = self.storage().get(&object, MAX_LEN).map_err(|source| ReadError::io(&object, source))?;
        let fetcher = self.fetcher();
        DrillRecord::decode(id, &bytes, &fetcher.config, &fetcher.keyring)
            .map_err(|source| ReadError::Damaged { object, source })
    }

    /// Keeps what a drill of `point` found that began at `time_unix_ms`, and drops all but the newest drills of the point.
    ///
    /// Order, under the repository's lock: (1) the point is there, and the name is free; (2) the result is put; (3) what
    /// there is too much of is deleted. 3 before 2 could leave fewer than there were.
    pub fn keep_drill(
        &self,
        point: RecoveryPointId,
        time_unix_ms: u64,
        record: &DrillRecord,
    ) -> Result<DrillId, KeepError> {
        let storage = self.storage();
        let _held = self.hold()?;
        self.expect_point(point)?;
        let mut id = DrillId { point, time_unix_ms };
        let mut others: Vec<DrillId> = list(storage).map_err(unlisted)?;
        others.retain(|other| other.point == point);
        while others.contains(&id) {
            id.time_unix_ms = id.time_unix_ms.saturating_add(1);
        }
        let fetcher = self.fetcher();
        let salt = random().map_err(KeepError::Random)?;
        let bytes = record.seal(id, salt, &fetcher.config, &fetcher.keyring)?;
        storage.put(&Object::Drill(id), &bytes).map_err(PointError::io(Object::Drill(id)))?;
        let mut kept = 1;
        others.sort_unstable_by(|a, b| b.cmp(a));
        for other in others {
            let good = match self.drill(other) {
                Ok(_) => true,
                // A later version's drill is not ours to delete.
                Err(ReadError::Damaged { source, .. }) => {
                    matches!(source, FormatError::UnknownVersion { .. } | FormatError::UnknownFeatures { .. })
                }
                Err(_) => true,
            };
            if good && kept < KEPT {
                kept += 1;
            } else if let Err(error) = storage.delete(&Object::Drill(other)) {
                warn!(object = %Object::Drill(other), %error, "a drill that is not needed any more stays");
            }
        }
        Ok(id)
    }

    /// Deletes the drills of one point, which has just been forgotten under the lock that the caller holds.
    pub(crate) fn forget_drills(&self, point: RecoveryPointId) -> Result<(), PointError> {
        for id in list(self.storage()).map_err(unlisted)?.into_iter().filter(|id| id.point == point) {
            self.storage().delete(&Object::Drill(id)).map_err(PointError::io(Object::Drill(id)))?;
        }
        Ok(())
    }

    /// Deletes drills whose point is gone: what a forget that was cut off has left. Looks under the lock, so that no
    /// drill of a point that is just being made is taken for one.
    pub(crate) fn drop_stray_drills(&self) -> Result<(), PointError> {
        let drills = list(self.storage()).map_err(unlisted)?;
        let mut points: HashSet<RecoveryPointId> = drills.iter().map(|id| id.point).collect();
        for point in self.list_points().map_err(unlisted)? {
            points.remove(&point);
        }
        if points.is_empty() {
            return Ok(());
        }
        let _held = self.hold()?;
        for point in points {
            if matches!(self.expect_point(point), Err(PointError::NoSuchPoint { .. })) {
                self.forget_drills(point)?;
            }
        }
        Ok(())
    }
}

fn unlisted(error: ReadError) -> PointError {
    PointError::Io { object: "drills".to_owned(), source: io::Error::other(error) }
}

fn list(storage: &dyn Storage) -> Result<Vec<DrillId>, ReadError> {
    let listed = storage.list(ObjectKind::Drill);
    let listed = listed.map_err(|source| ReadError::Io { object: "drills".to_owned(), source })?;
    let ids = listed.into_iter().filter_map(|listed| match listed.object {
        Object::Drill(id) => Some(id),
        _ => None,
    });
    Ok(ids.collect())
}

/// What is wrong with a drill's object as far as can be told without a key; `None` if nothing is.
pub(crate) fn problem(storage: &dyn Storage, config: &Config, id: DrillId) -> Option<String> {
    match storage.get(&Object::Drill(id), MAX_LEN) {
        Ok(bytes) => {
            let checked = Envelope::decode(&bytes).and_then(|(envelope, ..)| check(id, &envelope, config));
            checked.err().map(|error| told(&error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None, // dropped since the listing
        Err(error) => Some(format!("it cannot be read: {error}")),
    }
}

/// What is said of a damaged drill.
pub(crate) fn told(problem: &FormatError) -> String {
    format!("{problem}; nothing needs it: the next `lifeboat drill` of its point replaces it")
}

#[cfg(test)]
mod tests;
