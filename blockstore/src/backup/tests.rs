//! What a backup stores, what it does not, and how it fails.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::base::Base;
use crate::repository::Repository;
use crate::repository::test_support::*;
use crate::sim::SimFolder;
use crate::storage::ObjectKind;

const SIZE: usize = CHUNK as usize;

fn sparse(size: usize, data: std::ops::Range<usize>, seed: u64) -> MemorySource {
    let mut bytes = vec![0; size];
    let mut numbers = Numbers(seed);
    for at in data.clone() {
        bytes[at] = numbers.next().to_le_bytes()[0];
    }
    let mut source = MemorySource::new(bytes);
    source.data.clear();
    source.data.push(data.start as u64..data.end as u64);
    source
}

fn run(
    repository: &Repository,
    source: &dyn Source,
    parent: Option<&RecoveryPoint>,
) -> Result<(RecoveryPoint, DiskStats), BackupError> {
    let mut backup = repository.begin_backup("web01", parent, Arc::default())?;
    let stats = backup.add_disk("disk0", source)?;
    Ok((backup.seal(PointDetails::default())?, stats))
}

#[test]
fn every_size_comes_back_bit_for_bit() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let leaf = 512 * SIZE;
    for size in [0, 1, 511, 4096, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 17, leaf - 1, leaf, leaf + 1, 2 * leaf + 333] {
        let disk = mixed_disk(size as u64, size);
        let (point, stats) = back_up(&repository, &disk, None).expect("backs up");
        assert_eq!(stats.size, size as u64);
        assert_eq!(point.disks[0].size, size as u64);
        assert!(restored(&repository, &point, "disk0") == disk, "size {size}");
        assert!(restored(&open_repository(&folder), &point, "disk0") == disk, "size {size}, opened again");
    }
    assert!(verify(&open_repository(&folder), true).is_ok());
}

#[test]
fn several_disks_share_chunks_and_keep_their_names() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let (a, b) = (mixed_disk(1, 40 * SIZE), mixed_disk(2, 10 * SIZE + 5));
    let sources = [&a, &b].map(|disk| MemorySource::new(disk.clone()));
    let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    backup.add_disk("a", &sources[0]).expect("captures");
    let second = backup.add_disk("copy of a", &sources[0]).expect("captures");
    assert_eq!((second.new_chunks, second.new_nodes), (0, 0));
    backup.add_disk("b", &sources[1]).expect("captures");
    let details = PointDetails {
        labels: BTreeMap::from([("k".into(), "v".into())]),
        consistency: Consistency::Application,
        hardware: serde_json::json!({"cpus": 2}),
    };
    let point = backup.seal(details).expect("seals");
    let loaded = open_repository(&folder).load_point(point.id).expect("loads");
    assert_eq!(loaded, point);
    assert_eq!((loaded.machine.as_str(), loaded.consistency), ("web01", Consistency::Application));
    for (name, disk) in [("a", &a), ("copy of a", &a), ("b", &b)] {
        assert_eq!(&restored(&repository, &loaded, name), disk);
    }
}

#[test]
fn holes_are_not_read_and_zero_chunks_not_stored() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let source = sparse(2000 * SIZE, 700 * SIZE + 5..703 * SIZE - 5, 1);
    let (point, stats) = run(&repository, &source, None).expect("backs up");
    assert_eq!((stats.read, stats.new_chunks), (3 * SIZE as u64, 3));
    assert_eq!(point.stats.compared, 3 + 2, "the data, and a chunk of each hole");
    assert_eq!(source.read.load(Ordering::Relaxed), (3 + 5) * SIZE as u64);
    assert_eq!(restored(&repository, &point, "disk0"), source.bytes);
    let zeroes = MemorySource::new(vec![0; 2000 * SIZE]);
    let (point, stats) = run(&repository, &zeroes, None).expect("backs up");
    assert_eq!((stats.new_chunks, stats.new_nodes), (0, 0));
    assert!(point.disks[0].root.is_zero());
    assert_eq!(restored(&repository, &point, "disk0"), zeroes.bytes);
}

