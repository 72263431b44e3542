//! Writing: the order is that of docs/format/overlay.md, "Write" and "Write zeroes, trim".

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::error::{Action, OverlayError};
use super::format::GRAIN;
use super::map::State;
use super::read::grains;
use super::{DATA_NAME, Overlay};
use crate::base::Segment;

const GRAIN_LEN: usize = 4096;
const _: () = assert!(GRAIN_LEN as u64 == GRAIN);

/// Allocated zeroes are written in pieces of this size.
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// The data file is written in pieces of this size. The page cache keeps what came in one piece in one folio, and ext4
/// looks at every block of a folio that is written to: a later write of 4 KiB into what was written 256 KiB at a time
/// costs 10 us, 1 MiB at a time 34 us, 32 KiB at a time 2 us, and the pieces together no more than the whole.
const WRITE_PIECE: u64 = 32 << 10;

fn small(value: u64) -> usize {
    usize::try_from(value).expect("at most the length of a buffer in memory")
}

impl Overlay {
    /// Writes `data` at `offset`; any offset and length. Durable after the next [`Overlay::flush`] that starts after
    /// this returned. After an error each byte of the range holds its old or its new value.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), OverlayError> {
        self.check_range(offset, data.len() as u64)?;
        self.check_poison()?;
        if data.is_empty() {
            return Ok(());
        }
        self.relieve()?;
        let range = grains(offset, data.len() as u64);
        let _turn = self.ranges.lock(range.clone());
        let written = self.write_locked(offset, data).and_then(|()| self.mark(range, State::Data));
        self.writes.fetch_add(1, Ordering::Release); // also after an error: something may have been written
        written.map_err(|error| self.judge(error))
    }

    /// [`Overlay::write`] if it needs nothing but the page cache: whole grains, nobody else at them, no flush due.
    /// `None` if not; nothing is written then.
    pub fn write_resident(&self, offset: u64, data: &[u8]) -> Option<Result<(), OverlayError>> {
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= self.size)?;
        let aligned = offset.is_multiple_of(GRAIN) && (end.is_multiple_of(GRAIN) || end == self.size);
        if data.is_empty() || !aligned || self.is_poisoned() || self.wants_relief() {
            return None;
        }
        let range = grains(offset, data.len() as u64);
        let _turn = self.ranges.try_lock(range.clone())?;
        let written = self.write_data(offset, data).and_then(|()| self.mark(range, State::Data));
        self.writes.fetch_add(1, Ordering::Release);
        Some(written.map_err(|error| self.judge(error)))
    }

    /// Makes a range read as zeroes. Whole grains take no space afterwards unless they are to be kept allocated, so
    /// that a later write there finds space.
    pub fn write_zeroes(&self, offset: u64, length: u64, allocate: bool) -> Result<(), OverlayError> {
        self.check_range(offset, length)?;
        if !allocate {
            return self.zero(offset, length);
        }
        let mut done = 0;
        while done < length {
            let step = (length - done).min(ZEROES.len() as u64);
            self.write(offset + done, &ZEROES[..small(step)])?;
            done += step;
        }
        Ok(())
    }

    /// The guest no longer needs a range: it reads as zeroes afterwards, and whole grains take no space.
    pub fn trim(&self, offset: u64, length: u64) -> Result<(), OverlayError> {
        self.check_range(offset, length)?;
        self.zero(offset, length)
    }

    fn zero(&self, offset: u64, length: u64) -> Result<(), OverlayError> {
        self.check_poison()?;
        if length == 0 {
            return Ok(());
        }
        self.relieve()?;
        let _turn = self.ranges.lock(grains(offset, length));
        let done = self.zero_locked(offset, length);
        self.writes.fetch_add(1, Ordering::Release);
        done.map_err(|error| self.judge(error))
    }

    fn zero_locked(&self, offset: u64, length: u64) -> Result<(), OverlayError> {
        let end = offset + length;
        let whole_end = if end == self.size { end.div_ceil(GRAIN) } else { end / GRAIN };
        let whole = offset.div_ceil(GRAIN)..whole_end;
        if whole.is_empty() {
            // Inside one grain, or across the border of two.
            return self.zero_edges(offset, end);
        }
        self.zero_edges(offset, whole.start * GRAIN)?;
        self.zero_edges((whole.end * GRAIN).min(end), end)?;
        for (run, state) in self.map.runs(whole.clone()) {
            if state == State::Data {
                self.punch(run);
            }
        }
        self.mark(whole, State::Zero)
    }

    /// Zeroes parts of at most two grains.
    fn zero_edges(&self, start: u64, end: u64) -> Result<(), OverlayError> {
        let mut at = start;
        while at < end {
            let grain = at / GRAIN;
            let stop = end.min((grain + 1) * GRAIN);
            if self.map.state(grain) != State::Zero {
                self.write_locked(at, &[0; GRAIN_LEN][..small(stop - at)])?;
                self.mark(grain..grain + 1, State::Data)?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Gives space back. The grains read as zeroes by their state, so a failure wastes space and nothing else.
    fn punch(&self, run: Range<u64>) {
        let start = run.start * GRAIN;
        let length = (run.end * GRAIN).min(self.size) - start;
        if let Err(error) = self.data.punch(start, length) {
            tracing::warn!(file = %self.place.shown(DATA_NAME).display(), start, length, %error, "cannot give space back");
        }
    }

    /// Sets the state of grains, whose bytes are written, and notes them for the next flush if that changed any.
    pub(super) fn mark(&self, range: Range<u64>, state: State) -> Result<(), OverlayError> {
        if self.map.set(range.clone(), state) {
            self.note(range.clone());
            if let Some(recent) = &self.recent {
                recent.append(range, state)?; // after the note: see `Recent::turn_over`
            }
        }
        Ok(())
    }

    /// Writes bytes, and around them what a grain needs that is not in the data file yet. The grains are locked.
    fn write_locked(&self, offset: u64, data: &[u8]) -> Result<(), OverlayError> {
        let (mut start, mut end) = (offset, offset + data.len() as u64);
        let first = start / GRAIN;
        if self.is_partial(first, start, end) {
            let stop = end.min((first + 1) * GRAIN);
            self.write_merged(first, start, &data[..small(stop - start)])?;
            start = stop;
        }
        if start < end {
            let last = (end - 1) / GRAIN;
            if self.is_partial(last, start, end) {
                let from = start.max(last * GRAIN);
                self.write_merged(last, from, &data[small(from - offset)..])?;
                end = from;
            }
        }
        if start < end {
            self.write_data(start, &data[small(start - offset)..small(end - offset)])?;
        }
        Ok(())
    }

    /// Whether `start..end` leaves bytes of a grain to be fetched from elsewhere.
    fn is_partial(&self, grain: u64, start: u64, end: u64) -> bool {
        let covered = start <= grain * GRAIN && end >= ((grain + 1) * GRAIN).min(self.size);
        !covered && self.map.state(grain) != State::Data
    }

    /// Writes a whole grain: `data` at `offset`, the rest as it reads now.
    fn write_merged(&self, grain: u64, offset: u64, data: &[u8]) -> Result<(), OverlayError> {
        let start = grain * GRAIN;
        let length = small(GRAIN.min(self.size - start));
        let mut bytes = [0; GRAIN_LEN];
        if self.map.state(grain) == State::Base {
            let mut segments = Vec::new();
            self.base.read(start, length as u64, &mut segments)?;
            let mut rest = &mut bytes[..length];
            for segment in segments {
                let taken = match &segment {
                    Segment::Data(data) => {
                        let taken = data.len().min(rest.len());
                        rest[..taken].copy_from_slice(&data[..taken]);
                        taken
                    }
                    Segment::Hole(hole) => usize::try_from(*hole).unwrap_or(usize::MAX).min(rest.len()),
                };
                rest = &mut rest[taken..];
            }
        }
        let at = small(offset - start);
        bytes[at..at + data.len()].copy_from_slice(data);
        self.write_data(start, &bytes[..length])
    }

    fn write_data(&self, offset: u64, data: &[u8]) -> Result<(), OverlayError> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let room = small(WRITE_PIECE - at % WRITE_PIECE);
            let (piece, after) = rest.split_at(room.min(rest.len()));
            let written = self.data.write_at(at, piece);
            written.map_err(|error| Action::Write.failed(&self.place.shown(DATA_NAME), error))?;
            at += piece.len() as u64;
            rest = after;
        }
        Ok(())
    }
}
