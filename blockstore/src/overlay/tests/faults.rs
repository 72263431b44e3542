//! Storage that fails: a failed sync is for ever, a full disk is not.

use std::sync::atomic::AtomicU64;
use std::thread;

use super::*;

#[test]
fn a_failed_sync_poisons_for_ever_and_reads_go_on() {
    // Of a flush: the data file's, the journal's.
    for nth in 0..2 {
        let folder = SimFolder::new(nth);
        let overlay = create(&folder, SIZE).unwrap();
        overlay.write(0, &[1; 4096]).unwrap();
        overlay.flush().unwrap();
        let folder = folder.clone().fail_sync_at(folder.syncs() + nth);
        overlay.write(4096, &[2; 4096]).unwrap();
        assert!(matches!(overlay.flush(), Err(OverlayError::Io { action: Action::Sync, .. })));
        folder.heal();
        let syncs = folder.syncs();
        for _ in 0..3 {
            assert!(matches!(overlay.flush(), Err(OverlayError::Poisoned { .. })));
            assert!(matches!(overlay.write(0, &[3; 10]), Err(OverlayError::Poisoned { .. })));
            assert!(matches!(overlay.trim(0, 10), Err(OverlayError::Poisoned { .. })));
            assert!(matches!(overlay.write_zeroes(0, 10, true), Err(OverlayError::Poisoned { .. })));
        }
        assert_eq!(folder.syncs(), syncs, "a sync is never tried again");
        assert!(overlay.is_poisoned());
        assert_eq!(read(&overlay, 0, 4096), [1; 4096]);
        drop(overlay);
        let overlay = open(&folder.after_crash(), SIZE).unwrap();
        assert_eq!(read(&overlay, 0, 4096), [1; 4096], "what was flushed before is kept");
        overlay.write(0, &[4; 4096]).unwrap();
        overlay.flush().unwrap();
    }
}

#[test]
fn whoever_opens_after_a_failed_sync_does_not_build_on_what_it_lost() {
    for seed in 0..60 {
        let folder = SimFolder::new(seed);
        let overlay = create(&folder, SIZE).unwrap();
        overlay.write(0, &[1; 4096]).unwrap();
        overlay.flush().unwrap();
        let folder = folder.clone().fail_sync_at(folder.syncs() + seed % 2);
        overlay.write(4096, &[2; 4096]).unwrap();
        overlay.flush().unwrap_err();
        drop(overlay);
        let overlay = open(&folder, SIZE).unwrap();
        assert_eq!(overlay.usage().data_grains, 1, "only what is journalled counts");
        overlay.write(8192, &[3; 4096]).unwrap();
        overlay.flush().unwrap();
        drop(overlay);
        let overlay = open(&folder.after_crash(), SIZE).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(read(&overlay, 0, 4096), [1; 4096]);
        assert_eq!(read(&overlay, 8192, 4096), [3; 4096]);
    }
}

#[test]
fn a_failed_sync_of_a_compaction_leaves_one_good_journal() {
    // The data file's, the new journal's, the folder's.
    for nth in 0..3 {
        for seed in 0..20 {
            let folder = SimFolder::new(seed);
            let overlay = create(&folder, SIZE).unwrap();
            overlay.write(0, &[1; 4096]).unwrap();
            overlay.flush().unwrap();
            overlay.journal.lock().unwrap().set_compact_min(1);
            let folder = folder.clone().fail_sync_at(folder.syncs() + nth);
            overlay.write(4096, &[2; 4096]).unwrap();
            let flushed = overlay.flush();
            // A new journal that cannot be synced is given up, and the flush goes to the old one.
            assert_eq!(flushed.is_ok(), nth == 1, "{flushed:?}");
            assert_eq!(overlay.is_poisoned(), nth != 1);
            drop(overlay);
            let overlay = open(&folder.after_crash(), SIZE).unwrap();
            assert_eq!(read(&overlay, 0, 4096), [1; 4096]);
            let found = read(&overlay, 4096, 4096);
            assert!(flushed.is_err() || found == [2; 4096]);
        }
    }
}

