//! [`Journal`]: the file that says which grains count. Specification: docs/format/overlay.md

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Place;
use super::error::{Action, Damage, OverlayError};
use super::format::{self, Batch, HEADER_LEN, Header, HeaderError, MAX_RECORDS, Record, SECTOR};
use super::map::{GrainMap, State};
use crate::disk::Disk;

pub(super) const NAME: &str = "journal";
pub(super) const NEW_NAME: &str = "journal.new";

/// A journal is never compacted below this length.
pub(super) const COMPACT_MIN: u64 = 4 << 20;
/// It is compacted when it is this many times as long as the present states need.
const COMPACT_FACTOR: u64 = 4;
/// A flush compacts by itself, and keeps its caller waiting, only if nobody did when the journal is so much longer.
const MUST_COMPACT_FACTOR: u64 = 4;
/// So many records may come while a new journal is written; with more it is given up.
const CARRY_MAX: usize = 1 << 20;
/// So much room is kept behind the last batch, so that a flush finds space and changes no file length.
const RESERVE_LOW: u64 = 64 << 10;
const RESERVE_STEP: usize = 256 << 10;
static ZEROES: [u8; RESERVE_STEP] = [0; RESERVE_STEP];
/// How much is read at once when a journal is loaded; more than the longest batch.
const WINDOW: usize = 2 << 20;

#[derive(Debug)]
pub(super) struct Journal {
    file: Arc<dyn Disk>,
    path: PathBuf,
    header: Header,
    header_crc: u32,
    /// Where the next batch goes.
    tail: u64,
    /// How far the file is known to reach; zeroes from `tail` on, unless `torn`.
    end: u64,
    /// Up to where it is durable.
    synced: u64,
    next_sequence: u64,
    previous: u32,
    /// A batch was written in part behind `tail`.
    torn: bool,
    compact_min: u64,
    compact_at: u64,
    /// What was appended since [`Journal::begin_next`].
    carry: Option<Carry>,
}

#[derive(Debug, Default)]
struct Carry {
    records: Vec<Record>,
    overflow: bool,
}

/// A journal that is to be written beside the present one.
#[derive(Debug)]
pub(super) struct Next {
    header: Header,
    compact_min: u64,
}

impl Next {
    /// Writes it, durably, under the name that nobody reads, with the states that `map` holds now.
    pub(super) fn write(self, place: &Place, map: &GrainMap) -> Result<Journal, OverlayError> {
        let mut journal = Journal::write_new(place, self.header, map, self.compact_min)?;
        journal.sync()?;
        Ok(journal)
    }
}

impl Journal {
    /// Bytes up to the end of the last batch.
    pub(super) fn bytes(&self) -> u64 {
        self.tail
    }

    /// Whether the next flush has to compact.
    pub(super) fn must_compact(&self) -> bool {
        self.carry.is_none() && self.tail >= self.compact_at.saturating_mul(MUST_COMPACT_FACTOR)
    }

    /// Begins a compaction beside the flushes if the journal is long and none is under way: from now on what they
    /// append is kept for [`Journal::end_next`].
    pub(super) fn begin_next(&mut self) -> Option<Next> {
        if self.carry.is_some() || self.tail < self.compact_at {
            return None;
        }
        self.carry = Some(Carry::default());
        Some(self.next())
    }

    fn next(&self) -> Next {
        let generation = self.header.generation.saturating_add(1);
        let header = Header { generation, identity: self.header.identity.clone() };
        Next { header, compact_min: self.compact_min }
    }

    /// What was appended since [`Journal::begin_next`], in order; `None` if that was too much.
    pub(super) fn end_next(&mut self) -> Option<Vec<Record>> {
        self.carry.take().filter(|carry| !carry.overflow).map(|carry| carry.records)
    }

    /// Puts off the next attempt after one that failed.
    pub(super) fn postpone_compaction(&mut self) {
        self.compact_at = self.tail.saturating_add(self.compact_min);
    }

    #[cfg(test)]
    pub(super) fn set_compact_min(&mut self, bytes: u64) {
        self.compact_min = bytes;
        self.compact_at = bytes;
    }

