//! Key slots: whatever happens to them, somebody who may can still open the repository.

use super::test_support::*;
use super::*;
use crate::disk::Folder;
use crate::format::FormatError;
use crate::keys::{Protection, Secret};
use crate::sim::SimFolder;
use crate::storage::{LocalStorage, Object};

const SEEDS: [u64; 4] = [1, 2, 3, 0x5eed];

fn opens(folder: &SimFolder, byte: u8) -> bool {
    match Repository::open(sim_storage(folder), Some(&key(byte)), 0) {
        Ok(_) => true,
        Err(OpenError::WrongKey) => false,
        Err(error) => panic!("{error}"),
    }
}

fn slots(folder: &SimFolder) -> Vec<SlotId> {
    open_repository(folder).key_slots().expect("lists").into_iter().map(|slot| slot.id).collect()
}

fn damage(folder: &SimFolder, slot: SlotId) {
    let path = Object::KeySlot(slot).path();
    let file = folder.open_exclusive(path.as_ref()).expect("opens");
    file.write_at(60, &[0xff; 4]).expect("writes");
}

#[test]
fn secrets_are_added_and_removed_and_no_pack_is_touched() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 200_000);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    let packs = repository.stats().expect("counts").packs;
    let passphrase = || Secret::passphrase("second".into());
    let second = repository.add_key(&key(2), "the spare, Zürich").expect("adds");
    let third = repository.add_key(&passphrase(), "").expect("adds");
    let listed = repository.key_slots().expect("lists");
    assert_eq!(listed.len(), 3);
    assert_eq!(listed.iter().filter(|slot| slot.in_use).count(), 1);
    let state = |id| listed.iter().find(|slot| slot.id == id).expect("listed").state.clone();
    assert!(
        matches!(state(second), SlotState::Intact { kind: SlotKind::KeyFile, label, created_unix_s: 1.. } if label == "the spare, Zürich")
    );
    assert!(matches!(state(third), SlotState::Intact { kind: SlotKind::Passphrase, .. }));
    for secret in [key(1), key(2), passphrase()] {
        let opened = Repository::open(sim_storage(&folder), Some(&secret), 0).expect("opens");
        assert_eq!(restored(&opened, &point, "disk0"), disk);
    }
    repository.remove_key(second).expect("removes");
    assert!(!opens(&folder, 2) && opens(&folder, 1));
    assert!(matches!(repository.remove_key(second), Err(KeyError::NoSuchSlot { slot }) if slot == second));
    assert_eq!(repository.stats().expect("counts").packs, packs);
    assert!(verify(&repository, true).is_ok());
}

#[test]
fn the_last_slot_that_can_open_stays() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let first = slots(&folder)[0];
    assert!(matches!(repository.remove_key(first), Err(KeyError::LastSlot { .. })));
    let second = repository.add_key(&key(2), "").expect("adds");
    damage(&folder, second);
    assert!(matches!(repository.remove_key(first), Err(KeyError::LastSlot { .. })), "a damaged slot opens nothing");
    let listed = repository.key_slots().expect("lists");
    let state = |id| &listed.iter().find(|slot| slot.id == id).expect("listed").state;
    assert!(matches!(state(second), SlotState::Damaged(FormatError::Checksum { .. })));
    repository.remove_key(second).expect("a damaged one may go");
    assert_eq!(slots(&folder), [first]);
}

#[test]
fn unfit_and_known_secrets_and_labels_are_refused_and_leave_nothing() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let weak = [Secret::passphrase(String::new()), Secret::key_file(vec![1; 31])];
    assert!(weak.iter().all(|secret| matches!(repository.add_key(secret, ""), Err(KeyError::WeakSecret))));
    for label in ["ä".repeat(33), "two\nlines".into(), "nul\0".into()] {
        assert!(matches!(repository.add_key(&key(2), &label), Err(KeyError::Label { .. })), "{label}");
    }
    let first = slots(&folder)[0];
    assert!(matches!(repository.add_key(&key(1), ""), Err(KeyError::Known { slot }) if slot == first));
    assert!(matches!(repository.rotate_key(&key(1), ""), Err(KeyError::Known { .. })));
    assert_eq!(slots(&folder), [first]);
    let plain = Repository::init(sim_storage(&SimFolder::new(2)), CHUNK, Protection::None).expect("init");
    assert!(matches!(plain.add_key(&key(2), ""), Err(KeyError::NotEncrypted)));
    assert!(matches!(plain.remove_key(first), Err(KeyError::NotEncrypted)));
    assert!(matches!(plain.rotate_key(&key(2), ""), Err(KeyError::NotEncrypted)));
    assert_eq!(plain.key_slots().expect("lists"), []);
}

