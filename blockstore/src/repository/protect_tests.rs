//! Protected points stay, whoever forgets at the same time and wherever the power is cut.

use super::test_support::*;
use super::*;
use crate::disk::Folder;
use crate::format::FormatError;
use crate::keys::Protection;
use crate::sim::SimFolder;
use crate::storage::{LocalStorage, Object};

const SEEDS: [u64; 4] = [1, 2, 3, 0x5eed];
const NOW: u64 = 1_000;

fn disk(seed: u64) -> Vec<u8> {
    mixed_disk(seed, 3 * CHUNK as usize)
}

fn with_points(folder: &SimFolder, count: u64) -> Vec<RecoveryPoint> {
    let repository = new_repository(folder);
    (0..count).map(|n| back_up(&repository, &disk(n), None).expect("backs up").0).collect()
}

fn there(folder: &SimFolder, point: &RecoveryPoint) -> bool {
    open_repository(folder).list_points().expect("lists").contains(&point.id)
}

#[test]
fn a_protected_point_is_not_forgotten_until_its_time() {
    let folder = SimFolder::new(1);
    let points = with_points(&folder, 3);
    let repository = open_repository(&folder);
    let ids: Vec<RecoveryPointId> = points.iter().map(|point| point.id).collect();
    repository.protect(ids[0], None, NOW).expect("protects");
    repository.protect(ids[1], Some(NOW + 10), NOW).expect("protects");
    assert!(matches!(repository.protect(ids[2], Some(NOW), NOW), Err(PointError::Past)));
    let listed = repository.protections().expect("lists");
    assert_eq!(listed.get(&ids[0]), Some(&Protected::Always));
    assert_eq!(listed.get(&ids[1]), Some(&Protected::Until(NOW + 10)));
    assert_eq!(listed.len(), 2);
    for (id, now) in [(ids[0], u64::MAX), (ids[1], NOW + 9)] {
        assert!(matches!(repository.forget(id, None, now), Err(PointError::Protected { point, .. }) if point == id));
    }
    repository.forget(ids[1], Some(ids[2]), NOW + 10).expect("its time is over");
    assert!(!there(&folder, &points[1]) && repository.protection(ids[1]).expect("reads").is_none());
    assert!(repository.unprotect(ids[0]).expect("unprotects"));
    assert!(!repository.unprotect(ids[0]).expect("has none"));
    repository.forget(ids[0], Some(ids[2]), NOW).expect("forgets");
    assert_eq!(restored(&repository, &points[2], "disk0"), disk(2));
    let gone = |result| matches!(result, Err(PointError::NoSuchPoint { point }) if point == ids[0]);
    assert!(gone(repository.forget(ids[0], None, NOW)) && gone(repository.protect(ids[0], None, NOW)));
    assert!(gone(repository.unprotect(ids[0]).map(drop)));
}

#[test]
fn a_damaged_protection_protects() {
    let folder = SimFolder::new(1);
    let points = with_points(&folder, 2);
    let repository = open_repository(&folder);
    repository.protect(points[0].id, Some(NOW + 1), NOW).expect("protects");
    let path = Object::Protection(points[0].id).path();
    folder.open_exclusive(path.as_ref()).expect("opens").write_at(70, &[1]).expect("writes");
    assert!(matches!(repository.protection(points[0].id), Ok(Some(Protected::Damaged(_)))));
    let refused = repository.forget(points[0].id, None, u64::MAX);
    assert!(matches!(refused, Err(PointError::Protected { protected: Protected::Damaged(_), .. })));
    // One that was copied from another point's protects, too.
    let bytes = sim_storage(&folder);
    repository.protect(points[0].id, None, NOW).expect("made anew");
    let copied = bytes.get(&Object::Protection(points[0].id), 128).expect("reads");
    bytes.put(&Object::Protection(points[1].id), &copied).expect("writes");
    assert!(matches!(repository.protection(points[1].id), Ok(Some(Protected::Damaged(FormatError::Name)))));
}

#[test]
fn a_point_stays_if_the_one_that_was_to_stay_is_gone_or_damaged() {
    let folder = SimFolder::new(1);
    let points = with_points(&folder, 2);
    let repository = open_repository(&folder);
    let path = Object::Point(points[1].id).path();
    folder.open_exclusive(path.as_ref()).expect("opens").write_at(70, &[1]).expect("writes");
    let kept = |heir| matches!(repository.forget(points[0].id, Some(heir), NOW), Err(PointError::HeirGone { .. }));
    assert!(kept(points[1].id) && kept(RecoveryPointId([9; 32])));
    assert!(there(&folder, &points[0]));
    repository.forget(points[1].id, None, NOW).expect("a damaged point may be forgotten");
}

#[test]
fn of_protect_and_forget_at_once_one_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let storage = || Arc::new(LocalStorage::at(dir.path()));
    let first = Repository::init(storage(), CHUNK, Protection::None).expect("init");
    let second = Repository::open(storage(), None, 0).expect("opens");
    let heir = back_up(&first, &disk(0), None).expect("backs up").0.id;
    let (mut protected, mut forgotten) = (0, 0);
    for round in 0..60 {
        let point = back_up(&first, &disk(round + 1), None).expect("backs up").0.id;
        let start = std::sync::Barrier::new(2);
        let (protect, forget) = std::thread::scope(|scope| {
            let one = scope.spawn(|| {
                start.wait();
                first.protect(point, None, NOW)
            });
            let two = scope.spawn(|| {
                start.wait();
                second.forget(point, Some(heir), NOW)
            });
            (one.join().expect("no panic"), two.join().expect("no panic"))
        });
        let there = first.load_point(point).is_ok();
        match (&protect, &forget) {
            (Ok(()), Err(PointError::Protected { .. })) => protected += u64::from(there),
            (Err(PointError::NoSuchPoint { .. }), Ok(())) => forgotten += u64::from(!there),
            other => panic!("round {round}: {other:?}"),
        }
    }
    assert_eq!(protected + forgotten, 60);
}

