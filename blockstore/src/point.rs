//! [`RecoveryPoint`]: an immutable, consistent state of a machine, and its sealed object. Specification:
//! docs/format/point.md

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::format::config::Config;
use crate::format::point::{Envelope, MAX_TEXT_LEN};
use crate::format::{Encryption, FormatError};
use crate::id::{ChunkId, RecoveryPointId};
use crate::keys::Keyring;
use crate::manifest::MAX_DISK_SIZE;

/// Most disks of a point.
pub(crate) const MAX_DISKS: usize = 1024;
/// Longest name of a disk.
const MAX_NAME_LEN: usize = 255;
const ZSTD_LEVEL: i32 = 3;

/// How consistent the disks are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// As after a power cut.
    #[default]
    Crash,
    /// File systems were frozen.
    Application,
}

/// A disk of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointedDisk {
    /// Its name, unique in the point.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// The chunk size of its manifest.
    pub chunk_size: u32,
    /// The root of its manifest.
    pub root: ChunkId,
}

/// What a backup did.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PointStats {
    /// Bytes read from the sources.
    pub read: u64,
    /// Chunks that were not in the repository.
    pub new_chunks: u64,
    /// Their length before compression.
    pub new_bytes: u64,
    /// Bytes of the packs written.
    pub stored_bytes: u64,
    /// Chunks that are as in the parent.
    pub unchanged_chunks: u64,
    /// Chunks stored once more, so that the point can be read in larger pieces.
    pub gathered_chunks: u64,
    /// Chunks that were compared with the source once more when all was stored.
    pub compared: u64,
    /// How long the backup took.
    pub seconds: f64,
}

/// A consistent state of a machine that can be recovered.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveryPoint {
    /// The hash of the sealed object.
    pub id: RecoveryPointId,
    /// Whose state it is.
    pub machine: String,
    /// When the backup began, nanoseconds since 1970 UTC.
    pub time_unix_ns: u64,
    /// The disks.
    pub disks: Vec<PointedDisk>,
    /// The machine's definition, as the caller gave it.
    pub hardware: serde_json::Value,
    /// The point this one was compared with; it may be gone.
    pub parent: Option<RecoveryPointId>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// How consistent the disks are.
    pub consistency: Consistency,
    /// What the backup did.
    pub stats: PointStats,
}

/// The JSON text.
#[derive(Serialize, Deserialize)]
pub(crate) struct PointText {
    pub machine: String,
    pub time_unix_ns: u64,
    pub disks: Vec<PointedDisk>,
    #[serde(default)]
    pub hardware: serde_json::Value,
    #[serde(default)]
    pub parent: Option<RecoveryPointId>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    pub consistency: Consistency,
    #[serde(default)]
    pub stats: PointStats,
}

impl RecoveryPoint {
    /// A disk by its name.
    pub fn disk(&self, name: &str) -> Option<&PointedDisk> {
        self.disks.iter().find(|disk| disk.name == name)
    }

    /// Opens and checks an object.
    pub(crate) fn decode(
        id: RecoveryPointId,
        bytes: &[u8],
        config: &Config,
        keyring: &Keyring,
    ) -> Result<RecoveryPoint, FormatError> {
        let (envelope, payload) = Envelope::decode(bytes)?;
        if blake3::hash(bytes).as_bytes() != &id.0 {
            return Err(FormatError::Name);
        }
        if envelope.repository != config.repository {
            return Err(FormatError::OtherRepository);
        }
        if envelope.encryption != config.encryption {
            return Err(FormatError::Field { field: "encryption" });
        }
        let mut payload = payload.to_vec();
        let compressed: &[u8] = match keyring.point_cipher(&envelope.salt) {
            Some(cipher) => {
                cipher.open(&[0; 12], &envelope.associated_data(), &mut payload).ok_or(FormatError::Seal)?
            }
            None => &payload,
        };
        let wrong_length = FormatError::Length { part: "the recovery point's text" };
        let text = zstd::bulk::decompress(compressed, envelope.text_len as usize).map_err(|_| wrong_length.clone())?;
        if text.len() != envelope.text_len as usize {
            return Err(wrong_length);
        }
        let text: PointText =
            serde_json::from_slice(&text).map_err(|_| FormatError::Field { field: "the recovery point's text" })?;
        let point = RecoveryPoint {
            id,
            machine: text.machine,
            time_unix_ns: text.time_unix_ns,
            disks: text.disks,
            hardware: text.hardware,
            parent: text.parent,
            labels: text.labels,
            consistency: text.consistency,
            stats: text.stats,
        };
        check_disks(&point.disks, config)?;
        Ok(point)
    }
}

impl PointText {
    /// The sealed object and the point in it. Parsed back before anybody writes it.
    pub(crate) fn seal(
        &self,
        salt: [u8; 32],
        config: &Config,
        keyring: &Keyring,
    ) -> Result<(Vec<u8>, RecoveryPoint), FormatError> {
        let too_long = FormatError::Field { field: "length of the recovery point" };
        let text = serde_json::to_vec(self).map_err(|_| FormatError::Field { field: "the recovery point's text" })?;
        let text_len = u32::try_from(text.len()).ok().filter(|len| *len <= MAX_TEXT_LEN).ok_or(too_long.clone())?;
        let mut payload = zstd::bulk::compress(&text, ZSTD_LEVEL).map_err(|_| too_long.clone())?;
        let cipher = keyring.point_cipher(&salt);
        let encryption = if cipher.is_some() { Encryption::Aes256Gcm } else { Encryption::None };
        let envelope = Envelope { encryption, repository: config.repository, salt, text_len };
        if let Some(cipher) = cipher {
            let tag = cipher.seal(&[0; 12], &envelope.associated_data(), &mut payload).ok_or(too_long)?;
            payload.extend_from_slice(&tag);
        }
        let bytes = envelope.encode(&payload);
        let id = RecoveryPointId(*blake3::hash(&bytes).as_bytes());
        let point = RecoveryPoint::decode(id, &bytes, config, keyring)?;
        Ok((bytes, point))
    }
}

