//! The content of an attribute from its lists of runs.

use super::attribute::{Attribute, Value};
use super::compressed::{Compressed, Extent};
use super::record::Boot;
use crate::bytes::u8;
use crate::fs::{FsError, NodeId};
use crate::mapped::{Inline, Runs};
use crate::{DiskImage, SharedDisk};

/// Runs of one attribute.
const RUNS_MAX: usize = 4 << 20;

/// The content of an attribute whose parts these are.
pub(super) fn content(
    disk: &SharedDisk,
    boot: &Boot,
    id: NodeId,
    parts: &[&Attribute],
) -> Result<Box<dyn DiskImage>, FsError> {
    let mut parts = parts.to_vec();
    parts.sort_by_key(|part| part.first);
    let Some(first) = parts.first().filter(|first| first.first == 0) else {
        return Err(FsError::damaged(&id, "the beginning of its content is missing"));
    };
    if first.flags & Attribute::ENCRYPTED != 0 {
        return Err(FsError::unsupported(&id, "it is encrypted"));
    }
    let (length, written, unit) = match &first.value {
        Value::Resident(bytes) => return Ok(Box::new(Inline { size: bytes.len() as u64, bytes: bytes.clone() })),
        Value::Clusters { length, written, unit, .. } => (*length, (*written).min(*length), *unit),
    };
    let mut extents = Vec::new();
    let mut next = 0;
    for part in &parts {
        let Value::Clusters { runs, .. } = &part.value else {
            return Err(FsError::damaged(&id, "its content is in two places"));
        };
        if part.first != next {
            return Err(FsError::damaged(&id, "a part of its content is missing or there twice"));
        }
        next = decode(id, runs, next, &mut extents)?;
    }
    if first.flags & Attribute::COMPRESSED != 0 && unit != 0 {
        return Ok(Box::new(Compressed::new(disk.clone(), id, boot.cluster, unit, extents, (length, written))?));
    }
    let mut mapped = Runs::default();
    for extent in extents {
        let Some(cluster) = extent.cluster else { continue };
        let bytes = |clusters: u64| clusters.checked_mul(boot.cluster);
        let (Some(start), Some(count), Some(offset)) = (bytes(extent.first), bytes(extent.count), bytes(cluster))
        else {
            return Err(FsError::damaged(&id, "it points outside of its volume"));
        };
        // What was never written reads as zeroes, whatever the clusters hold.
        let count = count.min(written.saturating_sub(start));
        if offset.checked_add(count).is_none_or(|end| end > disk.size()) {
            return Err(FsError::damaged(&id, "it points outside of its volume"));
        }
        mapped.push(&id, (start, count, offset))?;
    }
    Ok(Box::new(mapped.over(disk.clone(), length)))
}

/// Each run: a byte with the widths of two numbers, a count of clusters, and the signed distance from the last run; one
/// without a distance is a hole. Returns the cluster of the value that follows.
fn decode(id: NodeId, bytes: &[u8], first: u64, out: &mut Vec<Extent>) -> Result<u64, FsError> {
    let bad = || FsError::damaged(&id, "its list of runs makes no sense");
    let (mut at, mut next, mut cluster) = (0, first, 0_i64);
    while u8(bytes, at) != 0 {
        let (count_width, place_width) = (usize::from(u8(bytes, at) & 15), usize::from(u8(bytes, at) >> 4));
        if count_width == 0 || count_width > 8 || place_width > 8 || at + 1 + count_width + place_width > bytes.len() {
            return Err(bad());
        }
        let count = u64::try_from(number(bytes, at + 1, count_width)).map_err(|_| bad())?;
        let place = if place_width == 0 {
            None
        } else {
            cluster = cluster.checked_add(number(bytes, at + 1 + count_width, place_width)).ok_or_else(bad)?;
            Some(u64::try_from(cluster).map_err(|_| bad())?)
        };
        if count == 0 || out.len() >= RUNS_MAX {
            return Err(bad());
        }
        out.push(Extent { first: next, count, cluster: place });
        next = next.checked_add(count).filter(|next| *next < 1 << 55).ok_or_else(bad)?;
        at += 1 + count_width + place_width;
    }
    Ok(next)
}

/// A signed little-endian number of `width` bytes.
fn number(bytes: &[u8], at: usize, width: usize) -> i64 {
    let mut full = [0; 8];
    for (to, from) in full.iter_mut().zip(bytes.iter().skip(at).take(width)) {
        *to = *from;
    }
    let unused = 64 - 8 * u32::try_from(width).unwrap_or(8);
    (i64::from_le_bytes(full) << unused) >> unused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_go_forth_and_back_and_have_holes() {
        let bytes = [0x21, 0x18, 0x34, 0x56, 0x01, 0x05, 0x11, 0x02, 0xf0, 0];
        let mut out = Vec::new();
        assert_eq!(decode(NodeId(0), &bytes, 3, &mut out).unwrap(), 3 + 0x18 + 5 + 2);
        assert_eq!(
            out,
            [
                Extent { first: 3, count: 0x18, cluster: Some(0x5634) },
                Extent { first: 0x1b, count: 5, cluster: None },
                Extent { first: 0x20, count: 2, cluster: Some(0x5624) },
            ]
        );
        assert!(decode(NodeId(0), &[0x11, 0x01, 0x80, 0], 0, &mut Vec::new()).is_err(), "before the volume");
        assert!(decode(NodeId(0), &[0x48, 1, 2], 0, &mut Vec::new()).is_err(), "cut off");
    }
}
