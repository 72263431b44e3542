//! Journal of an overlay: header, batches, records. Specification: docs/format/overlay.md

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::{Damage, OverlayIdentity};
use super::map::State;

/// Unit of copy-on-write.
pub(super) const GRAIN: u64 = 4096;
/// Names the layout.
pub(super) const MAGIC: [u8; 8] = *b"LBOATOJ1";
pub(super) const BATCH_MAGIC: [u8; 4] = *b"LBJB";
pub(super) const HEADER_LEN: usize = 4096;
/// Batches are padded to it.
pub(super) const SECTOR: usize = 512;
pub(super) const MAX_NAME_LEN: usize = 1024;
/// Bounds a batch to 1 MiB and a sector.
pub(super) const MAX_RECORDS: usize = 65_536;
/// 8 EiB less one grain: offsets stay far from overflow.
pub(super) const MAX_SIZE: u64 = i64::MAX as u64 - GRAIN;
pub(super) const BATCH_HEADER_LEN: usize = size_of::<RawBatch>();
const NAME_OFFSET: usize = size_of::<RawHeader>();

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    incompat: U32,
    crc32c: U32,
    generation: U64,
    size: U64,
    grain: U32,
    name_len: U32,
    point: [u8; 32],
    reserved: [u8; 56],
}
const _: () = assert!(size_of::<RawHeader>() == 128);

/// A batch's own header; see [`Batch`].
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBatch {
    magic: [u8; 4],
    crc32c: U32,
    sequence: U64,
    flush_start: U64,
    count: U32,
    previous: U32,
}
const _: () = assert!(size_of::<RawBatch>() == 32);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRecord {
    start: U64,
    count: U32,
    state: U32,
}
const _: () = assert!(size_of::<RawRecord>() == 16);

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) generation: u64,
    pub(super) identity: OverlayIdentity,
}

/// Why a header is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    Damaged(Damage),
    Unsupported { bits: u32 },
}

impl Header {
    /// The bytes of the header and their checksum. The identity was checked by [`fits`].
    pub(super) fn encode(&self) -> (Vec<u8>, u32) {
        let name = self.identity.disk.as_bytes();
        let mut raw = RawHeader {
            magic: MAGIC,
            incompat: U32::ZERO,
            crc32c: U32::ZERO,
            generation: self.generation.into(),
            size: self.identity.size.into(),
            grain: U32::new(4096),
            name_len: U32::new(u32::try_from(name.len()).unwrap_or(u32::MAX)),
            point: self.identity.point,
            reserved: [0; 56],
        };
        let mut bytes = [raw.as_bytes(), name].concat();
        bytes.resize(HEADER_LEN, 0);
        let crc = crc32c::crc32c(&bytes);
        raw.crc32c = crc.into();
        bytes[..NAME_OFFSET].copy_from_slice(raw.as_bytes());
        (bytes, crc)
    }

    /// The only way from bytes to a header.
    pub(super) fn decode(bytes: &[u8]) -> Result<(Header, u32), HeaderError> {
        let damaged = |damage| Err(HeaderError::Damaged(damage));
        let Some(bytes) = bytes.get(..HEADER_LEN) else { return damaged(Damage::TooShort) };
        let Ok((raw, rest)) = RawHeader::ref_from_prefix(bytes) else { return damaged(Damage::TooShort) };
        if raw.magic != MAGIC {
            return damaged(Damage::Magic);
        }
        let crc = raw.crc32c.get();
        let mut zeroed = bytes.to_vec();
        zeroed[12..16].fill(0);
        if crc32c::crc32c(&zeroed) != crc {
            return damaged(Damage::Checksum);
        }
        if raw.incompat != U32::ZERO {
            return Err(HeaderError::Unsupported { bits: raw.incompat.get() });
        }
        let name = usize::try_from(raw.name_len.get()).ok().filter(|len| *len <= MAX_NAME_LEN);
        let name = name.and_then(|len| rest.get(..len)).and_then(|name| str::from_utf8(name).ok());
        let size = raw.size.get();
        match name {
            Some(name) if u64::from(raw.grain.get()) == GRAIN && size <= MAX_SIZE => {
                let identity = OverlayIdentity { point: raw.point, disk: name.to_owned(), size };
                Ok((Header { generation: raw.generation.get(), identity }, crc))
            }
            _ => damaged(Damage::Field),
        }
    }
}

