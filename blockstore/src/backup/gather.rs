//! [`Gather`]: which chunks a backup stores once more, so that its point can be read in large pieces. Specification:
//! docs/format/repository.md, "Locality"

use std::collections::{HashMap, HashSet};

use crate::id::{ChunkId, IdHash, PackId};
use crate::index::Index;

/// One of so many bytes of the point may be stored once more.
const SHARE: u64 = 20;
/// A region may be spread over so many packs.
const PACKS: usize = 4;
/// A pack that gives a region so many chunks is worth the way.
const ENOUGH: usize = 16;

/// The choice of one backup. A region is what a leaf of the manifest covers.
#[derive(Debug, Default)]
pub(super) struct Gather {
    /// Bytes of the point so far.
    used: u64,
    /// Those stored once more.
    spent: u64,
    gathered: HashSet<ChunkId, IdHash>,
}

impl Gather {
    /// Counts a region that need not be looked at, because another point has the same.
    pub fn pass(&mut self, ids: impl Iterator<Item = ChunkId>, chunk_size: u64) {
        self.used += ids.filter(|id| !id.is_zero()).count() as u64 * chunk_size;
    }

    /// Of the chunks of a new region, those to store once more: what the packs that give it the fewest give, until it
    /// is spread over no more than [`PACKS`].
    pub fn choose(&mut self, ids: &[ChunkId], chunk_size: u64, index: &Index) -> Vec<ChunkId> {
        self.pass(ids.iter().copied(), chunk_size);
        // Where the index knows nothing the chunk is this backup's own.
        let mut packs: HashMap<Option<PackId>, Vec<ChunkId>> = HashMap::new();
        for id in ids.iter().filter(|id| !id.is_zero() && !self.gathered.contains(id)) {
            let pack = index.first(id).map(|location| location.pack);
            let movable = pack.is_some_and(|pack| !pack.gathered);
            let chunks = packs.entry(pack.map(|pack| pack.pack)).or_default();
            if movable {
                chunks.push(*id);
            }
        }
        let mut left = packs.len();
        let mut poor: Vec<Vec<ChunkId>> = packs.into_values().filter(|ids| (1..ENOUGH).contains(&ids.len())).collect();
        poor.sort_unstable_by_key(|ids| (ids.len(), ids.first().copied()));
        let mut chosen = Vec::new();
        for ids in poor {
            let cost = ids.len() as u64 * chunk_size;
            if left <= PACKS || self.spent + cost > self.used / SHARE {
                break;
            }
            left -= 1;
            self.spent += cost;
            chosen.extend(ids.into_iter().filter(|id| self.gathered.insert(*id)));
        }
        chosen
    }
}
