//! Disks of recovery points under random reads, checked against the bytes that were backed up.
#![expect(clippy::cast_possible_truncation, reason = "disks of a few megabytes")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::base::{Base, Segment};
use crate::error::ReadError;
use crate::keys::Protection;
use crate::mapping::Mapping;
use crate::repository::Repository;
use crate::repository::test_support::*;
use crate::sim::SimFolder;
use crate::storage::{Listed, Object, ObjectKind, Storage};

fn joined(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        match segment {
            Segment::Data(data) => bytes.extend_from_slice(data),
            Segment::Hole(length) => bytes.resize(bytes.len() + *length as usize, 0),
        }
    }
    bytes
}

/// Counts reads of packs, and slows them.
#[derive(Debug)]
struct Counted {
    inner: Arc<dyn Storage>,
    reads: AtomicU64,
    delay: Duration,
}

impl Storage for Counted {
    fn put(&self, object: &Object, bytes: &[u8]) -> std::io::Result<()> {
        self.inner.put(object, bytes)
    }
    fn create(&self, object: &Object, bytes: &[u8]) -> std::io::Result<()> {
        self.inner.create(object, bytes)
    }
    fn get(&self, object: &Object, max: u64) -> std::io::Result<Bytes> {
        self.inner.get(object, max)
    }
    fn get_range(&self, object: &Object, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(self.delay);
        self.inner.get_range(object, offset, buf)
    }
    fn len(&self, object: &Object) -> std::io::Result<u64> {
        self.inner.len(object)
    }
    fn list(&self, kind: ObjectKind) -> std::io::Result<Vec<Listed>> {
        self.inner.list(kind)
    }
    fn delete(&self, object: &Object) -> std::io::Result<()> {
        self.inner.delete(object)
    }
    fn settle(&self, kind: ObjectKind) -> std::io::Result<()> {
        self.inner.settle(kind)
    }
    fn map(&self, object: &Object) -> std::io::Result<Mapping> {
        self.inner.map(object)
    }
    fn is_vacant(&self) -> std::io::Result<bool> {
        self.inner.is_vacant()
    }
}

fn counted(folder: &SimFolder, cache: u64, delay: Duration) -> (Arc<Counted>, Repository) {
    let storage = Arc::new(Counted { inner: sim_storage(folder), reads: AtomicU64::new(0), delay });
    let repository = Repository::open(storage.clone(), Some(&key(1)), cache).expect("opens");
    (storage, repository)
}

#[test]
fn random_reads_give_the_bytes_that_were_backed_up() {
    let folder = SimFolder::new(1);
    let size = 1100 * CHUNK as usize + 1234;
    let disk = mixed_disk(5, size);
    let point = back_up(&new_repository(&folder), &disk, None).expect("backs up").0;
    for cache in [0, 1 << 20, 64 << 20] {
        let repository = Repository::open(sim_storage(&folder), Some(&key(1)), cache).expect("opens");
        let opened = repository.open_disk(&point, "disk0").expect("opens");
        let mut numbers = Numbers(cache);
        for _ in 0..400 {
            let offset = numbers.below(size as u64);
            let most = if numbers.below(4) == 0 { 3 << 20 } else { 5000 };
            let length = numbers.below((size as u64 - offset).min(most) + 1);
            let mut segments = vec![Segment::Hole(3)];
            opened.read(offset, length, &mut segments).expect("reads");
            assert_eq!(segments[0], Segment::Hole(3), "what was there is left alone");
            let expected = &disk[offset as usize..(offset + length) as usize];
            assert!(joined(&segments[1..]) == expected, "{length} bytes at {offset}, cache {cache}");
            let mut resident = Vec::new();
            if opened.read_resident(offset, length, &mut resident) {
                assert!(joined(&resident) == expected);
            } else {
                assert!(resident.is_empty());
            }
        }
    }
}

#[test]
fn a_read_past_the_end_is_refused() {
    let repository = new_repository(&SimFolder::new(1));
    let point = back_up(&repository, &[1; 1000], None).expect("backs up").0;
    let disk = repository.open_disk(&point, "disk0").expect("opens");
    let mut out = Vec::new();
    for (offset, length) in [(0, 1001), (1000, 1), (u64::MAX, 2), (5, u64::MAX)] {
        assert!(matches!(disk.read(offset, length, &mut out), Err(ReadError::OutOfRange { .. })));
        assert!(!disk.read_resident(offset, length, &mut out));
        assert!(disk.extents(offset, length, 5).is_err());
    }
    disk.read(1000, 0, &mut out).expect("nothing at the end is fine");
    assert!(out.is_empty());
    assert!(matches!(repository.open_disk(&point, "sda"), Err(ReadError::NoSuchDisk { .. })));
}

