//! The power is cut at every disk operation of a collect. Every point must be there, bit for bit, and the next collect
//! must bring about what the first one would have.

use super::super::*;
use super::stage::{Policy, Stage, Staged};
use crate::point::RecoveryPoint;
use crate::repository::test_support::*;
use crate::sim::SimFolder;

const SIZE: usize = CHUNK as usize;

struct Ready {
    folder: SimFolder,
    kept: Vec<(RecoveryPoint, Vec<u8>)>,
}

/// A point that is kept, one that shares a little with a forgotten one, and a batch in quarantine.
fn ready(seed: u64) -> Ready {
    let folder = SimFolder::new(seed);
    let repository = new_repository(&folder);
    let kept = mixed_disk(1, 30 * SIZE);
    let dropped = mixed_disk(2, 40 * SIZE);
    let mut shares = mixed_disk(3, 10 * SIZE);
    shares[..4 * SIZE].copy_from_slice(&dropped[20 * SIZE..24 * SIZE]);
    let point = |disk: &[u8]| back_up(&repository, disk, None).expect("backs up").0;
    let earlier = point(&mixed_disk(4, 12 * SIZE));
    repository.storage().delete(&Object::Point(earlier.id)).expect("deletes");
    repository.collect(&CollectOptions::default(), &Progress::new()).expect("collects");
    let dropped = point(&dropped);
    let kept = vec![(point(&kept), kept), (point(&shares), shares)];
    repository.storage().delete(&Object::Point(dropped.id)).expect("deletes");
    Ready { folder: folder.after_crash(), kept }
}

/// Opened by another process each time: what an earlier one left is stale.
fn open(folder: &SimFolder, actor: usize) -> Result<Repository, crate::repository::OpenError> {
    let stage = Stage::new(8, Policy::Switch(Vec::new()));
    (0..actor).for_each(|earlier| stage.leave(earlier));
    Repository::open(Staged::new(sim_storage(folder), stage, actor), Some(&key(1)), 1 << 20)
}

fn collect(folder: &SimFolder, actor: usize) -> Option<CollectReport> {
    let options = CollectOptions { reclaim_now: true, ..CollectOptions::default() };
    open(folder, actor).ok()?.collect(&options, &Progress::new()).ok()
}

fn check(folder: &SimFolder, kept: &[(RecoveryPoint, Vec<u8>)], context: &str) {
    let repository = open(folder, 7).unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_eq!(repository.list_points().expect("lists").len(), kept.len(), "{context}");
    for (point, disk) in kept {
        assert!(&restored(&repository, point, "disk0") == disk, "{context}: point {}", point.id);
    }
    let report = verify(&repository, true);
    assert!(report.is_ok(), "{context}: {report:?}");
}

#[test]
fn a_crash_at_every_operation_of_a_collect_loses_nothing_and_the_next_one_ends_the_work() {
    let seeds: &[u64] = if std::env::var_os("LIFEBOAT_NIGHTLY").is_some() { &[1, 2, 3, 0x5eed] } else { &[1] };
    for seed in seeds {
        let Ready { folder, kept } = ready(*seed);
        let rehearsal = folder.after_crash_with(*seed);
        let report = collect(&rehearsal, 0).expect("without a crash it succeeds");
        assert!(report.repacked_packs > 0 && report.freed_packs > 3, "seed {seed}: it must do something: {report:?}");
        let operations = rehearsal.operations();
        let packs = open(&rehearsal, 1).expect("opens").stats().expect("counts").packs;
        check(&rehearsal, &kept, &format!("seed {seed}, no crash"));
        for cut in 0..operations {
            let crashed = folder.after_crash_with(*seed).crash_at(cut);
            collect(&crashed, 0);
            for fate in 0..2 {
                let context = format!("seed {seed}, cut {cut} of {operations}, fate {fate}");
                let after = crashed.after_crash_with(seed + fate);
                check(&after, &kept, &context);
                let again = collect(&after, 1);
                assert!(again.is_some(), "{context}: the next collect must succeed");
                let left = open(&after, 2).expect("opens").stats().expect("counts");
                assert!(left.packs <= packs + 2, "{context}: {} packs instead of {packs} are left", left.packs);
                let listed = after.after_crash();
                check(&listed, &kept, &format!("{context}, next collect"));
            }
        }
    }
}

