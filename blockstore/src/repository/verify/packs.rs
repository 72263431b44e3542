//! The data: packs read whole, hashed, and their frames opened, on all cores.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::SystemTime;

use tracing::{info, warn};

use super::head::cannot_be_read;
use super::{DataCheck, Rotten, Verifier, VerifyError};
use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::pack::{MAX_PACK_LEN, decode_pack};
use crate::format::run::{Entry, PackRow};
use crate::id::PackId;
use crate::index::build::describe_pack;
use crate::pack::fetch::Fetcher;
use crate::storage::Object;

/// Each worker holds one pack in memory.
const WORKERS_MAX: usize = 16;
/// Packs are read in such steps, so that hashing finds them in the processor's cache.
const STEP: usize = 1 << 20;
/// After so many packs it is kept that they were verified.
const KEPT_EVERY: usize = 256;

/// What became of reading a pack.
struct Checked {
    pack: PackId,
    bytes: u64,
    rotten: Option<Rotten>,
}

impl Verifier<'_> {
    /// Reads packs that are needed or marked and were not read yet: all, or those that waited longest. Marks the damaged
    /// ones, takes the mark from those that are whole again. True if one is damaged.
    pub(super) fn read_data(&mut self) -> Result<bool, VerifyError> {
        let packs = self.choose();
        self.progress.add_total(packs.iter().filter_map(|pack| self.packs.get(pack)).sum());
        let mut found = false;
        let mut changed = false;
        for part in packs.chunks(KEPT_EVERY) {
            let checked = self.check_packs(part);
            let mut whole = BTreeMap::new();
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            for result in checked {
                let Checked { pack, bytes, rotten } = result?;
                self.report.packs_read += 1;
                self.report.bytes_read += bytes;
                self.read.insert(pack);
                let damaged = &self.repository.fetcher().damaged;
                match rotten {
                    // Perhaps because a collect has moved what it held.
                    Some(rotten) if rotten.missing && self.is_dropped(&pack)? => changed = true,
                    Some(rotten) => {
                        damaged.mark(self.repository.storage(), pack);
                        self.rotten.insert(pack, rotten);
                        found = true;
                    }
                    None => {
                        whole.insert(pack, now);
                        if damaged.contains(&pack) {
                            info!(%pack, "the pack is whole again");
                            damaged.clear(self.repository.storage(), pack);
                        }
                    }
                }
            }
            let (repository, packs) = (self.repository, &self.packs);
            let kept =
                self.verified.keep(repository.storage(), repository.id(), whole, |pack| packs.contains_key(pack));
            if let Err(error) = kept {
                warn!(%error, "it cannot be kept which packs were verified; they will be verified again sooner");
            }
            self.stop_if_cancelled()?;
        }
        Ok(found || changed)
    }

    /// Whether the index as it is now does not name a pack.
    fn is_dropped(&self, pack: &PackId) -> Result<bool, ReadError> {
        let index = &self.repository.fetcher().index;
        index.refresh()?;
        Ok(!index.runs().iter().any(|run| run.packs().any(|row| row.pack == *pack)))
    }

    /// Marked packs first, then by the time at which they were verified last.
    fn choose(&mut self) -> Vec<PackId> {
        let damaged = &self.repository.fetcher().damaged;
        let marked = damaged.all().into_iter().filter(|pack| self.packs.contains_key(pack));
        let wanted: BTreeSet<PackId> = self.referenced.iter().copied().chain(marked).collect();
        let mut packs: Vec<PackId> = wanted.into_iter().filter(|pack| !self.read.contains(pack)).collect();
        packs.sort_by_cached_key(|pack| (!damaged.contains(pack), self.verified.time(pack)));
        let len = |pack: &PackId| self.packs.get(pack).copied().unwrap_or(0);
        let total: u64 = packs.iter().map(len).sum();
        let limit = match self.options.data {
            DataCheck::All => return packs,
            DataCheck::None => 0,
            DataCheck::Bytes(bytes) => bytes,
            DataCheck::PerMille(share) => {
                (u128::from(total) * u128::from(share)).div_ceil(1000).try_into().unwrap_or(total)
            }
        };
        let mut left = self.budget.unwrap_or(limit);
        packs.retain(|pack| {
            let take = damaged.contains(pack) || left > 0;
            left = if take { left.saturating_sub(len(pack)) } else { left };
            take
        });
        self.budget = Some(left);
        packs
    }

    fn check_packs(&self, packs: &[PackId]) -> Vec<Result<Checked, ReadError>> {
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let check = || {
            let mut buffer = Vec::new();
            while let Some(pack) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.progress.is_cancelled() {
                    return;
                }
                let result = self.check_pack(*pack, &mut buffer);
                self.progress.add_done(self.packs.get(pack).copied().unwrap_or(0));
                results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
            }
        };
        thread::scope(|scope| {
            for _ in 1..thread::available_parallelism().map_or(2, |cores| cores.get().min(WORKERS_MAX)) {
                let _ = thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, check); // or fewer
            }
            check();
        });
        results.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a pack and checks its name, its structure and its frames.
    fn check_pack(&self, pack: PackId, buffer: &mut Vec<u8>) -> Result<Checked, ReadError> {
        let fetcher = self.repository.fetcher();
        let rotten = |what| Rotten { what, bad: None, missing: false };
        let lost = |what| Ok(Checked { pack, bytes: 0, rotten: Some(rotten(what)) });
        let len = match fetcher.storage.len(&Object::Pack(pack)) {
            Ok(len) if len > u64::from(MAX_PACK_LEN) => return lost(format!("it is too long, {len} bytes")),
            Ok(len) => usize::try_from(len).unwrap_or(usize::MAX), // at most MAX_PACK_LEN
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let missing = Rotten { missing: true, ..rotten("it is missing".to_owned()) };
                return Ok(Checked { pack, bytes: 0, rotten: Some(missing) });
            }
            Err(error) => return lost(cannot_be_read(&error)),
        };
        let read = self.read_pack(pack, len, buffer);
        let mut whole: Option<String> = None;
        let described = match read {
            Ok(true) if self.options.hash_only => return Ok(Checked { pack, bytes: len as u64, rotten: None }),
            // The bytes are those that were written; still open every frame, to notice what was written wrong.
            Ok(true) => match decode_pack(buffer) {
                Ok((header, frames)) => {
                    let pack_len = u32::try_from(len).unwrap_or(MAX_PACK_LEN); // at most MAX_PACK_LEN
                    Some(describe_pack(pack, &header, pack_len, &frames))
                }
                Err(error) => return lost(error.to_string()),
            },
            // Damaged somewhere; the index, not the pack's own table, says which frames ought to be there.
            Ok(false) => {
                whole = Some(FormatError::Name.to_string());
                indexed(fetcher, pack)
            }
            Err(error) => {
                whole = Some(cannot_be_read(&error));
                let described = indexed(fetcher, pack);
                described.iter().for_each(|(_, entries)| salvage(fetcher, pack, len, entries, buffer));
                described
            }
        };
        let mut bad = HashSet::default();
        if let Some((row, entries)) = described {
            bad.extend(fetcher.bad_frames(buffer, &row, &entries)?);
        }
        let what = match (whole, bad.len()) {
            (None, 0) => return Ok(Checked { pack, bytes: len as u64, rotten: None }),
            (Some(whole), 0) => whole,
            (None, frames) => format!("{frames} of its frames cannot be read"),
            (Some(whole), frames) => format!("{whole}; {frames} of its frames cannot be read"),
        };
        Ok(Checked { pack, bytes: len as u64, rotten: Some(Rotten { bad: Some(bad), ..rotten(what) }) })
    }

    /// Reads a pack in steps, hashing as it goes: whether it hashes to its name.
    fn read_pack(&self, pack: PackId, len: usize, buffer: &mut Vec<u8>) -> io::Result<bool> {
        let object = Object::Pack(pack);
        let storage = &self.repository.fetcher().storage;
        buffer.resize(len, 0);
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0u64;
        for step in buffer.chunks_mut(STEP) {
            storage.get_range(&object, offset, step)?;
            hasher.update(step);
            self.progress.add_read(step.len() as u64);
            offset += step.len() as u64;
        }
        Ok(hasher.finalize().as_bytes() == &pack.0)
    }
}