#[test]
fn an_unchanged_big_sparse_disk_costs_less_than_64_kib() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let source = Big { changed: None };
    let (first, _) = run(&repository, &source, None).expect("backs up");
    let before = folder_bytes(&folder);
    let (second, stats) = run(&repository, &source, Some(&first)).expect("backs up");
    assert_eq!((stats.new_chunks, stats.new_nodes), (0, 0));
    assert_eq!(second.disks, first.disks);
    assert_eq!(second.stats.stored_bytes, 0);
    assert!(folder_bytes(&folder) - before < 4096, "only the point is new");
    // One changed chunk: the chunk, its leaf and the nodes above it.
    let changed = Big { changed: Some(3 << 38) };
    let (third, stats) = run(&repository, &changed, Some(&second)).expect("backs up");
    assert_eq!((stats.new_chunks, stats.new_nodes), (1, 3), "three levels");
    assert!(folder_bytes(&folder) - before < 128 << 10);
    let disk = open_repository(&folder).open_disk(&third, "disk0").expect("opens");
    let mut segments = Vec::new();
    disk.read(3 << 38, 10, &mut segments).expect("reads");
    assert_eq!(segments, [crate::Segment::Data(vec![9; 10].into())]);
}

/// A tebibyte with a few data ranges.
struct Big {
    changed: Option<u64>,
}

const RANGES: [u64; 4] = [0, 5 << 30, 3 << 38, (1 << 40) - (64 << 10)];

impl Source for Big {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, part) in (offset..).step_by(SIZE).zip(buf.chunks_mut(SIZE)) {
            if !RANGES.iter().any(|start| (*start..start + (64 << 10)).contains(&at)) {
                part.fill(0);
                continue;
            }
            part.fill(if self.changed == Some(at) { 9 } else { 1 + (at >> 14).to_le_bytes()[0] % 3 });
        }
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<std::ops::Range<u64>>> {
        let ranges = RANGES.map(|start| start..start + (64 << 10));
        Ok(ranges.into_iter().find(|range| range.end > offset).map(|range| range.start.max(offset)..range.end))
    }
    fn current_size(&self) -> io::Result<u64> {
        Ok(1 << 40)
    }
}

fn folder_bytes(folder: &SimFolder) -> u64 {
    let storage = sim_storage(folder);
    let kinds = [ObjectKind::Pack, ObjectKind::IndexRun, ObjectKind::Point];
    kinds.iter().flat_map(|kind| storage.list(*kind).expect("lists")).map(|listed| listed.len).sum()
}

#[test]
fn changed_chunks_and_their_nodes_are_all_that_is_stored() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let mut disk = mixed_disk(1, 1200 * SIZE);
    let (first, _) = back_up(&repository, &disk, None).expect("backs up");
    for chunk in [3, 600, 601] {
        disk[chunk * SIZE + 100..chunk * SIZE + 120].copy_from_slice(b"changed by the guest");
        disk[chunk * SIZE] = u8::try_from(chunk % 251).expect("small");
    }
    let (second, stats) = back_up(&repository, &disk, Some(&first)).expect("backs up");
    assert_eq!(stats.new_chunks, 3);
    assert_eq!(stats.new_nodes, 3, "two leaves and the root");
    assert_eq!(stats.unchanged_chunks, 1197 - zero_chunks(&disk));
    assert_eq!(restored(&repository, &second, "disk0"), disk);
    // Without the parent the index finds the same.
    let (_, stats) = back_up(&repository, &disk, None).expect("backs up");
    assert_eq!((stats.new_chunks, stats.new_nodes, stats.unchanged_chunks), (0, 0, 0));
}

