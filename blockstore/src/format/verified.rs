//! When packs were read whole for the last time. Specification: docs/format/verified.md

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, check_features, check_magic};
use crate::id::{PackId, RepositoryId};

/// First bytes.
pub const MAGIC: [u8; 8] = *b"LBOATVF1";
/// Length of the header.
pub const HEADER_LEN: usize = 64;
/// No object names more packs.
pub const MAX_ENTRIES: u32 = 1 << 20;
/// No object is longer.
pub const MAX_LEN: u64 = HEADER_LEN as u64 + MAX_ENTRIES as u64 * size_of::<RawEntry>() as u64;
const PART: &str = "the list of verified packs";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    incompat: U32,
    entries: U32,
    repository: [u8; 16],
    reserved: [u8; 28],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    pack: [u8; 32],
    time_unix_s: U64,
}
const _: () = assert!(size_of::<RawEntry>() == 40);

fn checksum(header: &RawHeader) -> u32 {
    let bytes = header.as_bytes();
    crc32c::crc32c(bytes.get(..HEADER_LEN - 4).unwrap_or_default())
}

/// The bytes of a list. `entries` are sorted by pack, each of them once, at most [`MAX_ENTRIES`].
pub fn encode(repository: RepositoryId, entries: &[(PackId, u64)]) -> Vec<u8> {
    let mut header = RawHeader {
        magic: MAGIC,
        incompat: U32::new(0),
        entries: U32::new(u32::try_from(entries.len()).unwrap_or(u32::MAX)),
        repository: repository.0,
        reserved: [0; 28],
        crc32c: U32::new(0),
    };
    header.crc32c = U32::new(checksum(&header));
    let mut bytes = header.as_bytes().to_vec();
    for (pack, time) in entries {
        bytes.extend_from_slice(RawEntry { pack: pack.0, time_unix_s: U64::new(*time) }.as_bytes());
    }
    bytes
}

/// The entries of a list whose bytes hash to its name.
pub fn decode(bytes: &[u8], repository: RepositoryId) -> Result<Vec<(PackId, u64)>, FormatError> {
    let wrong = FormatError::Length { part: PART };
    let (header, rest) = RawHeader::ref_from_prefix(bytes).map_err(|_| wrong.clone())?;
    check_magic(&header.magic, &MAGIC, PART)?;
    if checksum(header) != header.crc32c.get() {
        return Err(FormatError::Checksum { part: PART });
    }
    check_features(header.incompat.get(), 0, PART)?;
    if header.repository != repository.0 {
        return Err(FormatError::OtherRepository);
    }
    let raw = <[RawEntry]>::ref_from_bytes(rest).map_err(|_| wrong.clone())?;
    if raw.len() != header.entries.get() as usize || header.entries.get() > MAX_ENTRIES {
        return Err(wrong);
    }
    if !raw.is_sorted_by(|a, b| a.pack < b.pack) {
        return Err(FormatError::Field { field: "order of the packs" });
    }
    Ok(raw.iter().map(|entry| (PackId(entry.pack), entry.time_unix_s.get())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPOSITORY: RepositoryId = RepositoryId([7; 16]);

    #[test]
    fn the_bytes_are_the_documented_ones_and_read_back() {
        let entries = [(PackId([1; 32]), 5), (PackId([2; 32]), u64::MAX)];
        let bytes = encode(REPOSITORY, &entries);
        let mut golden = b"LBOATVF1".to_vec();
        golden.extend([0, 0, 0, 0, 2, 0, 0, 0]);
        golden.extend([7; 16]);
        golden.extend([0; 28]);
        golden.extend(crc32c::crc32c(&golden).to_le_bytes());
        golden.extend([1; 32]);
        golden.extend(5u64.to_le_bytes());
        golden.extend([2; 32]);
        golden.extend([0xff; 8]);
        assert_eq!(bytes, golden);
        assert_eq!(decode(&bytes, REPOSITORY), Ok(entries.to_vec()));
        assert_eq!(decode(&encode(REPOSITORY, &[]), REPOSITORY), Ok(vec![]));
    }

    #[test]
    fn what_is_cut_changed_or_out_of_order_is_refused() {
        let bytes = encode(REPOSITORY, &[(PackId([1; 32]), 5), (PackId([2; 32]), 6)]);
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut], REPOSITORY).is_err(), "cut at {cut}");
        }
        for at in 0..HEADER_LEN {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert!(decode(&changed, REPOSITORY).is_err(), "byte {at}");
        }
        assert!(decode(&bytes, RepositoryId([8; 16])).is_err());
        for entries in [[(PackId([2; 32]), 5), (PackId([1; 32]), 5)], [(PackId([1; 32]), 5), (PackId([1; 32]), 5)]] {
            assert!(decode(&encode(REPOSITORY, &entries), REPOSITORY).is_err());
        }
    }
}