/// Whether an identity can be stored.
pub(super) fn fits(identity: &OverlayIdentity) -> bool {
    identity.disk.len() <= MAX_NAME_LEN && identity.size <= MAX_SIZE
}

/// Grains `start..start + count` are in `state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) start: u64,
    pub(super) count: u32,
    pub(super) state: State,
}

/// What a batch says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) sequence: u64,
    pub(super) flush_start: u64,
    pub(super) previous: u32,
    pub(super) crc: u32,
}

/// Length of a batch of `count` records.
pub(super) fn batch_len(count: usize) -> usize {
    (BATCH_HEADER_LEN + count * size_of::<RawRecord>()).next_multiple_of(SECTOR)
}

fn batch_crc(header_crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header_crc.to_le_bytes()), bytes)
}

/// Appends a batch to `out` and returns its checksum. `batch.crc` is not looked at.
pub(super) fn encode_batch(out: &mut Vec<u8>, header_crc: u32, batch: Batch, records: &[Record]) -> u32 {
    let start = out.len();
    let mut raw = RawBatch {
        magic: BATCH_MAGIC,
        crc32c: U32::ZERO,
        sequence: batch.sequence.into(),
        flush_start: batch.flush_start.into(),
        count: U32::new(u32::try_from(records.len()).unwrap_or(u32::MAX)),
        previous: batch.previous.into(),
    };
    out.extend_from_slice(raw.as_bytes());
    for record in records {
        let state = U32::new(match record.state {
            State::Base => 0, // never journalled; a reader would call it damage
            State::Data => 1,
            State::Zero => 2,
        });
        out.extend_from_slice(RawRecord { start: record.start.into(), count: record.count.into(), state }.as_bytes());
    }
    out.resize(start + batch_len(records.len()), 0);
    let crc = batch_crc(header_crc, &out[start + 8..]);
    raw.crc32c = crc.into();
    out[start..start + BATCH_HEADER_LEN].copy_from_slice(raw.as_bytes());
    crc
}

/// The length a batch claims, from its first [`BATCH_HEADER_LEN`] bytes; `None` where no batch begins.
pub(super) fn claimed_len(bytes: &[u8]) -> Option<usize> {
    let (raw, _) = RawBatch::ref_from_prefix(bytes).ok()?;
    let count = usize::try_from(raw.count.get()).ok()?;
    (raw.magic == BATCH_MAGIC && (1..=MAX_RECORDS).contains(&count)).then(|| batch_len(count))
}

/// Checks a batch of the length that [`claimed_len`] gave, but not its place in the journal.
pub(super) fn decode_batch(bytes: &[u8], header_crc: u32) -> Option<Batch> {
    let (raw, _) = RawBatch::ref_from_prefix(bytes).ok()?;
    if claimed_len(bytes) != Some(bytes.len()) || batch_crc(header_crc, bytes.get(8..)?) != raw.crc32c.get() {
        return None;
    }
    Some(Batch {
        sequence: raw.sequence.get(),
        flush_start: raw.flush_start.get(),
        previous: raw.previous.get(),
        crc: raw.crc32c.get(),
    })
}

/// The records of a checked batch; `None` stands for one that makes no sense on a disk of `grains`.
pub(super) fn records(bytes: &[u8], grains: u64) -> impl Iterator<Item = Option<Record>> {
    let raw = RawBatch::ref_from_prefix(bytes).ok();
    let count = raw.and_then(|(raw, _)| usize::try_from(raw.count.get()).ok()).unwrap_or(0);
    let records = raw.map(|(_, rest)| rest).unwrap_or_default();
    records.chunks_exact(size_of::<RawRecord>()).take(count).map(move |bytes| {
        let raw = RawRecord::ref_from_bytes(bytes).ok()?;
        let state = match raw.state.get() {
            1 => State::Data,
            2 => State::Zero,
            _ => return None,
        };
        let (start, count) = (raw.start.get(), raw.count.get());
        let inside = start.checked_add(u64::from(count)).is_some_and(|end| end <= grains);
        (inside && count > 0).then_some(Record { start, count, state })
    })
}
