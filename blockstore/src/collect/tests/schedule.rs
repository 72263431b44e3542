//! Collect beside a backup, a forget and a reader: their storage operations are interleaved on purpose, every single
//! preemption and many random ones, and no point may ever lose a chunk.

use std::sync::Arc;

use super::super::*;
use super::stage::{Policy, Stage, Staged};
use super::{Rule, with_broken};
use crate::backup::PointDetails;
use crate::error::ReadError;
use crate::point::RecoveryPoint;
use crate::repository::test_support::*;
use crate::sim::SimFolder;

const SIZE: usize = CHUNK as usize;
const BACKUP: usize = 0;
const COLLECT: usize = 1;
const READER: usize = 2;

/// What there is before the play: a point that will be forgotten, and packs in quarantine that the backup would like.
struct Scene {
    folder: SimFolder,
    doomed: RecoveryPoint,
    disk: Vec<u8>,
    source: Vec<u8>,
}

fn scene() -> Scene {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let gone = mixed_disk(5, 8 * SIZE);
    let (earlier, _) = back_up(&repository, &gone, None).expect("backs up");
    repository.storage().delete(&Object::Point(earlier.id)).expect("deletes");
    repository.collect(&CollectOptions::default(), &Progress::new()).expect("collects");
    let disk = mixed_disk(6, 12 * SIZE);
    let (doomed, _) = back_up(&repository, &disk, None).expect("backs up");
    // Some of what is about to die, some of what waits in quarantine, and something new.
    let source = [&disk[..6 * SIZE], &gone[..], &mixed_disk(7, 3 * SIZE)].concat();
    Scene { folder, doomed, disk, source }
}

/// One play; an error tells what was lost.
fn play(scene: &Scene, policy: Policy, broken: Option<Rule>) -> Result<u64, String> {
    let folder = scene.folder.after_kill();
    let stage = Stage::new(3, policy);
    let storage: Vec<Arc<Staged>> =
        (0..3).map(|actor| Staged::new(sim_storage(&folder), stage.clone(), actor)).collect();
    let open = |actor: usize| Repository::open(storage[actor].clone(), Some(&key(1)), 1 << 20).expect("opens");
    let (writer, collector, reader) = (open(BACKUP), open(COLLECT), open(READER));
    storage.iter().for_each(|storage| storage.begin());
    let (sealed, collected, read) = std::thread::scope(|scope| {
        let stage = &stage;
        let backup = scope.spawn(move || {
            let result = (|| {
                let source = MemorySource::new(scene.source.clone());
                let mut backup = writer.begin_backup("web02", Some(&scene.doomed), Arc::default())?;
                backup.add_disk("disk0", &source)?;
                backup.seal(PointDetails::default())
            })();
            stage.leave(BACKUP);
            result
        });
        let collect = scope.spawn(move || {
            let work = || {
                let object = Object::Point(scene.doomed.id);
                collector.storage().delete(&object).map_err(|source| CollectError::write("the point", source))?;
                let options = CollectOptions { reclaim_now: true, ..CollectOptions::default() };
                collector.collect(&options, &Progress::new())?;
                collector.collect(&options, &Progress::new())
            };
            let result = match broken {
                Some(rule) => with_broken(rule, work),
                None => work(),
            };
            stage.leave(COLLECT);
            result
        });
        let read = scope.spawn(move || {
            let result = (|| {
                let point = reader.load_point(scene.doomed.id)?;
                let _held = reader.hold_point("export of web01", &point)?;
                let disk = reader.open_disk(&point, "disk0")?;
                let target =
                    MemoryTarget { bytes: std::sync::Mutex::new(vec![0xaa; scene.disk.len()]), fails: false.into() };
                crate::restore::restore(&disk, &target, crate::restore::ZeroPolicy::WriteZeroes, &Progress::new())
                    .map_err(|error| ReadError::Io {
                        object: format!("{error:?}"),
                        source: io::ErrorKind::Other.into(),
                    })?;
                Ok(target.bytes.into_inner().expect("unpoisoned"))
            })();
            stage.leave(READER);
            result
        });
        (backup.join().expect("no panic"), collect.join().expect("no panic"), read.join().expect("no panic"))
    });
    let failed = |what: String| Err(format!("{what}\n{}", stage.trace()));
    let point = match sealed {
        Ok(point) => point,
        Err(error) => return failed(format!("the backup failed: {error:?}")),
    };
    if let Err(error) = collected {
        return failed(format!("the collect failed: {error:?}"));
    }
    match read {
        Ok(bytes) if bytes == scene.disk => {}
        Ok(_) => return failed("the reader read something else".into()),
        Err(ReadError::NoSuchPoint { .. }) => {} // forgotten before it was held
        Err(error) => return failed(format!("the reader failed: {error:?}")),
    }
    let repository = open_repository(&folder);
    let report = verify(&repository, true);
    if !report.is_ok() {
        return failed(format!("the new point is damaged: {report:?}"));
    }
    if restored(&repository, &point, "disk0") != scene.source {
        return failed("the new point holds something else".into());
    }
    Ok(stage.steps())
}

fn rounds(few: u64, many: u64) -> u64 {
    if std::env::var_os("LIFEBOAT_NIGHTLY").is_some() { many } else { few }
}

#[test]
fn no_interleaving_of_collect_backup_forget_and_reader_loses_a_chunk() {
    let scene = scene();
    for seed in 0..rounds(60, 3000) {
        play(&scene, Policy::Random(seed), None).unwrap_or_else(|lost| panic!("seed {seed}: {lost}"));
    }
}

#[test]
fn every_single_preemption_of_collect_backup_and_reader_is_harmless() {
    let scene = scene();
    let steps = play(&scene, Policy::Switch(Vec::new()), None).expect("nobody is interrupted");
    assert!(steps > 60, "{steps}");
    for step in (0..steps).step_by(usize::try_from(rounds(3, 1)).expect("small")) {
        for actor in [BACKUP, COLLECT, READER] {
            let policy = Policy::Switch(vec![(step, actor)]);
            play(&scene, policy.clone(), None).unwrap_or_else(|lost| panic!("{policy:?}: {lost}"));
        }
    }
    // The backup is interrupted once for a while, and the collect in that while.
    let mut numbers = Numbers(1);
    for round in 0..rounds(30, 2000) {
        let (first, second) = (numbers.below(steps), numbers.below(steps));
        let others = [BACKUP, COLLECT, READER].map(|actor| (actor + usize::from(round % 2 == 0)) % 3);
        let policy = Policy::Switch(vec![(first, COLLECT), (first + second / 2, others[0]), (first + second, COLLECT)]);
        play(&scene, policy.clone(), None).unwrap_or_else(|lost| panic!("{policy:?}: {lost}"));
    }
}

#[test]
fn a_collect_that_does_not_wait_for_backups_is_caught() {
    let scene = scene();
    let caught = (0..300).any(|step| {
        let policy = Policy::Switch(vec![(step, COLLECT)]);
        play(&scene, policy, Some(Rule::WaitForBackups)).is_err()
    });
    assert!(caught, "no schedule noticed that a rule is broken");
}
