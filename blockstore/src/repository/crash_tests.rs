//! The power is cut at every storage operation of a backup; what comes after must hold every time.

use super::test_support::*;
use super::*;
use crate::keys::Protection;
use crate::sim::SimFolder;
use crate::storage::Object;
use crate::{PointDetails, Progress};

const SEEDS: [u64; 4] = [1, 2, 3, 0x5eed];

fn first_disk() -> Vec<u8> {
    mixed_disk(1, 60 * CHUNK as usize + 99)
}

fn second_disk() -> Vec<u8> {
    let mut disk = first_disk();
    disk[..5 * CHUNK as usize].copy_from_slice(&mixed_disk(9, 5 * CHUNK as usize));
    disk
}

/// A repository with so many points that the next backup merges its index runs.
fn prepared(seed: u64) -> (SimFolder, RecoveryPoint) {
    let folder = SimFolder::new(seed);
    let repository = new_repository(&folder);
    let (point, _) = back_up(&repository, &first_disk(), None).expect("backs up");
    for n in 0..8 {
        back_up(&repository, &mixed_disk(100 + n, 30 * CHUNK as usize), None).expect("backs up");
    }
    (folder.after_crash(), point)
}

/// What must hold after any crash.
fn check(folder: &SimFolder, earlier: &RecoveryPoint, acknowledged: Option<RecoveryPointId>, context: &str) {
    let repository = open_repository(folder);
    let points = repository.list_points().unwrap_or_else(|error| panic!("{context}: {error}"));
    assert!(points.contains(&earlier.id), "{context}: the earlier point is gone");
    if let Some(id) = acknowledged {
        assert!(points.contains(&id), "{context}: an acknowledged point is gone");
    }
    for id in points {
        let point = repository.load_point(id).unwrap_or_else(|error| panic!("{context}: point {id}: {error}"));
        let found = restored(&repository, &point, "disk0");
        let expected = match point.machine.as_str() {
            "second" => second_disk(),
            _ if id == earlier.id => first_disk(),
            _ => continue, // the fillers
        };
        assert!(found == expected, "{context}: point {id} restores something else");
    }
    let report = verify(&repository, true);
    assert!(report.is_ok(), "{context}: {report:?}");
}

fn second_backup(folder: &SimFolder, parent: &RecoveryPoint) -> Option<RecoveryPointId> {
    let repository = Repository::open(sim_storage(folder), Some(&key(1)), 1 << 20).ok()?;
    let source = MemorySource::new(second_disk());
    let mut backup = repository.begin_backup("second", Some(parent), Arc::new(Progress::new())).ok()?;
    backup.add_disk("disk0", &source).ok()?;
    Some(backup.seal(PointDetails::default()).ok()?.id)
}

#[test]
fn a_crash_at_every_operation_of_a_backup_loses_no_point_and_invents_none() {
    for seed in SEEDS {
        let (ready, earlier) = prepared(seed);
        let rehearsal = ready.after_crash_with(seed);
        second_backup(&rehearsal, &earlier).expect("without a crash it succeeds");
        let operations = rehearsal.operations();
        let runs = open_repository(&rehearsal).stats().expect("counts").index_runs;
        assert_eq!(runs, 2, "the workload must merge index runs, too");
        assert!(operations > 40, "two packs, two runs, a point and nine deletions: {operations}");
        for cut in 0..=operations {
            let folder = ready.after_crash_with(seed).crash_at(cut);
            let acknowledged = second_backup(&folder, &earlier);
            for fate in 0..3 {
                let context = format!("seed {seed}, cut {cut} of {operations}, fate {fate}");
                let after = folder.after_crash_with(seed + fate);
                check(&after, &earlier, acknowledged, &context);
                if fate == 0 {
                    let again = second_backup(&after, &earlier);
                    assert!(again.is_some(), "{context}: the next backup must succeed");
                    check(&after.after_crash(), &earlier, again, &format!("{context}, next backup"));
                }
            }
        }
    }
}

#[test]
fn a_crash_during_init_leaves_no_repository_or_a_whole_one() {
    for seed in SEEDS {
        let rehearsal = SimFolder::new(seed);
        new_repository(&rehearsal);
        for cut in 0..rehearsal.operations() {
            let folder = SimFolder::new(seed).crash_at(cut);
            let failed = Repository::init(sim_storage(&folder), CHUNK, Protection::Secret(key(1)));
            assert!(failed.is_err(), "seed {seed}, cut {cut}");
            let after = folder.after_crash();
            match Repository::open(sim_storage(&after), Some(&key(1)), 0) {
                Err(OpenError::NotARepository) => drop(new_repository(&after)),
                Ok(_) => {}
                Err(other) => panic!("seed {seed}, cut {cut}: {other}"),
            }
            let (point, _) = back_up(&open_repository(&after), &first_disk(), None).expect("works");
            assert!(restored(&open_repository(&after), &point, "disk0") == first_disk(), "seed {seed}, cut {cut}");
        }
    }
}

#[test]
fn a_failed_sync_fails_the_backup_and_poisons_the_storage_until_it_is_opened_again() {
    for seed in SEEDS {
        let (ready, earlier) = prepared(seed);
        let rehearsal = ready.after_crash_with(seed);
        second_backup(&rehearsal, &earlier).expect("without a fault it succeeds");
        for sync in 0..rehearsal.syncs() {
            let folder = ready.after_crash_with(seed).fail_sync_at(sync);
            let storage = sim_storage(&folder);
            let Ok(repository) = Repository::open(storage.clone(), Some(&key(1)), 1 << 20) else { continue };
            let source = MemorySource::new(second_disk());
            let backup = repository.begin_backup("second", Some(&earlier), Arc::new(Progress::new()));
            let sealed = backup.and_then(|mut backup| {
                backup.add_disk("disk0", &source)?;
                backup.seal(PointDetails::default())
            });
            let put = storage.put(&Object::Point(earlier.id), b"never written");
            assert!(put.is_err(), "seed {seed}, sync {sync}: poisoned");
            let acknowledged = sealed.ok().map(|point| point.id); // a failed merge after the point is no failure
            folder.heal();
            check(&folder.after_crash(), &earlier, acknowledged, &format!("seed {seed}, sync {sync}"));
        }
    }
}
