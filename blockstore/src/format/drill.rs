//! What a drill found: the envelope, and what is attached. Specification: docs/format/drill.md

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Encryption, FormatError, check_features, check_magic, head};
use crate::id::{DrillId, RecoveryPointId, RepositoryId};

/// First bytes of the object.
pub const MAGIC: [u8; 8] = *b"LBOATDR1";
/// Length of the header.
pub const HEADER_LEN: usize = 160;
/// No summary is longer.
pub const MAX_TEXT_LEN: u32 = 64 << 10;
/// No stored summary is longer: incompressible text grows a little.
pub const MAX_STORED_TEXT_LEN: u32 = MAX_TEXT_LEN + (4 << 10);
/// No attachments are longer.
pub const MAX_REST_LEN: u32 = 4 << 20;
/// No stored attachments are longer.
pub const MAX_STORED_REST_LEN: u32 = MAX_REST_LEN + (64 << 10);
/// No object is longer.
pub const MAX_LEN: u64 = HEADER_LEN as u64 + MAX_STORED_TEXT_LEN as u64 + MAX_STORED_REST_LEN as u64;
/// What header and summary have at the most.
pub const MAX_HEAD_LEN: u64 = HEADER_LEN as u64 + MAX_STORED_TEXT_LEN as u64;
const PART: &str = "the drill";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    incompat: U32,
    encryption: u8,
    reserved: [u8; 3],
    repository: [u8; 16],
    point: [u8; 32],
    time_unix_ms: U64,
    salt: [u8; 32],
    text_len: U32,
    rest_len: U32,
    stored_text_len: U32,
    stored_rest_len: U32,
    text_crc32c: U32,
    rest_crc32c: U32,
    reserved_end: [u8; 28],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// What stands around summary and attachments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// Whether both are sealed.
    pub encryption: Encryption,
    /// Whose drill it is.
    pub repository: RepositoryId,
    /// Its name.
    pub id: DrillId,
    /// Derives the key of the seals.
    pub salt: [u8; 32],
    /// Length of the summary's text.
    pub text_len: u32,
    /// Length of the attachments.
    pub rest_len: u32,
}

impl Envelope {
    fn raw(&self) -> RawHeader {
        RawHeader {
            magic: MAGIC,
            incompat: U32::ZERO,
            encryption: self.encryption.to_byte(),
            reserved: [0; 3],
            repository: self.repository.0,
            point: self.id.point.0,
            time_unix_ms: U64::new(self.id.time_unix_ms),
            salt: self.salt,
            text_len: U32::new(self.text_len),
            rest_len: U32::new(self.rest_len),
            stored_text_len: U32::ZERO,
            stored_rest_len: U32::ZERO,
            text_crc32c: U32::ZERO,
            rest_crc32c: U32::ZERO,
            reserved_end: [0; 28],
            crc32c: U32::ZERO,
        }
    }

    /// The seals' associated data.
    pub fn associated_data(&self) -> [u8; 112] {
        self.raw().as_bytes().first_chunk().copied().unwrap_or([0; 112])
    }

    /// The whole object around what is stored of summary and attachments.
    pub fn encode(&self, text: &[u8], rest: &[u8]) -> Vec<u8> {
        let len = |bytes: &[u8]| U32::new(u32::try_from(bytes.len()).unwrap_or(u32::MAX)); // refused when parsed back
        let mut raw = RawHeader {
            stored_text_len: len(text),
            stored_rest_len: len(rest),
            text_crc32c: U32::new(crc32c::crc32c(text)),
            rest_crc32c: U32::new(crc32c::crc32c(rest)),
            ..self.raw()
        };
        raw.crc32c = U32::new(raw.checksum());
        [raw.as_bytes(), text, rest].concat()
    }

    /// The envelope and the stored summary, of an object or of its beginning.
    pub fn decode_head(bytes: &[u8]) -> Result<(Envelope, &[u8]), FormatError> {
        let (raw, rest) = decode_header(bytes)?;
        let text = rest.get(..raw.stored_text_len.get() as usize).ok_or(FormatError::Length { part: PART })?;
        if crc32c::crc32c(text) != raw.text_crc32c.get() {
            return Err(FormatError::Checksum { part: "the drill's summary" });
        }
        Ok((raw.envelope()?, text))
    }

