//! Chunks: where logical addresses lie on the device.

use std::collections::BTreeMap;

use super::item;
use super::tree::Key;
use crate::bytes::{le, part};
use crate::fs::FsError;

/// Chunks of a file system: of 16 TiB in pieces of 16 MiB.
const CHUNKS_MAX: usize = 1 << 20;
/// Data that is spread over devices: RAID 0, 10, 5 and 6.
const SPREAD: u64 = 0x8 | 0x40 | 0x80 | 0x100;

/// A chunk of which this device has all.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    length: u64,
    /// Where it lies on this device, if it does.
    place: Option<u64>,
}

/// All chunks, by their logical address.
pub(super) struct Chunks {
    device: u64,
    map: BTreeMap<u64, Chunk>,
}

impl Chunks {
    pub(super) fn new(device: u64) -> Chunks {
        Chunks { device, map: BTreeMap::new() }
    }

    /// The chunks that the superblock has: keys and chunks in turn.
    pub(super) fn add_system(&mut self, bytes: &[u8]) -> Result<(), FsError> {
        let mut at = 0;
        while at + 17 + 80 <= bytes.len() {
            let key = Key::decode(part(bytes, at, 17));
            let chunk = part(bytes, at + 17, bytes.len());
            let length = 48 + 32 * usize::from(le::u16(chunk, 44));
            if key.kind != item::CHUNK || length > chunk.len() {
                return Err(FsError::damaged(&"the superblock", "its chunks make no sense"));
            }
            self.add(key.offset, part(chunk, 0, length))?;
            at += 17 + length;
        }
        Ok(())
    }

    pub(super) fn add(&mut self, start: u64, chunk: &[u8]) -> Result<(), FsError> {
        let (length, kind) = (le::u64(chunk, 0), le::u64(chunk, 24));
        if start.checked_add(length).is_none() || self.map.len() >= CHUNKS_MAX {
            return Err(FsError::damaged(&"the tree of chunks", "a chunk makes no sense"));
        }
        let mut stripes = part(chunk, 48, 32 * usize::from(le::u16(chunk, 44))).chunks_exact(32);
        let ours = stripes.find(|stripe| le::u64(stripe, 0) == self.device).map(|stripe| le::u64(stripe, 8));
        let place = if kind & SPREAD != 0 { None } else { ours };
        self.map.insert(start, Chunk { length, place });
        Ok(())
    }

    /// Where a logical address lies, and how many bytes follow there.
    pub(super) fn place(&self, object: &dyn std::fmt::Display, logical: u64) -> Result<(u64, u64), FsError> {
        let found = self.map.range(..=logical).next_back().filter(|(start, chunk)| logical - *start < chunk.length);
        let (start, chunk) = found.ok_or_else(|| FsError::damaged(object, "it points outside of all chunks"))?;
        let place = chunk
            .place
            .ok_or_else(|| FsError::unsupported(object, "it is spread over several devices, or lies on another one"))?;
        let offset =
            place.checked_add(logical - start).ok_or_else(|| FsError::damaged(object, "a chunk makes no sense"))?;
        Ok((offset, chunk.length - (logical - start)))
    }
}
