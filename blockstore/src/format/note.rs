//! Notes: small checksummed objects around a JSON text, never encrypted. Specification: docs/format/note.md

use serde::Serialize;
use serde::de::DeserializeOwned;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, check_features, check_magic, head};
use crate::id::RepositoryId;

/// First bytes of a lease.
pub const LEASE: [u8; 8] = *b"LBOATLS1";
/// First bytes of a quarantine object.
pub const QUARANTINE: [u8; 8] = *b"LBOATQR1";
/// First bytes of a collect's summary.
pub const LIVENESS: [u8; 8] = *b"LBOATLV1";
/// Length of the header.
pub const HEADER_LEN: usize = 64;
/// Longest text.
pub const MAX_TEXT_LEN: u32 = 16 << 20;
/// Longest note.
pub const MAX_LEN: u64 = HEADER_LEN as u64 + MAX_TEXT_LEN as u64;
const PART: &str = "the note";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    incompat: U32,
    text_len: U32,
    repository: [u8; 16],
    text_crc32c: U32,
    reserved: [u8; 24],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

impl RawHeader {
    fn checksum(&self) -> u32 {
        let covered = self.as_bytes().split_last_chunk::<4>().map_or(&[][..], |(covered, _)| covered);
        crc32c::crc32c(covered)
    }
}

/// The object of a text. Parsed back before anybody writes it.
pub fn encode<T: Serialize>(magic: &[u8; 8], repository: RepositoryId, text: &T) -> Result<Vec<u8>, FormatError> {
    let text = serde_json::to_vec(text).map_err(|_| FormatError::Field { field: "text of the note" })?;
    let mut raw = RawHeader {
        magic: *magic,
        incompat: U32::ZERO,
        text_len: U32::new(u32::try_from(text.len()).unwrap_or(u32::MAX)), // refused when parsed back
        repository: repository.0,
        text_crc32c: U32::new(crc32c::crc32c(&text)),
        reserved: [0; 24],
        crc32c: U32::ZERO,
    };
    raw.crc32c = U32::new(raw.checksum());
    let bytes = [raw.as_bytes(), &text].concat();
    check(magic, repository, &bytes)?;
    Ok(bytes)
}

/// The text of an object.
pub fn decode<T: DeserializeOwned>(magic: &[u8; 8], repository: RepositoryId, bytes: &[u8]) -> Result<T, FormatError> {
    let text = check(magic, repository, bytes)?;
    serde_json::from_slice(text).map_err(|_| FormatError::Field { field: "text of the note" })
}

fn check<'a>(magic: &[u8; 8], repository: RepositoryId, bytes: &'a [u8]) -> Result<&'a [u8], FormatError> {
    let raw: &RawHeader = head(bytes, PART)?;
    check_magic(&raw.magic, magic, PART)?;
    if raw.checksum() != raw.crc32c.get() {
        return Err(FormatError::Checksum { part: "the note's header" });
    }
    check_features(raw.incompat.get(), 0, PART)?;
    if raw.text_len.get() > MAX_TEXT_LEN {
        return Err(FormatError::Field { field: "length of the note" });
    }
    let text = bytes.get(HEADER_LEN..).filter(|text| text.len() == raw.text_len.get() as usize);
    let text = text.ok_or(FormatError::Length { part: PART })?;
    if crc32c::crc32c(text) != raw.text_crc32c.get() {
        return Err(FormatError::Checksum { part: PART });
    }
    if raw.repository != repository.0 {
        return Err(FormatError::OtherRepository);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: RepositoryId = RepositoryId([1; 16]);

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let mut expected = Vec::from(*b"LBOATLS1\0\0\0\0\x06\0\0\0");
        expected.extend([1; 16]);
        expected.extend(crc32c::crc32c(b"\"text\"").to_le_bytes());
        expected.extend([0; 24]);
        expected.extend(crc32c::crc32c(&expected).to_le_bytes());
        expected.extend(b"\"text\"");
        assert_eq!(encode(&LEASE, ID, &"text"), Ok(expected.clone()));
        assert_eq!(decode(&LEASE, ID, &expected), Ok("text".to_owned()));
        let other = decode::<String>(&LEASE, RepositoryId([2; 16]), &expected);
        assert_eq!(other, Err(FormatError::OtherRepository));
        assert!(decode::<u32>(&LEASE, ID, &expected).is_err());
    }

    proptest! {
        #[test]
        fn every_damage_is_noticed(at in 0usize..70, flip in 1u8..=255, cut in 0usize..70) {
            let mut bytes = encode(&LEASE, ID, &"text").expect("short");
            prop_assert!(decode::<String>(&LEASE, ID, &bytes[..cut]).is_err());
            bytes[at] ^= flip;
            prop_assert!(decode::<String>(&LEASE, ID, &bytes).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode::<String>(&LEASE, ID, &bytes);
        }
    }
}
