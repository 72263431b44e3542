//! [`compare`]: which chunks of a target are not what the recovery point says. Nothing is taken on trust: every chunk that
//! should hold data is read and hashed, and of the others every byte that is no hole is looked at.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::plan::UNIT_BYTES;
use super::work::{Buffer, workers};
use super::{RestoreError, Target};
use crate::base::Base;
use crate::id::ChunkId;
use crate::manifest::FAN_OUT;
use crate::progress::Progress;
use crate::read::PointDisk;

/// Chunks of a disk in which a target differs. Takes memory for leaves that have one.
#[derive(Debug, Default)]
pub struct Differences {
    /// One bit for each chunk, by leaf.
    leaves: BTreeMap<u64, [u64; 8]>,
    bytes: u64,
    unreadable: u64,
    first: Option<u64>,
}

impl Differences {
    /// Whether the target is the disk.
    pub fn is_empty(&self) -> bool {
        self.leaves.is_empty()
    }

    /// Bytes of the chunks that differ.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many of them the target could not read.
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }

    /// Where the first one is.
    pub fn first_offset(&self) -> Option<u64> {
        self.first
    }

    pub(super) fn touches(&self, leaf: u64) -> bool {
        self.leaves.contains_key(&leaf)
    }

    pub(super) fn contains(&self, chunk: u64) -> bool {
        let (word, bit) = place(chunk);
        let leaf = self.leaves.get(&(chunk / FAN_OUT));
        leaf.and_then(|leaf| leaf.get(word)).is_some_and(|word| word & bit != 0)
    }

    fn add(&mut self, chunk: u64, offset: u64, length: u64) {
        let (word, bit) = place(chunk);
        if let Some(word) = self.leaves.entry(chunk / FAN_OUT).or_default().get_mut(word) {
            *word |= bit;
        }
        self.bytes += length;
        self.first = Some(self.first.map_or(offset, |first| first.min(offset)));
    }

    fn join(&mut self, other: Differences) {
        self.leaves.extend(other.leaves); // a leaf is one worker's
        self.bytes += other.bytes;
        self.unreadable += other.unreadable;
        self.first = self.first.into_iter().chain(other.first).min();
    }
}

fn place(chunk: u64) -> (usize, u64) {
    let at = chunk % FAN_OUT;
    (usize::try_from(at / 64).unwrap_or(0), 1 << (at % 64))
}

/// Compares a target that can be read with the disk. What the target cannot read differs.
pub fn compare(disk: &PointDisk, target: &dyn Target, progress: &Progress) -> Result<Differences, RestoreError> {
    progress.add_total(disk.size());
    let compare = Compare { disk, target, progress, next: Mutex::new(0), stop: AtomicBool::new(false) };
    let found = Mutex::new(Ok(Differences::default()));
    let work = || {
        let mine = compare.work();
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *found, mine) {
            (Ok(all), Ok(mine)) => all.join(mine),
            (Ok(_), Err(error)) => *found = Err(error),
            (Err(_), _) => {}
        }
    };
    thread::scope(|scope| {
        for _ in 1..workers() {
            let _ = thread::Builder::new().name("compare".to_owned()).spawn_scoped(scope, work); // or fewer
        }
        work();
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

struct Compare<'a> {
    disk: &'a PointDisk,
    target: &'a dyn Target,
    progress: &'a Progress,
    next: Mutex<u64>,
    stop: AtomicBool,
}

impl Compare<'_> {
    fn work(&self) -> Result<Differences, RestoreError> {
        let mut found = Differences::default();
        let mut buffer = Buffer::new(UNIT_BYTES.max(self.disk.chunk_size()));
        while let Some(leaf) = self.dispense().inspect_err(|_| self.stop.store(true, Ordering::Release))? {
            self.leaf(leaf, &mut buffer, &mut found).inspect_err(|_| self.stop.store(true, Ordering::Release))?;
        }
        Ok(found)
    }

    /// The next leaf at which either side may hold something.
    fn dispense(&self) -> Result<Option<u64>, RestoreError> {
        if self.progress.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        let leaf_bytes = FAN_OUT * self.disk.chunk_size();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let leaf = *next;
            let offset = leaf.saturating_mul(leaf_bytes);
            if self.stop.load(Ordering::Acquire) || leaf >= self.disk.chunks().div_ceil(FAN_OUT) {
                return Ok(None);
            }
            let read = |source| RestoreError::Read { offset, source };
            let zeroes = self.disk.zero_leaves(leaf).map_err(read)?;
            if zeroes == 0 {
                *next += 1;
                return Ok(Some(leaf));
            }
            let data = self.next_data(offset).map_or(u64::MAX, |data| data / leaf_bytes);
            if data == leaf {
                *next += 1;
                return Ok(Some(leaf));
            }
            *next = leaf.saturating_add(zeroes).min(data);
            let end = next.saturating_mul(leaf_bytes).min(self.disk.size());
            self.progress.add_done(end - offset);
        }
    }

    /// Where the target may hold something at or after an offset.
    fn next_data(&self, offset: u64) -> Option<u64> {
        match self.target.next_data(offset) {
            Ok(next) => next.map(|range| range.start.max(offset)),
            Err(_) => Some(offset), // reading it will tell
        }
    }

    fn leaf(&self, number: u64, buffer: &mut Buffer, found: &mut Differences) -> Result<(), RestoreError> {
        let size = self.disk.chunk_size();
        let first = number * FAN_OUT;
        let leaf = self.disk.leaf_of(first).map_err(|source| RestoreError::Read { offset: first * size, source })?;
        let end = (first + FAN_OUT).min(self.disk.chunks());
        let unit = (UNIT_BYTES / size).max(1);
        let mut at = first;
        while at < end {
            let to = (at + unit).min(end);
            let ids: Vec<ChunkId> = (at..to).map(|chunk| leaf.child(chunk)).collect();
            self.unit(at, &ids, buffer, found);
            let bytes = (to * size).min(self.disk.size()) - at * size;
            self.progress.add_done(bytes);
            if self.progress.is_cancelled() {
                return Err(RestoreError::Cancelled);
            }
            at = to;
        }
        Ok(())
    }

    fn unit(&self, first: u64, ids: &[ChunkId], buffer: &mut Buffer, found: &mut Differences) {
        let size = self.disk.chunk_size();
        let offset = first * size;
        let to_usize = |n: u64| usize::try_from(n).unwrap_or(usize::MAX); // inside the buffer
        let length = (ids.len() as u64 * size).min(self.disk.size() - offset);
        if ids.iter().all(ChunkId::is_zero) && self.next_data(offset).is_none_or(|data| data >= offset + length) {
            return;
        }
        let bytes = buffer.bytes();
        let Some((there, padding)) = bytes.split_at_mut_checked(to_usize(length)) else { return };
        padding.fill(0); // the last chunk of a disk is padded to a whole one
        let whole = self.target.read_at(offset, there).is_ok();
        for (chunk, (id, bytes)) in (first..).zip(ids.iter().zip(bytes.chunks_exact_mut(to_usize(size)))) {
            let at = chunk * size;
            let length = size.min(self.disk.size() - at);
            // After a failed read chunk by chunk: one bad sector must not condemn its neighbours.
            let readable =
                whole || self.target.read_at(at, bytes.get_mut(..to_usize(length)).unwrap_or_default()).is_ok();
            found.unreadable += u64::from(!readable);
            let same = readable
                && if id.is_zero() {
                    bytes.iter().all(|byte| *byte == 0)
                } else {
                    self.disk.fetcher().keyring.chunk_id(bytes) == *id
                };
            if !same {
                found.add(chunk, at, length);
            }
        }
    }
}
