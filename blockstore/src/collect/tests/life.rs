//! What a collect does, step by step.

use std::sync::Arc;
use std::time::Duration;

use super::super::*;
use crate::backup::PointDetails;
use crate::point::RecoveryPoint;
use crate::repository::test_support::*;
use crate::sim::SimFolder;

const SIZE: usize = CHUNK as usize;

fn now() -> CollectOptions {
    CollectOptions { reclaim_now: true, ..CollectOptions::default() }
}

fn collect(repository: &Repository, options: CollectOptions) -> CollectReport {
    repository.collect(&options, &Progress::new()).expect("collects")
}

fn forget(repository: &Repository, point: &RecoveryPoint) {
    repository.storage().delete(&Object::Point(point.id)).expect("deletes");
}

fn back_up(repository: &Repository, bytes: &[u8]) -> RecoveryPoint {
    crate::repository::test_support::back_up(repository, bytes, None).expect("backs up").0
}

/// Random bytes, so that every chunk is another one.
fn random_disk(seed: u64, chunks: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    (0..chunks * SIZE / 8).flat_map(|_| numbers.next().to_le_bytes()).collect()
}

fn packs(repository: &Repository) -> u64 {
    repository.stats().expect("counts").packs
}

#[test]
fn what_is_forgotten_waits_in_quarantine_and_then_goes() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let (kept, dropped) = (random_disk(1, 20), random_disk(2, 30));
    let (kept_point, dropped_point) = (back_up(&repository, &kept), back_up(&repository, &dropped));
    assert_eq!(packs(&repository), 4);
    forget(&repository, &dropped_point);
    let first = collect(&repository, CollectOptions::default());
    assert_eq!((first.condemned_packs, first.freed_packs, packs(&repository)), (2, 0, 4));
    assert!(first.quarantined[0].due >= first.quarantined[0].created + 24 * 3600);
    assert!(collect(&repository, CollectOptions::default()).freed_packs == 0, "it is not due yet");
    let other = open_repository(&folder);
    let last = collect(&other, now());
    assert_eq!((last.freed_packs, last.freed_bytes), (2, first.condemned_bytes));
    assert_eq!((packs(&other), last.quarantined.len()), (2, 0));
    assert!(restored(&repository, &kept_point, "disk0") == kept);
    assert!(restored(&other, &kept_point, "disk0") == kept);
    let report = verify(&other, true);
    assert!(report.is_ok() && report.unreferenced == 0, "{report:?}");
}

#[test]
fn with_nothing_to_do_nothing_is_written_but_the_lease() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    back_up(&repository, &random_disk(1, 20));
    collect(&repository, CollectOptions::default());
    let before = folder.operations();
    repository.lease(LeaseKind::Collect, "collect", &[]).expect("takes");
    let lease = folder.operations() - before;
    let report = collect(&repository, CollectOptions::default());
    assert_eq!((report.condemned_packs, report.freed_packs), (0, 0));
    let synced = 1; // the names of the points
    assert_eq!(folder.operations(), before + 2 * lease + synced);
    let before = folder.operations();
    repository.collect(&CollectOptions { dry_run: true, ..now() }, &Progress::new()).expect("rehearses");
    assert_eq!(folder.operations(), before, "a dry run writes nothing at all");
}

#[test]
fn a_pack_of_which_little_is_needed_is_repacked() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let first = random_disk(1, 40);
    let mut second = random_disk(2, 40);
    second[..8 * SIZE].copy_from_slice(&first[..8 * SIZE]);
    let first_point = back_up(&repository, &first);
    let second_point = back_up(&repository, &second);
    forget(&repository, &first_point);
    let bytes = repository.stats().expect("counts").pack_bytes;
    let dry = collect(&repository, CollectOptions { dry_run: true, ..CollectOptions::default() });
    assert_eq!((dry.repacked_packs, dry.condemned_packs), (1, 2));
    assert_eq!(collect(&repository, CollectOptions { threshold: 0, ..CollectOptions::default() }).repacked_packs, 0);
    let report = collect(&repository, now());
    assert_eq!(report.repacked_packs, 1);
    assert!(report.repacked_bytes < 10 * SIZE as u64, "{report:?}");
    assert!(report.freed_bytes > 40 * SIZE as u64, "{report:?}");
    assert!(repository.stats().expect("counts").pack_bytes < bytes - 30 * SIZE as u64);
    assert!(restored(&open_repository(&folder), &second_point, "disk0") == second);
    assert!(restored(&repository, &second_point, "disk0") == second);
    assert!(verify(&open_repository(&folder), true).is_ok());
    assert_eq!(collect(&repository, now()).condemned_packs, 0, "and that was that");
}

