//! Results are kept, bounded and dropped with their point; damage and power cuts cost a result at the most.

use serde_json::json;

use super::*;
use crate::collect::CollectOptions;
use crate::disk::Folder;
use crate::keys::Protection;
use crate::point::RecoveryPoint;
use crate::progress::Progress;
use crate::repository::test_support::*;
use crate::sim::SimFolder;

const NOW: u64 = 1_000;

fn with_points(folder: &SimFolder, count: u64) -> Vec<RecoveryPoint> {
    let repository = new_repository(folder);
    let disk = |seed| mixed_disk(seed, 3 * CHUNK as usize);
    (0..count).map(|n| back_up(&repository, &disk(n), None).expect("backs up").0).collect()
}

fn record(number: u64) -> DrillRecord {
    let trace = BootTrace { disks: vec![TracedDisk { disk: "disk0".into(), chunks: vec![2, 0, 1] }] };
    let console = format!("booted {number}\n").repeat(100).into_bytes();
    DrillRecord {
        summary: json!({ "number": number }),
        attached: Attachments { console, screenshot: vec![9; 99], trace },
    }
}

fn sorted(repository: &Repository) -> Vec<DrillId> {
    let mut drills = repository.drills().expect("lists");
    drills.sort_unstable();
    drills
}

#[test]
fn a_point_keeps_its_newest_drills_and_takes_them_along_when_it_is_forgotten() {
    let folder = SimFolder::new(1);
    let points = with_points(&folder, 2);
    let repository = open_repository(&folder);
    for number in 0..12 {
        let id = repository.keep_drill(points[0].id, number, &record(number)).expect("keeps");
        assert_eq!((id.point, id.time_unix_ms), (points[0].id, number));
    }
    let same = repository.keep_drill(points[1].id, 5, &record(100)).expect("keeps");
    let later = repository.keep_drill(points[1].id, 5, &record(101)).expect("keeps");
    assert_eq!((same.time_unix_ms, later.time_unix_ms), (5, 6));
    let mine: Vec<u64> =
        sorted(&repository).iter().filter(|id| id.point == points[0].id).map(|id| id.time_unix_ms).collect();
    assert_eq!(mine, (4..12).collect::<Vec<_>>());
    assert_eq!(repository.drill(later).expect("reads"), record(101));
    assert_eq!(repository.drill_summary(same).expect("reads"), record(100).summary);
    repository.forget(points[0].id, Some(points[1].id), NOW).expect("forgets");
    assert_eq!(sorted(&repository), [same, later]);
    let gone = repository.keep_drill(points[0].id, 50, &record(1));
    assert!(matches!(gone, Err(KeepError::Point(PointError::NoSuchPoint { .. }))), "{gone:?}");
}

#[test]
fn a_damaged_drill_is_named_harms_nothing_and_goes_with_the_next() {
    let folder = SimFolder::new(1);
    let points = with_points(&folder, 2);
    let repository = open_repository(&folder);
    let first = repository.keep_drill(points[0].id, 1, &record(1)).expect("keeps");
    let len = repository.storage().len(&Object::Drill(first)).expect("is there");
    let file = folder.open_exclusive(Object::Drill(first).path().as_ref()).expect("opens");
    for at in [170, len - 1] {
        let mut byte = [0];
        file.read_at(at, &mut byte).expect("reads");
        file.write_at(at, &[byte[0] ^ 1]).expect("writes");
        assert!(matches!(repository.drill(first), Err(ReadError::Damaged { .. })), "at {at}");
        let named = verify(&repository, false);
        assert!(named.damaged.iter().any(|damage| damage.object == Object::Drill(first)), "{named:?}");
        let open = Repository::open_keyless(sim_storage(&folder)).expect("opens");
        let keyless = open.verify(false, &Progress::new()).expect("verifies");
        assert!(keyless.damaged.iter().any(|damage| damage.object == Object::Drill(first)), "{keyless:?}");
        file.write_at(at, &byte).expect("writes");
    }
    assert_eq!(repository.drill(first).expect("it is whole again"), record(1));
    // Copied to another point's name it is not that point's.
    let bytes = repository.storage().get(&Object::Drill(first), MAX_LEN).expect("reads");
    let stolen = DrillId { point: points[1].id, time_unix_ms: 1 };
    repository.storage().put(&Object::Drill(stolen), &bytes).expect("writes");
    assert!(repository.drill_summary(stolen).is_err() && repository.drill(stolen).is_err());
    let fresh = repository.keep_drill(points[1].id, 2, &record(2)).expect("keeps");
    assert_eq!(sorted(&repository).iter().filter(|id| id.point == points[1].id).collect::<Vec<_>>(), [&fresh]);
    assert!(verify(&repository, false).is_ok());
}