fn zero_chunks(disk: &[u8]) -> u64 {
    disk.chunks(SIZE).filter(|chunk| chunk.iter().all(|byte| *byte == 0)).count() as u64
}

#[test]
fn a_disk_that_grows_or_shrinks_between_backups_is_right() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 700 * SIZE + 100);
    let mut parent = None;
    for size in [700 * SIZE + 100, 40 * SIZE, 600 * SIZE, 0, 700 * SIZE] {
        let (point, _) = back_up(&repository, &disk[..size], parent.as_ref()).expect("backs up");
        assert!(restored(&repository, &point, "disk0") == disk[..size], "size {size}");
        parent = Some(point);
    }
}

#[test]
fn a_source_error_names_the_offset_and_leaves_the_repository_clean() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 500 * SIZE);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    let mut source = MemorySource::new(mixed_disk(2, 500 * SIZE));
    source.fail_at = Some(300 * SIZE as u64 + 7);
    let good = MemorySource::new(mixed_disk(3, 100 * SIZE));
    let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    backup.add_disk("good", &good).expect("captures");
    match backup.add_disk("bad", &source) {
        Err(BackupError::Source { disk, offset, .. }) => {
            let place = offset..offset + (1 << 20);
            assert!(disk == "bad" && place.contains(&(300 * SIZE as u64 + 7)), "{offset}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(backup.add_disk("more", &source), Err(BackupError::Failed)));
    assert!(matches!(backup.seal(PointDetails::default()), Err(BackupError::Failed)));
    for repository in [repository, open_repository(&folder)] {
        assert_eq!(repository.list_points().expect("lists"), [point.id]);
        assert!(verify(&repository, true).is_ok());
        assert_eq!(restored(&repository, &point, "disk0"), disk);
    }
}

#[test]
fn a_backup_dropped_without_seal_leaves_nothing_that_counts_and_the_next_is_whole() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 300 * SIZE);
    let source = MemorySource::new(disk.clone());
    let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    backup.add_disk("disk0", &source).expect("captures");
    drop(backup);
    assert!(repository.list_points().expect("lists").is_empty());
    assert!(verify(&repository, true).is_ok());
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    assert_eq!(restored(&open_repository(&folder), &point, "disk0"), disk);
}

#[test]
fn a_source_that_changes_its_size_fails_the_backup() {
    let repository = new_repository(&SimFolder::new(1));
    let mut source = MemorySource::new(mixed_disk(1, 10 * SIZE));
    source.grows = true;
    let failed = run(&repository, &source, None);
    assert!(matches!(failed, Err(BackupError::SourceChanged { after, .. }) if after == 10 * SIZE as u64 + 1));
}

#[test]
fn bad_and_repeated_disk_names_are_refused() {
    let repository = new_repository(&SimFolder::new(1));
    let source = MemorySource::new(vec![1; 100]);
    for name in ["", "a/b", "line\nbreak", &"x".repeat(256)] {
        let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
        assert!(matches!(backup.add_disk(name, &source), Err(BackupError::Disk { .. })), "{name:?}");
    }
    let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    backup.add_disk("a", &source).expect("captures");
    assert!(matches!(backup.add_disk("a", &source), Err(BackupError::Disk { .. })));
}

#[test]
fn a_cancelled_backup_says_so_and_stops() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let progress = Arc::new(Progress::new());
    let mut source = MemorySource::new(mixed_disk(1, 2000 * SIZE));
    source.cancels = Some(progress.clone());
    let mut backup = repository.begin_backup("web01", None, progress).expect("begins");
    assert!(matches!(backup.add_disk("disk0", &source), Err(BackupError::Cancelled)));
    assert!(source.read.load(Ordering::Relaxed) < 2000 * SIZE as u64);
    assert!(verify(&repository, true).is_ok());
}

