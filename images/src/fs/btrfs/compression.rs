//! Compressed extents.

use std::io::Read;

use crate::bytes::{le, part, size};

/// The content of a compressed extent, `length` bytes; what it does not fill is zeroes.
pub(super) fn decompress(kind: u8, stored: &[u8], length: usize, sector: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; length];
    match kind {
        1 => zlib(stored, &mut out)?,
        2 => lzo(stored, &mut out, sector)?,
        3 => zstd(stored, &mut out)?,
        _ => return None,
    }
    Some(out)
}

fn zlib(stored: &[u8], out: &mut [u8]) -> Option<()> {
    use miniz_oxide::inflate::TINFLStatus;
    use miniz_oxide::inflate::core::inflate_flags::{
        TINFL_FLAG_PARSE_ZLIB_HEADER, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
    };
    use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
    let flags = TINFL_FLAG_PARSE_ZLIB_HEADER | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    // The stored sectors may go on behind the stream's end, and the stream behind what is wanted.
    let (status, _, _) = decompress(&mut Box::<DecompressorOxide>::default(), stored, out, 0, flags);
    matches!(status, TINFLStatus::Done | TINFLStatus::HasMoreOutput).then_some(())
}

fn zstd(stored: &[u8], out: &mut [u8]) -> Option<()> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(stored).ok()?.single_frame();
    let mut filled = 0;
    while filled < out.len() {
        match decoder.read(out.get_mut(filled..)?).ok()? {
            0 => break,
            length => filled += length,
        }
    }
    Some(())
}

/// The length of all, then segments of a sector of content, each with its length, which never lies across two sectors.
fn lzo(stored: &[u8], out: &mut [u8], sector: usize) -> Option<()> {
    let end = size(le::u32(stored, 0).into()).min(stored.len());
    let (mut at, mut filled) = (4, 0);
    while at + 4 <= end && filled < out.len() {
        let left = sector - at % sector;
        if left < 4 {
            at += left;
            continue;
        }
        let length = size(le::u32(stored, at).into());
        let segment = part(stored, at + 4, length);
        if segment.len() != length {
            return None;
        }
        let mut plain = vec![0; sector];
        let written = lzokay::decompress::decompress(segment, &mut plain).ok()?;
        let room = out.get_mut(filled..)?;
        let count = written.min(room.len());
        room.get_mut(..count)?.copy_from_slice(plain.get(..count)?);
        filled += count;
        at += 4 + length;
    }
    Some(())
}
