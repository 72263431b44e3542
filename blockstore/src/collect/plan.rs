//! Plan: from marks to what is done with each pack. Pure; needs the index and a listing of packs, but no data.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::mark::Marks;
use crate::format::pack::{PackKind, TARGET_PACK_LEN};
use crate::id::PackId;

/// Packs shorter than this are joined, when there are enough of them.
pub(super) const TINY_LEN: u32 = TARGET_PACK_LEN / 8;
/// So many tiny packs of a kind are joined.
pub(super) const TINY_MIN: usize = 8;

/// What is known of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    pub kind: PackKind,
    pub len: u32,
    pub frames: u32,
    pub live_frames: u32,
    /// Stored bytes of the live frames.
    pub live_bytes: u64,
}

impl Tally {
    /// A pack without a dead frame is not: a copy of it would be as long. The header and table of a pack of few small
    /// frames are most of it.
    fn is_worth_repacking(&self, threshold: u8) -> bool {
        self.live_frames < self.frames && self.live_bytes * 100 < u64::from(self.len) * u64::from(threshold)
    }
}

/// The packs that the index names, and how much of each is needed.
pub(crate) fn tally(marks: &Marks) -> HashMap<PackId, Tally> {
    let mut packs: HashMap<PackId, Tally> = HashMap::new();
    for (number, run) in marks.runs().iter().enumerate() {
        for row in run.packs() {
            let new = Tally { kind: row.kind, len: row.len, frames: row.frames, live_frames: 0, live_bytes: 0 };
            packs.entry(row.pack).or_insert(new);
        }
        for place in marks.marked(number) {
            if let Some(pack) = packs.get_mut(&place.pack.pack) {
                pack.live_frames += 1;
                pack.live_bytes += u64::from(place.entry.stored_len);
            }
        }
    }
    packs
}

/// What stands in the repository besides the index.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// All packs there are, and their lengths.
    pub packs: HashMap<PackId, u64>,
    /// Those of them that wait for their deletion.
    pub quarantined: HashSet<PackId>,
    /// Those that are damaged.
    pub damaged: HashSet<PackId>,
}

/// How a pack fares; of several places of a chunk the one in the best pack is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// Whole, and gathered by a backup: readers prefer it.
    Gathered,
    Good,
    Quarantined,
    Damaged,
    Missing,
}

impl Standing {
    /// How a pack of this length fares.
    pub fn rank(&self, pack: &PackId, len: u32) -> Rank {
        if self.packs.get(pack) != Some(&u64::from(len)) {
            Rank::Missing
        } else if self.damaged.contains(pack) {
            Rank::Damaged
        } else if self.quarantined.contains(pack) {
            Rank::Quarantined
        } else {
            Rank::Good
        }
    }
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Packs that nothing needs.
    pub dead: Vec<PackId>,
    /// Packs that no run names: what interrupted backups left.
    pub unnamed: Vec<PackId>,
    /// Packs whose live frames go into new packs.
    pub repack: Vec<PackId>,
    /// Packs the index names that are gone and not needed: only their entries are left.
    pub gone: HashSet<PackId>,
}

/// Decides. `threshold` is in per cent: a pack less of which is live is repacked; 0 repacks nothing.
pub(crate) fn plan(packs: &HashMap<PackId, Tally>, standing: &Standing, threshold: u8) -> Plan {
    let mut plan = Plan::default();
    let mut tiny: BTreeMap<PackKind, Vec<PackId>> = BTreeMap::new();
    for (pack, tally) in packs {
        match standing.packs.get(pack) {
            None if tally.live_frames == 0 => {
                plan.gone.insert(*pack);
            }
            None => {} // needed and missing: damage, which verify names
            Some(_) if standing.quarantined.contains(pack) => {}
            Some(_) if tally.live_frames == 0 => plan.dead.push(*pack),
            Some(_) if threshold == 0 || standing.damaged.contains(pack) => {}
            Some(_) if tally.is_worth_repacking(threshold) => plan.repack.push(*pack),
            Some(_) if tally.len < TINY_LEN => tiny.entry(tally.kind).or_default().push(*pack),
            Some(_) => {}
        }
    }
    plan.repack.extend(tiny.into_values().filter(|packs| packs.len() >= TINY_MIN).flatten());
    let named = |pack: &&PackId| !packs.contains_key(*pack) && !standing.quarantined.contains(*pack);
    plan.unnamed.extend(standing.packs.keys().filter(named));
    plan.dead.sort_unstable();
    plan.unnamed.sort_unstable();
    plan.repack.sort_unstable();
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> PackId {
        PackId([byte; 32])
    }

    fn pack(len: u32, live: u64) -> Tally {
        Tally { kind: PackKind::Data, len, frames: 10, live_frames: u32::from(live > 0), live_bytes: live }
    }

    #[test]
    fn each_pack_gets_what_it_deserves() {
        let large = TARGET_PACK_LEN;
        let packs = HashMap::from([
            (id(1), pack(large, 0)),
            (id(2), pack(large, u64::from(large) / 2 - 1)),
            (id(3), pack(large, u64::from(large) / 2 + 1)),
            (id(4), pack(large, 0)),
            (id(5), pack(large, 5)),
            (id(6), pack(large, 0)),
            (id(7), pack(large, 5)),
        ]);
        let mut standing = Standing {
            packs: [1, 2, 3, 4, 5, 9, 10].map(|n| (id(n), u64::from(large))).into(),
            quarantined: [id(4), id(10)].into(),
            damaged: [id(5)].into(),
        };
        let expected = Plan { dead: vec![id(1)], unnamed: vec![id(9)], repack: vec![id(2)], gone: [id(6)].into() };
        assert_eq!(plan(&packs, &standing, 50), expected);
        assert!(plan(&packs, &standing, 0).repack.is_empty());
        standing.packs.clear();
        assert_eq!(plan(&packs, &standing, 50).gone, [id(1), id(4), id(6)].into());
    }

    #[test]
    fn a_pack_all_of_which_is_needed_is_not_repacked_however_little_that_is() {
        let whole = Tally { kind: PackKind::Data, len: 200, frames: 1, live_frames: 1, live_bytes: 54 };
        let standing = Standing { packs: [(id(1), 200)].into(), ..Standing::default() };
        assert!(plan(&HashMap::from([(id(1), whole)]), &standing, 100).repack.is_empty());
        let half = Tally { frames: 2, ..whole };
        assert_eq!(plan(&HashMap::from([(id(1), half)]), &standing, 50).repack, [id(1)]);
    }

    #[test]
    fn tiny_packs_are_joined_when_there_are_enough_and_never_again() {
        let tiny = |count: u8| (0..count).map(|n| (id(n), pack(1000, 900))).collect::<HashMap<_, _>>();
        let standing = Standing { packs: (0..8).map(|n| (id(n), 1000)).collect(), ..Standing::default() };
        assert_eq!(plan(&tiny(8), &standing, 50).repack.len(), 8);
        assert!(plan(&tiny(7), &standing, 50).repack.is_empty());
    }
}