#[test]
fn a_full_storage_is_reported_as_such_wherever_it_happens() {
    let (mut refused, mut done) = (0, false);
    for room in (1..200).map(|n| (n * 32) << 10) {
        let folder = SimFolder::new(room);
        let repository = new_repository(&folder);
        let folder = folder.full_after(room);
        match back_up(&repository, &mixed_disk(1, 150 * SIZE), None) {
            Err(BackupError::NoSpace { .. }) => refused += 1,
            Err(other) => panic!("room {room}: {other:?}"),
            Ok(_) => done = true,
        }
        folder.heal();
        assert!(verify(&open_repository(&folder), true).is_ok(), "room {room}");
        let (point, _) = back_up(&repository, &mixed_disk(2, 50 * SIZE), None).expect("there is room again");
        assert_eq!(restored(&repository, &point, "disk0"), mixed_disk(2, 50 * SIZE));
        if done {
            break;
        }
    }
    assert!(refused > 3 && done, "{refused}");
}

#[test]
fn two_backups_at_once_are_both_whole() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let shared = mixed_disk(1, 400 * SIZE);
    let points: Vec<RecoveryPoint> = std::thread::scope(|scope| {
        let runs: Vec<_> =
            (0..3).map(|_| scope.spawn(|| back_up(&repository, &shared, None).expect("backs up").0)).collect();
        runs.into_iter().map(|run| run.join().expect("ends")).collect()
    });
    for point in &points {
        assert_eq!(restored(&open_repository(&folder), point, "disk0"), shared);
    }
    assert!(verify(&repository, true).is_ok());
}

#[test]
fn a_sparse_file_is_read_where_it_holds_data() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image");
    let file = std::fs::File::create(&path).expect("creates");
    file.set_len(100 << 20).expect("extends");
    std::os::unix::fs::FileExt::write_all_at(&file, &[5; 4096], 50 << 20).expect("writes");
    let source = FileSource::open(&path).expect("opens");
    let repository = new_repository(&SimFolder::new(1));
    let (point, stats) = run(&repository, &source, None).expect("backs up");
    assert_eq!(stats.new_chunks, 1);
    assert!(stats.read <= 1 << 20, "{}", stats.read);
    let restored = restored(&repository, &point, "disk0");
    assert!(restored == std::fs::read(&path).expect("reads"));
    file.set_len(101 << 20).expect("extends");
    assert_eq!(source.current_size().expect("asks"), 101 << 20);
}

/// Back up `source` and expect that it fails before there is a point; the error.
fn fails(repository: &Repository, source: &dyn Source, parent: Option<&RecoveryPoint>) -> BackupError {
    let points = repository.list_points().expect("lists").len();
    let error = run(repository, source, parent).expect_err("the compare fails");
    assert_eq!(repository.list_points().expect("lists").len(), points, "{error}");
    error
}

#[test]
fn a_source_that_says_something_else_the_second_time_fails_the_backup() {
    let repository = new_repository(&SimFolder::new(1));
    let disk = mixed_disk(1, 50 * SIZE + 77);
    let (parent, _) = back_up(&repository, &disk, None).expect("backs up");
    assert_eq!(parent.stats.compared, 51);
    // In a chunk, and in the padded end; once stored anew, once found in the index, once as in the parent.
    for at in [17 * SIZE + 5, 50 * SIZE + 76] {
        for (bytes, parent) in [(mixed_disk(2, disk.len()), None), (disk.clone(), None), (disk.clone(), Some(&parent))]
        {
            let mut source = MemorySource::new(bytes);
            source.lies_at = Some(at as u64);
            match fails(&repository, &source, parent) {
                BackupError::SourceDiffers { disk, offset } => {
                    assert_eq!((disk.as_str(), offset), ("disk0", (at / SIZE * SIZE) as u64));
                }
                other => panic!("{other}"),
            }
        }
    }
    assert!(verify(&repository, true).is_ok());
}