/// Two points are pruned, a third is protected, the newest stays.
#[test]
fn a_crash_at_every_operation_of_a_prune_leaves_the_newest_and_the_protected() {
    for seed in SEEDS {
        let ready = SimFolder::new(seed);
        let points = with_points(&ready, 4);
        open_repository(&ready).protect(points[0].id, None, NOW).expect("protects");
        let ready = ready.after_crash();
        let prune = |folder: &SimFolder| -> Vec<RecoveryPointId> {
            let Ok(repository) = Repository::open(sim_storage(folder), Some(&key(1)), 0) else { return Vec::new() };
            let old = points[..3].iter().map(|point| point.id);
            old.filter(|id| repository.forget(*id, Some(points[3].id), NOW).is_ok()).collect()
        };
        let rehearsal = ready.after_crash_with(seed);
        assert_eq!(prune(&rehearsal).len(), 2);
        for cut in 0..=rehearsal.operations() {
            let folder = ready.after_crash_with(seed).crash_at(cut);
            let forgotten = prune(&folder);
            for fate in 0..3 {
                let after = folder.after_crash_with(seed + fate);
                let context = format!("seed {seed}, cut {cut}, fate {fate}");
                let repository = open_repository(&after);
                let left = repository.list_points().expect("lists");
                assert!(left.contains(&points[0].id) && left.contains(&points[3].id), "{context}: {left:?}");
                assert!(forgotten.iter().all(|id| !left.contains(id)), "{context}: a forgotten point is back");
                for (n, point) in (0..).zip(&points).filter(|(_, point)| left.contains(&point.id)) {
                    assert_eq!(restored(&repository, point, "disk0"), disk(n), "{context}");
                }
                assert_eq!(repository.protection(points[0].id).expect("reads"), Some(Protected::Always), "{context}");
            }
        }
    }
}

/// A backup is killed as it writes its point, the point before it is pruned in its favour, the power is cut.
#[test]
fn a_prune_after_a_killed_backup_and_a_power_cut_leaves_a_point() {
    for seed in SEEDS {
        let ready = SimFolder::new(seed);
        let old = with_points(&ready, 1).remove(0);
        let ready = ready.after_crash();
        let rehearsal = ready.after_crash_with(seed);
        back_up(&open_repository(&rehearsal), &disk(0), None).expect("backs up");
        for killed in 0..rehearsal.operations() {
            let folder = ready.after_crash_with(seed).crash_at(killed);
            if let Ok(repository) = Repository::open(sim_storage(&folder), Some(&key(1)), 1 << 20) {
                let _ = back_up(&repository, &disk(0), None); // killed in between
            }
            let next = folder.after_kill();
            let newest = open_repository(&next).list_points().expect("lists").into_iter().find(|id| *id != old.id);
            let Some(newest) = newest else { continue };
            for cut in 0..14 {
                let folder = next.after_kill().crash_at(cut);
                if let Ok(repository) = Repository::open(sim_storage(&folder), Some(&key(1)), 0) {
                    let _ = repository.forget(old.id, Some(newest), NOW);
                }
                for fate in 0..3 {
                    let after = folder.after_crash_with(seed + fate);
                    let left = open_repository(&after).list_points().expect("lists");
                    assert!(!left.is_empty(), "seed {seed}, killed at {killed}, cut {cut}, fate {fate}");
                }
            }
        }
    }
}

#[test]
fn an_acknowledged_protection_survives_a_crash_at_every_operation() {
    for seed in SEEDS {
        let ready = SimFolder::new(seed);
        let point = with_points(&ready, 1).remove(0);
        let ready = ready.after_crash();
        let protect = |folder: &SimFolder, until| {
            let repository = Repository::open(sim_storage(folder), Some(&key(1)), 0);
            repository.is_ok_and(|repository| repository.protect(point.id, until, NOW).is_ok())
        };
        let rehearsal = ready.after_crash_with(seed);
        assert!(protect(&rehearsal, Some(2000)) && protect(&rehearsal, None));
        for cut in 0..=rehearsal.operations() {
            let folder = ready.after_crash_with(seed).crash_at(cut);
            let acknowledged = (protect(&folder, Some(2000)), protect(&folder, None));
            for fate in 0..3 {
                let after = folder.after_crash_with(seed + fate);
                let found = open_repository(&after).protection(point.id).expect("reads");
                let context = format!("seed {seed}, cut {cut}, fate {fate}: {acknowledged:?} {found:?}");
                match acknowledged {
                    (_, true) => assert_eq!(found, Some(Protected::Always), "{context}"),
                    (true, false) => {
                        assert!(matches!(found, Some(Protected::Until(2000) | Protected::Always)), "{context}")
                    }
                    (false, false) => assert!(matches!(found, None | Some(Protected::Until(2000))), "{context}"),
                }
            }
        }
    }
}
