//! [`Traced`]: a disk that notes what is read of it, and in which order.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use blockstore::base::{Base, Extent, Segment};
use blockstore::drill::{BootTrace, MAX_TRACE_CHUNKS, TracedDisk};
use blockstore::error::ReadError;

/// What the disks of one drill note together.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    listening: AtomicBool,
    first_read: AtomicU64,
    last_new: AtomicU64,
    disks: Mutex<Vec<Noted>>,
}

#[derive(Debug)]
struct Noted {
    disk: String,
    order: Vec<u64>,
    seen: HashSet<u64>,
}

const NEVER: u64 = u64::MAX;

impl Recorder {
    /// Nothing is read yet; times count from `began`.
    pub fn new(began: Instant) -> Arc<Recorder> {
        let never = || AtomicU64::new(NEVER);
        Arc::new(Recorder {
            began,
            listening: AtomicBool::new(false),
            first_read: never(),
            last_new: never(),
            disks: Mutex::default(),
        })
    }

    /// A disk that notes here what is read of it.
    pub fn trace(self: &Arc<Recorder>, disk: &str, base: Arc<dyn Base>, chunk_size: u64) -> Traced {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.push(Noted { disk: disk.to_owned(), order: Vec::new(), seen: HashSet::new() });
        Traced { base, chunk_size, number: disks.len() - 1, recorder: self.clone() }
    }

    /// From now on reads are the guest's: what was read before, by us and by QEMU when it opens the disks, is not noted.
    pub fn listen(&self) {
        self.listening.store(true, Ordering::Release);
    }

    /// Milliseconds until the first read, if there was one.
    pub fn first_read(&self) -> Option<u64> {
        Some(self.first_read.load(Ordering::Relaxed)).filter(|at| *at != NEVER)
    }

    /// Milliseconds until a chunk was read for the first time, the last time that happened.
    pub fn last_new(&self) -> Option<u64> {
        Some(self.last_new.load(Ordering::Relaxed)).filter(|at| *at != NEVER)
    }

    /// Chunks that were read.
    pub fn chunks(&self) -> u64 {
        let disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.iter().map(|noted| noted.seen.len() as u64).sum()
    }

    /// What was read, as far as there is room for it.
    pub fn boot_trace(&self) -> BootTrace {
        let disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let read = disks.iter().filter(|noted| !noted.order.is_empty());
        let traced = |noted: &Noted| TracedDisk { disk: noted.disk.clone(), chunks: noted.order.clone() };
        BootTrace { disks: read.map(traced).collect() }
    }

    fn note(&self, number: usize, first: u64, last: u64) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(NEVER - 1);
        self.first_read.fetch_min(now, Ordering::Relaxed);
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let mut room = MAX_TRACE_CHUNKS - disks.iter().map(|noted| noted.order.len()).sum::<usize>();
        let Some(noted) = disks.get_mut(number) else { return };
        for chunk in first..=last {
            if noted.seen.insert(chunk) {
                self.last_new.store(now, Ordering::Relaxed);
                if room > 0 {
                    noted.order.push(chunk);
                    room -= 1;
                }
            }
        }
    }
}

/// A disk whose reads are noted.
#[derive(Debug)]
pub struct Traced {
    base: Arc<dyn Base>,
    chunk_size: u64,
    number: usize,
    recorder: Arc<Recorder>,
}

impl Traced {
    fn note(&self, offset: u64, length: u64) {
        if length > 0 && self.recorder.listening.load(Ordering::Acquire) {
            self.recorder.note(self.number, offset / self.chunk_size, (offset + length - 1) / self.chunk_size);
        }
    }
}

impl Base for Traced {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_resident(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> bool {
        let resident = self.base.read_resident(offset, length, out);
        if resident {
            self.note(offset, length);
        }
        resident
    }

    fn read(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), ReadError> {
        self.base.read(offset, length, out)?;
        self.note(offset, length);
        Ok(())
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ReadError> {
        self.base.extents(offset, length, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Zeroes;

    impl Base for Zeroes {
        fn size(&self) -> u64 {
            1 << 40
        }

        fn read_resident(&self, _: u64, length: u64, out: &mut Vec<Segment>) -> bool {
            out.push(Segment::Hole(length));
            length < 10
        }

        fn read(&self, _: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), ReadError> {
            out.push(Segment::Hole(length));
            Ok(())
        }

        fn extents(&self, _: u64, length: u64, _: usize) -> Result<Vec<Extent>, ReadError> {
            Ok(vec![Extent { length, hole: true }])
        }
    }

    #[test]
    fn chunks_are_noted_once_in_the_order_of_the_first_touch() {
        let recorder = Recorder::new(Instant::now());
        let root = recorder.trace("root", Arc::new(Zeroes), 100);
        let data = recorder.trace("data", Arc::new(Zeroes), 100);
        assert_eq!((recorder.first_read(), recorder.last_new(), recorder.chunks()), (None, None, 0));
        assert!(root.read_resident(0, 5, &mut Vec::new()));
        recorder.listen();
        assert_eq!(recorder.chunks(), 0, "nobody listened");
        assert!(root.read_resident(950, 5, &mut Vec::new()));
        assert!(!root.read_resident(100, 50, &mut Vec::new()), "not answered, not noted");
        root.read(199, 2, &mut Vec::new()).unwrap();
        root.read(200, 750, &mut Vec::new()).unwrap();
        let traced = |disk: &str, chunks: &[u64]| TracedDisk { disk: disk.to_owned(), chunks: chunks.to_vec() };
        assert_eq!(recorder.boot_trace().disks, [traced("root", &[9, 1, 2, 3, 4, 5, 6, 7, 8])]);
        data.read(0, 100 << 20, &mut Vec::new()).unwrap();
        let trace = recorder.boot_trace();
        assert_eq!(trace.chunks(), MAX_TRACE_CHUNKS, "there is no room for more");
        assert_eq!(recorder.chunks(), 9 + (1 << 20));
    }
}
