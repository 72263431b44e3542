//! Restores, comparisons and restores of what differs, over targets that fail, lie and lose power.
#![expect(clippy::cast_possible_truncation, reason = "small disks")]

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::disk::{Disk, Folder};
use crate::point::RecoveryPoint;
use crate::repository::Repository;
use crate::repository::test_support::*;
use crate::sim::SimFolder;

/// A target on a simulated disk, which counts what is written.
struct SimTarget {
    disk: Arc<dyn Disk>,
    written: AtomicU64,
    /// Reads that touch these bytes fail.
    bad: Range<u64>,
    cancels: Option<(u64, Arc<Progress>)>,
}

impl SimTarget {
    fn new(disk: Arc<dyn Disk>) -> SimTarget {
        SimTarget { disk, written: AtomicU64::new(0), bad: 0..0, cancels: None }
    }
    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.disk.len().expect("has a length") as usize];
        self.disk.read_at(0, &mut bytes).expect("reads");
        bytes
    }
}

impl Target for SimTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let written = self.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        if let Some((at, progress)) = &self.cancels
            && written >= *at
        {
            progress.cancel();
        }
        self.disk.write_at(offset, data)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset < self.bad.end && self.bad.start < offset + buf.len() as u64 {
            return Err(io::Error::other("bad sector"));
        }
        self.disk.read_at(offset, buf)
    }
}

fn file(folder: &SimFolder, len: usize) -> Arc<dyn Disk> {
    let disk = folder.create(Path::new("target")).expect("creates");
    disk.set_len(len as u64).expect("extends");
    disk
}

fn opened(repository: &Repository, point: &RecoveryPoint) -> Arc<PointDisk> {
    repository.open_disk(point, "disk0").expect("opens")
}

/// A disk whose chunks stand in several packs in another order than on the disk, and several times.
fn shuffled(seed: u64) -> (SimFolder, Repository, RecoveryPoint, Vec<u8>) {
    let folder = SimFolder::new(seed);
    let repository = new_repository(&folder);
    let mut disk = mixed_disk(seed, 3 << 20);
    disk.truncate(disk.len() - 5000);
    let (mut point, _) = back_up(&repository, &disk, None).expect("backs up");
    let mut numbers = Numbers(seed);
    for round in 0..3 {
        for _ in 0..20 {
            let (from, to) = (numbers.below(150) as usize, numbers.below(150) as usize);
            let from: Vec<u8> = disk[from * CHUNK as usize..][..CHUNK as usize].to_vec();
            disk[to * CHUNK as usize..][..CHUNK as usize].copy_from_slice(&from);
            disk[numbers.below(150) as usize * CHUNK as usize] ^= 1 << round;
        }
        point = back_up(&repository, &disk, Some(&point)).expect("backs up").0;
    }
    (folder, repository, point, disk)
}

#[test]
fn a_disk_that_is_spread_over_packs_is_restored_bit_for_bit() {
    for seed in 0..8 {
        let (_, repository, point, disk) = shuffled(seed);
        assert!(restored(&repository, &point, "disk0") == disk, "seed {seed}");
    }
}

#[test]
fn only_what_differs_is_written_in_place() {
    for seed in 0..8 {
        let (_, repository, point, disk) = shuffled(seed);
        let source = opened(&repository, &point);
        let target = SimTarget::new(file(&SimFolder::new(seed), disk.len()));
        target.disk.write_at(0, &disk).expect("writes");
        let same = compare(&source, &target, &Progress::new()).expect("compares");
        assert!(same.is_empty() && same.bytes() == 0, "seed {seed}: {same:?}");

        let mut numbers = Numbers(seed);
        let mut spoiled = std::collections::BTreeSet::new();
        for _ in 0..10 {
            let at = numbers.below(disk.len() as u64);
            target.disk.write_at(at, &[disk[at as usize] ^ 0x10]).expect("writes");
            spoiled.insert(at / u64::from(CHUNK));
        }
        let found = compare(&source, &target, &Progress::new()).expect("compares");
        for chunk in 0..disk.len() as u64 / u64::from(CHUNK) {
            assert_eq!(found.contains(chunk), spoiled.contains(&chunk), "seed {seed}, chunk {chunk}");
        }
        assert_eq!(found.first_offset(), spoiled.first().map(|chunk| chunk * u64::from(CHUNK)));
        let stats = restore_changed(&source, &target, &found, &Progress::new()).expect("restores");
        assert!(target.content() == disk, "seed {seed}");
        assert_eq!(stats.data + stats.zero, found.bytes());
        assert_eq!(target.written.into_inner(), found.bytes(), "seed {seed}: nothing else was written");
    }
}

