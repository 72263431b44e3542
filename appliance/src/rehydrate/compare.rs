//! What a disk's guest sees compared with what its target holds, and the threads that go over a disk's regions.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use blockstore::base::Segment;

use super::copier::CopyError;
use super::live::LiveDisk;
use super::pace::Pace;
use super::regions::{REGION, Regions};
use super::target::{Place, Readback};

/// Neighbours are read and written together, up to this many.
const RUN: u64 = 16;
/// Threads that go over one disk.
const THREADS: usize = 3;

/// What a pass over the open, or over the unproven, regions does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Copies what is open.
    Copy,
    /// Compares what is copied.
    Prove,
}

/// A run of neighbouring regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl Run {
    /// Its regions.
    pub fn regions(self) -> std::ops::Range<u64> {
        self.first..self.first + self.count
    }

    /// Offset and length in bytes, on a disk of `size` bytes.
    pub fn bytes(self, size: u64) -> (u64, u64) {
        let offset = self.first * REGION;
        (offset, (self.count * REGION).min(size - offset))
    }
}

/// Goes once over the regions of a kind with several threads, until none is left, one fails, or `stop`. The regions of
/// a run that failed are open again.
pub fn over(
    regions: &Regions,
    pass: Pass,
    pace: &Pace,
    stop: &AtomicBool,
    work: impl Fn(Run, &mut Vec<u8>) -> Result<(), CopyError> + Sync,
) -> Result<(), CopyError> {
    let cursor = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<(), CopyError> {
        let mut buffer = Vec::new();
        while !stop.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
            let Some(run) = take(regions, pass, &cursor) else { break };
            pace.take(run.count * REGION, stop);
            if let Err(error) = work(run, &mut buffer) {
                run.regions().for_each(|region| regions.reopen(region));
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        let mut ended =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        // The scope waits for those behind a failed one.
        ended.try_for_each(|ended| ended)
    })
}

/// The next run of regions; threads that share a cursor get different ones.
fn take(regions: &Regions, pass: Pass, cursor: &AtomicU64) -> Option<Run> {
    let from = cursor.load(Ordering::Relaxed);
    let first = match pass {
        Pass::Copy => regions.take_open(from),
        Pass::Prove => regions.take_unproven(from),
    }?;
    let mut count = 1;
    while count < RUN {
        let joins = match pass {
            Pass::Copy => regions.take(first + count),
            Pass::Prove => regions.take_to_prove(first + count),
        };
        if !joins {
            break;
        }
        count += 1;
    }
    cursor.fetch_max(first + count, Ordering::Relaxed);
    Some(Run { first, count })
}

/// One side of a comparison.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// The disk's name.
    pub name: &'a str,
    /// What the guest sees.
    pub disk: &'a LiveDisk,
    /// Where it moves to.
    pub place: &'a Place,
    /// The same, open.
    pub target: &'a dyn Readback,
}

impl Pair<'_> {
    /// What the guest sees of a range.
    pub fn read(&self, offset: u64, length: u64) -> Result<Vec<Segment>, CopyError> {
        let Some(export) = self.disk.overlay() else { return Err(CopyError::Moved { disk: self.name.to_owned() }) };
        let mut segments = Vec::new();
        let read = export.overlay.read(offset, length, &mut segments);
        read.map_err(|source| CopyError::Source { disk: self.name.to_owned(), offset, source })?;
        Ok(segments)
    }

    /// The offset of the first byte in a range that differs on the two sides.
    pub fn difference(&self, offset: u64, length: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>, CopyError> {
        let segments = self.read(offset, length)?;
        let (clear, hole) = self.target.extent(offset, length).unwrap_or((0, false));
        if hole && clear == length && segments.iter().all(|segment| matches!(segment, Segment::Hole(_))) {
            return Ok(None);
        }
        buffer.resize(usize::try_from(length).unwrap_or(usize::MAX), 0); // at most a run
        self.target.forget(offset, length);
        self.target.read_at(offset, buffer).map_err(|source| CopyError::Target {
            action: "read back",
            target: self.place.clone(),
            offset,
            source,
        })?;
        let mut at = 0;
        for segment in segments {
            let here = buffer.get(at..).unwrap_or_default();
            let found = match &segment {
                Segment::Data(bytes) => differs(bytes, here),
                Segment::Hole(length) => {
                    let length = usize::try_from(*length).unwrap_or(usize::MAX);
                    here.get(..length).unwrap_or(here).iter().position(|byte| *byte != 0)
                }
            };
            if let Some(found) = found {
                return Ok(Some(offset + (at + found) as u64));
            }
            at += match segment {
                Segment::Data(bytes) => bytes.len(),
                Segment::Hole(length) => usize::try_from(length).unwrap_or(usize::MAX),
            };
        }
        Ok(None)
    }
}

fn differs(want: &[u8], here: &[u8]) -> Option<usize> {
    let here = here.get(..want.len()).unwrap_or(here);
    (want != here).then(|| want.iter().zip(here).take_while(|(a, b)| a == b).count())
}