#[test]
fn a_full_disk_fails_the_write_and_nothing_else_and_works_again_with_room() {
    let folder = SimFolder::new(1);
    let overlay = create(&folder, SIZE).unwrap();
    overlay.write(0, &[1; 8192]).unwrap();
    let folder = folder.full_after(2 * 4096);
    assert!(matches!(overlay.write(20 * 4096, &[2; 5 * 4096]), Err(OverlayError::NoSpace { .. })));
    assert!(!overlay.is_poisoned());
    assert_eq!(read(&overlay, 20 * 4096, 4096), base_bytes(SIZE)[20 * 4096..21 * 4096], "not acknowledged, not seen");
    overlay.write(0, &[3; 8192]).unwrap();
    overlay.flush().unwrap();
    overlay.trim(0, 4096).unwrap();
    overlay.write(30 * 4096, &[4; 4096]).unwrap();
    folder.heal();
    overlay.write(20 * 4096, &[2; 5 * 4096]).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let overlay = open(&folder.after_crash(), SIZE).unwrap();
    assert_eq!(read(&overlay, 20 * 4096, 5 * 4096), vec![2; 5 * 4096]);
    assert_eq!(read(&overlay, 0, 8192), [[0; 4096], [3; 4096]].concat());
    assert_eq!(read(&overlay, 30 * 4096, 4096), [4; 4096]);
}

#[test]
fn a_flush_that_finds_no_room_for_the_journal_is_done_by_the_next_one_with_room() {
    for seed in 0..20 {
        let folder = SimFolder::new(seed);
        let size = 200_000 * 4096;
        let overlay = create(&folder, size).unwrap();
        overlay.write(0, &[1; 4096]).unwrap();
        overlay.flush().unwrap();
        // More records than the reserve holds, of which a part still fits.
        let folder = folder.full_after(20 * 4096);
        for grain in (1..80_000).step_by(2) {
            overlay.map.set(grain..grain + 1, map::State::Zero);
            overlay.note(grain..grain + 1);
        }
        let before = overlay.usage();
        for _ in 0..2 {
            assert!(matches!(overlay.flush(), Err(OverlayError::NoSpace { .. })));
        }
        assert_eq!(overlay.usage(), before);
        let during = open(&folder.after_crash(), size).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        assert_eq!(read(&during, 0, 4096), [1; 4096]);
        assert!(!overlay.is_poisoned());
    }
    let folder = SimFolder::new(99);
    let overlay = create(&folder, 200_000 * 4096).unwrap();
    let folder = folder.full_after(20 * 4096);
    for grain in (1..80_000).step_by(2) {
        overlay.map.set(grain..grain + 1, map::State::Zero);
        overlay.note(grain..grain + 1);
    }
    overlay.flush().unwrap_err();
    folder.heal();
    overlay.flush().unwrap();
    overlay.write(0, &[1; 4096]).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let overlay = open(&folder.after_crash(), 200_000 * 4096).unwrap();
    assert_eq!((overlay.usage().zero_grains, overlay.usage().data_grains), (40_000, 1));
}

#[test]
fn changes_of_a_flush_that_found_no_room_outlive_a_killed_process() {
    let folder = SimFolder::new(1);
    let size = 200_000 * 4096;
    let overlay = create(&folder, size).unwrap();
    overlay.recent.as_ref().unwrap().set_turn_at(1);
    // Room for the list of each part, but not for its journal; each flush in vain might go over to the other list.
    let mut failed = 0;
    for part in 0..6usize {
        let _ = folder.clone().full_after(80 * 4096);
        for grain in (part as u64 * 30_000 + 2..(part as u64 + 1) * 30_000).step_by(2) {
            overlay.mark(grain..grain + 1, map::State::Zero).unwrap();
        }
        // Each list names grain 0; the last word counts.
        for state in [map::State::Data, map::State::Zero, map::State::Data].into_iter().take(2 + part / 5) {
            overlay.mark(0..1, state).unwrap();
        }
        let _ = folder.clone().full_after(0);
        failed += u32::from(overlay.flush().is_err());
    }
    assert!(failed >= 3);
    let usage = overlay.usage();
    assert_eq!((usage.data_grains, usage.zero_grains), (1, 6 * 14_999));
    let overlay = open(&folder.after_kill(), size).unwrap();
    assert_eq!((overlay.usage().data_grains, overlay.usage().zero_grains), (1, 6 * 14_999));
    overlay.flush().unwrap();
}

#[test]
fn a_base_that_cannot_be_read_fails_the_write_that_needs_it_and_nothing_else() {
    let base = TestBase::new(SIZE);
    let folder = SimFolder::new(1);
    let overlay = Overlay::create(Arc::new(folder), dir(), identity(SIZE), base.clone()).unwrap();
    base.fails.store(true, Ordering::Relaxed);
    assert!(matches!(overlay.write(10, b"part of a grain"), Err(OverlayError::Base(_))));
    let mut out = vec![Segment::Hole(1)];
    assert!(matches!(overlay.read(0, 4096, &mut out), Err(OverlayError::Base(_))));
    assert_eq!(out, [Segment::Hole(1)]);
    overlay.write(0, &[1; 4096]).unwrap();
    overlay.write(10, b"part of a grain").unwrap();
    overlay.flush().unwrap();
    base.fails.store(false, Ordering::Relaxed);
    overlay.write(4096, b"again").unwrap();
    assert_eq!(read(&overlay, 4096, 5), b"again");
}

