//! [`Planner`]: in which order a disk is restored.
//!
//! A window of the disk at a time, pack by pack, and a pack's frames in their order: what stands together is read at
//! once, and a chunk that the window has several times is read once. The packs come in the order in which the disk first
//! needs them, so that a disk stored in one go is written from its beginning to its end.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use super::{Differences, RestoreError, ZeroPolicy};
use crate::base::Base;
use crate::format::TAG_LEN;
use crate::format::run::{Entry, PackRow};
use crate::id::{ChunkId, PackId};
use crate::manifest::FAN_OUT;
use crate::read::PointDisk;

/// Chunks planned at once: about 8 MiB of plan, 8 GiB of a disk with chunks of 64 KiB.
const WINDOW: u64 = 1 << 17;
/// Frames are read together up to this many bytes, with no more than this of others between two of them.
const SPAN_MAX: u32 = 2 << 20;
const GAP_MAX: u32 = 32 << 10;
/// A worker is given at most this much of the disk's data at once.
pub(super) const UNIT_BYTES: u64 = 2 << 20;
/// And this many places to write to, where one chunk stands in many.
const PLACES_MAX: usize = 1024;
const ZEROES_MAX: u64 = 16 << 20;

/// Work for one worker.
pub(super) enum Batch {
    /// Frames of one pack in their order, and the chunks of the disk that each of them makes.
    Frames { pack: PackRow, frames: Vec<Entry>, places: Vec<Place> },
    /// A chunk of the disk that the index does not know now.
    Unknown { chunk: u64, id: ChunkId },
    /// Bytes of the disk to be made zero.
    Zeroes(Range<u64>),
}

/// A chunk of the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub chunk: u64,
    /// Which of the batch's frames.
    pub frame: usize,
}

struct Item {
    /// Of the pack, in the order in which the disk needs them.
    rank: usize,
    chunk: u64,
    entry: Entry,
}

pub(super) struct Planner<'a> {
    disk: &'a PointDisk,
    only: Option<&'a Differences>,
    zeroes: ZeroPolicy,
    next: u64,
    ready: VecDeque<Batch>,
    /// Bytes that are zero and need not be written, since they were asked for last.
    left_out: u64,
}