#[test]
fn a_rotation_can_be_repeated_by_the_same_process() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let first = repository.rotate_key(&key(2), "").expect("rotates");
    let second = repository.rotate_key(&key(3), "").expect("rotates");
    assert_eq!(second.removed, first.added);
    assert!(!opens(&folder, 1) && !opens(&folder, 2) && opens(&folder, 3));
    repository.add_key(&key(4), "").expect("adds");
    repository.remove_key(second.added).expect("even the one in use");
    let gone = repository.rotate_key(&key(5), "");
    assert!(matches!(gone, Err(KeyError::NoSuchSlot { slot }) if slot == second.added));
    assert!(opens(&folder, 4) && !opens(&folder, 5));
}

#[test]
fn of_two_who_remove_each_others_slot_one_is_refused() {
    for round in 0..40 {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let storage = || Arc::new(LocalStorage::at(dir.path()));
        let first = Repository::init(storage(), CHUNK, Protection::Secret(key(1))).expect("init");
        first.add_key(&key(2), "").expect("adds");
        let second = Repository::open(storage(), Some(&key(2)), 0).expect("opens");
        let ids = first.key_slots().expect("lists");
        let start = std::sync::Barrier::new(2);
        let remove = |repository: &Repository, id| {
            start.wait();
            repository.remove_key(id)
        };
        let results = std::thread::scope(|scope| {
            let one = scope.spawn(|| remove(&first, ids[0].id));
            let two = scope.spawn(|| remove(&second, ids[1].id));
            [one.join().expect("no panic"), two.join().expect("no panic")]
        });
        let removed = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(removed, 1, "round {round}: {results:?}");
        assert!(results.iter().any(|result| matches!(result, Err(KeyError::LastSlot { .. }))), "{results:?}");
        assert_eq!(first.key_slots().expect("lists").len(), 1);
    }
}

#[test]
fn a_crash_at_every_operation_of_a_rotation_leaves_a_secret_that_opens() {
    for seed in SEEDS {
        let ready = SimFolder::new(seed);
        new_repository(&ready);
        let ready = ready.after_crash();
        let rotate = |folder: &SimFolder| {
            let repository = Repository::open(sim_storage(folder), Some(&key(1)), 0).ok()?;
            repository.rotate_key(&key(2), "new").ok()
        };
        let rehearsal = ready.after_crash_with(seed);
        rotate(&rehearsal).expect("without a crash it succeeds");
        let operations = rehearsal.operations();
        assert!(operations > 10, "two puts and a deletion: {operations}");
        for cut in 0..=operations {
            let folder = ready.after_crash_with(seed).crash_at(cut);
            let acknowledged = rotate(&folder).is_some();
            for fate in 0..4 {
                let after = folder.after_crash_with(seed + fate);
                let (old, new) = (opens(&after, 1), opens(&after, 2));
                assert!(old || new, "seed {seed}, cut {cut}, fate {fate}: nothing opens it");
                assert!(!acknowledged || (new && !old), "seed {seed}, cut {cut}, fate {fate}: {old} {new}");
            }
        }
    }
}

/// A writer killed before its slot's name is durable, a removal, then a power cut.
#[test]
fn a_removal_after_a_killed_addition_and_a_power_cut_leaves_a_secret_that_opens() {
    for seed in SEEDS {
        let ready = SimFolder::new(seed);
        let first = new_repository(&ready).key_slots().expect("lists")[0].id;
        let ready = ready.after_crash();
        let rehearsal = ready.after_crash_with(seed);
        open_repository(&rehearsal).add_key(&key(2), "").expect("adds");
        for killed in 0..=rehearsal.operations() {
            let folder = ready.after_crash_with(seed).crash_at(killed);
            if let Ok(repository) = Repository::open(sim_storage(&folder), Some(&key(1)), 0) {
                let _ = repository.add_key(&key(2), ""); // killed in between
            }
            let next = folder.after_kill();
            for cut in 0..12 {
                let folder = next.after_kill().crash_at(cut);
                let Ok(repository) = Repository::open(sim_storage(&folder), Some(&key(1)), 0) else { continue };
                let removed = repository.remove_key(first);
                for fate in 0..4 {
                    let after = folder.after_crash_with(seed + fate);
                    let context = format!("seed {seed}, killed at {killed}, cut {cut}, fate {fate}: {removed:?}");
                    assert!(opens(&after, 1) || opens(&after, 2), "{context}");
                }
            }
        }
    }
}
