//! The protection of a recovery point, 128 bytes. Specification: docs/format/protection.md

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, check_features, check_magic, head};
use crate::id::{RecoveryPointId, RepositoryId};

/// First bytes of the object.
pub const MAGIC: [u8; 8] = *b"LBOATPR1";
/// Length of the object.
pub const PROTECTION_LEN: usize = 128;
const PART: &str = "the protection";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawProtection {
    magic: [u8; 8],
    incompat: U32,
    reserved: [u8; 4],
    repository: [u8; 16],
    point: [u8; 32],
    created: U64,
    until: U64,
    reserved_end: [u8; 44],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawProtection>() == PROTECTION_LEN);

/// Which point is protected, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredProtection {
    /// Whose point it is.
    pub repository: RepositoryId,
    /// The point; also the object's name.
    pub point: RecoveryPointId,
    /// When it was made, seconds since 1970 UTC.
    pub created_unix_s: u64,
    /// The second it ends, since 1970 UTC; none for one without end.
    pub until_unix_s: Option<u64>,
}

impl StoredProtection {
    /// The object's bytes.
    pub fn encode(&self) -> [u8; PROTECTION_LEN] {
        let mut raw = RawProtection {
            magic: MAGIC,
            incompat: U32::ZERO,
            reserved: [0; 4],
            repository: self.repository.0,
            point: self.point.0,
            created: U64::new(self.created_unix_s),
            until: U64::new(self.until_unix_s.unwrap_or(0)),
            reserved_end: [0; 44],
            crc32c: U32::ZERO,
        };
        raw.crc32c = U32::new(raw.checksum());
        zerocopy::transmute!(raw)
    }

    /// The protection in an object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<StoredProtection, FormatError> {
        let raw: &RawProtection = head(bytes, PART)?;
        check_magic(&raw.magic, &MAGIC, PART)?;
        if bytes.len() != PROTECTION_LEN {
            return Err(FormatError::Length { part: PART });
        }
        if raw.checksum() != raw.crc32c.get() {
            return Err(FormatError::Checksum { part: PART });
        }
        check_features(raw.incompat.get(), 0, PART)?;
        Ok(StoredProtection {
            repository: RepositoryId(raw.repository),
            point: RecoveryPointId(raw.point),
            created_unix_s: raw.created.get(),
            until_unix_s: Some(raw.until.get()).filter(|until| *until != 0),
        })
    }
}

impl RawProtection {
    fn checksum(&self) -> u32 {
        let covered = self.as_bytes().split_last_chunk::<4>().map_or(&[][..], |(covered, _)| covered);
        crc32c::crc32c(covered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> StoredProtection {
        StoredProtection {
            repository: RepositoryId([1; 16]),
            point: RecoveryPointId([2; 32]),
            created_unix_s: 1_700_000_000,
            until_unix_s: Some(1_800_000_000),
        }
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let mut expected = Vec::from(*b"LBOATPR1\0\0\0\0\0\0\0\0");
        expected.extend([1; 16]);
        expected.extend([2; 32]);
        expected.extend(1_700_000_000u64.to_le_bytes());
        expected.extend(1_800_000_000u64.to_le_bytes());
        expected.resize(124, 0);
        expected.extend(crc32c::crc32c(&expected).to_le_bytes());
        assert_eq!(sample().encode().as_slice(), expected);
        for protection in [sample(), StoredProtection { until_unix_s: None, ..sample() }] {
            assert_eq!(StoredProtection::decode(&protection.encode()), Ok(protection));
        }
    }

    proptest! {
        #[test]
        fn every_damage_is_noticed(at in 0usize..128, flip in 1u8..=255, cut in 0usize..128) {
            let mut bytes = sample().encode();
            prop_assert!(StoredProtection::decode(&bytes[..cut]).is_err());
            bytes[at] ^= flip;
            prop_assert!(StoredProtection::decode(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic_behind_a_good_checksum(mut bytes in proptest::collection::vec(any::<u8>(), 128)) {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].fill(0);
            let crc = crc32c::crc32c(&bytes[..124]).to_le_bytes();
            bytes[124..].copy_from_slice(&crc);
            prop_assert!(StoredProtection::decode(&bytes).is_ok());
        }
    }
}
