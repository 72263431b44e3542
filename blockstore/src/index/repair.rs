//! What the index does when a lookup leads nowhere: look again, find the damaged run, rebuild from the packs.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::build::{RunBuilder, describe_pack};
use super::run::Run;
use super::{Index, SetAside, insert};
use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::pack::{FOOTER_LEN, Footer, HEADER_LEN, Header, MAX_PACK_LEN};
use crate::format::run::{Entry, PackRow};
use crate::id::{PackId, RepositoryId, RunId};
use crate::storage::{Listed, Object, ObjectKind, Storage};

/// A guest that reads a lost sector again and again must not make us list and hash the index each time.
const PAUSE: Duration = Duration::from_secs(1);

/// What repairs already found out.
#[derive(Debug, Default)]
pub(super) struct Repair {
    /// Runs that hash to their names.
    proven: HashSet<RunId>,
    /// Packs whose table cannot be read.
    unreadable: HashSet<PackId>,
    /// Whether all packs were read regardless of coverage.
    exhausted: bool,
    /// The last repair that changed nothing, and the set it saw.
    vain: Option<(Instant, u64)>,
}

/// Which packs a rebuild reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Uncovered,
    All,
}

impl Index {
    /// Called when a lookup in the set `seen` failed or led to a bad frame. True if the set is another one now, so
    /// that trying again makes sense.
    pub fn repair(&self, seen: u64) -> Result<bool, ReadError> {
        let mut repair = self.repair.lock().unwrap_or_else(PoisonError::into_inner);
        if self.generation() != seen {
            return Ok(true); // somebody else was faster
        }
        if repair.vain.is_some_and(|(at, generation)| generation == seen && at.elapsed() < PAUSE) {
            return Ok(false);
        }
        let (fresh, mut damaged) = self.relist()?;
        for run in self.runs() {
            if !repair.proven.contains(&run.id) {
                if run.is_intact() {
                    repair.proven.insert(run.id);
                } else {
                    damaged.push((run.id, FormatError::Name));
                }
            }
        }
        self.set_aside(&damaged);
        let mut changed = self.rebuild(&mut repair, Reach::Uncovered)? || fresh || !damaged.is_empty();
        if !changed && !repair.exhausted {
            repair.exhausted = true;
            changed = self.rebuild(&mut repair, Reach::All)?;
        }
        if !changed {
            repair.vain = Some((Instant::now(), seen));
        }
        Ok(changed)
    }

    /// Sets damaged runs aside and rebuilds what they said.
    pub fn replace_damaged(&self, damaged: Vec<(RunId, FormatError)>) -> Result<(), ReadError> {
        let mut repair = self.repair.lock().unwrap_or_else(PoisonError::into_inner);
        self.set_aside(&damaged);
        self.rebuild(&mut repair, Reach::Uncovered).map(drop)
    }

