//! Makes checksums good again that a mutation has broken. Layouts: docs/format/

use std::ops::Range;

/// Writes the CRC-32C of `covered` at `at`; does nothing where the bytes are too short for it.
pub fn crc(bytes: &mut [u8], covered: Range<usize>, at: usize) {
    if let Some(covered) = bytes.get(covered) {
        let sum = crc32c::crc32c(covered).to_le_bytes();
        put(bytes, at, &sum);
    }
}

/// Writes `value` at `at`; does nothing where the bytes are too short for it.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = at.checked_add(value.len()).and_then(|end| bytes.get_mut(at..end)) {
        place.copy_from_slice(value);
    }
}

/// The little-endian number of four bytes at `at`; 0 past the end.
pub fn number(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    found.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// A pack: header, table, footer.
pub fn pack(bytes: &mut [u8]) {
    crc(bytes, 0..76, 76);
    let Some(footer) = bytes.len().checked_sub(32) else { return };
    let table = number(bytes, footer) as usize;
    crc(bytes, table..footer, footer + 12);
    crc(bytes, footer..footer + 20, footer + 20);
}

/// An index run: pack rows, header, footer.
pub fn index_run(bytes: &mut [u8]) {
    let rows = number(bytes, 12) as usize;
    let end = rows.saturating_mul(80).saturating_add(64);
    crc(bytes, 64..end, 40);
    crc(bytes, 0..60, 60);
    let Some(footer) = bytes.len().checked_sub(32) else { return };
    let header: Vec<u8> = bytes.iter().take(64).copied().collect();
    for (from, to, length) in [(32, 0, 8), (12, 8, 4), (60, 12, 4)] {
        if let Some(field) = header.get(from..from + length) {
            put(bytes, footer + to, field);
        }
    }
    crc(bytes, footer..footer + 20, footer + 20);
}

/// The envelope of a recovery point.
pub fn point(bytes: &mut [u8]) {
    let payload = bytes.len().saturating_sub(96);
    put(bytes, 68, &u32::try_from(payload).unwrap_or(u32::MAX).to_le_bytes());
    let length = bytes.len();
    crc(bytes, 96.min(length)..length, 72);
    crc(bytes, 0..92, 92);
}

/// A note: the length and checksum of its text, and the header's.
pub fn note(bytes: &mut [u8]) {
    let text = bytes.len().saturating_sub(64);
    put(bytes, 12, &u32::try_from(text).unwrap_or(u32::MAX).to_le_bytes());
    let length = bytes.len();
    crc(bytes, 64.min(length)..length, 32);
    crc(bytes, 0..60, 60);
}

/// A drill: checksums of its two parts, as long as the header says the first is, and the header's.
pub fn drill(bytes: &mut [u8]) {
    let length = bytes.len();
    let middle = (number(bytes, 112) as usize).saturating_add(160).min(length);
    put(bytes, 116, &u32::try_from(length - middle.max(160).min(length)).unwrap_or(u32::MAX).to_le_bytes());
    crc(bytes, 160.min(length)..middle.max(160.min(length)), 120);
    crc(bytes, middle..length, 124);
    crc(bytes, 0..156, 156);
}

/// An overlay's journal: its header, and every batch up to one whose length makes no sense. With `order`, each batch also
/// gets the number and the predecessor that its place asks for.
pub fn journal(bytes: &mut [u8], order: bool) {
    put(bytes, 12, &[0; 4]);
    crc(bytes, 0..4096, 12);
    let header = number(bytes, 12);
    let (mut at, mut previous, mut sequence) = (4096, header, 1_u64);
    while bytes.len() > at + 32 {
        let records = number(bytes, at + 24) as usize;
        let length = records.saturating_mul(16).saturating_add(32).saturating_add(511) / 512 * 512;
        let Some(end) = at.checked_add(length).filter(|end| *end <= bytes.len()) else { return };
        if order {
            put(bytes, at, b"LBJB");
            put(bytes, at + 8, &sequence.to_le_bytes());
            put(bytes, at + 28, &previous.to_le_bytes());
        }
        let sum = bytes.get(at + 8..end).unwrap_or_default();
        let sum = crc32c::crc32c_append(crc32c::crc32c(&header.to_le_bytes()), sum);
        put(bytes, at + 4, &sum.to_le_bytes());
        (at, previous, sequence) = (end, sum, sequence + 1);
    }
}

/// A file of an overlay's recent changes: magic, boot id, header and entries.
pub fn recent(bytes: &mut [u8], boot: &[u8; 16]) {
    put(bytes, 0, b"LBOATOR1");
    put(bytes, 8, boot);
    crc(bytes, 0..32, 32);
    let header = crc32c::crc32c(&number(bytes, 32).to_le_bytes());
    for entry in bytes.get_mut(64..).unwrap_or_default().chunks_exact_mut(20) {
        let sum = crc32c::crc32c_append(header, entry.get(..16).unwrap_or_default());
        put(entry, 16, &sum.to_le_bytes());
    }
}