#[test]
fn what_was_read_is_resident_and_shares_the_cached_bytes() {
    let folder = SimFolder::new(1);
    let point = back_up(&new_repository(&folder), &[7; 100_000], None).expect("backs up").0;
    let (storage, repository) = counted(&folder, 64 << 20, Duration::ZERO);
    let disk = repository.open_disk(&point, "disk0").expect("opens");
    assert_eq!(storage.reads.load(Ordering::Relaxed), 0, "opening reads nothing");
    let mut first = Vec::new();
    assert!(!disk.read_resident(100, 50, &mut first));
    disk.read(100, 50, &mut first).expect("reads");
    let reads = storage.reads.load(Ordering::Relaxed);
    let mut again = Vec::new();
    assert!(disk.read_resident(100, 50, &mut again));
    assert_eq!(storage.reads.load(Ordering::Relaxed), reads);
    match (&first[..], &again[..]) {
        ([Segment::Data(a)], [Segment::Data(b)]) => assert_eq!(a.as_ptr(), b.as_ptr(), "no copy"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn many_readers_of_a_missing_chunk_fetch_it_once() {
    let folder = SimFolder::new(1);
    let disk = mixed_disk(1, 64 * CHUNK as usize);
    let point = back_up(&new_repository(&folder), &disk, None).expect("backs up").0;
    let (storage, repository) = counted(&folder, 64 << 20, Duration::from_millis(20));
    let opened = repository.open_disk(&point, "disk0").expect("opens");
    let at = disk.chunks(CHUNK as usize).position(|chunk| chunk[0] != 0).expect("data") as u64 * u64::from(CHUNK);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let mut out = Vec::new();
                opened.read(at, 100, &mut out).expect("reads");
                assert_eq!(joined(&out), disk[at as usize..at as usize + 100]);
            });
        }
    });
    assert_eq!(storage.reads.load(Ordering::Relaxed), 2, "the leaf and the chunk");
}

#[test]
fn readers_of_overlapping_ranges_do_not_wait_for_each_other_for_ever() {
    let folder = SimFolder::new(1);
    let disk = mixed_disk(1, 300 * CHUNK as usize);
    let point = back_up(&new_repository(&folder), &disk, None).expect("backs up").0;
    for seed in 0..20 {
        let (_, repository) = counted(&folder, 1 << 20, Duration::ZERO);
        let opened = repository.open_disk(&point, "disk0").expect("opens");
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (opened, disk) = (&opened, &disk);
                scope.spawn(move || {
                    let mut numbers = Numbers(seed * 10 + thread);
                    for _ in 0..20 {
                        let offset = numbers.below(200) * u64::from(CHUNK);
                        let mut out = Vec::new();
                        opened.read(offset, 80 * u64::from(CHUNK), &mut out).expect("reads");
                        let end = offset as usize + 80 * CHUNK as usize;
                        assert!(joined(&out) == disk[offset as usize..end], "seed {seed}");
                    }
                });
            }
        });
    }
}

#[test]
fn neighbours_are_read_together_and_sequential_readers_find_their_chunks_ready() {
    let folder = SimFolder::new(1);
    let mut numbers = Numbers(3);
    let disk: Vec<u8> = (0..1000 * CHUNK as usize / 8).flat_map(|_| numbers.next().to_le_bytes()).collect();
    let point = back_up(&new_repository(&folder), &disk, None).expect("backs up").0;
    let (storage, repository) = counted(&folder, 64 << 20, Duration::ZERO);
    let opened = repository.open_disk(&point, "disk0").expect("opens");
    let mut out = Vec::new();
    opened.read(0, 32 * u64::from(CHUNK), &mut out).expect("reads");
    assert!(storage.reads.load(Ordering::Relaxed) <= 4, "{}", storage.reads.load(Ordering::Relaxed));
    let mut resident = 0;
    for chunk in 100..900u64 {
        let mut out = Vec::new();
        if opened.read_resident(chunk * u64::from(CHUNK), 4096, &mut out) {
            resident += 1;
        } else {
            opened.read(chunk * u64::from(CHUNK), 4096, &mut out).expect("reads");
            std::thread::sleep(Duration::from_millis(1)); // the reader does something with it
        }
        assert!(joined(&out) == disk[(chunk * u64::from(CHUNK)) as usize..][..4096]);
    }
    assert!(resident > 400, "{resident} of 800");
}

