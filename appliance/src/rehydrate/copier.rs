//! Copies regions of a disk to production storage and compares them, one run of neighbours at a time.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use blockstore::base::Segment;
use blockstore::overlay::OverlayError;
use nbd_server::export::ZeroMode;

use super::checkpoint;
use super::live::LiveDisk;
use super::pace::Pace;
use super::regions::{REGION, Regions};
use super::target::{Place, Production};

/// Neighbours are read and written together, up to this many.
const RUN: u64 = 16;
/// Threads that copy one disk.
const THREADS: usize = 3;
/// A region that differs this often although it was written anew is the target's fault.
const DIFFERENCES: u64 = 5;

/// A disk on its way.
#[derive(Debug)]
pub struct Move {
    /// The disk's name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// What the guest sees.
    pub disk: Arc<LiveDisk>,
    /// Where it moves to.
    pub place: Place,
    /// The same, open.
    pub target: Arc<dyn Production>,
    /// What is copied already.
    pub regions: Arc<Regions>,
    /// Where that is noted for a restart.
    pub checkpoint: PathBuf,
    /// Bytes copied since the process began to copy.
    pub copied: AtomicU64,
    /// Bytes of that which are no holes.
    pub data: AtomicU64,
    /// Nanoseconds that the threads spent on copying, without what the pace had them wait.
    pub busy: AtomicU64,
    /// Comparisons that failed since the last that did not.
    pub differences: AtomicU64,
}

/// Why a copy does not go on.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The disk cannot be read.
    #[error("cannot read disk {disk} at offset {offset}")]
    Source {
        /// Which disk.
        disk: String,
        /// Where.
        offset: u64,
        /// Why.
        source: OverlayError,
    },
    /// The target cannot be written or read.
    #[error("cannot {action} {target} at offset {offset}")]
    Target {
        /// What was tried.
        action: &'static str,
        /// The target.
        target: Place,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The target does not hold what was written to it.
    #[error("{target} returns other bytes at offset {offset} than were written there, again and again")]
    Differs {
        /// The target.
        target: Place,
        /// Where.
        offset: u64,
    },
    /// What is copied cannot be noted.
    #[error("cannot note what is copied in {}", path.display())]
    Note {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The disk has no overlay any more.
    #[error("disk {disk} is on production storage already")]
    Moved {
        /// Which disk.
        disk: String,
    },
}

/// What a pass over the open, or over the unproven, regions does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Copies what is open.
    Copy,
    /// Compares what is copied.
    Prove,
}

impl Move {
    /// Bytes that are on the target already.
    pub fn hydrated(&self) -> u64 {
        let regions = &self.regions;
        ((regions.total() - regions.open()) * REGION).min(self.size)
    }

    /// How long what is open would take to copy without a limit, by what one thread has needed for data so far; as good
    /// as for ever while it has copied none.
    pub fn time_left(&self) -> Duration {
        let nanos = u128::from(self.busy.load(Ordering::Relaxed)) * u128::from(self.regions.open() * REGION);
        let each = nanos.checked_div(u128::from(self.data.load(Ordering::Relaxed)));
        Duration::from_nanos(each.and_then(|nanos| u64::try_from(nanos).ok()).unwrap_or(u64::MAX))
    }

    /// Goes once over the regions of a kind with several threads, until none is left, one fails, or `stop`.
    pub fn pass(&self, pass: Pass, pace: &Pace, stop: &AtomicBool) -> Result<(), CopyError> {
        let cursor = AtomicU64::new(0);
        let failed = AtomicBool::new(false);
        let work = || -> Result<(), CopyError> {
            let mut buffer = Vec::new();
            while !stop.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
                let Some((first, count)) = self.take_run(pass, &cursor) else { break };
                pace.take(count * REGION, stop);
                let done = match pass {
                    Pass::Copy => self.copy(first, count),
                    Pass::Prove => self.prove(first, count, &mut buffer),
                };
                if let Err(error) = done {
                    (first..first + count).for_each(|region| self.regions.reopen(region));
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
            let mut ended = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            // The scope waits for those behind a failed one.
            ended.try_for_each(|ended| ended)
        })
    }

