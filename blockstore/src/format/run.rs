//! Index runs: sorted entries that say where chunks are. Specification: docs/format/index.md

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::pack::{FLAG_GATHERED, FLAG_ZSTD, MAX_FRAMES, MAX_PACK_LEN, PackKind};
use super::{Encryption, FormatError, check_features, check_magic, head, tail};
use crate::id::{ChunkId, PackId, RepositoryId};

/// First bytes of a run.
pub const MAGIC: [u8; 8] = *b"LBOATIX1";
/// Last bytes of a run.
pub const FOOTER_MAGIC: [u8; 8] = *b"LBOATIF1";
/// Length of the header.
pub const HEADER_LEN: usize = 64;
/// Length of a pack row.
pub const ROW_LEN: usize = 80;
/// Length of an entry.
pub const ENTRY_LEN: usize = 48;
/// Length of the footer.
pub const FOOTER_LEN: usize = 32;
/// No run names more packs.
pub const MAX_PACKS: u32 = 1 << 20;
/// No run has more entries.
pub const MAX_ENTRIES: u64 = u32::MAX as u64;
const PART: &str = "the index run";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    incompat: U32,
    packs: U32,
    repository: [u8; 16],
    entries: U64,
    rows_crc32c: U32,
    reserved: [u8; 16],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
    entries: U64,
    packs: U32,
    header_crc32c: U32,
    reserved: U32,
    crc32c: U32,
    magic: [u8; 8],
}
const _: () = assert!(size_of::<RawFooter>() == FOOTER_LEN);

/// A pack row, in place and unchecked.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct RawRow {
    pack: [u8; 32],
    salt: [u8; 32],
    len: U32,
    frames: U32,
    entries: U32,
    kind: u8,
    encryption: u8,
    flags: u8,
    reserved: u8,
}
const _: () = assert!(size_of::<RawRow>() == ROW_LEN);

/// An entry, in place and unchecked: what it says is proven only by the frame it leads to.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug)]
#[repr(C)]
pub struct RawEntry {
    /// The chunk or node.
    pub id: [u8; 32],
    pack: U32,
    offset: U32,
    stored_len: U32,
    frame: U16,
    flags: u8,
    level: u8,
}
const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN);

/// What a run knows of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackRow {
    /// Name of the pack.
    pub pack: PackId,
    /// Its salt.
    pub salt: [u8; 32],
    /// Its length.
    pub len: u32,
    /// Its number of frames.
    pub frames: u32,
    /// How many of them have an entry in this run.
    pub entries: u32,
    /// What it holds.
    pub kind: PackKind,
    /// Whether it is sealed.
    pub encryption: Encryption,
    /// Whether what it holds is better read here than elsewhere.
    pub gathered: bool,
}

/// An entry as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The chunk or node.
    pub id: ChunkId,
    /// Which of the run's pack rows.
    pub row: u32,
    /// Where the frame begins in the pack.
    pub offset: u32,
    /// Its length.
    pub stored_len: u32,
    /// Its number.
    pub frame: u16,
    /// Its flags.
    pub flags: u8,
    /// Level of a node.
    pub level: u8,
}

/// Where the tables of a run are in its bytes; known to fit them exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Number of pack rows.
    pub packs: u32,
    /// Number of entries.
    pub entries: u64,
    entries_at: usize,
    end: usize,
}

impl Layout {
    /// Checks everything but the entries.
    pub fn decode(bytes: &[u8], repository: RepositoryId) -> Result<Layout, FormatError> {
        let header: &RawHeader = head(bytes, PART)?;
        check_magic(&header.magic, &MAGIC, PART)?;
        if checksum(header.as_bytes(), 60) != header.crc32c.get() {
            return Err(FormatError::Checksum { part: "the index run's header" });
        }
        check_features(header.incompat.get(), 0, PART)?;
        let layout = Layout::new(header.packs.get(), header.entries.get())?;
        if bytes.len() != layout.end + FOOTER_LEN {
            return Err(FormatError::Length { part: PART });
        }
        let footer: &RawFooter = tail(bytes, PART)?;
        check_magic(&footer.magic, &FOOTER_MAGIC, "the index run's footer")?;
        let same = footer.entries == header.entries
            && footer.packs == header.packs
            && footer.header_crc32c == header.crc32c
            && footer.crc32c.get() == checksum(footer.as_bytes(), 20);
        if !same {
            return Err(FormatError::Checksum { part: "the index run's footer" });
        }
        let rows = bytes.get(HEADER_LEN..layout.entries_at).ok_or(FormatError::Length { part: PART })?;
        if crc32c::crc32c(rows) != header.rows_crc32c.get() {
            return Err(FormatError::Checksum { part: "the index run's pack rows" });
        }
        if header.repository != repository.0 {
            return Err(FormatError::OtherRepository);
        }
        layout.rows(bytes).iter().try_for_each(|row| row.check().map(drop))?;
        Ok(layout)
    }