    /// Writes a new journal, under the name that nobody reads, with the states that `map` holds now. Nothing is
    /// durable yet. Compaction begins at `compact_min` bytes.
    pub(super) fn write_new(
        place: &Place,
        header: Header,
        map: &GrainMap,
        compact_min: u64,
    ) -> Result<Journal, OverlayError> {
        let name = place.file(NEW_NAME);
        let path = place.shown(NEW_NAME);
        match place.folder.remove(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Action::Create.failed(&path, error)),
            _ => {}
        }
        let file = place.folder.create(&name).map_err(|error| Action::Create.failed(&path, error))?;
        let (bytes, header_crc) = header.encode();
        file.write_at(0, &bytes).map_err(|error| Action::Write.failed(&path, error))?;
        let mut journal = Journal {
            file,
            path,
            header,
            header_crc,
            tail: HEADER_LEN as u64,
            end: HEADER_LEN as u64,
            synced: 0,
            next_sequence: 1,
            previous: header_crc,
            torn: false,
            compact_min,
            compact_at: compact_min,
            carry: None,
        };
        let mut records = Vec::new();
        let mut runs = map.runs(0..map.grains()).flat_map(|(range, state)| split(range.start, range.end, state));
        loop {
            records.clear();
            records.extend(runs.by_ref().take(MAX_RECORDS));
            if records.is_empty() {
                break;
            }
            journal.append_to_flush(&records, 1)?;
        }
        journal.reserve()?;
        journal.compact_at = compact_min.max(journal.tail.saturating_mul(COMPACT_FACTOR));
        Ok(journal)
    }

    /// Writes the journal that is to take this one's place while nobody appends. Not durable yet.
    pub(super) fn write_next(&self, place: &Place, map: &GrainMap) -> Result<Journal, OverlayError> {
        let next = self.next();
        Journal::write_new(place, next.header, map, next.compact_min)
    }

    /// Gives a new journal, which is synced, the name it is looked for under. After an error nobody knows which of
    /// the two would be found.
    pub(super) fn install(&mut self, place: &Place) -> Result<(), OverlayError> {
        let path = place.shown(NAME);
        place
            .folder
            .rename(&place.file(NEW_NAME), &place.file(NAME))
            .map_err(|error| Action::Rename.failed(&self.path, error))?;
        self.path = path;
        place.sync()
    }

    /// Makes the journal durable. If that fails, what is not durable is taken away again: a process that opens the
    /// overlay later would find it in the host's cache and build on it, although it may never reach the disk.
    pub(super) fn sync(&mut self) -> Result<(), OverlayError> {
        if let Err(error) = self.file.sync() {
            if let Err(error) = self.file.set_len(self.synced) {
                tracing::warn!(journal = %self.path.display(), %error, "cannot take back a flush that failed");
            }
            return Err(Action::Sync.failed(&self.path, error));
        }
        self.synced = self.tail;
        Ok(())
    }

    /// Appends the records of one flush. [`OverlayError::NoSpace`] leaves everything as it was; any other error
    /// poisons.
    pub(super) fn append(&mut self, records: &[Record]) -> Result<(), OverlayError> {
        if self.torn {
            self.cut()?;
        }
        let before = (self.tail, self.next_sequence, self.previous);
        let flush_start = self.next_sequence;
        for records in records.chunks(MAX_RECORDS) {
            if let Err(error) = self.append_to_flush(records, flush_start) {
                (self.tail, self.next_sequence, self.previous) = before;
                self.torn = true;
                return Err(error);
            }
        }
        if let Some(carry) = &mut self.carry {
            carry.overflow |= carry.records.len() + records.len() > CARRY_MAX;
            if carry.overflow {
                carry.records = Vec::new();
            } else {
                carry.records.extend_from_slice(records);
            }
        }
        Ok(())
    }

    fn append_to_flush(&mut self, records: &[Record], flush_start: u64) -> Result<(), OverlayError> {
        let batch = Batch { sequence: self.next_sequence, flush_start, previous: self.previous, crc: 0 };
        let mut bytes = Vec::with_capacity(format::batch_len(records.len()));
        let crc = format::encode_batch(&mut bytes, self.header_crc, batch, records);
        self.file.write_at(self.tail, &bytes).map_err(|error| Action::Write.failed(&self.path, error))?;
        self.tail += bytes.len() as u64;
        self.end = self.end.max(self.tail);
        self.next_sequence += 1;
        self.previous = crc;
        Ok(())
    }

    /// Cuts off what stands behind the last batch, durably, so that it can never be taken for part of a later one.
    fn cut(&mut self) -> Result<(), OverlayError> {
        self.file.set_len(self.tail).map_err(|error| Action::Write.failed(&self.path, error))?;
        self.sync()?;
        self.end = self.tail;
        self.torn = false;
        Ok(())
    }

    /// Sees to it that there is room behind the last batch. Without space that is not an error.
    pub(super) fn reserve(&mut self) -> Result<(), OverlayError> {
        if self.torn || self.end - self.tail >= RESERVE_LOW {
            return Ok(());
        }
        match self.file.write_at(self.end, &ZEROES).map_err(|error| Action::Write.failed(&self.path, error)) {
            Ok(()) => self.end += RESERVE_STEP as u64,
            Err(OverlayError::NoSpace { .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Reads the journal of an overlay and applies it to `map`, whose size `header` has to confirm.
    pub(super) fn load(place: &Place) -> Result<(Journal, GrainMap), OverlayError> {
        let path = place.shown(NAME);
        let file = match place.folder.open_exclusive(&place.file(NAME)) {
            Ok(file) => file,
            // `data` has its name only once the journal had its own.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(OverlayError::Damaged { path, offset: 0, damage: Damage::Missing });
            }
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => return Err(place.busy()),
            Err(error) => return Err(Action::Open.failed(&path, error)),
        };
        let mut window = Window::new(&*file, &path)?;
        let end = window.len;
        let damaged = |offset, damage| OverlayError::Damaged { path: path.clone(), offset, damage };
        let first = window.get(0, HEADER_LEN)?.ok_or_else(|| damaged(0, Damage::TooShort))?;
        let (header, header_crc) = Header::decode(first).map_err(|error| match error {
            HeaderError::Damaged(damage) => damaged(0, damage),
            HeaderError::Unsupported { bits } => OverlayError::Unsupported { path: path.clone(), bits },
        })?;
        let map = GrainMap::new(header.identity.size.div_ceil(format::GRAIN));
        let mut replay =
            Replay { map: &map, header_crc, tail: HEADER_LEN as u64, next_sequence: 1, previous: header_crc };
        replay.run(&mut window, &damaged)?;
        let (tail, next_sequence, previous) = (replay.tail, replay.next_sequence, replay.previous);
        let torn = judge_tail(&mut window, tail, header_crc, next_sequence, &damaged)?;
        let live = map.runs(0..map.grains()).filter(|(_, state)| *state != State::Base).count() as u64;
        let live = format::batch_len(1) as u64 + live.saturating_mul(16);
        let compact_at = COMPACT_MIN.max(live.saturating_mul(COMPACT_FACTOR));
        let compact_min = COMPACT_MIN;
        let mut journal = Journal {
            file,
            path: path.clone(),
            header,
            header_crc,
            tail,
            end,
            synced: tail,
            next_sequence,
            previous,
            torn,
            compact_min,
            compact_at,
            carry: None,
        };
        if torn {
            tracing::warn!(journal = %path.display(), offset = tail, length = end - tail,
                "cutting off a flush that was not completed");
            journal.cut()?;
        }
        // A process that was killed may not have got as far.
        journal.sync()?;
        place.sync()?;
        Ok((journal, map))
    }

    pub(super) fn header(&self) -> &Header {
        &self.header
    }
}

/// The batches that count.
struct Replay<'a> {
    map: &'a GrainMap,
    header_crc: u32,
    tail: u64,
    next_sequence: u64,
    previous: u32,
}

impl Replay<'_> {
    /// Applies batches until one is not valid.
    fn run(
        &mut self,
        window: &mut Window<'_>,
        damaged: &dyn Fn(u64, Damage) -> OverlayError,
    ) -> Result<(), OverlayError> {
        while let Some((bytes, batch)) = window.batch(self.tail, self.header_crc)? {
            if batch.sequence != self.next_sequence || batch.previous != self.previous {
                break;
            }
            if batch.flush_start > batch.sequence || batch.flush_start == 0 {
                return Err(damaged(self.tail, Damage::Field));
            }
            for record in format::records(bytes, self.map.grains()) {
                let Some(Record { start, count, state }) = record else {
                    return Err(damaged(self.tail, Damage::Field));
                };
                self.map.set(start..start + u64::from(count), state);
            }
            self.tail += bytes.len() as u64;
            self.next_sequence = self.next_sequence.checked_add(1).ok_or_else(|| damaged(self.tail, Damage::Field))?;
            self.previous = batch.crc;
        }
        Ok(())
    }
}