    /// The envelope, the stored summary and the stored attachments of an object.
    pub fn decode(bytes: &[u8]) -> Result<(Envelope, &[u8], &[u8]), FormatError> {
        let (raw, _) = decode_header(bytes)?;
        let (envelope, text) = Envelope::decode_head(bytes)?;
        let rest = bytes.get(HEADER_LEN + text.len()..).unwrap_or_default();
        if rest.len() != raw.stored_rest_len.get() as usize {
            return Err(FormatError::Length { part: PART });
        }
        if crc32c::crc32c(rest) != raw.rest_crc32c.get() {
            return Err(FormatError::Checksum { part: "what the drill attached" });
        }
        Ok((envelope, text, rest))
    }
}

fn decode_header(bytes: &[u8]) -> Result<(&RawHeader, &[u8]), FormatError> {
    let raw: &RawHeader = head(bytes, PART)?;
    check_magic(&raw.magic, &MAGIC, PART)?;
    if raw.checksum() != raw.crc32c.get() {
        return Err(FormatError::Checksum { part: "the drill's header" });
    }
    check_features(raw.incompat.get(), 0, PART)?;
    let short = raw.text_len.get() <= MAX_TEXT_LEN
        && raw.rest_len.get() <= MAX_REST_LEN
        && raw.stored_text_len.get() <= MAX_STORED_TEXT_LEN
        && raw.stored_rest_len.get() <= MAX_STORED_REST_LEN;
    if !short {
        return Err(FormatError::Field { field: "length of the drill" });
    }
    Ok((raw, bytes.get(HEADER_LEN..).unwrap_or_default()))
}

impl RawHeader {
    fn checksum(&self) -> u32 {
        let covered = self.as_bytes().split_last_chunk::<4>().map_or(&[][..], |(covered, _)| covered);
        crc32c::crc32c(covered)
    }

    fn envelope(&self) -> Result<Envelope, FormatError> {
        Ok(Envelope {
            encryption: Encryption::from_byte(self.encryption)?,
            repository: RepositoryId(self.repository),
            id: DrillId { point: RecoveryPointId(self.point), time_unix_ms: self.time_unix_ms.get() },
            salt: self.salt,
            text_len: self.text_len.get(),
            rest_len: self.rest_len.get(),
        })
    }
}

/// What is attached to a drill's summary.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attachments {
    /// What the guest wrote to its first serial port.
    pub console: Vec<u8>,
    /// A PNG file, or nothing.
    pub screenshot: Vec<u8>,
    /// What the guest read.
    pub trace: BootTrace,
}

/// Which chunks a guest touched, in the order of the first touch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BootTrace {
    /// For each disk that was touched.
    pub disks: Vec<TracedDisk>,
}

/// The chunks of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracedDisk {
    /// The disk's name.
    pub disk: String,
    /// Numbers of chunks, none of them twice.
    pub chunks: Vec<u64>,
}

/// Longest console log.
pub const MAX_CONSOLE_LEN: usize = 256 << 10;
/// Longest screenshot.
pub const MAX_SCREENSHOT_LEN: usize = 2 << 20;
/// Most chunks of a trace.
pub const MAX_TRACE_CHUNKS: usize = 1 << 16;
/// Most disks of a trace.
const MAX_TRACE_DISKS: u32 = 1024;
/// Chunk numbers are below this.
const CHUNKS_MAX: u64 = 1 << 48;

const ATTACHED: FormatError = FormatError::Length { part: "what the drill attached" };
const TRACE: FormatError = FormatError::Field { field: "the boot trace" };