#[test]
fn the_marks_of_ten_million_chunks_take_few_megabytes() {
    use crate::index::build::RunBuilder;
    use crate::index::build::tests::{entry_of, row_of};
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let chunks = if std::env::var_os("LIFEBOAT_NIGHTLY").is_some() { 10_000_000_u64 } else { 200_000 };
    let (mut number, per_run) = (0, 1 << 20);
    while number < chunks {
        let mut entries = RunBuilder::default();
        while number < chunks && entries.len() < per_run {
            let pack = crate::format::run::PackRow {
                pack: PackId(*blake3::hash(&(number / 500).to_le_bytes()).as_bytes()),
                ..row_of(1)
            };
            entries.add(pack, entry_of(ChunkId(*blake3::hash(&number.to_le_bytes()).as_bytes())));
            number += 1;
        }
        repository.fetcher().index.add(entries).expect("stores");
    }
    let report = repository.plan_collect(50, |id| id.0[31] % 4 > 0);
    assert_eq!(report.packs, chunks.div_ceil(500));
    let share = report.live_bytes * 100 / (chunks * 100);
    assert!((74..=76).contains(&share), "{report:?}");
    let most = chunks / 8 + report.packs * 12 + 4096;
    assert!(report.mark_bytes <= most, "{} bytes for {chunks} chunks", report.mark_bytes);
}

#[test]
fn many_tiny_packs_are_joined_once() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disks: Vec<Vec<u8>> = (0..10).map(|seed| random_disk(seed, 3)).collect();
    let points: Vec<RecoveryPoint> = disks.iter().map(|disk| back_up(&repository, disk)).collect();
    assert_eq!(collect(&repository, now()).repacked_packs, 20);
    assert_eq!(packs(&repository), 2);
    for (point, disk) in points.iter().zip(&disks) {
        assert!(&restored(&open_repository(&folder), point, "disk0") == disk);
    }
    assert_eq!(collect(&repository, now()).repacked_packs, 0);
}

#[test]
fn a_forgotten_point_that_is_held_stays_readable_until_it_is_released() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = random_disk(1, 20);
    let point = back_up(&repository, &disk);
    let held = repository.hold_point("export of web01", &point).expect("holds");
    forget(&repository, &point);
    let report = collect(&repository, now());
    assert_eq!((report.points, report.condemned_packs), (1, 0));
    assert!(restored(&open_repository(&folder), &point, "disk0") == disk);
    let pack = repository.fetcher().index.runs()[0].packs().next().expect("named").pack.to_string();
    let explained = repository.explain_pack(&pack[..8], &now(), &Progress::new()).expect("explains");
    assert_eq!((explained.state.as_str(), explained.holders.len()), ("kept", 1));
    assert!(explained.holders[0].forgotten && explained.holders[0].leases[0].starts_with("export of web01"));
    drop(held);
    assert_eq!(collect(&repository, now()).freed_packs, 2);
    assert_eq!(packs(&repository), 0);
}

#[test]
fn a_backup_that_found_a_dying_chunk_saves_it() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = random_disk(1, 20);
    let point = back_up(&repository, &disk);
    let (source, other) = (MemorySource::new(disk.clone()), open_repository(&folder));
    let mut backup = other.begin_backup("web02", None, Arc::default()).expect("begins");
    forget(&repository, &point);
    let report = collect(&repository, now());
    assert_eq!((report.condemned_packs, report.freed_packs), (2, 0), "{report:?}");
    assert!(report.quarantined[0].waits_for[0].starts_with("backup of web02"), "{report:?}");
    assert_eq!(backup.add_disk("disk0", &source).expect("captures").new_chunks, 0);
    assert_eq!(collect(&repository, now()).freed_packs, 0);
    let sealed = backup.seal(PointDetails::default()).expect("seals");
    let report = collect(&repository, now());
    assert_eq!((report.reprieved_packs, report.freed_packs), (2, 0), "{report:?}");
    assert!(report.quarantined.is_empty());
    assert!(restored(&open_repository(&folder), &sealed, "disk0") == disk);
}

#[test]
fn a_backup_that_begins_later_does_not_count_on_what_is_in_quarantine() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = random_disk(1, 20);
    forget(&repository, &back_up(&repository, &disk));
    collect(&repository, CollectOptions::default());
    let source = MemorySource::new(disk.clone());
    let other = open_repository(&folder);
    let mut backup = other.begin_backup("web02", None, Arc::default()).expect("begins");
    assert_eq!(backup.add_disk("disk0", &source).expect("captures").new_chunks, 20);
    assert_eq!(collect(&repository, now()).freed_packs, 2, "nobody has to be waited for");
    let sealed = backup.seal(PointDetails::default()).expect("seals");
    assert!(restored(&open_repository(&folder), &sealed, "disk0") == disk);
}

#[test]
fn what_an_interrupted_backup_left_is_freed() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = random_disk(1, 20);
    back_up(&repository, &disk);
    for listed in repository.storage().list(ObjectKind::IndexRun).expect("lists") {
        repository.storage().delete(&listed.object).expect("deletes");
    }
    for id in repository.list_points().expect("lists") {
        repository.storage().delete(&Object::Point(id)).expect("deletes");
    }
    let report = collect(&open_repository(&folder), now());
    assert_eq!((report.unnamed_packs, report.freed_packs), (2, 2), "{report:?}");
    assert_eq!(packs(&repository), 0);
}