#[test]
fn extents_are_right_merged_and_bounded() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let chunk = u64::from(CHUNK);
    let mut bytes = vec![0; 3000 * CHUNK as usize + 77];
    bytes[600 * CHUNK as usize..603 * CHUNK as usize].fill(1);
    bytes[2999 * CHUNK as usize..].fill(2);
    let point = back_up(&repository, &bytes, None).expect("backs up").0;
    let disk = repository.open_disk(&point, "disk0").expect("opens");
    let size = disk.size();
    let all = disk.extents(0, size, 100).expect("answers");
    let lengths: Vec<(u64, bool)> = all.iter().map(|extent| (extent.length, extent.hole)).collect();
    let expected = [(600 * chunk, true), (3 * chunk, false), (2396 * chunk, true), (chunk + 77, false)];
    assert_eq!(lengths, expected);
    let part = disk.extents(601 * chunk + 5, chunk * 2, 100).expect("answers");
    assert_eq!(part.iter().map(|e| (e.length, e.hole)).collect::<Vec<_>>(), [(2 * chunk - 5, false), (5, true)]);
    assert_eq!(disk.extents(0, size, 2).expect("answers").len(), 2);
}

#[test]
fn a_four_tebibyte_disk_opens_and_reads_anywhere_at_once() {
    let folder = SimFolder::new(1);
    let repository = Repository::init(sim_storage(&folder), 64 << 10, Protection::Secret(key(1))).expect("init");
    let huge = Huge;
    let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    backup.add_disk("disk0", &huge).expect("captures");
    let point = backup.seal(crate::PointDetails::default()).expect("seals");
    let (storage, repository) = counted(&folder, 1 << 20, Duration::ZERO);
    let disk = repository.open_disk(&point, "disk0").expect("opens");
    let mut out = Vec::new();
    disk.read((4 << 40) - 4096, 4096, &mut out).expect("reads");
    assert_eq!(joined(&out), [3; 4096]);
    assert!(storage.reads.load(Ordering::Relaxed) <= 4, "three nodes and a chunk");
    let hole = disk.extents(0, 4 << 40, 10).expect("answers");
    assert_eq!(hole.iter().map(|e| e.length).sum::<u64>(), 4 << 40, "zero subtrees are skipped: {hole:?}");
}

struct Huge;

impl crate::Source for Huge {
    fn size(&self) -> u64 {
        4 << 40
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.fill(0);
        let hole = ((4 << 40) - 4096u64).saturating_sub(offset) as usize;
        buf.iter_mut().skip(hole).for_each(|byte| *byte = 3);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> std::io::Result<Option<std::ops::Range<u64>>> {
        Ok(Some(offset.max((4 << 40) - 4096)..4 << 40))
    }
    fn current_size(&self) -> std::io::Result<u64> {
        Ok(4 << 40)
    }
}

#[test]
fn what_was_fetched_ahead_is_read_without_the_storage_by_every_disk_that_is_the_same() {
    let folder = SimFolder::new(1);
    let bytes = mixed_disk(5, 40 * CHUNK as usize + 99);
    let (point, _) = back_up(&new_repository(&folder), &bytes, None).expect("backs up");
    let (storage, repository) = counted(&folder, 8 << 20, Duration::ZERO);
    let chunks: Vec<u64> = [39, 3, 4, 2, 3, 40, 5, 1 << 40].into();
    let ahead = repository.open_disk(&point, "disk0").expect("opens");
    assert!(ahead.prefetch(&chunks).expect("fetches") > 0);
    assert_eq!(ahead.prefetch(&chunks).expect("is there"), 0);
    let before = storage.reads.load(Ordering::Relaxed);
    let disk = repository.open_disk(&point, "disk0").expect("opens");
    for chunk in chunks.iter().filter(|chunk| **chunk <= 40) {
        let offset = chunk * u64::from(CHUNK);
        let length = u64::from(CHUNK).min(disk.size() - offset);
        let mut segments = Vec::new();
        assert!(disk.read_resident(offset, length, &mut segments), "chunk {chunk}");
        let at = offset as usize;
        assert_eq!(joined(&segments), bytes[at..at + length as usize], "chunk {chunk}");
    }
    assert_eq!(storage.reads.load(Ordering::Relaxed), before);
    // A cache that has no room for it is left alone.
    let (storage, repository) = counted(&folder, 0, Duration::ZERO);
    let disk = repository.open_disk(&point, "disk0").expect("opens");
    disk.prefetch(&[1, 2, 3]).expect("nothing fails");
    let before = storage.reads.load(Ordering::Relaxed);
    disk.prefetch(&[1, 2, 3]).expect("nothing fails");
    assert_eq!(storage.reads.load(Ordering::Relaxed), before);
}
