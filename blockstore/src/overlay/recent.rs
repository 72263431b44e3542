//! [`Recent`]: the changes that no flush has journalled yet, for whoever opens the overlay after this process was
//! killed while the machine ran on. Specification: docs/format/overlay.md, "Recent changes"
//!
//! Nothing here is ever synced: after a power cut the boot id is another one and all of it is ignored.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Place;
use super::error::{Action, OverlayError};
use super::format::Record;
use super::journal::split;
use super::map::State;
use crate::disk::Disk;

const MAGIC: [u8; 8] = *b"LBOATOR1";
const NAMES: [&str; 2] = ["recent.0", "recent.1"];
const HEADER_LEN: usize = size_of::<RawHeader>();
const ENTRY_LEN: usize = size_of::<RawEntry>();
/// A flush goes over to the other file when this one is longer.
const TURN_AT: u64 = 1 << 20;
/// Entries read at once.
const STEP: u64 = 4096;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    boot: [u8; 16],
    epoch: U64,
    crc32c: U32,
    reserved: [u8; 28],
}
const _: () = assert!(size_of::<RawHeader>() == 64);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    start: U64,
    count: U32,
    state: U32,
    crc32c: U32,
}
const _: () = assert!(size_of::<RawEntry>() == 20);

impl RawEntry {
    fn new(header_crc: u32, record: Record) -> RawEntry {
        let state = U32::new(match record.state {
            State::Base => 0,
            State::Data => 1,
            State::Zero => 2,
        });
        let mut raw = RawEntry { start: record.start.into(), count: record.count.into(), state, crc32c: U32::ZERO };
        raw.crc32c = raw.checksum(header_crc).into();
        raw
    }

    fn checksum(&self, header_crc: u32) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&header_crc.to_le_bytes()), &self.as_bytes()[..ENTRY_LEN - 4])
    }

    fn check(&self, header_crc: u32, grains: u64) -> Option<Record> {
        let state = match self.state.get() {
            1 => State::Data,
            2 => State::Zero,
            _ => return None,
        };
        let (start, count) = (self.start.get(), self.count.get());
        let inside = count > 0 && start.checked_add(u64::from(count)).is_some_and(|end| end <= grains);
        (inside && self.checksum(header_crc) == self.crc32c.get()).then_some(Record { start, count, state })
    }
}

#[derive(Debug)]
pub(super) struct Recent {
    turn: Mutex<Turn>,
}

#[derive(Debug)]
struct Turn {
    place: Place,
    boot: [u8; 16],
    files: [Option<Arc<dyn Disk>>; 2],
    active: usize,
    /// Where the next entry of the active file goes; 0 before it has a header.
    tail: u64,
    epoch: u64,
    header_crc: u32,
    turn_at: u64,
    /// The other file holds changes that no flush has journalled.
    other_counts: bool,
}

/// A file of this boot, read.
struct Found {
    slot: usize,
    epoch: u64,
    header_crc: u32,
    tail: u64,
    records: Vec<Record>,
}

