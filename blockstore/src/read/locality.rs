//! [`Locality`]: how far a disk of a point is scattered over the repository.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{ManifestReader, ReadShared};
use crate::error::ReadError;
use crate::id::PackId;
use crate::manifest::FAN_OUT;
use crate::point::PointedDisk;

/// Regions that are looked at, so that it takes as long for a large disk as for a small one.
const REGIONS: u64 = 64;
/// Packs are taken to be read in blocks of this size: what a device or a network brings at once.
const BLOCK: u64 = 128 << 10;

/// What reading a disk in order costs, found out in the index and the manifest alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Locality {
    /// Whether only some regions were looked at.
    pub sampled: bool,
    /// Regions of 512 chunks that were looked at and hold data.
    pub regions: u64,
    /// Chunks in them that hold data.
    pub chunks: u64,
    /// Packs that hold these chunks.
    pub packs: u64,
    /// Reads it takes, when neighbours in a pack are read at once.
    pub reads: u64,
    /// Bytes the chunks take in their packs.
    pub used: u64,
    /// Bytes of the blocks of 128 KiB that they lie in.
    pub fetched: u64,
}

impl Locality {
    /// Bytes fetched for each byte used; 1 where everything lies together.
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn amplification(&self) -> f64 {
        if self.used == 0 { 1.0 } else { self.fetched as f64 / self.used as f64 }
    }
}

/// Looks at all regions of a disk, or at [`REGIONS`] spread evenly over it.
pub(crate) fn locality(shared: &Arc<ReadShared>, disk: &PointedDisk) -> Result<Locality, ReadError> {
    let manifest = ManifestReader::new(shared.clone(), disk)?;
    let leaves = manifest.shape().chunks.div_ceil(FAN_OUT);
    let samples = leaves.min(REGIONS);
    let mut found = Locality { sampled: leaves > REGIONS, ..Locality::default() };
    let (mut packs, mut blocks) = (HashSet::<PackId>::new(), HashMap::<(PackId, u64), u64>::new());
    for sample in 0..samples {
        // The first region with data of this part of the disk.
        let (mut leaf, end) = (sample * leaves / samples, (sample + 1) * leaves / samples);
        while leaf < end {
            match manifest.zero_leaves(leaf)? {
                0 => break,
                zeroes => leaf += zeroes,
            }
        }
        if leaf >= end {
            continue;
        }
        let node = manifest.leaf(leaf)?;
        found.regions += 1;
        let mut next = None;
        for chunk in 0..FAN_OUT {
            let id = node.child(chunk);
            let Some(location) = (!id.is_zero()).then(|| shared.fetcher.index.first(&id)).flatten() else { continue };
            let (pack, start) = (location.pack.pack, u64::from(location.entry.offset));
            let end = start + u64::from(location.entry.stored_len);
            found.chunks += 1;
            found.used += end - start;
            found.reads += u64::from(next != Some((pack, start)));
            next = Some((pack, end));
            packs.insert(pack);
            let len = u64::from(location.pack.len);
            let block = |block| ((pack, block), BLOCK.min(len.saturating_sub(block * BLOCK)));
            blocks.extend((start / BLOCK..end.div_ceil(BLOCK)).map(block));
        }
    }
    (found.packs, found.fetched) = (packs.len() as u64, blocks.values().sum());
    Ok(found)
}
