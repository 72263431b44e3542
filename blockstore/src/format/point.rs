//! The envelope of a recovery point: header and payload. Specification: docs/format/point.md

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Encryption, FormatError, check_features, check_magic, head};
use crate::id::RepositoryId;

/// First bytes of the object.
pub const MAGIC: [u8; 8] = *b"LBOATPT1";
/// Length of the header.
pub const HEADER_LEN: usize = 96;
/// No JSON text is longer.
pub const MAX_TEXT_LEN: u32 = 16 << 20;
/// No payload is longer: incompressible text grows a little.
pub const MAX_PAYLOAD_LEN: u32 = MAX_TEXT_LEN + (64 << 10);
const PART: &str = "the recovery point";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    incompat: U32,
    encryption: u8,
    reserved: [u8; 3],
    repository: [u8; 16],
    salt: [u8; 32],
    text_len: U32,
    payload_len: U32,
    payload_crc32c: U32,
    reserved_end: [u8; 16],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// What stands around the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// Whether the payload is sealed.
    pub encryption: Encryption,
    /// Whose point it is.
    pub repository: RepositoryId,
    /// Derives the key of the seal.
    pub salt: [u8; 32],
    /// Length of the JSON text.
    pub text_len: u32,
}

impl Envelope {
    /// The seal's associated data.
    pub fn associated_data(&self) -> [u8; 64] {
        let raw = RawHeader {
            magic: MAGIC,
            incompat: U32::ZERO,
            encryption: self.encryption.to_byte(),
            reserved: [0; 3],
            repository: self.repository.0,
            salt: self.salt,
            text_len: U32::new(self.text_len),
            payload_len: U32::ZERO,
            payload_crc32c: U32::ZERO,
            reserved_end: [0; 16],
            crc32c: U32::ZERO,
        };
        raw.as_bytes().first_chunk().copied().unwrap_or([0; 64])
    }

    /// The whole object around a payload.
    pub fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let mut raw = RawHeader {
            magic: MAGIC,
            incompat: U32::ZERO,
            encryption: self.encryption.to_byte(),
            reserved: [0; 3],
            repository: self.repository.0,
            salt: self.salt,
            text_len: U32::new(self.text_len),
            payload_len: U32::new(u32::try_from(payload.len()).unwrap_or(u32::MAX)), // refused when parsed back
            payload_crc32c: U32::new(crc32c::crc32c(payload)),
            reserved_end: [0; 16],
            crc32c: U32::ZERO,
        };
        raw.crc32c = U32::new(raw.checksum());
        [raw.as_bytes(), payload].concat()
    }

    /// Envelope and payload of an object.
    pub fn decode(bytes: &[u8]) -> Result<(Envelope, &[u8]), FormatError> {
        let raw: &RawHeader = head(bytes, PART)?;
        check_magic(&raw.magic, &MAGIC, PART)?;
        if raw.checksum() != raw.crc32c.get() {
            return Err(FormatError::Checksum { part: PART });
        }
        check_features(raw.incompat.get(), 0, PART)?;
        let payload = bytes.get(HEADER_LEN..).ok_or(FormatError::Length { part: PART })?;
        if raw.text_len.get() > MAX_TEXT_LEN || raw.payload_len.get() > MAX_PAYLOAD_LEN {
            return Err(FormatError::Field { field: "length of the recovery point" });
        }
        if payload.len() != raw.payload_len.get() as usize {
            return Err(FormatError::Length { part: PART });
        }
        if crc32c::crc32c(payload) != raw.payload_crc32c.get() {
            return Err(FormatError::Checksum { part: PART });
        }
        let envelope = Envelope {
            encryption: Encryption::from_byte(raw.encryption)?,
            repository: RepositoryId(raw.repository),
            salt: raw.salt,
            text_len: raw.text_len.get(),
        };
        Ok((envelope, payload))
    }
}

impl RawHeader {
    fn checksum(&self) -> u32 {
        let covered = self.as_bytes().split_last_chunk::<4>().map_or(&[][..], |(covered, _)| covered);
        crc32c::crc32c(covered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Envelope {
        Envelope { encryption: Encryption::None, repository: RepositoryId([1; 16]), salt: [2; 32], text_len: 300 }
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let mut expected = Vec::from(*b"LBOATPT1\0\0\0\0\0\0\0\0");
        expected.extend([1; 16]);
        expected.extend([2; 32]);
        expected.extend([0x2c, 1, 0, 0, 4, 0, 0, 0]);
        assert_eq!(sample().associated_data(), expected[..64]);
        expected.extend(crc32c::crc32c(b"text").to_le_bytes());
        expected.extend([0; 16]);
        expected.extend(crc32c::crc32c(&expected).to_le_bytes());
        expected.extend(b"text");
        assert_eq!(sample().encode(b"text"), expected);
        assert_eq!(Envelope::decode(&expected), Ok((sample(), &b"text"[..])));
    }

    proptest! {
        #[test]
        fn every_damage_is_noticed(at in 0usize..100, flip in 1u8..=255, cut in 0usize..100) {
            let mut bytes = sample().encode(b"text");
            prop_assert!(Envelope::decode(&bytes[..cut]).is_err());
            bytes[at] ^= flip;
            prop_assert!(Envelope::decode(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Envelope::decode(&bytes);
        }
    }
}
