//! Compressed content: units of clusters, each stored as it is, not at all, or compressed by LZNT1 in fewer clusters.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::bytes::{le, part, size, u8};
use crate::fs::{FsError, NodeId};
use crate::{DiskImage, SharedDisk};

/// Largest unit: 16 clusters of 4 KiB in all that Windows makes.
const UNIT_MAX: u64 = 1 << 20;

/// A run of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub first: u64,
    pub count: u64,
    pub cluster: Option<u64>,
}

/// Compressed content.
pub(super) struct Compressed {
    disk: SharedDisk,
    id: NodeId,
    cluster: u64,
    unit: u64,
    extents: Vec<Extent>,
    length: u64,
    written: u64,
    /// The unit that was read last: reads come in order.
    last: Mutex<Option<(u64, Vec<u8>)>>,
}

impl Compressed {
    pub(super) fn new(
        disk: SharedDisk,
        id: NodeId,
        cluster: u64,
        unit: u8,
        extents: Vec<Extent>,
        (length, written): (u64, u64),
    ) -> Result<Compressed, FsError> {
        let unit = 1_u64.checked_shl(unit.into()).filter(|unit| *unit * cluster <= UNIT_MAX);
        let unit = unit.ok_or_else(|| FsError::damaged(&id, "it is compressed in units that make no sense"))?;
        Ok(Compressed { disk, id, cluster, unit, extents, length, written, last: Mutex::new(None) })
    }

    /// The clusters that a unit is stored in, in pieces.
    fn stored(&self, unit: u64) -> Vec<(u64, u64)> {
        let (first, end) = (unit * self.unit, (unit + 1) * self.unit);
        let at = self.extents.partition_point(|extent| extent.first + extent.count <= first);
        let mut found = Vec::new();
        for extent in self.extents.get(at..).unwrap_or_default().iter().take_while(|extent| extent.first < end) {
            let (from, to) = (extent.first.max(first), (extent.first + extent.count).min(end));
            if let Some(cluster) = extent.cluster {
                found.push((cluster + (from - extent.first), to - from));
            }
        }
        found
    }

    fn read_unit(&self, unit: u64) -> io::Result<Vec<u8>> {
        let stored = self.stored(unit);
        let clusters: u64 = stored.iter().map(|(_, count)| count).sum();
        let mut bytes = vec![0; size(clusters * self.cluster)];
        let mut rest = bytes.as_mut_slice();
        for (cluster, count) in stored {
            let (part, left) = std::mem::take(&mut rest).split_at_mut(size(count * self.cluster));
            let offset = cluster.checked_mul(self.cluster).ok_or(io::ErrorKind::InvalidData)?;
            crate::fs::read(self.disk.as_ref(), &self.id, offset, part)?;
            rest = left;
        }
        let whole = size(self.unit * self.cluster);
        if clusters == 0 || clusters == self.unit {
            bytes.resize(whole, 0);
            return Ok(bytes);
        }
        decompress(&bytes, whole)
            .ok_or_else(|| FsError::damaged(&self.id, "its compressed content makes no sense").into())
    }
}

impl DiskImage for Compressed {
    fn size(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.length) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the end"));
        }
        let whole = self.unit * self.cluster;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let unit = at / whole;
            let length = size((whole - at % whole).min(rest.len() as u64));
            let (out, left) = std::mem::take(&mut rest).split_at_mut(length);
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.as_ref().is_none_or(|(known, _)| *known != unit) {
                *last = Some((unit, self.read_unit(unit)?));
            }
            let found = last.as_ref().map_or(&[][..], |(_, bytes)| part(bytes, size(at % whole), length));
            out.copy_from_slice(found);
            // What was never written reads as zeroes.
            let valid = size(self.written.saturating_sub(at).min(length as u64));
            out.get_mut(valid..).unwrap_or_default().fill(0);
            at += length as u64;
            rest = left;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let whole = self.unit * self.cluster;
        let at = self.extents.partition_point(|extent| (extent.first + extent.count) * self.cluster <= offset);
        for extent in self.extents.get(at..).unwrap_or_default() {
            if extent.cluster.is_none() {
                continue;
            }
            // The unit around it has data, if only a part of it is stored.
            let start = (extent.first * self.cluster / whole * whole).max(offset);
            let end = ((extent.first + extent.count) * self.cluster).next_multiple_of(whole).min(self.length);
            return Ok((start < end).then_some(start..end));
        }
        Ok(None)
    }
}

/// LZNT1: chunks of up to 4096 bytes, of letters and of references to what came before in the chunk.
fn decompress(bytes: &[u8], whole: usize) -> Option<Vec<u8>> {
    const CHUNK: usize = 4096;
    let mut out = Vec::with_capacity(whole);
    let mut at = 0;
    while at + 2 <= bytes.len() && out.len() < whole {
        let header = usize::from(le::u16(bytes, at));
        if header == 0 {
            break;
        }
        let length = (header & 0xfff) + 1;
        let chunk = part(bytes, at + 2, length);
        if chunk.len() != length {
            return None;
        }
        at += 2 + length;
        // A chunk that was not full is followed by zeroes.
        out.resize(out.len().next_multiple_of(CHUNK), 0);
        let start = out.len();
        if header & 0x8000 == 0 {
            out.extend_from_slice(chunk);
        } else {
            let mut next = 0;
            while next < chunk.len() {
                let flags = u8(chunk, next);
                next += 1;
                for bit in 0..8 {
                    if next >= chunk.len() {
                        break;
                    }
                    if flags & 1 << bit == 0 {
                        out.push(u8(chunk, next));
                        next += 1;
                        continue;
                    }
                    let token = usize::from(le::u16(chunk, next));
                    next += 2;
                    // The farther into the chunk, the more bits tell the distance and the fewer the length.
                    let done = out.len() - start;
                    let bits = usize::BITS - done.checked_sub(1)?.leading_zeros();
                    let shift = 16 - bits.max(4);
                    let (distance, count) = ((token >> shift) + 1, (token & ((1 << shift) - 1)) + 3);
                    if distance > done || done + count > CHUNK {
                        return None;
                    }
                    for _ in 0..count {
                        out.push(*out.get(out.len() - distance)?);
                    }
                }
            }
        }
        if out.len() - start > CHUNK {
            return None;
        }
    }
    out.resize(whole, 0);
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_s_example_is_read() {
        // [MS-XCA] 3.2: "F# F# G A A G F# E D ..." is stored as this.
        let stored = [
            0x38, 0xb0, 0x88, 0x46, 0x23, 0x20, 0x00, 0x20, 0x47, 0x20, 0x41, 0x00, 0x10, 0xa2, 0x47, 0x01, 0xa0, 0x45,
            0x20, 0x44, 0x00, 0x08, 0x45, 0x01, 0x50, 0x79, 0x00, 0xc0, 0x45, 0x20, 0x05, 0x24, 0x13, 0x88, 0x05, 0xb4,
            0x02, 0x4a, 0x44, 0xef, 0x03, 0x58, 0x02, 0x8c, 0x09, 0x16, 0x01, 0x48, 0x45, 0x00, 0xbe, 0x00, 0x9e, 0x00,
            0x04, 0x01, 0x18, 0x90, 0x00,
        ];
        let plain = b"F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E F# G F# D E F# G F# E D E A F# F# G A A G F# E D D E F# E D D\0";
        let read = decompress(&stored, 4096).unwrap();
        assert_eq!(&read[..plain.len()], plain);
        for cut in 0..stored.len() {
            decompress(&stored[..cut], 4096);
        }
    }
}