    fn new(packs: u32, entries: u64) -> Result<Layout, FormatError> {
        if packs > MAX_PACKS || entries > MAX_ENTRIES {
            return Err(FormatError::Field { field: "size of the index run" });
        }
        let too_long = FormatError::Length { part: PART };
        let count = usize::try_from(entries).map_err(|_| too_long.clone())?;
        let entries_at = HEADER_LEN + packs as usize * ROW_LEN; // at most 80 MiB
        let end = count.checked_mul(ENTRY_LEN).and_then(|len| len.checked_add(entries_at)).ok_or(too_long)?;
        Ok(Layout { packs, entries, entries_at, end })
    }

    /// The pack rows in the bytes this layout was decoded from.
    pub fn rows<'a>(&self, bytes: &'a [u8]) -> &'a [RawRow] {
        let table = bytes.get(HEADER_LEN..self.entries_at).unwrap_or_default();
        <[RawRow]>::ref_from_bytes(table).unwrap_or_default()
    }

    /// The entries in the bytes this layout was decoded from.
    pub fn entries<'a>(&self, bytes: &'a [u8]) -> &'a [RawEntry] {
        let table = bytes.get(self.entries_at..self.end).unwrap_or_default();
        <[RawEntry]>::ref_from_bytes(table).unwrap_or_default()
    }
}

impl RawRow {
    /// The row, if its numbers are possible.
    pub fn check(&self) -> Result<PackRow, FormatError> {
        let row = PackRow {
            pack: PackId(self.pack),
            salt: self.salt,
            len: self.len.get(),
            frames: self.frames.get(),
            entries: self.entries.get(),
            kind: PackKind::from_byte(self.kind)?,
            encryption: Encryption::from_byte(self.encryption)?,
            gathered: self.flags & FLAG_GATHERED != 0,
        };
        if row.len > MAX_PACK_LEN || row.frames > MAX_FRAMES {
            return Err(FormatError::Field { field: "pack row" });
        }
        Ok(row)
    }
}

impl RawEntry {
    /// The entry's values, unproven.
    pub fn get(&self) -> Entry {
        Entry {
            id: ChunkId(self.id),
            row: self.pack.get(),
            offset: self.offset.get(),
            stored_len: self.stored_len.get(),
            frame: self.frame.get(),
            flags: self.flags & FLAG_ZSTD,
            level: self.level,
        }
    }
}