/// Whether a disk may have this name.
pub(crate) fn is_disk_name(name: &str) -> bool {
    (1..=MAX_NAME_LEN).contains(&name.len()) && !name.chars().any(|c| c.is_control() || c == '/')
}

fn check_disks(disks: &[PointedDisk], config: &Config) -> Result<(), FormatError> {
    let mut names = HashSet::new();
    let good = disks.len() <= MAX_DISKS
        && disks.iter().all(|disk| {
            is_disk_name(&disk.name)
                && names.insert(&disk.name)
                && disk.size <= MAX_DISK_SIZE
                && disk.chunk_size == config.chunk_size
        });
    if good { Ok(()) } else { Err(FormatError::Field { field: "a disk of the recovery point" }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::RepositoryId;
    use crate::keys::MasterKey;
    use proptest::prelude::*;

    fn config(encryption: Encryption) -> Config {
        Config { repository: RepositoryId([1; 16]), chunk_size: 65536, encryption }
    }

    fn text() -> PointText {
        PointText {
            machine: "web01".into(),
            time_unix_ns: 1_700_000_000_123_456_789,
            disks: vec![PointedDisk { name: "disk0".into(), size: 10, chunk_size: 65536, root: ChunkId([3; 32]) }],
            hardware: serde_json::json!({ "cpus": 2 }),
            parent: Some(RecoveryPointId([4; 32])),
            labels: BTreeMap::from([("why".into(), "test".into())]),
            consistency: Consistency::Application,
            stats: PointStats { read: 10, seconds: 0.5, ..PointStats::default() },
        }
    }

    #[test]
    fn a_sealed_point_reads_back_and_needs_its_key() {
        let config = config(Encryption::Aes256Gcm);
        let keyring = Keyring::derive(&MasterKey::new([7; 32]));
        let (bytes, point) = text().seal([9; 32], &config, &keyring).expect("sealed");
        assert_eq!(RecoveryPoint::decode(point.id, &bytes, &config, &keyring), Ok(point.clone()));
        assert_eq!(point.time_unix_ns, 1_700_000_000_123_456_789);
        assert_eq!(point.disk("disk0").expect("named").root, ChunkId([3; 32]));
        let other = Keyring::derive(&MasterKey::new([8; 32]));
        assert_eq!(RecoveryPoint::decode(point.id, &bytes, &config, &other), Err(FormatError::Seal));
        let wrong_name = RecoveryPointId([0; 32]);
        assert_eq!(RecoveryPoint::decode(wrong_name, &bytes, &config, &keyring), Err(FormatError::Name));
    }

    #[test]
    fn unknown_fields_are_ignored_and_bad_disks_refused() {
        let config = config(Encryption::None);
        let open = |json: &str| {
            let payload = zstd::bulk::compress(json.as_bytes(), 1).expect("compresses");
            let text_len = u32::try_from(json.len()).expect("short");
            let envelope =
                Envelope { encryption: Encryption::None, repository: config.repository, salt: [0; 32], text_len };
            let bytes = envelope.encode(&payload);
            let id = RecoveryPointId(*blake3::hash(&bytes).as_bytes());
            RecoveryPoint::decode(id, &bytes, &config, &Keyring::plain())
        };
        let disk = |name: &str, chunk_size: u32, size: u64| {
            let root = ChunkId::ZERO;
            format!(r#"{{"name":"{name}","size":{size},"chunk_size":{chunk_size},"root":"{root}","later":1}}"#)
        };
        let point = |disks: &[String]| {
            let disks = disks.join(",");
            format!(r#"{{"machine":"m","time_unix_ns":1,"consistency":"crash","later":[1],"disks":[{disks}]}}"#)
        };
        let good = open(&point(&[disk("a", 65536, 5), disk("b", 65536, 5)])).expect("valid");
        assert_eq!((good.disks.len(), good.consistency, good.stats), (2, Consistency::Crash, PointStats::default()));
        for bad in [
            point(&[disk("a", 65536, 5), disk("a", 65536, 5)]),
            point(&[disk("", 65536, 5)]),
            point(&[disk("a/b", 65536, 5)]),
            point(&[disk("a", 32768, 5)]),
            point(&[disk("a", 65536, u64::MAX)]),
            "{}".into(),
        ] {
            assert!(open(&bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_damage_is_noticed(at in 0usize..350, flip in 1u8..=255, cut in 0usize..350) {
            let config = config(Encryption::Aes256Gcm);
            let keyring = Keyring::derive(&MasterKey::new([7; 32]));
            let (mut bytes, point) = text().seal([9; 32], &config, &keyring).expect("sealed");
            prop_assert!(RecoveryPoint::decode(point.id, &bytes[..cut.min(bytes.len() - 1)], &config, &keyring).is_err());
            let at = at % bytes.len();
            bytes[at] ^= flip;
            prop_assert!(RecoveryPoint::decode(point.id, &bytes, &config, &keyring).is_err());
        }
    }
}
