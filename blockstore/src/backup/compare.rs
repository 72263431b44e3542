//! The compare that ends every backup: a sample of the disk is read from the source once more and held against what
//! the repository gives back, before there is a point. Specification: docs/format/repository.md, "Compare".

use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::BackupError;
use super::source::Source;
use crate::error::ReadError;
use crate::id::ChunkId;
use crate::manifest::FAN_OUT;
use crate::point::PointedDisk;
use crate::progress::Progress;
use crate::read::{ManifestReader, ReadShared};

/// So many chunks of each disk are always compared.
const ALWAYS: usize = 64;
/// And one of so many beyond them, as long as there is time.
const ONE_OF: u64 = 1000;
/// At most so many of a disk.
const MOST: usize = 4096;
/// After this long only the first [`ALWAYS`] are still compared.
const TIME: Duration = Duration::from_secs(10);
/// Chunks compared at once: they wait for devices.
const THREADS: usize = 4;

/// Which chunks of a disk to compare: those with the least random priorities, so that none is more likely than
/// another. The same seed over the same chunks gives the same sample.
pub(super) struct Sample {
    seed: u64,
    /// The best so far, the worst of them on top.
    best: BinaryHeap<(u64, u64)>,
    offered: u64,
}

impl Sample {
    pub fn new(seed: u64) -> Sample {
        Sample { seed, best: BinaryHeap::new(), offered: 0 }
    }

    /// Offers a chunk that was read.
    pub fn offer(&mut self, chunk: u64) {
        self.offered += 1;
        let priority = mix(self.seed ^ mix(chunk));
        if self.best.len() < MOST {
            self.best.push((priority, chunk));
        } else if self.best.peek().is_some_and(|worst| priority < worst.0) {
            self.best.pop();
            self.best.push((priority, chunk));
        }
    }

    /// Offers one chunk of a hole, which the source said it need not be asked for.
    pub fn offer_hole(&mut self, chunk: u64, count: u64) {
        if count > 0 {
            self.offer(chunk + mix(self.seed ^ !chunk) % count);
        }
    }

    /// The chunks, in the order they are to be compared.
    fn chunks(self) -> Vec<u64> {
        let beyond = usize::try_from(self.offered / ONE_OF).unwrap_or(MOST);
        let mut best = self.best.into_sorted_vec();
        best.truncate(ALWAYS.saturating_add(beyond).min(MOST));
        best.into_iter().map(|(_, chunk)| chunk).collect()
    }
}

/// The finalizer of SplitMix64: neighbours become strangers.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Compares a sample of a captured disk. What it holds must be durable and in the index. Returns how many chunks were
/// compared.
pub(super) fn compare(
    read: &Arc<ReadShared>,
    source: &dyn Source,
    disk: &PointedDisk,
    sample: Sample,
    progress: &Progress,
) -> Result<u64, BackupError> {
    let chunks = sample.chunks();
    let unreadable = |source| BackupError::Unreadable { disk: disk.name.clone(), offset: 0, source };
    // A reader of its own: it holds no node that the capture has seen.
    let manifest = ManifestReader::new(read.clone(), disk).map_err(unreadable)?;
    let comparison = Comparison { read, source, disk, manifest };
    let (next, compared) = (AtomicUsize::new(0), AtomicU64::new(0));
    let failure: Mutex<Option<BackupError>> = Mutex::new(None);
    let began = Instant::now();
    let work = || {
        let mut plain = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = chunks.get(at) else { return };
            if at >= ALWAYS && began.elapsed() > TIME {
                return;
            }
            let result = if progress.is_cancelled() {
                Err(BackupError::Cancelled)
            } else {
                comparison.chunk(*chunk, &mut plain)
            };
            match result {
                Ok(()) => compared.fetch_add(1, Ordering::Relaxed),
                Err(error) => {
                    next.store(chunks.len(), Ordering::Relaxed);
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    return;
                }
            };
        }
    };
    thread::scope(|scope| {
        for _ in 1..THREADS.min(chunks.len()) {
            // Without more threads it only takes longer.
            let _ = thread::Builder::new().name("compare".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(compared.into_inner()),
    }
}

struct Comparison<'a> {
    read: &'a ReadShared,
    source: &'a dyn Source,
    disk: &'a PointedDisk,
    manifest: ManifestReader,
}

impl Comparison<'_> {
    fn chunk(&self, chunk: u64, plain: &mut Vec<u8>) -> Result<(), BackupError> {
        let size = u64::from(self.disk.chunk_size);
        let offset = chunk * size;
        let real = usize::try_from(size.min(self.disk.size - offset)).unwrap_or(0); // at most 4 MiB
        plain.clear();
        plain.resize(self.disk.chunk_size as usize, 0);
        let target = plain.get_mut(..real).unwrap_or_default();
        let name = || self.disk.name.clone();
        self.source.read_at(offset, target).map_err(|source| BackupError::Source { disk: name(), offset, source })?;
        let fetcher = &self.read.fetcher;
        let stored = || -> Result<bool, ReadError> {
            let id: ChunkId = self.manifest.leaf(chunk / FAN_OUT)?.child(chunk);
            if id.is_zero() {
                return Ok(plain.iter().all(|byte| *byte == 0));
            }
            if let Some(location) = fetcher.index.first(&id) {
                fetcher.storage.forget(
                    &crate::storage::Object::Pack(location.pack.pack),
                    u64::from(location.entry.offset),
                    u64::from(location.entry.stored_len),
                );
            }
            Ok(fetcher.chunk(&id)? == plain[..])
        };
        match stored() {
            Ok(true) => Ok(()),
            Ok(false) => Err(BackupError::SourceDiffers { disk: name(), offset }),
            Err(source) => Err(BackupError::Unreadable { disk: name(), offset, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seed: u64, count: u64) -> Vec<u64> {
        let mut sample = Sample::new(seed);
        (0..count).for_each(|chunk| sample.offer(chunk));
        sample.chunks()
    }

    #[test]
    fn a_sample_is_as_large_as_promised_and_another_for_another_seed() {
        for (count, size) in [(0, 0), (1, 1), (64, 64), (900, 64), (10_000, 74), (10_000_000, 4096)] {
            let chunks = sample(1, count);
            assert_eq!(chunks.len(), size, "of {count}");
            let different: std::collections::HashSet<_> = chunks.iter().collect();
            assert!(different.len() == size && chunks.iter().all(|chunk| *chunk < count));
        }
        assert_eq!(sample(1, 10_000), sample(1, 10_000));
        assert_ne!(sample(1, 10_000), sample(2, 10_000));
    }

    #[test]
    fn every_part_of_a_disk_is_as_likely() {
        let mut hits = [0; 4];
        for seed in 0..200 {
            sample(seed, 1000).iter().for_each(|chunk| hits[usize::try_from(chunk / 250).expect("small")] += 1);
        }
        assert!(hits.iter().all(|hits| (2900..3500).contains(hits)), "{hits:?} of 200 samples of 64");
        let mut sample = Sample::new(3);
        sample.offer_hole(100, 50);
        assert!((100..150).contains(&sample.chunks()[0]));
    }
}