#[test]
fn a_lost_index_is_rebuilt_before_anything_is_called_dead() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = random_disk(1, 20);
    let point = back_up(&repository, &disk);
    for listed in repository.storage().list(ObjectKind::IndexRun).expect("lists") {
        repository.storage().delete(&listed.object).expect("deletes");
    }
    let report = collect(&open_repository(&folder), now());
    assert_eq!((report.unnamed_packs, report.condemned_packs, report.freed_packs), (0, 0, 0), "{report:?}");
    assert!(restored(&open_repository(&folder), &point, "disk0") == disk);
}

#[test]
fn nothing_is_freed_while_a_point_or_a_lease_cannot_be_read() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let dropped = back_up(&repository, &random_disk(1, 20));
    let damaged = back_up(&repository, &random_disk(2, 20));
    forget(&repository, &dropped);
    let storage = repository.storage();
    let good = storage.get(&Object::Point(damaged.id), 1 << 20).expect("reads");
    let lease = Object::Lease(LeaseId([7; 16]));
    for (object, bytes) in [(Object::Point(damaged.id), &good[..40]), (lease, b"rubbish")] {
        storage.put(&object, bytes).expect("writes");
        let refused = repository.collect(&now(), &Progress::new());
        let Err(CollectError::Blocked(blockers)) = refused else { panic!("{object}: {refused:?}") };
        assert_eq!(blockers[0].object, object.to_string());
        let dry = collect(&repository, CollectOptions { dry_run: true, ..now() });
        assert_eq!((dry.blocked.len(), dry.freed_packs), (1, 0), "{dry:?}");
        assert_eq!(packs(&repository), 4);
        match object {
            Object::Lease(_) => storage.delete(&object).expect("deletes"),
            _ => storage.put(&object, &good).expect("writes"),
        }
    }
    assert_eq!(collect(&repository, now()).freed_packs, 2);
}

#[test]
fn two_collects_do_not_work_at_once_and_a_cancelled_one_leaves_no_lease() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    back_up(&repository, &random_disk(1, 20));
    let held = repository.lease(LeaseKind::Collect, "collect", &[]).expect("takes");
    let refused = repository.collect(&now(), &Progress::new());
    assert!(matches!(refused, Err(CollectError::InUse { .. })), "{refused:?}");
    drop(held);
    let progress = Progress::new();
    progress.cancel();
    assert!(matches!(repository.collect(&now(), &progress), Err(CollectError::Cancelled)));
    assert!(repository.leases().expect("lists").is_empty());
}

#[test]
fn a_quarantine_of_nothing_deletes_at_once_and_a_damaged_batch_is_begun_anew() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    forget(&repository, &back_up(&repository, &random_disk(1, 20)));
    collect(&repository, CollectOptions::default());
    for listed in repository.storage().list(ObjectKind::Quarantine).expect("lists") {
        repository.storage().put(&listed.object, b"rubbish").expect("writes");
    }
    let again = collect(&repository, CollectOptions::default());
    assert_eq!((again.condemned_packs, again.quarantined.len()), (2, 1), "{again:?}");
    forget(&repository, &back_up(&repository, &random_disk(2, 20)));
    let at_once = CollectOptions { quarantine: Duration::ZERO, ..CollectOptions::default() };
    assert_eq!(collect(&repository, at_once).freed_packs, 2);
    assert_eq!(packs(&repository), 2, "what waits for its date waits on");
}

#[test]
fn without_the_key_the_last_collect_is_told_with_what_changed_since() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let keyless = || Repository::open_keyless(sim_storage(&folder)).expect("opens").rehearse_collect().expect("tells");
    let (first, second) = (back_up(&repository, &random_disk(1, 20)), back_up(&repository, &random_disk(2, 30)));
    let report = keyless();
    assert_eq!((report.as_of, report.points_new.len(), report.packs), (None, 2, 4));
    collect(&repository, CollectOptions::default());
    let third = back_up(&repository, &random_disk(3, 5));
    forget(&repository, &second);
    let report = keyless();
    assert_eq!((&report.points_new, &report.points_gone), (&vec![third.id], &vec![second.id]));
    assert!(report.as_of.is_some() && report.quarantined.is_empty());
    collect(
        &repository,
        CollectOptions { quarantine: Duration::from_secs(0), reclaim_now: false, threshold: 0, dry_run: false },
    );
    let kept = repository.lease(LeaseKind::Reader, "export of web01", &[&first]).expect("takes");
    let report = keyless();
    assert!(report.points_new.is_empty() && report.points_gone.is_empty(), "{report:?}");
    assert_eq!((report.packs, report.leases.len(), report.due_bytes), (4, 1, 0), "{report:?}");
    drop(kept);
    forget(&repository, &first);
    collect(&repository, CollectOptions::default());
    let report = keyless();
    assert_eq!((report.quarantined[0].packs, report.dead_packs, report.unnamed_packs), (2, 0, 0), "{report:?}");
}