#[test]
fn storage_that_cannot_be_read_is_an_error_and_poisons_nothing() {
    let folder = SimFolder::new(1);
    let overlay = create(&folder, SIZE).unwrap();
    overlay.write(0, &[1; 4096]).unwrap();
    let folder = folder.fail_reads();
    assert!(matches!(overlay.read(0, 10, &mut Vec::new()), Err(OverlayError::Io { action: Action::Read, .. })));
    assert!(!overlay.read_resident(0, 10, &mut Vec::new()));
    folder.heal();
    overlay.flush().unwrap();
    drop(overlay);
    let folder = folder.fail_reads();
    assert!(matches!(open(&folder, SIZE), Err(OverlayError::Io { action: Action::Read, .. })));
    folder.heal();
    assert_eq!(read(&open(&folder, SIZE).unwrap(), 0, 4096), [1; 4096]);
}

#[test]
fn a_flush_syncs_only_if_something_was_written_and_then_always() {
    let folder = SimFolder::new(1);
    let overlay = create(&folder, SIZE).unwrap();
    let syncs = folder.syncs();
    overlay.flush().unwrap();
    assert_eq!(folder.syncs(), syncs, "nothing was written");
    overlay.write(0, &[1; 4096]).unwrap();
    overlay.flush().unwrap();
    assert_eq!(folder.syncs(), syncs + 2);
    overlay.write(0, &[2; 100]).unwrap();
    overlay.flush().unwrap();
    assert_eq!(folder.syncs(), syncs + 3, "an overwrite of a journalled grain needs no record, but the sync");
    assert_eq!(read(&open(&folder.after_crash(), SIZE).unwrap(), 0, 100), [2; 100]);
}

/// A folder whose syncs take time, so that flushes meet.
#[derive(Debug)]
struct Slow(SimFolder);

#[derive(Debug)]
struct SlowDisk(Arc<dyn Disk>);

impl Disk for SlowDisk {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }
    fn sync(&self) -> io::Result<()> {
        thread::sleep(std::time::Duration::from_millis(2));
        self.0.sync()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.punch(offset, length)
    }
}

impl Folder for Slow {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(SlowDisk(self.0.create(path)?)))
    }
    fn open_exclusive(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(SlowDisk(self.0.open_exclusive(path)?)))
    }
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        self.0.open_read(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<crate::disk::Entry>> {
        self.0.list(dir)
    }
    fn list_dirs(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.0.list_dirs(dir)
    }
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.create_dir(dir)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.sync_dir(dir)
    }
    fn real_path(&self, path: &Path) -> Option<PathBuf> {
        self.0.real_path(path)
    }
}

#[test]
fn flushes_that_meet_share_their_syncs_and_each_covers_what_came_before_it() {
    let folder = SimFolder::new(1);
    let overlay = Overlay::create(Arc::new(Slow(folder.clone())), dir(), identity(SIZE), TestBase::new(SIZE)).unwrap();
    let before = folder.syncs();
    let flushes = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..8u64 {
            let (overlay, flushes) = (&overlay, &flushes);
            scope.spawn(move || {
                for round in 0..10u8 {
                    overlay.write(thread * 8192, &[round; 4096]).unwrap();
                    overlay.flush().unwrap();
                    flushes.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let syncs = folder.syncs() - before;
    assert_eq!(flushes.load(Ordering::Relaxed), 80);
    assert!(syncs < 120, "80 flushes took {syncs} syncs");
    let after = open(&folder.after_crash(), SIZE).unwrap();
    for thread in 0..8 {
        assert_eq!(read(&after, thread * 8192, 4096), [9; 4096]);
    }
}

#[test]
fn everybody_who_waits_for_a_flush_that_fails_is_told() {
    for nth in 0..3 {
        let folder = SimFolder::new(nth);
        let overlay =
            Overlay::create(Arc::new(Slow(folder.clone())), dir(), identity(SIZE), TestBase::new(SIZE)).unwrap();
        let folder = folder.clone().fail_sync_at(folder.syncs() + nth);
        let promised: Vec<bool> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8u64)
                .map(|thread| {
                    let overlay = &overlay;
                    scope.spawn(move || overlay.write(thread * 8192, &[1; 4096]).and_then(|()| overlay.flush()).is_ok())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(promised.contains(&false));
        let after = open(&folder.after_crash(), SIZE).unwrap();
        for (thread, promised) in promised.into_iter().enumerate() {
            assert!(!promised || read(&after, thread as u64 * 8192, 4096) == [1; 4096]);
        }
    }
}
