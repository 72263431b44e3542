//! The configuration object, 64 bytes. Specification: docs/format/repository.md

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Encryption, FormatError, check_features, check_magic, head};
use crate::id::RepositoryId;

/// First bytes of the object.
pub const MAGIC: [u8; 8] = *b"LBOATRP1";
/// Length of the object.
pub const CONFIG_LEN: usize = 64;
/// Smallest chunk size.
pub const MIN_CHUNK_SIZE: u32 = 16 << 10;
/// Largest chunk size.
pub const MAX_CHUNK_SIZE: u32 = 4 << 20;
const HASH_BLAKE3: u8 = 1;
const PART: &str = "the repository's configuration";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawConfig {
    magic: [u8; 8],
    incompat: U32,
    chunk_size: U32,
    repository: [u8; 16],
    encryption: u8,
    hash: u8,
    reserved: [u8; 26],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawConfig>() == CONFIG_LEN);

/// What a repository is made with; never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Identity of the repository.
    pub repository: RepositoryId,
    /// Chunk size in bytes.
    pub chunk_size: u32,
    /// Whether frames and points are sealed.
    pub encryption: Encryption,
}

/// Whether a chunk size may be used.
pub fn is_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && (MIN_CHUNK_SIZE..=MAX_CHUNK_SIZE).contains(&size)
}

impl Config {
    /// The object's bytes.
    pub fn encode(&self) -> [u8; CONFIG_LEN] {
        let mut raw = RawConfig {
            magic: MAGIC,
            incompat: U32::ZERO,
            chunk_size: U32::new(self.chunk_size),
            repository: self.repository.0,
            encryption: self.encryption.to_byte(),
            hash: HASH_BLAKE3,
            reserved: [0; 26],
            crc32c: U32::ZERO,
        };
        raw.crc32c = U32::new(raw.checksum());
        zerocopy::transmute!(raw)
    }

    /// The configuration in an object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Config, FormatError> {
        let raw: &RawConfig = head(bytes, PART)?;
        check_magic(&raw.magic, &MAGIC, PART)?;
        if bytes.len() != CONFIG_LEN {
            return Err(FormatError::Length { part: PART });
        }
        if raw.checksum() != raw.crc32c.get() {
            return Err(FormatError::Checksum { part: PART });
        }
        check_features(raw.incompat.get(), 0, PART)?;
        if !is_chunk_size(raw.chunk_size.get()) {
            return Err(FormatError::Field { field: "chunk size" });
        }
        if raw.hash != HASH_BLAKE3 {
            return Err(FormatError::Field { field: "hash" });
        }
        Ok(Config {
            repository: RepositoryId(raw.repository),
            chunk_size: raw.chunk_size.get(),
            encryption: Encryption::from_byte(raw.encryption)?,
        })
    }
}

impl RawConfig {
    fn checksum(&self) -> u32 {
        let covered = self.as_bytes().split_last_chunk::<4>().map_or(&[][..], |(covered, _)| covered);
        crc32c::crc32c(covered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Config {
        Config { repository: RepositoryId([7; 16]), chunk_size: 65536, encryption: Encryption::Aes256Gcm }
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let bytes = sample().encode();
        let mut expected = Vec::from(*b"LBOATRP1\0\0\0\0\0\0\x01\0");
        expected.extend([7; 16]);
        expected.extend([1, 1]);
        expected.extend([0; 26]);
        expected.extend(crc32c::crc32c(&expected).to_le_bytes());
        assert_eq!(bytes.as_slice(), expected);
        assert_eq!(bytes[60..], [87, 111, 225, 61]);
    }

    #[test]
    fn a_later_layout_is_named_as_such() {
        let mut bytes = sample().encode();
        bytes[7] = b'2';
        assert_eq!(Config::decode(&bytes), Err(FormatError::UnknownVersion { part: PART, version: '2' }));
        bytes[0] = b'X';
        assert_eq!(Config::decode(&bytes), Err(FormatError::Magic { part: PART }));
    }

    #[test]
    fn unknown_feature_bits_refuse_the_object() {
        let mut bytes = sample().encode();
        bytes[9] = 4;
        let crc = crc32c::crc32c(&bytes[..60]).to_le_bytes();
        bytes[60..].copy_from_slice(&crc);
        assert_eq!(Config::decode(&bytes), Err(FormatError::UnknownFeatures { part: PART, bits: 0x400 }));
    }

    proptest! {
        #[test]
        fn every_damage_is_noticed(at in 0usize..64, flip in 1u8..=255, cut in 0usize..64) {
            let bytes = sample().encode();
            prop_assert_eq!(Config::decode(&bytes), Ok(sample()));
            prop_assert!(Config::decode(&bytes[..cut]).is_err());
            let mut bytes = bytes;
            bytes[at] ^= flip;
            prop_assert!(Config::decode(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Config::decode(&bytes);
        }
    }
}
