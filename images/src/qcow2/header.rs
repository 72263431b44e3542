//! The qcow2 header, checked before anything else believes it. Specification: QEMU, docs/interop/qcow2.rst, sections
//! "General" and "Header extensions".
//!
//! The library reads the image; this decides whether it may: what it would refuse is named, so that the caller can turn
//! to QEMU, and what would make it read zeroes where a table is cut off is called damage. That comes first: QEMU, too,
//! reads what is past the end of a file as zeroes.

use std::io;

use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::DiskImage;
use crate::raw::Raw;

const MAGIC: u32 = 0x5146_49fb;
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// QEMU's own limit for the level 1 table: 32 MiB.
const MAX_L1_ENTRIES: u32 = 32 * 1024 * 1024 / 8;
const MAX_BACKING_NAME: u32 = 1023;
/// More header extensions than any writer has kinds of.
const MAX_EXTENSIONS: usize = 64;
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const MAX_BACKING_FORMAT: u32 = 63;
/// What stands in the way of the library, by bit of the incompatible features.
const FEATURES: [&str; 5] = [
    "not closed cleanly",
    "marked as corrupt",
    "an external data file",
    "another compression than zlib",
    "extended level 2 entries",
];
const EXTENDED_L2: u64 = 1 << 4;
const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
}
const _: () = assert!(size_of::<RawHeader>() == 72);

/// What version 3 adds.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader3 {
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
}
const _: () = assert!(size_of::<RawHeader3>() == 32);

/// A header that is consistent with its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub size: u64,
    pub cluster_size: u64,
    pub backing: Option<Backing>,
}

/// The image below, as its header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    pub name: String,
    pub format: Option<String>,
}

/// Why a header is not accepted.
#[derive(Debug)]
pub enum HeaderError {
    /// Valid, but for QEMU to read.
    Unsupported(String),
    /// Not valid.
    Corrupt(String),
    Io(io::Error),
}

impl From<io::Error> for HeaderError {
    fn from(error: io::Error) -> Self {
        HeaderError::Io(error)
    }
}

fn corrupt<T>(reason: impl Into<String>) -> Result<T, HeaderError> {
    Err(HeaderError::Corrupt(reason.into()))
}

/// Reads and checks header and level 1 table.
pub fn read(file: &Raw) -> Result<Header, HeaderError> {
    let mut bytes = [0; size_of::<RawHeader>()];
    if file.size() < bytes.len() as u64 {
        return corrupt("shorter than a qcow2 header");
    }
    file.read_at(0, &mut bytes)?;
    let Ok(raw) = RawHeader::read_from_bytes(&bytes) else { return corrupt("shorter than a qcow2 header") };
    if raw.magic.get() != MAGIC {
        return corrupt("not a qcow2 image");
    }
    if !CLUSTER_BITS.contains(&raw.cluster_bits.get()) {
        return corrupt(format!("clusters of 2^{} bytes", raw.cluster_bits));
    }
    let cluster_size = 1_u64 << raw.cluster_bits.get();
    let (extensions_at, features) = match raw.version.get() {
        2 => (size_of::<RawHeader>() as u64, 0),
        3 => check_version_3(file, cluster_size)?,
        version => return Err(HeaderError::Unsupported(format!("version {version}"))),
    };
    if i64::try_from(raw.size.get()).is_err() {
        return corrupt(format!("a disk of {} bytes", raw.size));
    }
    check_tables(file, &raw, cluster_size, if features & EXTENDED_L2 == 0 { 8 } else { 16 })?;
    if let Some(reason) = for_qemu(features, raw.crypt_method.get()) {
        check_reference_counts(file, &raw, cluster_size)?;
        return Err(HeaderError::Unsupported(reason));
    }
    let backing = backing(file, &raw, extensions_at, cluster_size)?;
    Ok(Header { size: raw.size.get(), cluster_size, backing })
}