    /// Copies the regions that the guest has read, which are in the cache.
    pub fn copy_recent(&self, pace: &Pace, stop: &AtomicBool) -> Result<(), CopyError> {
        let recent = self.disk.recently_read();
        let mut at = 0;
        while let Some(region) = recent.next(at) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            at = region + 1;
            if self.regions.take(region) {
                pace.take(REGION, stop);
                self.copy(region, 1).inspect_err(|_| self.regions.reopen(region))?;
            }
        }
        Ok(())
    }

    /// The next run of regions; threads that share a cursor get different ones.
    fn take_run(&self, pass: Pass, cursor: &AtomicU64) -> Option<(u64, u64)> {
        let next = |from| match pass {
            Pass::Copy => self.regions.take_open(from),
            Pass::Prove => self.regions.take_unproven(from),
        };
        let first = next(cursor.load(Ordering::Relaxed))?;
        let mut count = 1;
        while count < RUN {
            let joins = match pass {
                Pass::Copy => self.regions.take(first + count),
                Pass::Prove => self.regions.take_to_prove(first + count),
            };
            if !joins {
                break;
            }
            count += 1;
        }
        cursor.fetch_max(first + count, Ordering::Relaxed);
        Some((first, count))
    }

    fn range(&self, first: u64, count: u64) -> (u64, u64) {
        let offset = first * REGION;
        (offset, (count * REGION).min(self.size - offset))
    }

    fn read(&self, offset: u64, length: u64) -> Result<Vec<Segment>, CopyError> {
        let Some(export) = self.disk.overlay() else { return Err(CopyError::Moved { disk: self.name.clone() }) };
        let mut segments = Vec::new();
        let read = export.overlay.read(offset, length, &mut segments);
        read.map_err(|source| CopyError::Source { disk: self.name.clone(), offset, source })?;
        Ok(segments)
    }

    fn target_failed(&self, action: &'static str, offset: u64) -> impl Fn(io::Error) -> CopyError + '_ {
        move |source| CopyError::Target { action, target: self.place.clone(), offset, source }
    }

    fn copy(&self, first: u64, count: u64) -> Result<(), CopyError> {
        let began = Instant::now();
        let (mut offset, length) = self.range(first, count);
        for segment in self.read(offset, length)? {
            let write = self.target_failed("write", offset);
            match segment {
                Segment::Data(bytes) => {
                    self.target.write_at(offset, &bytes).map_err(write)?;
                    self.data.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    offset += bytes.len() as u64;
                }
                Segment::Hole(length) => {
                    let (clear, hole) = self.target.extent(offset, length).unwrap_or((0, false));
                    if !(hole && clear == length) {
                        self.target.zero(offset, length, ZeroMode::MayPunch).map_err(write)?;
                    }
                    offset += length;
                }
            }
        }
        (first..first + count).for_each(|region| self.regions.copied(region));
        self.copied.fetch_add(length, Ordering::Relaxed);
        self.busy.fetch_add(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }

    /// Compares a run; regions that differ are open again.
    fn prove(&self, first: u64, count: u64, buffer: &mut Vec<u8>) -> Result<(), CopyError> {
        let (offset, length) = self.range(first, count);
        let segments = self.read(offset, length)?;
        let (clear, hole) = self.target.extent(offset, length).unwrap_or((0, false));
        if hole && clear == length && segments.iter().all(|segment| matches!(segment, Segment::Hole(_))) {
            return Ok(());
        }
        buffer.resize(usize::try_from(length).unwrap_or(usize::MAX), 0); // at most a run
        self.target.forget(offset, length);
        self.target.read_at(offset, buffer).map_err(self.target_failed("read back", offset))?;
        let mut at = 0;
        let mut differs = Vec::new();
        for segment in segments {
            let here = buffer.get(at..).unwrap_or_default();
            match segment {
                Segment::Data(bytes) => {
                    compare(at, &bytes, here, &mut differs);
                    at += bytes.len();
                }
                Segment::Hole(length) => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX);
                    let here = here.get(..length).unwrap_or(here);
                    if let Some(found) = here.iter().position(|byte| *byte != 0) {
                        differs.push(at + found);
                    }
                    at += length;
                }
            }
        }
        if differs.is_empty() {
            self.differences.store(0, Ordering::Relaxed);
            return Ok(());
        }
        // Of a run that differs all is copied again. Mostly the guest wrote while we compared, which says nothing of the
        // target; a write that is in the overlay and not marked yet is rare, and is forgiven a few times.
        let written = (first..first + count).any(|region| self.regions.is_open(region));
        let times = self.differences.fetch_add(u64::from(!written), Ordering::Relaxed) + u64::from(!written);
        let found = offset + differs.first().map_or(0, |at| *at as u64);
        if times > DIFFERENCES {
            self.differences.store(0, Ordering::Relaxed);
            return Err(CopyError::Differs { target: self.place.clone(), offset: found });
        }
        (first..first + count).for_each(|region| self.regions.reopen(region));
        Ok(())
    }

    /// Makes what is copied durable and notes it for a restart.
    ///
    /// Order: (1) take the set, (2) sync the target, (3) replace the file. With 2 before 1 the file could speak of
    /// bytes that a power cut takes away.
    pub fn note(&self) -> Result<(), CopyError> {
        let written = self.regions.written();
        self.sync()?;
        checkpoint::write(&self.checkpoint, self.size, &written)
            .map_err(|source| CopyError::Note { path: self.checkpoint.clone(), source })
    }

    /// Makes what is copied durable. After a failure nobody knows what is, and all of it is open again.
    pub fn sync(&self) -> Result<(), CopyError> {
        self.target.sync().map_err(|error| {
            (0..self.regions.total()).for_each(|region| self.regions.reopen(region));
            self.target_failed("sync", 0)(error)
        })
    }
}

fn compare(at: usize, want: &[u8], here: &[u8], differs: &mut Vec<usize>) {
    let here = here.get(..want.len()).unwrap_or(here);
    if want != here {
        let same = want.iter().zip(here).take_while(|(a, b)| a == b).count();
        differs.push(at + same);
    }
}