#[test]
fn a_collect_that_is_cancelled_anywhere_loses_nothing() {
    let Ready { folder, kept } = ready(1);
    let rehearsal = folder.after_kill();
    let (options, progress) = (CollectOptions { reclaim_now: true, ..CollectOptions::default() }, Progress::new());
    open(&rehearsal, 0).expect("opens").collect(&options, &progress).expect("collects");
    let total = progress.done();
    for share in 0..8 {
        let folder = folder.after_kill();
        let (repository, progress) = (open(&folder, 0).expect("opens"), Progress::new());
        let cancelled = std::thread::scope(|scope| {
            let work = scope.spawn(|| repository.collect(&options, &progress));
            while progress.done() < total * share / 8 && !work.is_finished() {
                std::thread::yield_now();
            }
            progress.cancel();
            work.join().expect("no panic")
        });
        assert!(matches!(cancelled, Ok(_) | Err(CollectError::Cancelled)), "{cancelled:?}");
        check(&folder, &kept, &format!("cancelled after {share} of 8"));
        assert!(collect(&folder, 1).is_some());
        check(&folder, &kept, &format!("cancelled after {share} of 8, next collect"));
    }
}

/// The names a killed forget has removed may come back with the next power cut, if nothing has synced their folder.
#[test]
fn a_forget_that_was_killed_a_collect_and_a_power_cut_leave_a_point_whole_or_gone() {
    let Ready { folder, kept } = ready(1);
    let (forgotten, _) = &kept[0];
    let rehearsal = folder.after_crash();
    open(&rehearsal, 0).expect("opens").forget(forgotten.id, None, 1).expect("forgets");
    let mut freed = 0;
    for cut in 0..rehearsal.operations() {
        let killed = folder.after_crash().crash_at(cut);
        assert!(open(&killed, 0).expect("opens").forget(forgotten.id, None, 1).is_err(), "cut {cut}");
        let next = killed.after_kill();
        freed += u64::from(collect(&next, 1).is_some_and(|report| report.points == 1));
        for seed in 0..8 {
            let folder = next.after_crash_with(seed);
            let repository = open(&folder, 7).unwrap_or_else(|error| panic!("cut {cut}, seed {seed}: {error}"));
            let listed = repository.list_points().expect("lists");
            let there: Vec<_> = kept.iter().filter(|(point, _)| listed.contains(&point.id)).cloned().collect();
            check(&folder, &there, &format!("cut {cut}, seed {seed}"));
        }
    }
    assert!(freed > 0, "no cut came between the point's end and its sync: that proves nothing");
}

/// What was done before, and not yet durable, is durable when it is done again.
#[test]
fn an_unprotect_that_was_killed_and_is_repeated_survives_a_power_cut() {
    let Ready { folder, kept } = ready(1);
    let point = kept[0].0.id;
    open(&folder, 0).expect("opens").protect(point, None, 1).expect("protects");
    let rehearsal = folder.after_crash();
    open(&rehearsal, 0).expect("opens").unprotect(point).expect("unprotects");
    for cut in 0..rehearsal.operations() {
        let killed = folder.after_crash().crash_at(cut);
        assert!(open(&killed, 0).expect("opens").unprotect(point).is_err(), "cut {cut}");
        let next = killed.after_kill();
        open(&next, 1).expect("opens").unprotect(point).expect("unprotects");
        for seed in 0..8 {
            let repository = open(&next.after_crash_with(seed), 2).expect("opens");
            assert_eq!(repository.protection(point).expect("reads"), None, "cut {cut}, seed {seed}");
        }
    }
}
