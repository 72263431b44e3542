//! Packs: header, table and footer around sealed frames. Specification: docs/format/pack.md

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::config::MAX_CHUNK_SIZE;
use super::{Encryption, FormatError, TAG_LEN, check_features, check_magic, head, tail};
use crate::id::{ChunkId, RepositoryId};

/// First bytes of a pack.
pub const MAGIC: [u8; 8] = *b"LBOATPK1";
/// Last bytes of a pack.
pub const FOOTER_MAGIC: [u8; 8] = *b"LBOATPF1";
/// Length of the header; the first frame follows.
pub const HEADER_LEN: u32 = 80;
/// Length of a table entry.
pub const ENTRY_LEN: u32 = 48;
/// Length of the footer.
pub const FOOTER_LEN: u32 = 32;
/// No pack is longer.
pub const MAX_PACK_LEN: u32 = 64 << 20;
/// Writers close a pack at this length.
pub const TARGET_PACK_LEN: u32 = 32 << 20;
/// No pack holds more frames; their numbers fit 16 bits.
pub const MAX_FRAMES: u32 = 65_535;
/// Flag of a frame: compressed with zstd.
pub const FLAG_ZSTD: u8 = 1;
/// Flag of a pack: its chunks stand elsewhere too, and are better read here.
pub const FLAG_GATHERED: u8 = 1;
const PART: &str = "the pack";

/// What a pack's frames are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PackKind {
    /// Chunks of disks.
    Data,
    /// Manifest nodes.
    Metadata,
}

impl PackKind {
    pub(crate) fn to_byte(self) -> u8 {
        match self {
            PackKind::Data => 1,
            PackKind::Metadata => 2,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Result<PackKind, FormatError> {
        match byte {
            1 => Ok(PackKind::Data),
            2 => Ok(PackKind::Metadata),
            _ => Err(FormatError::Field { field: "pack kind" }),
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    incompat: U32,
    kind: u8,
    encryption: u8,
    flags: u8,
    reserved: u8,
    repository: [u8; 16],
    salt: [u8; 32],
    reserved_end: [u8; 12],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN as usize);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    id: [u8; 32],
    offset: U32,
    stored_len: U32,
    plain_len: U32,
    flags: U32,
}
const _: () = assert!(size_of::<RawEntry>() == ENTRY_LEN as usize);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
    table_offset: U64,
    frames: U32,
    table_crc32c: U32,
    incompat: U32,
    crc32c: U32,
    magic: [u8; 8],
}
const _: () = assert!(size_of::<RawFooter>() == FOOTER_LEN as usize);

/// A pack's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frames are.
    pub kind: PackKind,
    /// Whether they are sealed.
    pub encryption: Encryption,
    /// Whose pack it is.
    pub repository: RepositoryId,
    /// Derives the frame key.
    pub salt: [u8; 32],
    /// Whether it holds second copies that lie better than the first: [`FLAG_GATHERED`].
    pub gathered: bool,
}

/// One frame, as the table describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The chunk or node.
    pub id: ChunkId,
    /// Where the frame begins.
    pub offset: u32,
    /// Its length, tag included.
    pub stored_len: u32,
    /// Length of the chunk.
    pub plain_len: u32,
    /// [`FLAG_ZSTD`].
    pub flags: u8,
    /// Level of a node.
    pub level: u8,
}

/// Where the table of a pack is; known to lie inside the pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Where the table begins, which is where the frames end.
    pub table_offset: u32,
    /// How many frames.
    pub frames: u32,
    table_crc32c: u32,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN as usize] {
        let mut raw = RawHeader {
            magic: MAGIC,
            incompat: U32::ZERO,
            kind: self.kind.to_byte(),
            encryption: self.encryption.to_byte(),
            flags: if self.gathered { FLAG_GATHERED } else { 0 },
            reserved: 0,
            repository: self.repository.0,
            salt: self.salt,
            reserved_end: [0; 12],
            crc32c: U32::ZERO,
        };
        raw.crc32c = U32::new(checksum_before(raw.as_bytes(), 76));
        zerocopy::transmute!(raw)
    }

    /// The header at the start of a pack.
    pub fn decode(bytes: &[u8]) -> Result<Header, FormatError> {
        let part = "the pack's header";
        let raw: &RawHeader = head(bytes, part)?;
        check_magic(&raw.magic, &MAGIC, part)?;
        if checksum_before(raw.as_bytes(), 76) != raw.crc32c.get() {
            return Err(FormatError::Checksum { part });
        }
        check_features(raw.incompat.get(), 0, part)?;
        Ok(Header {
            kind: PackKind::from_byte(raw.kind)?,
            encryption: Encryption::from_byte(raw.encryption)?,
            repository: RepositoryId(raw.repository),
            salt: raw.salt,
            gathered: raw.flags & FLAG_GATHERED != 0,
        })
    }
}