impl Recent {
    /// Starts without any, and removes what an earlier overlay in this folder left.
    pub(super) fn create(place: &Place, boot: [u8; 16]) -> Result<Recent, OverlayError> {
        for name in NAMES {
            match place.folder.remove(&place.file(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Action::Create.failed(&place.shown(name), error));
                }
                _ => {}
            }
        }
        Ok(Recent::assemble(place, boot, [None, None]))
    }

    /// Reads what a process that was killed since the machine started has left, and hands it over in order.
    pub(super) fn open(
        place: &Place,
        boot: [u8; 16],
        grains: u64,
        mut apply: impl FnMut(Record),
    ) -> Result<Recent, OverlayError> {
        let mut files = [None, None];
        let mut found = Vec::new();
        for (slot, name) in NAMES.into_iter().enumerate() {
            let path = place.shown(name);
            match place.folder.open_exclusive(&place.file(name)) {
                Ok(file) => {
                    let read = read(&*file, slot, boot, grains).map_err(|error| Action::Read.failed(&path, error))?;
                    if let Some(found) = &read {
                        // Behind an entry that was not written in full nothing may come back.
                        file.set_len(found.tail).map_err(|error| Action::Write.failed(&path, error))?;
                    }
                    found.extend(read);
                    files[slot] = Some(file);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Action::Open.failed(&path, error)),
            }
        }
        found.sort_by_key(|found: &Found| found.epoch);
        let recent = Recent::assemble(place, boot, files);
        let mut turn = recent.turn();
        turn.other_counts = found.len() == 2;
        for found in found {
            (turn.active, turn.tail) = (found.slot, found.tail);
            (turn.epoch, turn.header_crc) = (found.epoch, found.header_crc);
            found.records.into_iter().for_each(&mut apply);
        }
        drop(turn);
        Ok(recent)
    }

    fn assemble(place: &Place, boot: [u8; 16], files: [Option<Arc<dyn Disk>>; 2]) -> Recent {
        let place = place.clone();
        let turn = Turn {
            place,
            boot,
            files,
            active: 0,
            tail: 0,
            epoch: 0,
            header_crc: 0,
            turn_at: TURN_AT,
            other_counts: false,
        };
        Recent { turn: Mutex::new(turn) }
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn set_turn_at(&self, bytes: u64) {
        self.turn().turn_at = bytes;
    }

    /// Appends a change, after it was noted for the next flush.
    pub(super) fn append(&self, range: Range<u64>, state: State) -> Result<(), OverlayError> {
        let mut turn = self.turn();
        let path = turn.place.shown(NAMES[turn.active]);
        turn.append(range, state).map_err(|error| Action::Write.failed(&path, error))
    }

    /// Goes over to the other file if this one is long. Called by a flush after it took the changes it will journal:
    /// the file it leaves holds no others.
    pub(super) fn turn_over(&self) {
        let mut turn = self.turn();
        if turn.tail >= turn.turn_at && !turn.other_counts {
            turn.active ^= 1;
            turn.tail = 0;
            turn.other_counts = true;
        }
    }

    /// Empties the file that was left. Called by a flush that is durable.
    pub(super) fn settle(&self) -> Result<(), OverlayError> {
        let mut turn = self.turn();
        if turn.other_counts {
            let other = turn.active ^ 1;
            let path = turn.place.shown(NAMES[other]);
            if let Some(file) = &turn.files[other] {
                file.set_len(0).map_err(|error| Action::Write.failed(&path, error))?;
            }
            turn.other_counts = false;
        }
        Ok(())
    }

    /// Forgets everything: after a failed sync only what is journalled may count.
    pub(super) fn discard(&self) {
        for file in self.turn().files.iter().flatten() {
            if let Err(error) = file.set_len(0) {
                tracing::warn!(%error, "cannot forget the changes that were not flushed");
            }
        }
    }
}

impl Turn {
    fn append(&mut self, range: Range<u64>, state: State) -> io::Result<()> {
        if self.tail == 0 {
            self.begin()?;
        }
        let Some(file) = &self.files[self.active] else { return Err(io::ErrorKind::NotFound.into()) };
        for record in split(range.start, range.end, state) {
            file.write_at(self.tail, RawEntry::new(self.header_crc, record).as_bytes())?;
            self.tail += ENTRY_LEN as u64;
        }
        Ok(())
    }

    /// Empties the active file, or creates it, and gives it a header.
    fn begin(&mut self) -> io::Result<()> {
        let file = match &self.files[self.active] {
            Some(file) => Arc::clone(file),
            None => self.place.folder.create(&self.place.file(NAMES[self.active]))?,
        };
        self.files[self.active] = Some(Arc::clone(&file));
        file.set_len(0)?;
        let mut raw = RawHeader {
            magic: MAGIC,
            boot: self.boot,
            epoch: U64::new(self.epoch + 1),
            crc32c: U32::ZERO,
            reserved: [0; 28],
        };
        let crc = crc32c::crc32c(&raw.as_bytes()[..32]);
        raw.crc32c = crc.into();
        file.write_at(0, raw.as_bytes())?;
        self.epoch += 1;
        self.header_crc = crc;
        self.tail = HEADER_LEN as u64;
        Ok(())
    }
}

/// Reads a file up to its first entry that is not whole; nothing if it is not of this boot.
fn read(file: &dyn Disk, slot: usize, boot: [u8; 16], grains: u64) -> io::Result<Option<Found>> {
    let len = file.len()?;
    if len < HEADER_LEN as u64 {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_LEN];
    file.read_at(0, &mut bytes)?;
    let Ok(header) = RawHeader::ref_from_bytes(&bytes) else { return Ok(None) };
    let header_crc = header.crc32c.get();
    if header.magic != MAGIC || header.boot != boot || crc32c::crc32c(&bytes[..32]) != header_crc {
        return Ok(None);
    }
    let mut found = Found { slot, epoch: header.epoch.get(), header_crc, tail: HEADER_LEN as u64, records: Vec::new() };
    let mut buffer = Vec::new();
    loop {
        let entries = STEP.min((len - found.tail) / ENTRY_LEN as u64);
        let wanted = usize::try_from(entries).map_or(0, |entries| entries * ENTRY_LEN);
        buffer.resize(wanted, 0);
        file.read_at(found.tail, &mut buffer)?;
        for bytes in buffer.chunks_exact(ENTRY_LEN) {
            let entry = RawEntry::ref_from_bytes(bytes).ok().and_then(|raw| raw.check(header_crc, grains));
            let Some(record) = entry else { return Ok(Some(found)) };
            found.records.push(record);
            found.tail += ENTRY_LEN as u64;
        }
        if entries == 0 {
            return Ok(Some(found));
        }
    }
}