#[test]
fn a_source_that_calls_data_a_hole_is_found_out() {
    let repository = new_repository(&SimFolder::new(1));
    let mut source = sparse(40 * SIZE, 10 * SIZE..20 * SIZE, 1);
    source.bytes[30 * SIZE..40 * SIZE].fill(3); // no data range names it
    source.bytes[20 * SIZE..30 * SIZE].fill(3);
    let error = fails(&repository, &source, None);
    assert!(matches!(error, BackupError::SourceDiffers { offset, .. } if offset >= 20 * SIZE as u64), "{error}");
}

#[test]
fn a_storage_that_does_not_give_back_what_it_took_fails_the_backup() {
    let folder = SimFolder::new(1);
    let disk = mixed_disk(1, 30 * SIZE);
    drop(new_repository(&folder));
    let storage = Arc::new(BadStorage::new(sim_storage(&folder)));
    let repository = Repository::open(storage.clone(), Some(&key(1)), 4 << 20).expect("opens");
    storage.damages_packs.store(true, Ordering::Relaxed);
    match fails(&repository, &MemorySource::new(disk.clone()), None) {
        BackupError::Unreadable { disk, .. } => assert_eq!(disk, "disk0"),
        other => panic!("{other}"),
    }
    // What is found is marked, so that the next backups do not build on it: one for the nodes' pack, one for the data's.
    storage.damages_packs.store(false, Ordering::Relaxed);
    let point = (0..3).find_map(|_| Some(back_up(&repository, &disk, None).ok()?.0)).expect("backs up");
    assert_eq!(restored(&open_repository(&folder), &point, "disk0"), disk);
}

#[test]
fn a_backup_cancelled_while_it_compares_leaves_no_point() {
    let repository = new_repository(&SimFolder::new(1));
    let progress = Arc::new(Progress::new());
    let source = MemorySource::new(mixed_disk(1, 30 * SIZE));
    let mut backup = repository.begin_backup("web01", None, progress.clone()).expect("begins");
    backup.add_disk("disk0", &source).expect("captures");
    progress.cancel();
    assert!(matches!(backup.seal(PointDetails::default()), Err(BackupError::Cancelled)));
    assert!(repository.list_points().expect("lists").is_empty());
}

/// Bytes of chunks that occur nowhere else.
fn noise(seed: u64, chunks: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..chunks * SIZE / 8).flat_map(|_| numbers.next().to_le_bytes()).collect()
}

#[test]
fn a_scattered_disk_is_gathered_within_bounds_and_then_read_from_few_packs() {
    const DONORS: usize = 40;
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let mut disk = noise(1, 2048);
    back_up(&repository, &disk, None).expect("backs up");
    for donor in 0..DONORS {
        let chunks = noise(100 + donor as u64, 2);
        back_up(&repository, &chunks, None).expect("backs up");
        let at = (1536 + donor * 12) * SIZE; // in the last region
        disk[at..at + 2 * SIZE].copy_from_slice(&chunks);
    }
    let (point, stats) = back_up(&repository, &disk, None).expect("backs up");
    let most = 2048 / 20;
    assert_eq!((stats.new_chunks, stats.new_nodes), (0, 2), "a leaf and the root");
    assert!((60..=most).contains(&stats.gathered_chunks), "{stats:?}");
    assert_eq!(point.stats.gathered_chunks, stats.gathered_chunks);
    for repository in [repository.clone(), open_repository(&folder)] {
        let locality = repository.locality(&point, "disk0").expect("known");
        assert_eq!((locality.chunks, locality.regions, locality.sampled), (2048, 4, false));
        assert!(locality.packs <= 2 + 4, "the disk's own two, 3 donors, the gathered: {locality:?}");
        assert!(locality.used > 2048 * SIZE as u64 && locality.amplification() < 1.2, "{locality:?}");
        assert!(restored(&repository, &point, "disk0") == disk);
    }
    // Once is enough, with the parent and without.
    for parent in [Some(&point), None] {
        let (again, stats) = back_up(&repository, &disk, parent).expect("backs up");
        assert_eq!((stats.gathered_chunks, again.stats.stored_bytes), (0, 0));
    }
    assert!(verify(&open_repository(&folder), true).is_ok());
    // What the index forgets the packs tell again, this too.
    let storage = sim_storage(&folder);
    for run in storage.list(ObjectKind::IndexRun).expect("lists") {
        storage.delete(&run.object).expect("deletes");
    }
    let rebuilt = open_repository(&folder);
    assert!(restored(&rebuilt, &point, "disk0") == disk);
    assert!(rebuilt.locality(&point, "disk0").expect("known").packs <= 6);
}

