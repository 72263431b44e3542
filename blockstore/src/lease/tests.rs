//! Leases are seen, renewed, judged and given back; whoever lost one does not go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::*;
use crate::backup::{BackupError, PointDetails};
use crate::repository::test_support::*;
use crate::sim::SimFolder;

fn leases(repository: &Repository) -> Vec<LeaseState> {
    repository.leases().expect("lists")
}

#[test]
fn a_backup_has_a_lease_from_before_its_first_look_until_its_end() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    let seen = leases(&open_repository(&folder));
    assert_eq!(seen.len(), 1);
    let record = seen[0].record.clone().expect("readable");
    assert_eq!((record.kind, record.owner.as_str()), (LeaseKind::Backup, "backup of web01"));
    assert_eq!((record.process.pid, &seen[0].verdict), (std::process::id(), &Verdict::Alive));
    drop(backup);
    assert!(leases(&repository).is_empty());
    back_up(&repository, &mixed_disk(1, 5 * CHUNK as usize), None).expect("backs up");
    assert!(leases(&repository).is_empty());
}

#[test]
fn a_backup_whose_lease_is_gone_seals_no_point() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let source = MemorySource::new(mixed_disk(1, 5 * CHUNK as usize));
    let mut backup = repository.begin_backup("web01", None, Arc::default()).expect("begins");
    backup.add_disk("disk0", &source).expect("captures");
    for lease in leases(&repository) {
        repository.storage().delete(&Object::Lease(lease.id)).expect("deletes");
    }
    let sealed = backup.seal(PointDetails::default());
    assert!(matches!(sealed, Err(BackupError::Lease(LeaseError::Lapsed { .. }))), "{sealed:?}");
    assert!(repository.list_points().expect("lists").is_empty());
}

#[test]
fn a_lease_that_was_taken_away_is_never_put_again() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let lease = repository.lease(LeaseKind::Collect, "collect", &[]).expect("takes");
    let object = Object::Lease(lease.id().expect("stands"));
    lease.renew_now().expect("renews");
    lease.confirm().expect("counts");
    repository.storage().delete(&object).expect("deletes");
    assert!(matches!(lease.renew_now(), Err(LeaseError::Lapsed { .. })));
    assert!(matches!(lease.confirm(), Err(LeaseError::Lapsed { .. })));
    drop(lease);
    assert!(leases(&repository).is_empty());
}

#[test]
fn a_held_point_is_named_and_one_that_is_gone_cannot_be_held() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let (point, _) = back_up(&repository, &mixed_disk(1, 5 * CHUNK as usize), None).expect("backs up");
    let held = repository.hold_point("export of web01", &point).expect("holds");
    let seen = leases(&repository);
    assert!(seen[0].holds(point.id));
    let record = seen[0].record.clone().expect("readable");
    assert_eq!((&record.points[0].machine, record.points[0].disks[0].root), (&point.machine, point.disks[0].root));
    drop(held);
    repository.storage().delete(&Object::Point(point.id)).expect("deletes");
    let gone = repository.hold_point("export of web01", &point);
    assert!(matches!(gone, Err(ReadError::NoSuchPoint { .. })), "{gone:?}");
    assert!(leases(&repository).is_empty());
}

#[test]
fn a_recovery_keeps_its_lease_until_it_is_released_and_has_one_only() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let (point, _) = back_up(&repository, &mixed_disk(1, 5 * CHUNK as usize), None).expect("backs up");
    let first = repository.hold_recovery("host/web01", "recovery web01", &point).expect("holds");
    let other = repository.hold_recovery("host/web02", "recovery web02", &point).expect("holds");
    drop(first);
    let again = repository.hold_recovery("host/web01", "recovery web01", &point).expect("holds");
    assert_eq!(leases(&repository).len(), 2);
    drop(again);
    repository.release_recovery("host/web01").expect("releases");
    assert_eq!(leases(&repository).len(), 1);
    other.release();
    assert!(leases(&repository).is_empty());
}

#[test]
fn where_nothing_can_be_written_a_reader_goes_on_without_a_lease_and_a_backup_does_not() {
    let folder = SimFolder::new(1);
    let (point, _) = back_up(&new_repository(&folder), &mixed_disk(1, 5 * CHUNK as usize), None).expect("backs up");
    let folder = folder.full_after(0);
    let repository = open_repository(&folder);
    let held = repository.hold_point("export of web01", &point).expect("goes on");
    assert_eq!(held.id(), None);
    let refused = repository.begin_backup("web01", None, Arc::default());
    assert!(matches!(refused, Err(BackupError::Lease(LeaseError::Io { .. }))), "{refused:?}");
}

#[test]
fn a_damaged_lease_is_listed_and_may_be_anybodys() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let object = Object::Lease(LeaseId([7; 16]));
    repository.storage().put(&object, b"LBOATLS1 and then rubbish").expect("writes");
    let seen = leases(&repository);
    assert!(matches!(seen[0].verdict, Verdict::Unreadable(_)), "{seen:?}");
    assert!(seen[0].may_write() && !seen[0].verdict.is_stale());
}

/// A clock that is set by hand, and a process that lives or not.
#[derive(Debug, Default)]
struct Fake {
    now: AtomicU64,
    gone: std::sync::atomic::AtomicBool,
}

impl Surroundings for Fake {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.now.load(Ordering::Relaxed))
    }
    fn process(&self) -> Process {
        System.process()
    }
    fn is_gone(&self, _: &Process) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

#[test]
fn a_lease_is_stale_when_it_has_run_out_by_more_than_clocks_differ_or_its_process_is_gone() {
    let around = Fake::default();
    around.now.store(1000, Ordering::Relaxed);
    let backup = LeaseRecord::new(LeaseKind::Backup, "backup", &[], &around);
    let recovery = LeaseRecord::new(LeaseKind::Recovery, "recovery", &[], &around);
    assert_eq!((backup.created, backup.expires, recovery.expires), (1000, 1600, 1000 + 30 * 24 * 3600));
    for (now, verdict) in [(500, Verdict::Alive), (1900, Verdict::Alive), (1901, Verdict::Expired)] {
        around.now.store(now, Ordering::Relaxed);
        assert_eq!(backup.judge(&around), verdict, "{now}");
        assert_eq!(recovery.judge(&around), Verdict::Alive, "{now}");
    }
    around.now.store(1000, Ordering::Relaxed);
    around.gone.store(true, Ordering::Relaxed);
    assert_eq!(backup.judge(&around), Verdict::ProcessGone);
    assert_eq!(recovery.judge(&around), Verdict::Alive, "it outlives its process");
}
