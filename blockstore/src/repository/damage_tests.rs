//! A damaged pack is found, marked, passed over by later backups, and needed no more once they stored its chunks anew.

use std::path::{Path, PathBuf};

use super::test_support::*;
use super::*;
use crate::disk::Folder;
use crate::id::PackId;
use crate::sim::SimFolder;
use crate::storage::ObjectKind;

fn flip(folder: &SimFolder, object: Object) {
    let path = PathBuf::from(object.path());
    let file = folder.open_exclusive(&path).expect("opens");
    let middle = file.len().expect("has a length") / 2;
    let mut bytes = [0; 64];
    file.read_at(middle, &mut bytes).expect("reads");
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    file.write_at(middle, &bytes).expect("writes");
}

/// The pack that holds the first chunk of the disk, and the one that holds its first leaf.
fn packs_of(repository: &Repository, point: &RecoveryPoint) -> [PackId; 2] {
    let disk = repository.open_disk(point, "disk0").expect("opens");
    let leaf = disk.leaf_of(0).expect("reads");
    let chunk = (0..512).map(|at| leaf.child(at)).find(|id| !id.is_zero()).expect("holds data");
    let node = point.disk("disk0").expect("named").root;
    [chunk, node].map(|id| repository.fetcher().index.first(&id).expect("indexed").pack.pack)
}

fn markers(folder: &SimFolder) -> Vec<Object> {
    sim_storage(folder).list(ObjectKind::DamagedPack).expect("lists").into_iter().map(|listed| listed.object).collect()
}

fn made() -> (SimFolder, Vec<u8>, RecoveryPoint, [PackId; 2]) {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 1 << 20);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    let packs = packs_of(&repository, &point);
    (folder, disk, point, packs)
}

#[test]
fn what_verify_found_damaged_is_stored_anew_by_the_next_backup_and_heals_old_points() {
    for (at, with_parent) in [(0, true), (0, false), (1, true), (1, false)] {
        let (folder, disk, point, packs) = made();
        flip(&folder, Object::Pack(packs[at]));
        let report = verify(&open_repository(&folder), true);
        assert_eq!(report.damaged.len(), 1, "one damage for one object: {report:?}");
        assert_eq!(report.damaged[0].object, Object::Pack(packs[at]));
        assert_eq!(report.damaged[0].affected.len(), 1);
        assert_eq!(markers(&folder), [Object::DamagedPack(packs[at])]);
        assert_eq!(verify(&open_repository(&folder), true), report, "and again");

        let parent = with_parent.then_some(&point);
        let (second, stats) = back_up(&open_repository(&folder), &disk, parent).expect("backs up");
        assert!([stats.new_chunks, stats.new_nodes][at] > 0, "{stats:?}");
        for point in [&point, &second] {
            assert_eq!(restored(&open_repository(&folder), point, "disk0"), disk);
        }
        let healed = verify(&open_repository(&folder), true);
        assert!(healed.is_ok(), "{healed:?}");
        let (_, stats) = back_up(&open_repository(&folder), &disk, Some(&second)).expect("backs up");
        assert_eq!((stats.new_chunks, stats.new_nodes), (0, 0), "the new copies count");

        flip(&folder, Object::Pack(packs[at]));
        assert!(verify(&open_repository(&folder), true).is_ok());
        assert_eq!(markers(&folder), [], "whole again");
    }
}

#[test]
fn what_a_read_found_damaged_is_stored_anew_by_the_next_backup() {
    let (folder, disk, point, [pack, _]) = made();
    flip(&folder, Object::Pack(pack));
    let opened = open_repository(&folder).open_disk(&point, "disk0").expect("opens");
    let read = crate::Base::read(&*opened, 0, 1 << 20, &mut Vec::new());
    assert!(matches!(read, Err(ReadError::CorruptChunk { .. })), "{read:?}");
    assert_eq!(markers(&folder), [Object::DamagedPack(pack)]);
    let (second, _) = back_up(&open_repository(&folder), &disk, Some(&point)).expect("backs up");
    for point in [&point, &second] {
        assert_eq!(restored(&open_repository(&folder), point, "disk0"), disk);
    }
}

#[test]
fn a_damaged_pack_is_reported_until_nothing_that_is_needed_stands_in_it_alone() {
    let (folder, mut disk, point, [pack, _]) = made();
    flip(&folder, Object::Pack(pack));
    assert!(!verify(&open_repository(&folder), true).is_ok());
    disk[..512 << 10].fill(0); // half of what the pack holds is gone from the source
    let (second, _) = back_up(&open_repository(&folder), &disk, Some(&point)).expect("backs up");
    assert_eq!(restored(&open_repository(&folder), &second, "disk0"), disk);
    let report = verify(&open_repository(&folder), true);
    assert_eq!(report.damaged.iter().map(|damage| damage.object).collect::<Vec<_>>(), [Object::Pack(pack)]);
    assert!(report.damaged[0].affected.iter().all(|hit| hit.point == point.id));
    sim_storage(&folder).delete(&Object::Point(point.id)).expect("deletes");
    assert!(verify(&open_repository(&folder), true).is_ok());
}

#[test]
fn a_backup_goes_on_without_a_parent_whose_manifest_is_damaged_or_missing() {
    for missing in [false, true] {
        let (folder, disk, point, [_, pack]) = made();
        if missing {
            folder.remove(Path::new(&Object::Pack(pack).path())).expect("removes");
        } else {
            flip(&folder, Object::Pack(pack));
        }
        let (second, stats) = back_up(&open_repository(&folder), &disk, Some(&point)).expect("backs up");
        assert_eq!(stats.new_chunks, 0, "the chunks are found through the index");
        assert!(stats.new_nodes > 0);
        for point in [&point, &second] {
            assert_eq!(restored(&open_repository(&folder), point, "disk0"), disk);
        }
        assert!(verify(&open_repository(&folder), true).is_ok());
    }
}

#[test]
fn a_damaged_manifest_nobody_noticed_is_not_built_upon() {
    let (folder, disk, point, [_, pack]) = made();
    flip(&folder, Object::Pack(pack));
    let (second, _) = back_up(&open_repository(&folder), &disk, None).expect("backs up");
    for point in [&point, &second] {
        assert_eq!(restored(&open_repository(&folder), point, "disk0"), disk);
    }
}

#[test]
fn damage_counts_once_when_several_runs_name_the_pack() {
    let (folder, mut disk, point, [pack, _]) = made();
    disk[..64 << 10].reverse();
    back_up(&open_repository(&folder), &disk, Some(&point)).expect("backs up");
    flip(&folder, Object::Pack(pack));
    let report = verify(&open_repository(&folder), true);
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    let runs = |folder| sim_storage(folder).list(ObjectKind::IndexRun).expect("lists").len();
    let before = runs(&folder);
    // A read that fails has the index look at all packs again, which leaves a run that says the same.
    let opened = open_repository(&folder).open_disk(&point, "disk0").expect("opens");
    assert!(crate::Base::read(&*opened, 0, 1 << 20, &mut Vec::new()).is_err());
    assert!(runs(&folder) > before, "no run was made anew");
    let again = verify(&open_repository(&folder), true);
    assert_eq!(again.damaged, report.damaged);
}