/// The bytes of a run. `rows` must be sorted by pack, `entries` by id and row.
pub fn encode(repository: RepositoryId, rows: &[PackRow], entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + rows.len() * ROW_LEN + entries.len() * ENTRY_LEN + FOOTER_LEN);
    bytes.resize(HEADER_LEN, 0);
    for row in rows {
        let raw = RawRow {
            pack: row.pack.0,
            salt: row.salt,
            len: U32::new(row.len),
            frames: U32::new(row.frames),
            entries: U32::new(row.entries),
            kind: row.kind.to_byte(),
            encryption: row.encryption.to_byte(),
            flags: if row.gathered { FLAG_GATHERED } else { 0 },
            reserved: 0,
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    let rows_crc32c = crc32c::crc32c(bytes.get(HEADER_LEN..).unwrap_or_default());
    for entry in entries {
        let raw = RawEntry {
            id: entry.id.0,
            pack: U32::new(entry.row),
            offset: U32::new(entry.offset),
            stored_len: U32::new(entry.stored_len),
            frame: U16::new(entry.frame),
            flags: entry.flags,
            level: entry.level,
        };
        bytes.extend_from_slice(raw.as_bytes());
    }
    let packs = U32::new(u32::try_from(rows.len()).unwrap_or(u32::MAX)); // out of bounds: refused when parsed back
    let entries = U64::new(entries.len() as u64);
    let mut header = RawHeader {
        magic: MAGIC,
        incompat: U32::ZERO,
        packs,
        repository: repository.0,
        entries,
        rows_crc32c: U32::new(rows_crc32c),
        reserved: [0; 16],
        crc32c: U32::ZERO,
    };
    header.crc32c = U32::new(checksum(header.as_bytes(), 60));
    if let Some(place) = bytes.first_chunk_mut::<HEADER_LEN>() {
        place.copy_from_slice(header.as_bytes());
    }
    let mut footer = RawFooter {
        entries,
        packs,
        header_crc32c: header.crc32c,
        reserved: U32::ZERO,
        crc32c: U32::ZERO,
        magic: FOOTER_MAGIC,
    };
    footer.crc32c = U32::new(checksum(footer.as_bytes(), 20));
    bytes.extend_from_slice(footer.as_bytes());
    bytes
}

fn checksum(bytes: &[u8], end: usize) -> u32 {
    crc32c::crc32c(bytes.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REPOSITORY: RepositoryId = RepositoryId([3; 16]);

    fn rows() -> Vec<PackRow> {
        let encryption = Encryption::Aes256Gcm;
        let row = |byte, kind| PackRow {
            pack: PackId([byte; 32]),
            salt: [byte + 1; 32],
            len: 1000,
            frames: 5,
            entries: 1,
            kind,
            encryption,
            gathered: byte == 0x20,
        };
        vec![row(0x10, PackKind::Data), row(0x20, PackKind::Metadata)]
    }

    fn entries() -> Vec<Entry> {
        let entry = |byte, row, level| Entry {
            id: ChunkId([byte; 32]),
            row,
            offset: 80,
            stored_len: 700,
            frame: 4,
            flags: 1,
            level,
        };
        vec![entry(1, 0, 0), entry(2, 1, 1)]
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let bytes = encode(REPOSITORY, &rows(), &entries());
        let mut table = Vec::new();
        for (byte, kind) in [(0x10, 1), (0x20, 2)] {
            table.extend([byte; 32]);
            table.extend([byte + 1; 32]);
            table.extend([0xe8, 3, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, kind, 1, u8::from(byte == 0x20), 0]);
        }
        let mut expected = Vec::from(*b"LBOATIX1\0\0\0\0\x02\0\0\0");
        expected.extend([3; 16]);
        expected.extend([2, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend(crc32c::crc32c(&table).to_le_bytes());
        expected.extend([0; 16]);
        let header_crc = crc32c::crc32c(&expected).to_le_bytes();
        expected.extend(header_crc);
        expected.extend(&table);
        for (byte, row) in [(1, 0), (2, 1)] {
            expected.extend([byte; 32]);
            expected.extend([row, 0, 0, 0, 80, 0, 0, 0, 0xbc, 2, 0, 0, 4, 0, 1, row]);
        }
        let mut footer = Vec::from([2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        footer.extend(header_crc);
        footer.extend([0; 4]);
        footer.extend(crc32c::crc32c(&footer).to_le_bytes());
        footer.extend(b"LBOATIF1");
        expected.extend(footer);
        assert_eq!(bytes, expected);
        let layout = Layout::decode(&bytes, REPOSITORY).expect("valid");
        assert_eq!(layout.rows(&bytes).iter().map(|row| row.check().expect("valid")).collect::<Vec<_>>(), rows());
        assert_eq!(layout.entries(&bytes).iter().map(RawEntry::get).collect::<Vec<_>>(), entries());
    }

    #[test]
    fn another_repositorys_run_is_refused() {
        let bytes = encode(RepositoryId([4; 16]), &rows(), &entries());
        assert_eq!(Layout::decode(&bytes, REPOSITORY), Err(FormatError::OtherRepository));
    }

    proptest! {
        #[test]
        fn damage_outside_the_entries_is_noticed(at in 0usize..352, flip in 1u8..=255, cut in 0usize..352) {
            let mut bytes = encode(REPOSITORY, &rows(), &entries());
            prop_assert_eq!(bytes.len(), 352);
            prop_assert!(Layout::decode(&bytes[..cut], REPOSITORY).is_err());
            bytes[at] ^= flip;
            // Entries are proven by the frames they lead to.
            prop_assert_eq!(Layout::decode(&bytes, REPOSITORY).is_ok(), (224..320).contains(&at));
        }

        #[test]
        fn hostile_counts_never_panic(packs: u32, entries: u64, rest in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut header = RawHeader {
                magic: MAGIC, incompat: U32::ZERO, packs: U32::new(packs), repository: REPOSITORY.0,
                entries: U64::new(entries), rows_crc32c: U32::ZERO, reserved: [0; 16], crc32c: U32::ZERO,
            };
            header.crc32c = U32::new(checksum(header.as_bytes(), 60));
            let mut bytes = header.as_bytes().to_vec();
            bytes.extend(rest);
            prop_assert!(Layout::decode(&bytes, REPOSITORY).is_err());
        }
    }
}