/// Returns where the header extensions start and the incompatible features, all of which are known.
fn check_version_3(file: &Raw, cluster_size: u64) -> Result<(u64, u64), HeaderError> {
    let mut bytes = [0; size_of::<RawHeader3>()];
    if file.size() < 104 {
        return corrupt("shorter than a qcow2 header");
    }
    file.read_at(size_of::<RawHeader>() as u64, &mut bytes)?;
    let Ok(raw) = RawHeader3::read_from_bytes(&bytes) else { return corrupt("shorter than a qcow2 header") };
    let features = raw.incompatible_features.get();
    if features >> FEATURES.len() != 0 {
        // What else the header says may mean something else then.
        return Err(HeaderError::Unsupported(feature_names(features)));
    }
    if raw.refcount_order.get() > 6 {
        return corrupt(format!("reference counts of 2^{} bits", raw.refcount_order));
    }
    let length = u64::from(raw.header_length.get());
    if length < 104 || length > cluster_size || !length.is_multiple_of(8) {
        return corrupt(format!("a header of {length} bytes"));
    }
    Ok((length, features))
}

fn feature_names(features: u64) -> String {
    let set = (0..64_u32).filter(|bit| features >> bit & 1 == 1);
    let names = set.map(|bit| {
        let name = usize::try_from(bit).ok().and_then(|bit| FEATURES.get(bit));
        name.map_or_else(|| format!("unknown feature {bit}"), |name| (*name).to_owned())
    });
    names.collect::<Vec<_>>().join(", ")
}

/// Why an image is QEMU's to read.
fn for_qemu(features: u64, crypt_method: u32) -> Option<String> {
    match (features, crypt_method) {
        (0, 0) => None,
        (0, 1) => Some("encrypted (AES)".to_owned()),
        (0, 2) => Some("encrypted (LUKS)".to_owned()),
        (0, method) => Some(format!("encryption method {method}")),
        (features, _) => Some(feature_names(features)),
    }
}

/// Here they are not read, but QEMU needs them; where they begin past the end of the file, it has been cut off.
fn check_reference_counts(file: &Raw, raw: &RawHeader, cluster_size: u64) -> Result<(), HeaderError> {
    let offset = raw.refcount_table_offset.get();
    let clusters = raw.refcount_table_clusters.get();
    // The last cluster of a file may end early.
    let last = u64::from(clusters.saturating_sub(1)) * cluster_size;
    let inside = offset.checked_add(last).is_some_and(|last| last < file.size());
    if !(offset.is_multiple_of(cluster_size) && inside) {
        return corrupt("the table of reference counts is not inside the file");
    }
    Ok(())
}

/// Every level 2 table must be inside the file: one that is cut off would read as "nothing stored here".
fn check_tables(file: &Raw, raw: &RawHeader, cluster_size: u64, l2_entry: u64) -> Result<(), HeaderError> {
    let (entries, offset) = (raw.l1_size.get(), raw.l1_table_offset.get());
    if entries > MAX_L1_ENTRIES {
        return corrupt(format!("a level 1 table of {entries} entries"));
    }
    let per_entry = cluster_size * (cluster_size / l2_entry);
    if raw.size.get().div_ceil(per_entry) > u64::from(entries) {
        return corrupt(format!("a level 1 table of {entries} entries, too small for {} bytes", raw.size));
    }
    let inside = |offset: u64, length: u64| offset.checked_add(length).is_some_and(|end| end <= file.size());
    let length = u64::from(entries) * 8;
    if !(offset.is_multiple_of(cluster_size) && inside(offset, length)) {
        return corrupt("the level 1 table is not inside the file");
    }
    // Bounded by MAX_L1_ENTRIES, and read piece by piece.
    let mut table = vec![0; 64 * 1024];
    let mut at = 0;
    while at < length {
        let piece = usize::try_from((length - at).min(64 * 1024)).unwrap_or(table.len());
        let piece = table.get_mut(..piece).unwrap_or_default();
        file.read_at(offset + at, piece)?;
        for entry in piece.as_chunks::<8>().0 {
            let l2 = u64::from_be_bytes(*entry) & L2_OFFSET;
            if l2 != 0 && !(l2.is_multiple_of(cluster_size) && inside(l2, cluster_size)) {
                return corrupt(format!("a level 2 table at offset {l2} is not inside the file"));
            }
        }
        at += piece.len() as u64;
    }
    Ok(())
}