/// Says whether something other than zeroes follows the last valid batch, and refuses where a later flush proves
/// that the missing batch was once durable.
fn judge_tail(
    window: &mut Window<'_>,
    tail: u64,
    header_crc: u32,
    missing: u64,
    damaged: &dyn Fn(u64, Damage) -> OverlayError,
) -> Result<bool, OverlayError> {
    let mut torn = false;
    let mut at = tail;
    while at < window.len {
        let length = usize::try_from(window.len - at).map_or(SECTOR, |rest| rest.min(SECTOR));
        let sector = window.get(at, length)?.ok_or_else(|| damaged(at, Damage::TooShort))?;
        if sector.iter().any(|byte| *byte != 0) {
            torn = true;
            if window.batch(at, header_crc)?.is_some_and(|(_, batch)| batch.flush_start > missing) {
                return Err(damaged(tail, Damage::Batch { sequence: missing }));
            }
        }
        at += length as u64;
    }
    Ok(torn)
}

/// A range of grains as records, whose counts have 32 bits.
pub(super) fn split(start: u64, end: u64, state: State) -> impl Iterator<Item = Record> {
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= end || state == State::Base {
            return None;
        }
        let count = u32::try_from(end - at).unwrap_or(u32::MAX);
        let record = Record { start: at, count, state };
        at += u64::from(count);
        Some(record)
    })
}