/// Reads frame by frame what can be read of a pack that cannot be read whole; the rest is zero, and so no frame.
fn salvage(fetcher: &Fetcher, pack: PackId, len: usize, entries: &[Entry], buffer: &mut Vec<u8>) {
    buffer.clear();
    buffer.resize(len, 0);
    for entry in entries {
        let frame = buffer.get_mut(entry.offset as usize..);
        if let Some(frame) = frame.and_then(|rest| rest.get_mut(..entry.stored_len as usize))
            && fetcher.storage.get_range(&Object::Pack(pack), u64::from(entry.offset), frame).is_err()
        {
            frame.fill(0);
        }
    }
}

/// Everything the index says about a pack. Slow, but only damaged packs come here.
fn indexed(fetcher: &Fetcher, pack: PackId) -> Option<(PackRow, Vec<Entry>)> {
    let mut row = None;
    let mut entries = Vec::new();
    for run in fetcher.index.runs() {
        if run.packs().any(|row| row.pack == pack) {
            let locations = run.entries().iter().filter_map(|raw| run.location(raw));
            for location in locations.filter(|location| location.pack.pack == pack) {
                row = Some(location.pack);
                entries.push(location.entry);
            }
        }
    }
    // Several runs may name a pack, after a rebuild; a frame is opened where it stands, and only once.
    entries.sort_unstable_by_key(|entry| (entry.offset, entry.id));
    entries.dedup_by_key(|entry| (entry.offset, entry.id));
    row.map(|row| (row, entries))
}