#[test]
fn a_large_scattered_disk_costs_no_more_than_its_share() {
    let repository = new_repository(&SimFolder::new(1));
    let mut disk = Vec::new();
    for donor in 0..120 {
        let chunks = noise(donor, 10);
        back_up(&repository, &chunks, None).expect("backs up");
        disk.extend(chunks);
    }
    let (point, stats) = back_up(&repository, &disk, None).expect("backs up");
    assert!((1..=1200 / 20).contains(&stats.gathered_chunks), "{stats:?}");
    let locality = repository.locality(&point, "disk0").expect("known");
    assert!(locality.packs > 100 && locality.reads >= 110, "{locality:?}");
    assert_eq!(restored(&repository, &point, "disk0"), disk);
}

#[test]
fn writers_of_several_machines_and_many_readers_do_not_disturb_each_other() {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicBool;
    let folder = SimFolder::new(1);
    new_repository(&folder);
    let sealed: Mutex<Vec<(RecoveryPoint, u64, usize)>> = Mutex::default();
    let (over, read) = (AtomicBool::new(false), std::sync::atomic::AtomicU64::new(0));
    // Two of them through a repository opened of their own, as other processes would be.
    let repositories: Vec<Repository> = (0..3).map(|_| open_repository(&folder)).collect();
    let disk = |seed: u64, chunks: usize| mixed_disk(seed, chunks * SIZE + 5);
    std::thread::scope(|scope| {
        for reader in 0..3u64 {
            let (repository, sealed, over, read) = (&repositories[0], &sealed, &over, &read);
            scope.spawn(move || {
                let mut numbers = Numbers(reader);
                while !over.load(Ordering::Relaxed) {
                    let known = sealed.lock().expect("unpoisoned").clone();
                    if known.is_empty() {
                        std::thread::yield_now();
                        continue;
                    }
                    let at = usize::try_from(numbers.below(known.len() as u64)).expect("small");
                    let (point, seed, chunks) = &known[at];
                    assert!(restored(repository, point, "disk0") == disk(*seed, *chunks), "seed {seed}");
                    read.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (repository, sealed) = (&repositories[usize::try_from(writer % 3).expect("small")], &sealed);
                scope.spawn(move || {
                    let mut parent = None;
                    for round in 0..6 {
                        // Writers share what has one seed.
                        let (seed, chunks) = (round + writer / 2, 60 + 10 * usize::try_from(writer).expect("small"));
                        let (point, _) = back_up(repository, &disk(seed, chunks), parent.as_ref()).expect("backs up");
                        sealed.lock().expect("unpoisoned").push((point.clone(), seed, chunks));
                        parent = Some(point);
                    }
                })
            })
            .collect();
        let ended: Vec<bool> = writers.into_iter().map(|writer| writer.join().is_ok()).collect();
        over.store(true, Ordering::Relaxed);
        assert_eq!(ended, [true; 4]);
    });
    assert!(read.load(Ordering::Relaxed) > 0);
    let repository = open_repository(&folder);
    for (point, seed, chunks) in sealed.into_inner().expect("unpoisoned") {
        assert!(restored(&repository, &point, "disk0") == disk(seed, chunks), "seed {seed}");
    }
    assert!(verify(&repository, true).is_ok());
}