#[test]
fn what_the_old_target_cannot_read_is_written_anew_and_its_neighbours_are_not() {
    let (_, repository, point, disk) = shuffled(1);
    let source = opened(&repository, &point);
    let mut target = SimTarget::new(file(&SimFolder::new(1), disk.len()));
    target.disk.write_at(0, &disk).expect("writes");
    target.bad = 5 * u64::from(CHUNK) + 100..5 * u64::from(CHUNK) + 200;
    let found = compare(&source, &target, &Progress::new()).expect("compares");
    assert_eq!((found.bytes(), found.unreadable(), found.contains(5)), (u64::from(CHUNK), 1, true));
    restore_changed(&source, &target, &found, &Progress::new()).expect("restores");
    assert_eq!(target.written.into_inner(), u64::from(CHUNK));
}

#[test]
fn a_restore_that_was_cancelled_or_lost_power_anywhere_is_completed_by_writing_what_differs() {
    for seed in 0..40 {
        let (_, repository, point, disk) = shuffled(seed % 4);
        let source = opened(&repository, &point);
        // With some seeds power fails in the middle: what was not synced is kept, dropped or torn.
        let cut = if seed % 3 == 0 { 4 + Numbers(seed).below(20) } else { u64::MAX };
        let folder = SimFolder::new(seed).crash_at(cut);
        let mut first = SimTarget::new(file(&folder, disk.len()));
        first.disk.sync().expect("syncs");
        folder.sync_dir(Path::new("")).expect("syncs");
        let progress = Arc::new(Progress::new());
        let stop_at = Numbers(seed).below(disk.len() as u64 * 3 / 4);
        // A cancel could come before the cut.
        first.cancels = (seed % 3 != 0).then(|| (stop_at, progress.clone()));
        let ended = restore(&source, &first, ZeroPolicy::TargetIsZero, &progress);
        if seed % 3 != 0 {
            assert!(matches!(ended, Err(RestoreError::Cancelled) | Ok(_)), "seed {seed}: {ended:?}");
        }
        assert!(seed % 3 == 0 || !folder.is_off(), "seed {seed}");
        drop(first); // a file is held by one opener at a time
        let after = folder.after_crash();
        let resumed = SimTarget::new(after.open_exclusive(Path::new("target")).expect("still there"));
        let found = compare(&source, &resumed, &Progress::new()).expect("compares");
        restore_changed(&source, &resumed, &found, &Progress::new()).expect("restores");
        assert!(resumed.content() == disk, "seed {seed}");
        let left = compare(&source, &resumed, &Progress::new()).expect("compares");
        assert!(left.is_empty(), "seed {seed}: {left:?}");
    }
}

#[test]
fn a_disk_of_holes_costs_nothing_to_compare_with_a_target_of_holes() {
    struct Hole;
    impl Target for Hole {
        fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
            panic!("nothing to write")
        }
        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            panic!("nothing to read")
        }
        fn next_data(&self, _: u64) -> io::Result<Option<Range<u64>>> {
            Ok(None)
        }
    }
    let repository = new_repository(&SimFolder::new(1));
    let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    let source = MemorySource { data: Vec::new(), ..MemorySource::new(vec![0; 64 << 20]) };
    backup.add_disk("disk0", &source).expect("captures");
    let point = backup.seal(crate::PointDetails::default()).expect("seals");
    let disk = opened(&repository, &point);
    assert!(compare(&disk, &Hole, &Progress::new()).expect("compares").is_empty());
    let stats = restore(&disk, &Hole, ZeroPolicy::TargetIsZero, &Progress::new()).expect("restores");
    assert_eq!((stats.data, stats.zero), (0, 64 << 20));
}
