//! Sweep: what becomes of the packs in quarantine, by a fresh mark.

use std::collections::{HashMap, HashSet};

use tracing::{info, warn};

use super::plan::{Standing, Tally};
use super::quarantine::{self, BATCH_MAX, Batch};
use super::{CollectError, CollectOptions, Round};
use crate::id::{BatchId, LeaseId, PackId};
use crate::keys::random;
use crate::lease::{Lease, unix};
use crate::pack::fetch::Fetcher;
use crate::progress::Progress;
use crate::storage::Object;

/// What a sweep did.
#[derive(Debug, Default)]
pub(super) struct Swept {
    pub packs: u64,
    pub bytes: u64,
    pub reprieved: u64,
    /// Batches of a collect that was cut off, which wait for leases from now on.
    pub settled: u64,
}

/// Deletes the packs whose time has come, and takes out those that are needed.
///
/// A pack goes when its date has passed (or `reclaim` says not to wait), none of the leases its batch waits for stood when
/// the round began, and the round's mark, made after that, found nothing that needs it. Order for what goes: (1) new
/// index runs without it are durable, (2) the old runs are deleted, (3) the pack is deleted, (4) the batch forgets it. With
/// 3 before 1 a crash would leave an index that leads nowhere; with 4 before 3 a backup could find the pack and count on it.
pub(super) fn sweep(
    fetcher: &Fetcher,
    round: &Round,
    lease: &Lease,
    options: &CollectOptions,
    gone: &HashSet<PackId>,
    progress: &Progress,
) -> Result<Swept, CollectError> {
    let now = unix(fetcher.storage.surroundings().now());
    let mut swept = Swept::default();
    let mut deaths: Vec<(BatchId, Batch, Vec<PackId>)> = Vec::new();
    for (id, batch) in &round.batches {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                // Its packs are found dead once more, and wait once more.
                warn!(object = %Object::Quarantine(*id), %error, "removed: it cannot be read");
                delete(fetcher, Object::Quarantine(*id))?;
                continue;
            }
        };
        let needed = |pack: &PackId| round.tallies.get(pack).is_some_and(|tally| tally.live_frames > 0);
        let (reprieved, condemned): (Vec<PackId>, Vec<PackId>) = batch.packs.iter().copied().partition(needed);
        swept.reprieved += reprieved.len() as u64;
        let waits = batch.waits.as_ref().is_none_or(|waits| !round.held_up(waits).is_empty());
        let due = options.reclaim_now || batch.due <= now;
        let dying = if due && !waits { condemned.clone() } else { Vec::new() };
        if batch.waits.is_none() {
            // A collect ended between the two writes of `condemn`: the second one is made up for, and its date kept.
            let batch = Batch { packs: condemned, ..batch.clone() };
            settle(fetcher, *id, batch)?;
            swept.settled += 1;
        } else if !dying.is_empty() {
            deaths.push((*id, batch.clone(), dying));
        } else if !reprieved.is_empty() {
            info!(packs = reprieved.len(), "taken out of quarantine: points need them");
            replace(fetcher, *id, Batch { packs: condemned, ..batch.clone() })?;
        }
    }
    let dying: HashSet<PackId> = deaths.iter().flat_map(|(_, _, packs)| packs.iter().copied()).collect();
    if !dying.is_empty() || !gone.is_empty() {
        lease.confirm()?;
        let without = &dying | gone;
        fetcher.index.without(&without).map_err(|source| CollectError::write("an index run", source))?;
    }
    progress.add_total(dying.iter().map(|pack| round.standing.packs.get(pack).copied().unwrap_or(0)).sum());
    for (id, batch, dying) in deaths {
        for pack in &dying {
            super::mark::stop(progress)?;
            lease.confirm()?; // a collect that was paused for long must not go on where another one was since
            delete(fetcher, Object::Pack(*pack))?;
            if let Some(len) = round.standing.packs.get(pack) {
                swept.packs += 1;
                swept.bytes += len;
                progress.add_done(*len);
            }
            fetcher.damaged.clear(&*fetcher.storage, *pack);
        }
        let dead: HashSet<PackId> = dying.into_iter().collect();
        let needed = |pack: &PackId| round.tallies.get(pack).is_some_and(|tally| tally.live_frames > 0);
        let packs = batch.packs.iter().copied().filter(|pack| !dead.contains(pack) && !needed(pack)).collect();
        replace(fetcher, id, Batch { packs, ..batch })?;
    }
    Ok(swept)
}

/// Puts packs into quarantine.
///
/// Order: (1) the batch, without the leases it waits for; (2) the leases are listed; (3) the batch, with them. A backup
/// that takes its lease after 2 sees the batch of 1 when it lists the quarantine, and counts on none of its packs. One that
/// took its lease before is waited for. A crash after 1 leaves a batch that waits until the next collect does 2 and 3.
pub(super) fn condemn(
    fetcher: &Fetcher,
    packs: &[PackId],
    options: &CollectOptions,
    lease: &Lease,
) -> Result<(), CollectError> {
    let storage = &*fetcher.storage;
    let now = unix(storage.surroundings().now());
    for packs in packs.chunks(BATCH_MAX) {
        lease.confirm()?;
        let due = now.saturating_add(options.quarantine.as_secs());
        let batch = Batch { created: now, due, waits: None, packs: packs.to_vec() };
        let id = BatchId(random().map_err(|source| CollectError::write("the quarantine", source))?);
        replace(fetcher, id, batch.clone())?;
        settle(fetcher, id, batch)?;
    }
    Ok(())
}

fn settle(fetcher: &Fetcher, id: BatchId, batch: Batch) -> Result<(), CollectError> {
    let leases = crate::lease::list(&*fetcher.storage, fetcher.config.repository)?;
    let waits: Vec<LeaseId> = leases.iter().filter(|lease| lease.may_write()).map(|lease| lease.id).collect();
    replace(fetcher, id, Batch { waits: Some(waits), ..batch })
}

/// Puts a batch, or deletes it when nothing is left in it.
fn replace(fetcher: &Fetcher, id: BatchId, batch: Batch) -> Result<(), CollectError> {
    let object = Object::Quarantine(id);
    if batch.packs.is_empty() {
        return delete(fetcher, object);
    }
    quarantine::put(&*fetcher.storage, fetcher.config.repository, id, &batch)
        .map_err(|source| CollectError::write(&object.to_string(), source))
}

fn delete(fetcher: &Fetcher, object: Object) -> Result<(), CollectError> {
    fetcher.storage.delete(&object).map_err(|source| CollectError::write(&object.to_string(), source))
}

/// Bytes of some packs, as listed.
pub(super) fn bytes_of<'a>(standing: &Standing, packs: impl IntoIterator<Item = &'a PackId>) -> u64 {
    packs.into_iter().filter_map(|pack| standing.packs.get(pack)).sum()
}

/// Stored bytes that points need.
pub(super) fn live_bytes(tallies: &HashMap<PackId, Tally>) -> u64 {
    tallies.values().map(|tally| tally.live_bytes).sum()
}