impl<'a> Planner<'a> {
    pub fn new(disk: &'a PointDisk, only: Option<&'a Differences>, zeroes: ZeroPolicy) -> Planner<'a> {
        Planner { disk, only, zeroes, next: 0, ready: VecDeque::new(), left_out: 0 }
    }

    /// The next batch; none at the end.
    pub fn next(&mut self) -> Result<Option<Batch>, RestoreError> {
        while self.ready.is_empty() && self.next < self.disk.chunks() {
            self.plan()?;
        }
        Ok(self.ready.pop_front())
    }

    pub fn take_left_out(&mut self) -> u64 {
        std::mem::take(&mut self.left_out)
    }

    fn plan(&mut self) -> Result<(), RestoreError> {
        let size = self.disk.chunk_size();
        let end = self.next.saturating_add(WINDOW).min(self.disk.chunks());
        let mut packs: Vec<PackRow> = Vec::new();
        let mut ranks: HashMap<PackId, usize> = HashMap::new();
        let mut items: Vec<Item> = Vec::new();
        let mut zeroes = self.next..self.next;
        while self.next < end {
            let number = self.next / FAN_OUT;
            let border = (number + 1).saturating_mul(FAN_OUT).min(end);
            if self.only.is_some_and(|only| !only.touches(number)) {
                self.next = border;
                continue;
            }
            let read = |source| RestoreError::Read { offset: number * FAN_OUT * size, source };
            let leaf = self.disk.leaf_of(self.next).map_err(read)?;
            if leaf.is_zero() && self.only.is_none() {
                let leaves = self.disk.zero_leaves(number).map_err(read)?.max(1);
                let to = number.saturating_add(leaves).saturating_mul(FAN_OUT).min(self.disk.chunks());
                self.add_zeroes(&mut zeroes, self.next..to);
                self.next = to;
                continue;
            }
            for chunk in self.next..border {
                if self.only.is_some_and(|only| !only.contains(chunk)) {
                    continue;
                }
                let id = leaf.child(chunk);
                if id.is_zero() {
                    self.add_zeroes(&mut zeroes, chunk..chunk + 1);
                    continue;
                }
                let found = self.disk.fetcher().index.first(&id);
                // A longer one cannot be right: whoever reads it alone finds out what is.
                match found.filter(|found| u64::from(found.entry.stored_len) <= size + u64::from(TAG_LEN)) {
                    None => self.ready.push_back(Batch::Unknown { chunk, id }),
                    Some(found) => {
                        let rank = *ranks.entry(found.pack.pack).or_insert_with(|| {
                            packs.push(found.pack);
                            packs.len() - 1
                        });
                        items.push(Item { rank, chunk, entry: found.entry });
                    }
                }
            }
            self.next = border;
        }
        self.close_zeroes(&mut zeroes);
        items.sort_unstable_by_key(|item| (item.rank, item.entry.offset, item.chunk));
        self.cut(&items, &packs);
        Ok(())
    }

    /// Cuts sorted items into batches.
    fn cut(&mut self, items: &[Item], packs: &[PackRow]) {
        let unit = usize::try_from((UNIT_BYTES / self.disk.chunk_size()).max(1)).unwrap_or(1);
        let (mut frames, mut places): (Vec<Entry>, Vec<Place>) = (Vec::new(), Vec::new());
        let mut rank = 0;
        for item in items {
            let joins = match (frames.first(), frames.last()) {
                (Some(first), Some(last)) if rank == item.rank => {
                    let same = last.offset == item.entry.offset && last.id == item.entry.id;
                    let gap = item.entry.offset.saturating_sub(last.offset.saturating_add(last.stored_len));
                    let span = item.entry.offset.saturating_add(item.entry.stored_len).saturating_sub(first.offset);
                    let room = same || (frames.len() < unit && gap <= GAP_MAX && span <= SPAN_MAX);
                    (room && places.len() < PLACES_MAX).then_some(same)
                }
                _ => None,
            };
            if joins.is_none() {
                self.push(rank, packs, &mut frames, &mut places);
                rank = item.rank;
            }
            if joins != Some(true) {
                frames.push(item.entry);
            }
            places.push(Place { chunk: item.chunk, frame: frames.len() - 1 });
        }
        self.push(rank, packs, &mut frames, &mut places);
    }

    fn push(&mut self, rank: usize, packs: &[PackRow], frames: &mut Vec<Entry>, places: &mut Vec<Place>) {
        if let (Some(pack), false) = (packs.get(rank), frames.is_empty()) {
            let (frames, places) = (std::mem::take(frames), std::mem::take(places));
            self.ready.push_back(Batch::Frames { pack: *pack, frames, places });
        }
    }

    /// Joins chunks to the zeroes before them.
    fn add_zeroes(&mut self, run: &mut Range<u64>, more: Range<u64>) {
        if run.end == more.start {
            run.end = more.end;
        } else {
            self.close_zeroes(run);
            *run = more;
        }
    }

    fn close_zeroes(&mut self, run: &mut Range<u64>) {
        let size = self.disk.chunk_size();
        let bytes = |chunk: u64| chunk.saturating_mul(size).min(self.disk.size());
        let (mut start, end) = (bytes(run.start), bytes(run.end));
        *run = run.end..run.end;
        match self.zeroes {
            ZeroPolicy::TargetIsZero => self.left_out += end - start,
            ZeroPolicy::WriteZeroes => {
                while start < end {
                    let to = (start + ZEROES_MAX).min(end);
                    self.ready.push_back(Batch::Zeroes(start..to));
                    start = to;
                }
            }
        }
    }
}