impl Footer {
    /// The footer at the end of a pack of `pack_len` bytes.
    pub fn decode(bytes: &[u8], pack_len: u64) -> Result<Footer, FormatError> {
        let part = "the pack's footer";
        let raw: &RawFooter = tail(bytes, part)?;
        check_magic(&raw.magic, &FOOTER_MAGIC, part)?;
        if checksum_before(raw.as_bytes(), 20) != raw.crc32c.get() {
            return Err(FormatError::Checksum { part });
        }
        check_features(raw.incompat.get(), 0, part)?;
        let frames = raw.frames.get();
        if frames > MAX_FRAMES || pack_len > u64::from(MAX_PACK_LEN) {
            return Err(FormatError::Field { field: "size of the pack" });
        }
        let end = raw.table_offset.get().checked_add(u64::from(frames) * u64::from(ENTRY_LEN) + u64::from(FOOTER_LEN));
        if end != Some(pack_len) {
            return Err(FormatError::Length { part: PART });
        }
        let table_offset = u32::try_from(raw.table_offset.get()).map_err(|_| FormatError::Length { part: PART })?;
        if table_offset < HEADER_LEN {
            return Err(FormatError::Field { field: "table offset" });
        }
        Ok(Footer { table_offset, frames, table_crc32c: raw.table_crc32c.get() })
    }

    /// Length of the table.
    pub fn table_len(&self) -> u32 {
        self.frames * ENTRY_LEN // at most 65,535 * 48
    }

    /// The frames a pack's table describes; they follow each other without gaps from the header to the table.
    pub fn decode_table(&self, table: &[u8], header: &Header) -> Result<Vec<Frame>, FormatError> {
        let part = "the pack's table";
        let entries = <[RawEntry]>::ref_from_bytes(table).map_err(|_| FormatError::Length { part })?;
        if u32::try_from(entries.len()).ok() != Some(self.frames) {
            return Err(FormatError::Length { part });
        }
        if crc32c::crc32c(table) != self.table_crc32c {
            return Err(FormatError::Checksum { part });
        }
        let mut frames = Vec::with_capacity(entries.len());
        let mut next = HEADER_LEN;
        for entry in entries {
            let frame = entry.check(header)?;
            if frame.offset != next {
                return Err(FormatError::Field { field: "frame offset" });
            }
            next = next.checked_add(frame.stored_len).ok_or(FormatError::Field { field: "frame length" })?;
            frames.push(frame);
        }
        if next != self.table_offset {
            return Err(FormatError::Field { field: "table offset" });
        }
        Ok(frames)
    }
}

impl RawEntry {
    fn check(&self, header: &Header) -> Result<Frame, FormatError> {
        let [flags, level, 0, 0] = self.flags.get().to_le_bytes() else {
            return Err(FormatError::Field { field: "frame flags" });
        };
        let frame = Frame {
            id: ChunkId(self.id),
            offset: self.offset.get(),
            stored_len: self.stored_len.get(),
            plain_len: self.plain_len.get(),
            flags,
            level,
        };
        if flags & !FLAG_ZSTD != 0 || (header.kind == PackKind::Data && level != 0) {
            return Err(FormatError::Field { field: "frame flags" });
        }
        if frame.id.is_zero() {
            return Err(FormatError::Field { field: "chunk id" });
        }
        check_lengths(frame.stored_len, frame.plain_len, header.encryption)?;
        Ok(frame)
    }
}

/// Bounds of the two lengths of a frame.
pub fn check_lengths(stored_len: u32, plain_len: u32, encryption: Encryption) -> Result<(), FormatError> {
    let tag = match encryption {
        Encryption::None => 0,
        Encryption::Aes256Gcm => TAG_LEN,
    };
    let plain_fits = (1..=MAX_CHUNK_SIZE).contains(&plain_len);
    if plain_fits && stored_len > tag && stored_len <= plain_len + tag {
        Ok(())
    } else {
        Err(FormatError::Field { field: "frame length" })
    }
}

/// The associated data of a frame's seal.
pub fn associated_data(id: &ChunkId, plain_len: u32, flags: u8, level: u8) -> [u8; 40] {
    #[derive(IntoBytes, Immutable, Unaligned)]
    #[repr(C)]
    struct Raw {
        id: [u8; 32],
        plain_len: U32,
        flags: [u8; 4],
    }
    zerocopy::transmute!(Raw { id: id.0, plain_len: U32::new(plain_len), flags: [flags, level, 0, 0] })
}

