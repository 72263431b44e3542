//! Copies regions of a disk to production storage and compares them, one run of neighbours at a time.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockstore::base::Segment;
use blockstore::overlay::OverlayError;
use nbd_server::export::ZeroMode;

use super::checkpoint;
use super::compare::{self, Pair, Pass, Run};
use super::live::LiveDisk;
use super::pace::Pace;
use super::regions::{REGION, Regions};
use super::target::{Place, Production};

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
        compare::over(&self.regions, pass, pace, stop, |run, buffer| match pass {
            Pass::Copy => self.copy(run),
            Pass::Prove => self.prove(run, buffer),
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
                self.copy(Run { first: region, count: 1 }).inspect_err(|_| self.regions.reopen(region))?;
            }
        }
        Ok(())
    }

    fn pair(&self) -> Pair<'_> {
        Pair { name: &self.name, disk: &self.disk, place: &self.place, target: &*self.target }
    }

    fn target_failed(&self, action: &'static str, offset: u64) -> impl Fn(io::Error) -> CopyError + '_ {
        move |source| CopyError::Target { action, target: self.place.clone(), offset, source }
    }

    fn copy(&self, run: Run) -> Result<(), CopyError> {
        let began = Instant::now();
        let (mut offset, length) = run.bytes(self.size);
        for segment in self.pair().read(offset, length)? {
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
        run.regions().for_each(|region| self.regions.copied(region));
        self.copied.fetch_add(length, Ordering::Relaxed);
        self.busy.fetch_add(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }

    /// Compares a run; regions that differ are open again.
    fn prove(&self, run: Run, buffer: &mut Vec<u8>) -> Result<(), CopyError> {
        let (offset, length) = run.bytes(self.size);
        let Some(found) = self.pair().difference(offset, length, buffer)? else {
            self.differences.store(0, Ordering::Relaxed);
            return Ok(());
        };
        // Of a run that differs all is copied again. Mostly the guest wrote while we compared, which says nothing of the
        // target; a write that is in the overlay and not marked yet is rare, and is forgiven a few times.
        let written = run.regions().any(|region| self.regions.is_open(region));
        let times = self.differences.fetch_add(u64::from(!written), Ordering::Relaxed) + u64::from(!written);
        if times > DIFFERENCES {
            self.differences.store(0, Ordering::Relaxed);
            return Err(CopyError::Differs { target: self.place.clone(), offset: found });
        }
        run.regions().for_each(|region| self.regions.reopen(region));
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
