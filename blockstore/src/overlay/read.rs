//! Reading: each run of grains from where its state says.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::error::{Action, OverlayError};
use super::format::GRAIN;
use super::map::State;
use super::{DATA_NAME, Overlay};
use crate::base::{Extent, Segment};
use crate::disk::ReadAt;

/// A read from the data file that a resident read may do at most.
const RESIDENT_MAX: u64 = 64 << 10;

/// Whether a range was written to since the recovery point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangedExtent {
    /// Length in bytes, never 0.
    pub length: u64,
    /// Whether the overlay holds it, as data or as zeroes.
    pub changed: bool,
}

/// The grains that a range of bytes touches.
pub(super) fn grains(offset: u64, length: u64) -> Range<u64> {
    offset / GRAIN..(offset + length).div_ceil(GRAIN)
}

fn push_hole(out: &mut Vec<Segment>, first: usize, length: u64) {
    if out.len() > first
        && let Some(Segment::Hole(last)) = out.last_mut()
    {
        *last += length;
    } else {
        out.push(Segment::Hole(length));
    }
}

impl Overlay {
    /// The runs of equal state in a range that was checked: offset, length, state.
    fn byte_runs(&self, offset: u64, length: u64) -> impl Iterator<Item = (u64, u64, State)> {
        let end = offset.saturating_add(length);
        let range = if length == 0 { 0..0 } else { grains(offset, length) };
        self.map.runs(range).map(move |(run, state)| {
            let start = offset.max(run.start * GRAIN);
            (start, end.min(run.end * GRAIN) - start, state)
        })
    }

    /// Appends the segments of a range if that takes no waiting: holes, what the base has in memory, and a little of
    /// the data file if the page cache has it. Else leaves `out` as it was and returns false.
    pub fn read_resident(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> bool {
        if self.check_range(offset, length).is_err() {
            return false;
        }
        let first = out.len();
        let mut allowed = RESIDENT_MAX;
        for (offset, length, state) in self.byte_runs(offset, length) {
            let resident = match state {
                State::Base => self.base.read_resident(offset, length, out),
                State::Zero => {
                    push_hole(out, first, length);
                    true
                }
                State::Data if length > allowed => false,
                State::Data => {
                    allowed -= length;
                    match self.resident_data(offset, length) {
                        Some(bytes) => {
                            out.push(Segment::Data(bytes));
                            true
                        }
                        None => false,
                    }
                }
            };
            if !resident {
                out.truncate(first);
                return false;
            }
        }
        true
    }

    fn resident_data(&self, offset: u64, length: u64) -> Option<Bytes> {
        let mut bytes = BytesMut::zeroed(usize::try_from(length).ok()?);
        matches!(self.data.read_resident_at(offset, &mut bytes), Ok(true)).then(|| bytes.freeze())
    }

    /// Appends the segments of a range. On an error `out` is left as it was.
    pub fn read(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), OverlayError> {
        self.check_range(offset, length)?;
        let first = out.len();
        let done = self.read_runs(offset, length, out);
        if done.is_err() {
            out.truncate(first);
        }
        done
    }

    fn read_runs(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), OverlayError> {
        let first = out.len();
        // The runs of the data file, each where it belongs in `out`; they are read together.
        let mut places = Vec::new();
        let mut reads = Vec::new();
        for (offset, length, state) in self.byte_runs(offset, length) {
            match state {
                State::Base => self.base.read(offset, length, out)?,
                State::Zero => push_hole(out, first, length),
                State::Data => {
                    let out_of_range = OverlayError::OutOfRange { offset, length, size: self.size };
                    let length = usize::try_from(length).map_err(|_| out_of_range)?;
                    places.push(out.len());
                    reads.push(ReadAt { offset, buffer: vec![0; length] });
                    out.push(Segment::Data(Bytes::new()));
                }
            }
        }
        let read = self.data.read_many(&mut reads);
        read.map_err(|error| Action::Read.failed(&self.place.shown(DATA_NAME), error))?;
        for (place, read) in places.into_iter().zip(reads) {
            if let Some(segment) = out.get_mut(place) {
                *segment = Segment::Data(read.buffer.into());
            }
        }
        Ok(())
    }

    /// What a range holds: consecutive extents from `offset`, at most `limit` (at least one), neighbours different.
    pub fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, OverlayError> {
        self.check_range(offset, length)?;
        let mut out: Vec<Extent> = Vec::new();
        // Two neighbours may become one, so it is done only when one too many has come.
        let mut push = |extent: Extent| {
            let full = out.len() >= limit.max(1);
            match out.last_mut() {
                _ if extent.length == 0 => {}
                Some(last) if last.hole == extent.hole => last.length += extent.length,
                _ if full => return false,
                _ => out.push(extent),
            }
            true
        };
        for (mut offset, mut length, state) in self.byte_runs(offset, length) {
            if state != State::Base {
                if !push(Extent { length, hole: state == State::Zero }) {
                    return Ok(out);
                }
                continue;
            }
            while length > 0 {
                let found = self.base.extents(offset, length, limit.max(1))?;
                let covered: u64 = found.iter().map(|extent| extent.length).sum();
                if covered == 0 || covered > length {
                    // Not what a base promises; data is always true.
                    push(Extent { length, hole: false });
                    return Ok(out);
                }
                if !found.into_iter().all(&mut push) {
                    return Ok(out);
                }
                offset += covered;
                length -= covered;
            }
        }
        Ok(out)
    }

    /// Where a range differs from the recovery point: consecutive extents from `offset`, at most `limit` (at least one),
    /// neighbours different; nothing for what is outside the disk. Grains are the unit; an overwritten grain counts as
    /// changed whatever it holds.
    pub fn changed(&self, offset: u64, length: u64, limit: usize) -> Vec<ChangedExtent> {
        let length = length.min(self.size.saturating_sub(offset));
        let mut out: Vec<ChangedExtent> = Vec::new();
        for (_, length, state) in self.byte_runs(offset, length) {
            let changed = state != State::Base;
            let full = out.len() >= limit.max(1);
            match out.last_mut() {
                Some(last) if last.changed == changed => last.length += length,
                _ if full => break,
                _ => out.push(ChangedExtent { length, changed }),
            }
        }
        out
    }
}
