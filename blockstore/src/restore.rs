//! [`restore`]: writes a whole disk to a target, with all cores, leaving out what is zero.

use std::io;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use crate::base::Base;
use crate::error::ReadError;
use crate::id::ChunkId;
use crate::manifest::FAN_OUT;
use crate::progress::Progress;
use crate::read::PointDisk;

/// A worker takes about this many bytes of the disk at once; a divisor of what a manifest leaf covers.
const UNIT_BYTES: u64 = 2 << 20;
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Where a disk is written to. Called from several threads, in no particular order.
pub trait Target: Send + Sync {
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
}

/// What to do about ranges that are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPolicy {
    /// The target reads as zeroes already: leave them out, so that it stays sparse.
    TargetIsZero,
    /// The target may hold anything: write zeroes.
    WriteZeroes,
}

/// Why a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The recovery point could not be read.
    #[error("cannot read the disk at offset {offset}")]
    Read {
        /// Where, to the chunk.
        offset: u64,
        /// Why.
        source: ReadError,
    },
    /// The target could not be written.
    #[error("cannot write the target at offset {offset}")]
    Target {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// No threads.
    #[error("cannot start worker threads")]
    Threads(#[source] io::Error),
    /// The caller cancelled; the target is incomplete.
    #[error("the restore was cancelled")]
    Cancelled,
}

/// What a restore did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RestoreStats {
    /// Bytes of data written.
    pub data: u64,
    /// Bytes that are zero, written or left out.
    pub zero: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Writes all of `disk` to `target`. The chunk cache is neither used nor filled. Nothing is synced: that is the
/// target's owner's to do. After an error the target is incomplete.
pub fn restore(
    disk: &PointDisk,
    target: &dyn Target,
    zeroes: ZeroPolicy,
    progress: &Progress,
) -> Result<RestoreStats, RestoreError> {
    let began = Instant::now();
    let work = Work {
        disk,
        target,
        zeroes,
        progress,
        unit: (UNIT_BYTES / disk.chunk_size()).clamp(1, FAN_OUT),
        next: AtomicU64::new(0),
        data: AtomicU64::new(0),
        zero: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    progress.add_total(disk.size());
    let workers = thread::available_parallelism().map_or(2, |cores| cores.get().min(32));
    thread::scope(|scope| {
        for _ in 0..workers {
            let worker = thread::Builder::new().name("restore".to_owned());
            if let Err(error) = worker.spawn_scoped(scope, || work.run()) {
                work.fail(RestoreError::Threads(error));
                break;
            }
        }
    });
    match work.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(failure) => Err(failure),
        None => Ok(RestoreStats {
            data: work.data.into_inner(),
            zero: work.zero.into_inner(),
            seconds: began.elapsed().as_secs_f64(),
        }),
    }
}

struct Work<'a> {
    disk: &'a PointDisk,
    target: &'a dyn Target,
    zeroes: ZeroPolicy,
    progress: &'a Progress,
    /// Chunks taken at once.
    unit: u64,
    next: AtomicU64,
    data: AtomicU64,
    zero: AtomicU64,
    stop: AtomicBool,
    failure: Mutex<Option<RestoreError>>,
}

impl Work<'_> {
    fn fail(&self, error: RestoreError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.store(true, Ordering::Release);
    }

    fn run(&self) {
        while !self.stop.load(Ordering::Acquire) {
            let start = self.next.fetch_add(self.unit, Ordering::Relaxed);
            if start >= self.disk.chunks() {
                return;
            }
            let end = (start + self.unit).min(self.disk.chunks());
            let done = match self.progress.is_cancelled() {
                true => Err(RestoreError::Cancelled),
                false => self.write(start, end),
            };
            if let Err(error) = done {
                self.fail(error);
            }
        }
    }

    /// Writes chunks `start..end`, which lie below one manifest leaf.
    fn write(&self, start: u64, end: u64) -> Result<(), RestoreError> {
        let size = self.disk.chunk_size();
        let read = |source| RestoreError::Read { offset: start * size, source };
        let leaf = self.disk.leaf_of(start).map_err(read)?;
        let ids: Vec<ChunkId> = (start..end).map(|chunk| leaf.child(chunk)).collect();
        let stored: Vec<ChunkId> = ids.iter().copied().filter(|id| !id.is_zero()).collect();
        let mut chunks = self.disk.fetcher().chunks(&stored).into_iter();
        for (chunk, id) in (start..end).zip(&ids) {
            let offset = chunk * size;
            let length = size.min(self.disk.size() - offset);
            if id.is_zero() {
                self.zero.fetch_add(length, Ordering::Relaxed);
                if self.zeroes == ZeroPolicy::WriteZeroes {
                    self.write_zeroes(offset, length)?;
                }
            } else if let Some(bytes) = chunks.next() {
                let bytes = bytes.map_err(|source| RestoreError::Read { offset, source })?;
                let bytes = bytes.get(..usize::try_from(length).unwrap_or(usize::MAX)).unwrap_or(&bytes);
                self.target.write_at(offset, bytes).map_err(|source| RestoreError::Target { offset, source })?;
                self.data.fetch_add(length, Ordering::Relaxed);
            }
            self.progress.add_done(length);
        }
        Ok(())
    }

    fn write_zeroes(&self, mut offset: u64, length: u64) -> Result<(), RestoreError> {
        let end = offset + length;
        while offset < end {
            let step = usize::try_from(end - offset).unwrap_or(usize::MAX).min(ZEROES.len());
            let zeroes = ZEROES.get(..step).unwrap_or(&ZEROES);
            self.target.write_at(offset, zeroes).map_err(|source| RestoreError::Target { offset, source })?;
            offset += step as u64;
        }
        Ok(())
    }
}
