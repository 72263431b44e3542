//! [`Work`]: the threads of a restore.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::plan::{Batch, Place, Planner, UNIT_BYTES};
use super::{RestoreError, Target};
use crate::base::Base;
use crate::progress::Progress;
use crate::read::PointDisk;

/// Targets that bypass the page cache want their buffers to begin at such a border.
const ALIGNMENT: usize = 4096;

pub(super) struct Work<'a> {
    disk: &'a PointDisk,
    target: &'a dyn Target,
    planner: Mutex<Planner<'a>>,
    progress: &'a Progress,
    data: AtomicU64,
    zero: AtomicU64,
    stop: AtomicBool,
    failure: Mutex<Option<RestoreError>>,
}

/// Twice as many as there are cores: while one waits for the target, another one decodes.
pub(super) fn workers() -> usize {
    thread::available_parallelism().map_or(4, |cores| (cores.get() * 2).min(32))
}

impl<'a> Work<'a> {
    pub fn new(disk: &'a PointDisk, target: &'a dyn Target, planner: Planner<'a>, progress: &'a Progress) -> Work<'a> {
        Work {
            disk,
            target,
            planner: Mutex::new(planner),
            progress,
            data: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Bytes of data and bytes of zeroes that are there now.
    pub fn run(self) -> Result<(u64, u64), RestoreError> {
        thread::scope(|scope| {
            for _ in 0..workers() {
                let worker = thread::Builder::new().name("restore".to_owned());
                if let Err(error) = worker.spawn_scoped(scope, || self.work()) {
                    self.fail(RestoreError::Threads(error));
                    break;
                }
            }
        });
        match self.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure),
            None => Ok((self.data.into_inner(), self.zero.into_inner())),
        }
    }

    fn fail(&self, error: RestoreError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.store(true, Ordering::Release);
    }

    fn work(&self) {
        let mut buffer = Buffer::new(UNIT_BYTES.max(self.disk.chunk_size()));
        while !self.stop.load(Ordering::Acquire) {
            match self.step(&mut buffer) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => self.fail(error),
            }
        }
    }

    /// False when there is nothing left to do.
    fn step(&self, buffer: &mut Buffer) -> Result<bool, RestoreError> {
        if self.progress.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        let batch = {
            let mut planner = self.planner.lock().unwrap_or_else(PoisonError::into_inner);
            let batch = planner.next()?;
            self.are_zero(planner.take_left_out());
            batch
        };
        match batch {
            None => return Ok(false),
            Some(Batch::Zeroes(range)) => {
                let failed = |source| RestoreError::Target { offset: range.start, source };
                self.target.write_zeroes(range.start, range.end - range.start).map_err(failed)?;
                self.are_zero(range.end - range.start);
            }
            Some(Batch::Unknown { chunk, id }) => {
                let offset = chunk * self.disk.chunk_size();
                let bytes = self.disk.fetcher().chunk(&id);
                let bytes = bytes.map_err(|source| RestoreError::Read { offset, source })?;
                self.write(chunk, &bytes)?;
            }
            Some(Batch::Frames { pack, frames, places }) => {
                let bytes = buffer.bytes();
                self.disk.fetcher().fill(&pack, &frames, bytes).map_err(|failed| {
                    let place = places.iter().find(|place| place.frame == failed.at);
                    let offset = place.map_or(0, |place| place.chunk * self.disk.chunk_size());
                    RestoreError::Read { offset, source: failed.source }
                })?;
                self.write_places(&places, bytes)?;
            }
        }
        Ok(true)
    }

    /// Neighbours on the disk that are neighbours in the buffer are written at once.
    fn write_places(&self, places: &[Place], bytes: &[u8]) -> Result<(), RestoreError> {
        let size = usize::try_from(self.disk.chunk_size()).unwrap_or(usize::MAX); // at most 4 MiB
        let neighbours = |a: &Place, b: &Place| a.chunk + 1 == b.chunk && a.frame + 1 == b.frame;
        for run in places.chunk_by(neighbours) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else { continue };
            self.write(first.chunk, bytes.get(first.frame * size..(last.frame + 1) * size).unwrap_or_default())?;
        }
        Ok(())
    }

    /// Writes whole chunks, the last of which may reach past the disk's end.
    fn write(&self, chunk: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        let offset = chunk * self.disk.chunk_size();
        let room = usize::try_from(self.disk.size() - offset).unwrap_or(usize::MAX);
        let bytes = bytes.get(..room).unwrap_or(bytes);
        self.target.write_at(offset, bytes).map_err(|source| RestoreError::Target { offset, source })?;
        self.data.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.progress.add_done(bytes.len() as u64);
        Ok(())
    }

    fn are_zero(&self, length: u64) {
        self.zero.fetch_add(length, Ordering::Relaxed);
        self.progress.add_done(length);
    }
}

/// Memory that begins at a border of [`ALIGNMENT`] and is used again and again.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    pub fn new(len: u64) -> Buffer {
        let len = usize::try_from(len).unwrap_or(0); // at most 4 MiB
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Buffer { bytes, start, len }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }
}
