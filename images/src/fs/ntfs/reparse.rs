//! Reparse points: symbolic links and junctions, and content that something else than NTFS stores. Layout: [MS-FSCC],
//! section 2.1.2.

use crate::bytes::{le, part, utf16_le};

/// Longest reparse point.
pub(super) const LENGTH_MAX: u64 = 16 << 10;

/// What a reparse point is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reparse {
    /// A link.
    Link(Vec<u8>),
    /// Content that is elsewhere.
    Other(&'static str),
    /// Something that leaves the content alone.
    Plain,
}

pub(super) fn decode(bytes: &[u8]) -> Reparse {
    let data = part(bytes, 8, usize::from(le::u16(bytes, 4)));
    // Two names: the one that is followed, and the one that is shown.
    let link = |names_at: usize| {
        let name =
            |at: usize| utf16_le(part(data, names_at + usize::from(le::u16(data, at)), le::u16(data, at + 2).into()));
        let (followed, shown) = (name(0), name(4));
        let name = if shown.is_empty() { followed.trim_start_matches("\\??\\").to_owned() } else { shown };
        Reparse::Link(name.replace('\\', "/").into_bytes())
    };
    match le::u32(bytes, 0) {
        0xa000_000c => link(12),
        0xa000_0003 => link(8),
        // The Windows Subsystem for Linux.
        0xa000_001d => Reparse::Link(part(data, 4, data.len()).to_vec()),
        0x8000_0017 => Reparse::Other("it is compressed by Windows' overlay filter (CompactOS)"),
        0x8000_0013 => Reparse::Other("it is stored by Windows' data deduplication"),
        tag if tag & 0xffff_0fff == 0x9000_001a => Reparse::Other("it is a placeholder whose content is in a cloud"),
        _ => Reparse::Plain,
    }
}