#[test]
fn an_encrypted_repository_seals_its_drills() {
    let folder = SimFolder::new(1);
    let repository =
        Repository::init(sim_storage(&folder), CHUNK, Protection::Secret(key(1))).expect("makes a repository");
    let (point, _) = back_up(&repository, &mixed_disk(1, CHUNK as usize), None).expect("backs up");
    let id = repository.keep_drill(point.id, 1, &record(7)).expect("keeps");
    assert_eq!(repository.drill(id).expect("reads"), record(7));
    let bytes = repository.storage().get(&Object::Drill(id), MAX_LEN).expect("reads");
    let (envelope, ..) = Envelope::decode(&bytes).expect("whole");
    assert_eq!(envelope.encryption, Encryption::Aes256Gcm);
    // Without its seal it is refused, good checksums or not.
    let (config, plain) = (repository.fetcher().config, Keyring::plain());
    let forged =
        record(8).seal(id, [0; 32], &Config { encryption: Encryption::None, ..config }, &plain).expect("plain");
    repository.storage().put(&Object::Drill(id), &forged).expect("writes");
    assert!(repository.drill(id).is_err() && repository.drill_summary(id).is_err());
}

#[test]
fn a_result_that_is_too_large_is_refused_and_not_written() {
    let folder = SimFolder::new(1);
    let points = with_points(&folder, 1);
    let repository = open_repository(&folder);
    let large = |console: usize, screenshot: usize| {
        let attached =
            Attachments { console: vec![1; console], screenshot: vec![2; screenshot], ..Attachments::default() };
        repository.keep_drill(points[0].id, 1, &DrillRecord { attached, ..record(1) })
    };
    assert!(matches!(large(MAX_CONSOLE_LEN + 1, 0), Err(KeepError::Format(_))));
    assert!(matches!(large(0, MAX_SCREENSHOT_LEN + 1), Err(KeepError::Format(_))));
    assert!(repository.drills().expect("lists").is_empty());
    assert!(large(MAX_CONSOLE_LEN, MAX_SCREENSHOT_LEN).is_ok());
}

#[test]
fn a_power_cut_leaves_whole_drills_and_a_collect_drops_those_of_forgotten_points() {
    let run = |folder: &SimFolder| -> Option<Vec<RecoveryPoint>> {
        let repository = Repository::open(sim_storage(folder), Some(&key(1)), 0).ok()?;
        let points: Vec<RecoveryPoint> = {
            let mut ids = repository.list_points().ok()?;
            ids.sort_unstable();
            ids.into_iter().map(|id| repository.load_point(id).ok()).collect::<Option<_>>()?
        };
        for number in 0..3 {
            repository.keep_drill(points[0].id, number, &record(number)).ok()?;
        }
        repository.forget(points[0].id, Some(points[1].id), NOW).ok()?;
        Some(points)
    };
    let whole = SimFolder::new(1);
    with_points(&whole, 2);
    let operations = {
        let folder = whole.after_kill();
        let before = folder.operations();
        run(&folder).expect("nothing fails");
        folder.operations() - before
    };
    for cut in 0..operations {
        let folder = whole.after_kill();
        let at = folder.operations() + cut;
        let folder = folder.crash_at(at);
        run(&folder);
        let folder = folder.after_crash();
        let repository = open_repository(&folder);
        for id in repository.drills().expect("lists") {
            assert_eq!(repository.drill(id).unwrap_or_else(|e| panic!("cut {cut}: {e}")), record(id.time_unix_ms));
        }
        let options = CollectOptions { reclaim_now: true, ..CollectOptions::default() };
        repository.collect(&options, &Progress::new()).unwrap_or_else(|e| panic!("cut {cut}: {e}"));
        let points = repository.list_points().expect("lists");
        assert!(repository.drills().expect("lists").iter().all(|id| points.contains(&id.point)), "cut {cut}");
        assert!(verify(&repository, true).is_ok(), "cut {cut}");
    }
}
