//! Explain: what is known about packs, and who needs one.

use std::collections::HashSet;

use super::mark::holders;
use super::{CollectError, CollectOptions, Round};
use crate::format::pack::PackKind;
use crate::id::{ChunkId, PackId};
use crate::lease::LeaseState;
use crate::progress::Progress;
use crate::repository::Repository;

use super::report::{Holder, PackReport};

impl Repository {
    /// Every pack that is not needed in full, those with most to free first. Writes nothing.
    pub fn explain_packs(
        &self,
        options: &CollectOptions,
        progress: &Progress,
    ) -> Result<Vec<PackReport>, CollectError> {
        let round = Round::look(self, progress)?;
        let plan = round.plan(options.threshold);
        let repack: HashSet<PackId> = plan.repack.into_iter().collect();
        let named = round.tallies.iter().filter(|(_, tally)| tally.live_frames < tally.frames).map(|(pack, _)| *pack);
        let unnamed = round.standing.packs.keys().filter(|pack| !round.tallies.contains_key(*pack)).copied();
        let mut packs: Vec<PackReport> = named.chain(unnamed).map(|pack| describe(&round, pack, &repack)).collect();
        packs.sort_by_key(|pack| (std::cmp::Reverse(pack.bytes.saturating_sub(pack.live_bytes)), pack.pack));
        Ok(packs)
    }

    /// One pack, by the beginning of its name, and who needs it: points, and whose leases hold them. Writes nothing.
    pub fn explain_pack(
        &self,
        prefix: &str,
        options: &CollectOptions,
        progress: &Progress,
    ) -> Result<PackReport, CollectError> {
        let round = Round::look(self, progress)?;
        let all: HashSet<PackId> = round.tallies.keys().chain(round.standing.packs.keys()).copied().collect();
        let mut found = all.into_iter().filter(|pack| pack.to_string().starts_with(prefix));
        let pack = match (found.next(), found.count()) {
            (None, _) => return Err(CollectError::NoSuchPack { prefix: prefix.to_owned() }),
            (Some(pack), 0) => pack,
            (Some(_), others) => {
                return Err(CollectError::Ambiguous { prefix: prefix.to_owned(), count: others + 1 });
            }
        };
        let repack: HashSet<PackId> = round.plan(options.threshold).repack.into_iter().collect();
        let mut report = describe(&round, pack, &repack);
        let live: HashSet<ChunkId> = (0..round.marks.runs().len())
            .flat_map(|run| round.marks.marked(run))
            .filter(|place| place.pack.pack == pack)
            .map(|place| place.entry.id)
            .collect();
        if live.is_empty() {
            return Ok(report);
        }
        let needed = holders(self.fetcher(), &round.roots, &|id| live.contains(id), progress)?;
        let listed: HashSet<_> = self.list_points()?.into_iter().collect();
        for (point, frames) in needed {
            let machine = round.roots.disks.iter().find(|disk| disk.point == point);
            let leases = round.leases.iter().filter(|lease| lease.holds(point)).map(LeaseState::holder).collect();
            let machine = machine.map(|disk| disk.machine.clone()).unwrap_or_default();
            report.holders.push(Holder { point, machine, frames, forgotten: !listed.contains(&point), leases });
        }
        report.holders.sort_by(|a, b| (&a.machine, a.point).cmp(&(&b.machine, b.point)));
        Ok(report)
    }
}

fn describe(round: &Round, pack: PackId, repack: &HashSet<PackId>) -> PackReport {
    let tally = round.tallies.get(&pack);
    let batch = round.batches.iter().filter_map(|(_, batch)| batch.as_ref().ok()).find(|b| b.packs.contains(&pack));
    let live_frames = tally.map_or(0, |tally| u64::from(tally.live_frames));
    let state = match (round.standing.packs.contains_key(&pack), tally) {
        (false, _) => "missing",
        _ if batch.is_some() => "quarantined",
        (true, None) => "unnamed",
        _ if live_frames == 0 => "dead",
        _ if repack.contains(&pack) => "to be repacked",
        _ => "kept",
    };
    let waits = batch.and_then(|batch| batch.waits.as_deref()).unwrap_or_default();
    PackReport {
        pack,
        kind: tally.map(|tally| match tally.kind {
            PackKind::Data => "data".to_owned(),
            PackKind::Metadata => "metadata".to_owned(),
        }),
        bytes: round.standing.packs.get(&pack).copied().unwrap_or(0),
        live_bytes: tally.map_or(0, |tally| tally.live_bytes),
        frames: tally.map_or(0, |tally| u64::from(tally.frames)),
        live_frames,
        state: state.to_owned(),
        due: batch.map(|batch| batch.due),
        waits_for: round.held_up(waits).into_iter().map(LeaseState::holder).collect(),
        holders: Vec::new(),
    }
}