/// The table and footer that follow the frames.
pub fn encode_end(frames: &[Frame], table_offset: u32, out: &mut Vec<u8>) {
    let start = out.len();
    for frame in frames {
        let raw = RawEntry {
            id: frame.id.0,
            offset: U32::new(frame.offset),
            stored_len: U32::new(frame.stored_len),
            plain_len: U32::new(frame.plain_len),
            flags: U32::from_bytes([frame.flags, frame.level, 0, 0]),
        };
        out.extend_from_slice(raw.as_bytes());
    }
    let table_crc32c = crc32c::crc32c(out.get(start..).unwrap_or_default());
    let mut raw = RawFooter {
        table_offset: U64::new(u64::from(table_offset)),
        frames: U32::new(u32::try_from(frames.len()).unwrap_or(u32::MAX)), // above MAX_FRAMES: refused when parsed back
        table_crc32c: U32::new(table_crc32c),
        incompat: U32::ZERO,
        crc32c: U32::ZERO,
        magic: FOOTER_MAGIC,
    };
    raw.crc32c = U32::new(checksum_before(raw.as_bytes(), 20));
    out.extend_from_slice(raw.as_bytes());
}

/// Header and frames of a whole pack; every check but its name and the frames themselves.
pub fn decode_pack(bytes: &[u8]) -> Result<(Header, Vec<Frame>), FormatError> {
    let header = Header::decode(bytes)?;
    let pack_len = bytes.len() as u64;
    let footer = Footer::decode(bytes, pack_len)?;
    let table = bytes
        .get(footer.table_offset as usize..)
        .and_then(|rest| rest.get(..footer.table_len() as usize))
        .ok_or(FormatError::Length { part: PART })?;
    let frames = footer.decode_table(table, &header)?;
    Ok((header, frames))
}

fn checksum_before(bytes: &[u8], end: usize) -> u32 {
    crc32c::crc32c(bytes.get(..end).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            kind: PackKind::Data,
            encryption: Encryption::Aes256Gcm,
            repository: RepositoryId([9; 16]),
            salt: [8; 32],
            gathered: false,
        }
    }

    fn frames() -> Vec<Frame> {
        let a = Frame { id: ChunkId([1; 32]), offset: 80, stored_len: 20, plain_len: 16384, flags: 1, level: 0 };
        let b = Frame { id: ChunkId([2; 32]), offset: 100, stored_len: 30, plain_len: 16384, flags: 0, level: 0 };
        vec![a, b]
    }

    fn pack() -> Vec<u8> {
        let mut bytes = header().encode().to_vec();
        bytes.extend([0xee; 50]);
        encode_end(&frames(), 130, &mut bytes);
        bytes
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let mut expected = Vec::from(*b"LBOATPK1\0\0\0\0\x01\x01\0\0");
        expected.extend([9; 16]);
        expected.extend([8; 32]);
        expected.extend([0; 12]);
        expected.extend(crc32c::crc32c(&expected).to_le_bytes());
        expected.extend([0xee; 50]);
        let mut table = Vec::from([1; 32]);
        table.extend([80, 0, 0, 0, 20, 0, 0, 0, 0, 0x40, 0, 0, 1, 0, 0, 0]);
        table.extend([2; 32]);
        table.extend([100, 0, 0, 0, 30, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0]);
        let mut footer = Vec::from([130, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
        footer.extend(crc32c::crc32c(&table).to_le_bytes());
        footer.extend([0; 4]);
        footer.extend(crc32c::crc32c(&footer).to_le_bytes());
        footer.extend(b"LBOATPF1");
        expected.extend(table);
        expected.extend(footer);
        assert_eq!(pack(), expected);
        assert_eq!(decode_pack(&pack()), Ok((header(), frames())));
    }

    proptest! {
        #[test]
        fn damage_outside_the_frames_is_noticed(at in 0usize..258, flip in 1u8..=255, cut in 0usize..258) {
            let mut bytes = pack();
            prop_assert_eq!(bytes.len(), 258);
            prop_assert!(decode_pack(&bytes[..cut]).is_err());
            bytes[at] ^= flip;
            prop_assert_eq!(decode_pack(&bytes).is_ok(), (80..130).contains(&at));
        }

        #[test]
        fn hostile_numbers_never_panic(offset: u64, count in 0u32..70_000, table in proptest::collection::vec(any::<u8>(), 0..300), crcs: bool) {
            let mut raw = RawFooter {
                table_offset: U64::new(offset), frames: U32::new(count), table_crc32c: U32::new(crc32c::crc32c(&table)),
                incompat: U32::ZERO, crc32c: U32::ZERO, magic: FOOTER_MAGIC,
            };
            if crcs { raw.crc32c = U32::new(checksum_before(raw.as_bytes(), 20)); }
            let end = offset.saturating_add(u64::from(count) * 48 + 32);
            if let Ok(footer) = Footer::decode(raw.as_bytes(), end) {
                prop_assert!(footer.decode_table(&table, &header()).is_err());
            }
            let _ = decode_pack(&table);
        }
    }
}