impl Attachments {
    /// The bytes. What has no room is refused when they are parsed back.
    pub fn encode(&self) -> Vec<u8> {
        let trace = self.trace.encode();
        let mut bytes = Vec::new();
        for part in [&self.console, &self.screenshot, &trace] {
            bytes.extend(u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
        }
        bytes.extend([&self.console[..], &self.screenshot, &trace].concat());
        bytes
    }

    /// From the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Attachments, FormatError> {
        let mut reader = Reader(bytes);
        let [console, screenshot, trace] = [reader.u32()?, reader.u32()?, reader.u32()?].map(|len| len as usize);
        if console > MAX_CONSOLE_LEN || screenshot > MAX_SCREENSHOT_LEN {
            return Err(FormatError::Field { field: "length of what the drill attached" });
        }
        let attached = Attachments {
            console: reader.bytes(console)?.to_vec(),
            screenshot: reader.bytes(screenshot)?.to_vec(),
            trace: BootTrace::decode(reader.bytes(trace)?)?,
        };
        if reader.0.is_empty() { Ok(attached) } else { Err(ATTACHED) }
    }
}

impl BootTrace {
    /// Chunks of all disks.
    pub fn chunks(&self) -> usize {
        self.disks.iter().map(|disk| disk.chunks.len()).sum()
    }

    fn encode(&self) -> Vec<u8> {
        if self.disks.is_empty() {
            return Vec::new();
        }
        let len = |len: usize| u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes();
        let mut bytes = len(self.disks.len()).to_vec();
        for TracedDisk { disk, chunks } in &self.disks {
            bytes.extend(u16::try_from(disk.len()).unwrap_or(u16::MAX).to_le_bytes());
            bytes.extend(len(chunks.len()));
            bytes.extend(disk.as_bytes());
            let mut last = 0_u64;
            for chunk in chunks {
                let step = chunk.wrapping_sub(last).cast_signed();
                put_varint(&mut bytes, (step << 1 ^ step >> 63).cast_unsigned());
                last = *chunk;
            }
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<BootTrace, FormatError> {
        if bytes.is_empty() {
            return Ok(BootTrace::default());
        }
        let mut reader = Reader(bytes);
        let disks = reader.u32()?;
        if disks == 0 || disks > MAX_TRACE_DISKS {
            return Err(TRACE);
        }
        let mut trace = BootTrace::default();
        let mut left = MAX_TRACE_CHUNKS;
        for _ in 0..disks {
            let (name, count) = (reader.u16()?, reader.u32()? as usize);
            let name = std::str::from_utf8(reader.bytes(name.into())?).map_err(|_| TRACE)?;
            left = left.checked_sub(count).ok_or(TRACE)?;
            if !crate::point::is_disk_name(name) || trace.disks.iter().any(|disk| disk.disk == name) {
                return Err(TRACE);
            }
            let mut seen = std::collections::HashSet::new();
            let (mut chunks, mut last) = (Vec::new(), 0_u64);
            for _ in 0..count {
                let coded = reader.varint()?;
                let step = (coded >> 1).cast_signed() ^ -((coded & 1).cast_signed());
                last = last.checked_add_signed(step).filter(|chunk| *chunk < CHUNKS_MAX).ok_or(TRACE)?;
                if !seen.insert(last) {
                    return Err(TRACE);
                }
                chunks.push(last);
            }
            trace.disks.push(TracedDisk { disk: name.to_owned(), chunks });
        }
        if reader.0.is_empty() { Ok(trace) } else { Err(TRACE) }
    }
}

fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = value.to_le_bytes()[0] & 0x7f;
        value >>= 7;
        if value == 0 {
            return bytes.push(low);
        }
        bytes.push(low | 0x80);
    }
}