    /// The damaged runs that were found since this was called last.
    pub fn take_set_aside(&self) -> Vec<SetAside> {
        std::mem::take(&mut *self.set_aside.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Order: the copy under the other name first, then the deletion; the bytes are never gone in between.
    fn set_aside(&self, damaged: &[(RunId, FormatError)]) {
        for (id, reason) in damaged {
            let object = Object::IndexRun(*id);
            let kept = self
                .storage
                .map(&object)
                .and_then(|bytes| self.storage.put(&Object::DamagedRun(*id), &bytes))
                .and_then(|()| self.storage.delete(&object));
            match kept {
                Ok(()) => {
                    warn!(%object, %reason, "damaged index run set aside; its entries are rebuilt from the packs")
                }
                Err(ref error) => warn!(%object, %reason, %error, "damaged index run left out, it cannot be set aside"),
            }
            let mut set_aside = self.set_aside.lock().unwrap_or_else(PoisonError::into_inner);
            set_aside.retain(|known| known.run != *id);
            set_aside.push(SetAside { run: *id, reason: reason.clone(), kept: kept.is_ok() });
        }
        if !damaged.is_empty() {
            self.change(|runs| runs.retain(|run| !damaged.iter().any(|(id, _)| *id == run.id)));
        }
    }

    /// Makes runs for packs that the present ones do not fully cover, or for all. True if there is a new run.
    fn rebuild(&self, repair: &mut Repair, reach: Reach) -> Result<bool, ReadError> {
        let listed = self.storage.list(ObjectKind::Pack);
        let listed = listed.map_err(|source| ReadError::Io { object: "packs".to_owned(), source })?;
        let covered = self.coverage();
        let mut entries = RunBuilder::default();
        let (mut packs, mut changed) = (0u64, false);
        for Listed { object, len } in listed {
            let Object::Pack(id) = object else { continue };
            let known = reach == Reach::Uncovered && covered.get(&id).is_some_and(|(has, frames)| has >= frames);
            if known || repair.unreadable.contains(&id) {
                continue;
            }
            match read_table(&*self.storage, id, len, self.repository) {
                Ok((row, table)) => {
                    packs += 1;
                    entries.add_pack(row, &table);
                    if entries.is_full() {
                        changed |= self.keep(std::mem::take(&mut entries))?;
                    }
                }
                Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    repair.unreadable.insert(id);
                    warn!(%object, error = %error, "the pack's table cannot be read, its chunks are not indexed");
                }
            }
        }
        changed |= self.keep(entries)?;
        if changed {
            info!(packs, "index entries rebuilt from pack tables");
        }
        Ok(changed)
    }

    /// Uses a rebuilt run, stored if the storage lets us. False if it says nothing new.
    fn keep(&self, entries: RunBuilder) -> Result<bool, ReadError> {
        if entries.len() == 0 {
            return Ok(false);
        }
        let damaged = |source| ReadError::Io { object: "rebuilt index run".to_owned(), source };
        let run = self.build(entries).map_err(damaged)?;
        if self.runs().iter().any(|known| known.id == run.id) {
            return Ok(false);
        }
        let object = Object::IndexRun(run.id);
        let run = match self.storage.put(&object, run.bytes()) {
            Ok(()) => Run::open(&*self.storage, run.id, self.repository).unwrap_or(run),
            Err(error) => {
                warn!(%object, %error, "rebuilt index run cannot be stored; it is used from memory");
                run
            }
        };
        self.change(|runs| insert(runs, Arc::new(run)));
        Ok(true)
    }

    /// Per pack: entries the runs have, and frames it has.
    fn coverage(&self) -> HashMap<PackId, (u64, u64)> {
        let mut covered: HashMap<PackId, (u64, u64)> = HashMap::new();
        for run in self.runs() {
            for row in run.packs() {
                let sum = covered.entry(row.pack).or_insert((0, u64::from(row.frames)));
                sum.0 += u64::from(row.entries);
            }
        }
        covered
    }
}

/// Reads header, footer and table of a pack.
pub(crate) fn read_table(
    storage: &dyn Storage,
    id: PackId,
    len: u64,
    repository: RepositoryId,
) -> Result<(PackRow, Vec<Entry>), ReadError> {
    let object = Object::Pack(id);
    let io = |source| ReadError::io(&object, source);
    let damaged = |source| ReadError::Damaged { object, source };
    let pack_len = u32::try_from(len).ok().filter(|len| (HEADER_LEN + FOOTER_LEN..=MAX_PACK_LEN).contains(len));
    let pack_len = pack_len.ok_or(damaged(FormatError::Length { part: "the pack" }))?;
    let mut header = [0; HEADER_LEN as usize];
    storage.get_range(&object, 0, &mut header).map_err(io)?;
    let header = Header::decode(&header).map_err(damaged)?;
    if header.repository != repository {
        return Err(damaged(FormatError::OtherRepository));
    }
    let mut footer = [0; FOOTER_LEN as usize];
    storage.get_range(&object, len - u64::from(FOOTER_LEN), &mut footer).map_err(io)?;
    let footer = Footer::decode(&footer, len).map_err(damaged)?;
    let mut table = vec![0; footer.table_len() as usize]; // bounded: the footer was checked
    storage.get_range(&object, u64::from(footer.table_offset), &mut table).map_err(io)?;
    let frames = footer.decode_table(&table, &header).map_err(damaged)?;
    Ok(describe_pack(id, &header, pack_len, &frames))
}