/// A file seen through a buffer that moves forward.
struct Window<'a> {
    file: &'a dyn Disk,
    path: &'a Path,
    len: u64,
    start: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    fn new(file: &'a dyn Disk, path: &'a Path) -> Result<Window<'a>, OverlayError> {
        let len = file.len().map_err(|error| Action::Read.failed(path, error))?;
        Ok(Window { file, path, len, start: 0, bytes: Vec::new() })
    }

    /// `length` bytes at `offset`, not more than [`WINDOW`], or `None` past the end of the file.
    fn get(&mut self, offset: u64, length: usize) -> Result<Option<&[u8]>, OverlayError> {
        let Some(end) = offset.checked_add(length as u64).filter(|end| *end <= self.len) else { return Ok(None) };
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            let wanted = usize::try_from(self.len - offset).map_or(WINDOW, |rest| rest.min(WINDOW)).max(length);
            self.bytes.resize(wanted, 0);
            self.start = offset;
            let read = self.file.read_at(offset, &mut self.bytes);
            if let Err(error) = read {
                self.bytes.clear();
                return Err(Action::Read.failed(self.path, error));
            }
        }
        let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
        Ok(self.bytes.get(from..).and_then(|rest| rest.get(..length)))
    }

    /// The batch at `offset`, if one with a right checksum is there.
    fn batch(&mut self, offset: u64, header_crc: u32) -> Result<Option<(&[u8], Batch)>, OverlayError> {
        let claimed = self.get(offset, format::BATCH_HEADER_LEN)?.and_then(format::claimed_len);
        let Some(length) = claimed else { return Ok(None) };
        let Some(bytes) = self.get(offset, length)? else { return Ok(None) };
        Ok(format::decode_batch(bytes, header_crc).map(|batch| (bytes, batch)))
    }
}