/// Takes fields off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(ATTACHED)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(ATTACHED)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    fn varint(&mut self) -> Result<u64, FormatError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(TRACE);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(TRACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Envelope {
        Envelope {
            encryption: Encryption::None,
            repository: RepositoryId([1; 16]),
            id: DrillId { point: RecoveryPointId([2; 32]), time_unix_ms: 0x0123 },
            salt: [3; 32],
            text_len: 300,
            rest_len: 400,
        }
    }

    fn traced(disk: &str, chunks: &[u64]) -> TracedDisk {
        TracedDisk { disk: disk.to_owned(), chunks: chunks.to_vec() }
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let mut expected = Vec::from(*b"LBOATDR1\0\0\0\0\0\0\0\0");
        expected.extend([1; 16]);
        expected.extend([2; 32]);
        expected.extend([0x23, 1, 0, 0, 0, 0, 0, 0]);
        expected.extend([3; 32]);
        expected.extend([0x2c, 1, 0, 0, 0x90, 1, 0, 0]);
        assert_eq!(sample().associated_data(), expected[..112]);
        expected.extend([4, 0, 0, 0, 2, 0, 0, 0]);
        expected.extend(crc32c::crc32c(b"text").to_le_bytes());
        expected.extend(crc32c::crc32c(b"at").to_le_bytes());
        expected.extend([0; 28]);
        expected.extend(crc32c::crc32c(&expected).to_le_bytes());
        expected.extend(b"textat");
        assert_eq!(sample().encode(b"text", b"at"), expected);
        assert_eq!(Envelope::decode(&expected), Ok((sample(), &b"text"[..], &b"at"[..])));
        assert_eq!(Envelope::decode_head(&expected[..164]), Ok((sample(), &b"text"[..])));
    }

    #[test]
    fn the_attachments_are_the_documented_ones() {
        let trace = BootTrace { disks: vec![traced("a", &[3, 2, 130]), traced("bc", &[])] };
        let attached = Attachments { console: b"hello".to_vec(), screenshot: b"png".to_vec(), trace };
        let mut expected = vec![5, 0, 0, 0, 3, 0, 0, 0, 23, 0, 0, 0];
        expected.extend(b"hellopng");
        expected.extend([2, 0, 0, 0]);
        expected.extend([1, 0, 3, 0, 0, 0, b'a', 6, 1, 0x80, 2]);
        expected.extend([2, 0, 0, 0, 0, 0, b'b', b'c']);
        assert_eq!(attached.encode(), expected);
        assert_eq!(Attachments::decode(&expected), Ok(attached));
        assert_eq!(Attachments::decode(&Attachments::default().encode()), Ok(Attachments::default()));
    }

    #[test]
    fn a_trace_that_names_a_chunk_or_a_disk_twice_or_too_much_is_refused() {
        let decoded = |disks| BootTrace::decode(&BootTrace { disks }.encode());
        assert_eq!(decoded(vec![traced("a", &[1, 1])]), Err(TRACE));
        assert_eq!(decoded(vec![traced("a", &[1]), traced("a", &[2])]), Err(TRACE));
        assert_eq!(decoded(vec![traced("", &[1])]), Err(TRACE));
        assert_eq!(decoded(vec![traced("a", &[CHUNKS_MAX])]), Err(TRACE));
        assert!(decoded(vec![traced("a", &[CHUNKS_MAX - 1, 0])]).is_ok());
        let many: Vec<u64> = (0..MAX_TRACE_CHUNKS as u64).collect();
        assert!(decoded(vec![traced("a", &many)]).is_ok());
        assert_eq!(decoded(vec![traced("a", &many), traced("b", &[1])]), Err(TRACE));
    }

    proptest! {
        #[test]
        fn every_damage_is_noticed(at in 0usize..166, flip in 1u8..=255, cut in 0usize..166) {
            let mut bytes = sample().encode(b"text", b"at");
            prop_assert!(Envelope::decode(&bytes[..cut]).is_err());
            bytes[at] ^= flip;
            prop_assert!(Envelope::decode(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Envelope::decode(&bytes);
            let _ = Attachments::decode(&bytes);
            let _ = BootTrace::decode(&bytes);
        }

        #[test]
        fn every_trace_reads_back(chunks in proptest::collection::hash_set(0u64..CHUNKS_MAX, 0..50)) {
            let trace = BootTrace { disks: vec![traced("disk0", &chunks.into_iter().collect::<Vec<_>>())] };
            prop_assert_eq!(BootTrace::decode(&trace.encode()), Ok(trace));
        }
    }
}
