//! Backups that are told what changed: the rest is taken over from the parent, whole subtrees at a time.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::*;
use crate::repository::Repository;
use crate::repository::test_support::*;
use crate::sim::SimFolder;

const SIZE: usize = CHUNK as usize;

/// A source that knows what changed; of the rest it must not be asked.
struct Told {
    inner: MemorySource,
    changes: Vec<Range<u64>>,
}

impl Source for Told {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.inner.next_data(offset)
    }

    fn next_change(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.changes.iter().find(|range| range.end > offset);
        Ok(next.map(|range| range.start.max(offset)..range.end))
    }

    fn current_size(&self) -> io::Result<u64> {
        self.inner.current_size()
    }
}

fn told(bytes: &[u8], changes: &[Range<u64>]) -> Told {
    Told { inner: MemorySource::new(bytes.to_vec()), changes: changes.to_vec() }
}

fn run(repository: &Repository, source: &Told, parent: Option<&RecoveryPoint>) -> (RecoveryPoint, DiskStats) {
    let mut backup = repository.begin_backup("web01", parent, Arc::default()).expect("begins");
    let stats = backup.add_disk("disk0", source).expect("captures");
    (backup.seal(PointDetails::default()).expect("seals"), stats)
}

/// Chunks that a range touches.
fn widened(changes: &[Range<u64>]) -> u64 {
    let chunks = |range: &Range<u64>| range.start / SIZE as u64..range.end.div_ceil(SIZE as u64);
    let all: std::collections::BTreeSet<u64> = changes.iter().flat_map(chunks).collect();
    all.len() as u64
}

#[test]
fn only_what_changed_is_read_and_the_tree_is_the_one_of_a_whole_backup() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let leaf = 512 * SIZE;
    for (seed, size) in [SIZE / 2, 3 * SIZE + 17, leaf, leaf + 1, 3 * leaf + 5 * SIZE + 99].into_iter().enumerate() {
        let mut random = Numbers(seed as u64 + 1);
        let mut disk = mixed_disk(seed as u64 + 7, size);
        let (mut parent, _) = back_up(&repository, &disk, None).expect("backs up");
        for round in 0..8 {
            let mut changes = Vec::new();
            let mut at = 0;
            while round > 0 && at < size as u64 {
                let start = at + random.next() % (size as u64 / 2 + 1);
                let end = (start + 1 + random.next() % (3 * SIZE as u64)).min(size as u64);
                if start < end {
                    changes.push(start..end);
                }
                at = end.max(start) + 1;
            }
            for change in &changes {
                let zero = random.next().is_multiple_of(4);
                let [start, end] = [change.start, change.end].map(|at| usize::try_from(at).expect("small"));
                for byte in &mut disk[start..end] {
                    *byte = if zero { 0 } else { random.next().to_le_bytes()[3] };
                }
            }
            let source = told(&disk, &changes);
            let (point, stats) = run(&repository, &source, Some(&parent));
            let case = format!("seed {seed}, size {size}, round {round}, changes {changes:?}");
            assert!(stats.read <= widened(&changes) * SIZE as u64, "read {}, {case}", stats.read);
            assert!(restored(&repository, &point, "disk0") == disk, "{case}");
            let (whole, again) = back_up(&repository, &disk, None).expect("backs up");
            assert_eq!((whole.disks[0].root, again.new_chunks, again.new_nodes), (point.disks[0].root, 0, 0), "{case}");
            parent = point;
        }
    }
    assert!(verify(&open_repository(&folder), true).is_ok());
}

#[test]
fn without_a_parent_of_the_same_size_everything_is_read() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(3, 700 * SIZE);
    let (parent, _) = back_up(&repository, &disk, None).expect("backs up");
    let grown = mixed_disk(4, 700 * SIZE + 1);
    for (bytes, parent) in [(&disk, None), (&grown, Some(&parent))] {
        let source = told(bytes, &[]);
        let (point, _) = run(&repository, &source, parent);
        assert!(source.inner.read.load(Ordering::Relaxed) >= bytes.len() as u64);
        assert!(restored(&repository, &point, "disk0") == *bytes);
    }
}

#[test]
fn a_source_that_names_an_empty_change_is_refused() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(3, 9 * SIZE);
    let (parent, _) = back_up(&repository, &disk, None).expect("backs up");
    struct Empty(Told);
    impl Source for Empty {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.0.read_at(offset, buf)
        }
        fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            self.0.next_data(offset)
        }
        fn next_change(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
            Ok(Some(offset..offset))
        }
        fn current_size(&self) -> io::Result<u64> {
            self.0.current_size()
        }
    }
    let source = Empty(told(&disk, &[]));
    let mut backup = repository.begin_backup("web01", Some(&parent), Arc::default()).expect("begins");
    assert!(matches!(backup.add_disk("disk0", &source), Err(BackupError::Source { offset: 0, .. })));
}