fn backing(file: &Raw, raw: &RawHeader, extensions_at: u64, cluster_size: u64) -> Result<Option<Backing>, HeaderError> {
    let (offset, length) = (raw.backing_file_offset.get(), raw.backing_file_size.get());
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    let end = offset.checked_add(u64::from(length));
    if length > MAX_BACKING_NAME || end.is_none_or(|end| end > cluster_size || end > file.size()) {
        return corrupt("the name of the backing file is not inside the header's cluster");
    }
    let mut name = vec![0; usize::try_from(length).unwrap_or_default()];
    file.read_at(offset, &mut name)?;
    let Ok(name) = String::from_utf8(name) else { return corrupt("the name of the backing file is not text") };
    if name.contains('\0') {
        return corrupt("the name of the backing file has a zero byte");
    }
    let format = backing_format(file, extensions_at, offset)?;
    Ok(Some(Backing { name, format }))
}

/// The extensions stand between the header and the backing file's name.
fn backing_format(file: &Raw, mut at: u64, end: u64) -> Result<Option<String>, HeaderError> {
    for _ in 0..MAX_EXTENSIONS {
        if at + 8 > end {
            return Ok(None);
        }
        let mut head = [0; 8];
        file.read_at(at, &mut head)?;
        let [kind, length] =
            [&head[..4], &head[4..]].map(|part| part.iter().fold(0, |n, byte| n << 8 | u32::from(*byte)));
        at += 8;
        match kind {
            EXTENSION_END => return Ok(None),
            EXTENSION_BACKING_FORMAT => {
                if length > MAX_BACKING_FORMAT || at + u64::from(length) > end {
                    return corrupt("the format of the backing file is not inside the header");
                }
                let mut format = vec![0; usize::try_from(length).unwrap_or_default()];
                file.read_at(at, &mut format)?;
                return match String::from_utf8(format) {
                    Ok(format) => Ok(Some(format)),
                    Err(_) => corrupt("the format of the backing file is not text"),
                };
            }
            _ => at += u64::from(length).next_multiple_of(8),
        }
    }
    corrupt("too many header extensions")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: usize = 65536;

    /// An image of 1 GiB with one level 2 table, its fields as the change leaves them.
    fn header(change: impl FnOnce(&mut Vec<u8>)) -> Result<Header, HeaderError> {
        let mut bytes = vec![0; 4 * CLUSTER];
        for (at, value) in [(0, MAGIC), (4, 3), (20, 16), (36, 4), (56, 1), (96, 4), (100, 104)] {
            bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(value));
        }
        let reference_counts = 3 * CLUSTER as u64;
        for (at, value) in
            [(24, 1 << 30), (40, CLUSTER as u64), (48, reference_counts), (CLUSTER, (2 * CLUSTER as u64) | (1 << 63))]
        {
            bytes[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
        }
        change(&mut bytes);
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), &bytes).expect("writable");
        read(&Raw::open(file.path()).expect("a regular file"))
    }

    fn set(bytes: &mut [u8], at: usize, value: u64) {
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// A backing file's name at 512, its format in an extension.
    fn name_backing(bytes: &mut [u8], extensions_at: usize) {
        set(bytes, 8, 512);
        bytes[16..20].copy_from_slice(&8_u32.to_be_bytes());
        bytes[512..520].copy_from_slice(b"base.raw");
        let extensions = [0x1234_5678, 3, 0, 0, EXTENSION_BACKING_FORMAT, 3];
        for (number, word) in extensions.into_iter().enumerate() {
            bytes[extensions_at + 4 * number..][..4].copy_from_slice(&u32::to_be_bytes(word));
        }
        bytes[extensions_at + 24..extensions_at + 27].copy_from_slice(b"raw");
    }

    #[test]
    fn a_good_header_is_understood() {
        let plain = Header { size: 1 << 30, cluster_size: 65536, backing: None };
        assert_eq!(header(|_| ()).expect("good"), plain);
        let backing = Some(Backing { name: "base.raw".into(), format: Some("raw".into()) });
        assert_eq!(header(|bytes| name_backing(bytes, 104)).expect("good").backing, backing);
        let second = header(|bytes| {
            bytes[7] = 2;
            name_backing(bytes, 72);
        });
        assert_eq!(second.expect("version 2 has extensions, too").backing, backing);
        let unnamed = header(|bytes| {
            name_backing(bytes, 104);
            bytes[104..128].fill(0);
        });
        assert_eq!(unnamed.expect("good").backing.expect("named").format, None);
    }

    #[test]
    fn what_the_library_does_not_read_is_named() {
        for (at, value, expected) in [
            (7, 4, "version 4"),
            (35, 1, "AES"),
            (35, 2, "LUKS"),
            (79, 1, "not closed cleanly"),
            (79, 2, "corrupt"),
            (79, 4, "external data file"),
            (79, 8, "compression"),
            (79, 16, "extended"),
            (72, 1, "unknown feature 56"),
        ] {
            match header(|bytes| bytes[at] = value) {
                Err(HeaderError::Unsupported(reason)) => assert!(reason.contains(expected), "{expected}: {reason}"),
                other => panic!("{expected}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_cut_off_is_damage_even_if_it_is_for_qemu() {
        type Change = fn(&mut Vec<u8>);
        let changes: [(&str, Change); 8] = [
            ("the header", |bytes| bytes.truncate(103)),
            ("the level 1 table", |bytes| bytes.truncate(CLUSTER + 31)),
            ("all but the header", |bytes| bytes.truncate(CLUSTER)),
            ("a level 2 table", |bytes| bytes.truncate(3 * CLUSTER - 1)),
            ("the reference counts", |bytes| bytes.truncate(3 * CLUSTER)),
            ("the reference counts, far", |bytes| set(bytes, 48, 1 << 40)),
            ("the reference counts, at no offset", |bytes| set(bytes, 48, u64::MAX << 16)),
            ("more reference counts than the file holds", |bytes| bytes[59] = 3),
        ];
        for (at, value) in [(35, 1), (35, 2), (79, 1), (79, 4), (79, 8), (79, 16), (79, 20)] {
            for (what, change) in changes {
                let result = header(|bytes| {
                    bytes[at] = value;
                    change(bytes);
                });
                assert!(matches!(result, Err(HeaderError::Corrupt(_))), "{what}, {at} is {value}: {result:?}");
            }
            let tail = header(|bytes| {
                bytes[at] = value;
                bytes.truncate(3 * CLUSTER + 512);
            });
            assert!(matches!(tail, Err(HeaderError::Unsupported(_))), "the last cluster may end early: {tail:?}");
        }
        // An entry of the extended kind leads to half as much.
        let small = |value: u8| {
            header(|bytes| {
                bytes[39] = 2;
                bytes[79] = value;
            })
        };
        assert!(matches!(small(8), Err(HeaderError::Unsupported(_))));
        assert!(matches!(small(16), Err(HeaderError::Corrupt(_))));
        // What an unknown feature changes is not known.
        let unknown = header(|bytes| {
            bytes[79] = 32;
            bytes.truncate(CLUSTER);
        });
        assert!(matches!(unknown, Err(HeaderError::Unsupported(_))), "{unknown:?}");
    }

    #[test]
    fn what_contradicts_itself_is_damage() {
        type Change = fn(&mut Vec<u8>);
        let changes: [(&str, Change); 14] = [
            ("magic", |bytes| bytes[0] = 0),
            ("short", |bytes| bytes.truncate(71)),
            ("short for its version", |bytes| bytes.truncate(103)),
            ("tiny clusters", |bytes| bytes[23] = 8),
            ("huge clusters", |bytes| bytes[23] = 22),
            ("huge disk", |bytes| bytes[24] = 0x80),
            ("disk beyond its table", |bytes| set(bytes, 24, 1 << 40)),
            ("huge table", |bytes| bytes[36] = 0xff),
            ("unaligned table", |bytes| set(bytes, 40, 512)),
            ("table outside", |bytes| set(bytes, 40, 1 << 40)),
            ("level 2 table cut off", |bytes| bytes.truncate(3 * CLUSTER - 1)),
            ("level 2 table unaligned", |bytes| set(bytes, CLUSTER, 2 * CLUSTER as u64 + 512)),
            ("long header", |bytes| bytes[101] = 2),
            ("name outside", |bytes| {
                set(bytes, 8, CLUSTER as u64 - 4);
                bytes[19] = 8;
            }),
        ];
        for (what, change) in changes {
            let result = header(change);
            assert!(matches!(result, Err(HeaderError::Corrupt(_))), "{what}: {result:?}");
        }
    }
}
