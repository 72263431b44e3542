//! What is damaged is had from a copy, from an image, or from what is left of a pack, and nothing else is taken.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::test_support::*;
use super::*;
use crate::disk::Folder;
use crate::sim::SimFolder;
use crate::storage::ObjectKind;

fn spoil(folder: &SimFolder, object: Object, at: u64) {
    let file = folder.open_exclusive(&PathBuf::from(object.path())).expect("opens");
    let mut bytes = [0; 8];
    file.read_at(at, &mut bytes).expect("reads");
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    file.write_at(at, &bytes).expect("writes");
}

fn packs(folder: &SimFolder) -> BTreeSet<Object> {
    sim_storage(folder).list(ObjectKind::Pack).expect("lists").into_iter().map(|listed| listed.object).collect()
}

fn markers(folder: &SimFolder) -> usize {
    sim_storage(folder).list(ObjectKind::DamagedPack).expect("lists").len()
}

/// A copy, object by object.
fn copy_of(folder: &SimFolder) -> SimFolder {
    let (from, copy) = (sim_storage(folder), SimFolder::new(99));
    let to = sim_storage(&copy);
    let kinds = [ObjectKind::KeySlot, ObjectKind::Pack, ObjectKind::IndexRun, ObjectKind::Point];
    let listed = kinds.into_iter().flat_map(|kind| from.list(kind).expect("lists")).map(|listed| listed.object);
    for object in listed.chain([Object::Config]) {
        to.put(&object, &from.get(&object, 64 << 20).expect("reads")).expect("writes");
    }
    copy
}

fn whole(bytes: &[u8]) -> RepairImage {
    RepairImage { disk: None, source: Box::new(MemorySource::new(bytes.to_vec())) }
}

fn repair(folder: &SimFolder, copies: &[&SimFolder], images: &[&[u8]]) -> RepairReport {
    let sources = RepairSources {
        copies: copies.iter().map(|copy| sim_storage(copy)).collect(),
        images: images.iter().map(|bytes| whole(bytes)).collect(),
    };
    let options = VerifyOptions { data: DataCheck::All, ..VerifyOptions::default() };
    open_repository(folder).repair(options, &sources, &Progress::new()).expect("completes")
}

/// A repository with two points that share a part, and their disks.
fn made() -> (SimFolder, [(RecoveryPoint, Vec<u8>); 2]) {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let mut disk = vec![0; (12 << 20) + 700]; // two levels of manifest
    disk[..1 << 20].copy_from_slice(&mixed_disk(1, 1 << 20));
    disk[11 << 20..].copy_from_slice(&mixed_disk(2, (1 << 20) + 700));
    let (first, _) = back_up(&repository, &disk, None).expect("backs up");
    let before = disk.clone();
    disk[..CHUNK as usize].fill(9);
    let (second, _) = back_up(&repository, &disk, Some(&first)).expect("backs up");
    (folder, [(first, before), (second, disk)])
}

fn assert_whole(folder: &SimFolder, points: &[(RecoveryPoint, Vec<u8>)]) {
    let report = verify(&open_repository(folder), true);
    assert!(report.is_ok(), "{report:?}");
    for (point, disk) in points {
        assert!(restored(&open_repository(folder), point, "disk0") == *disk);
    }
}

#[test]
fn a_pack_that_is_damaged_missing_or_cut_is_put_back_from_a_copy() {
    let (folder, points) = made();
    let copy = copy_of(&folder);
    let all = packs(&folder);
    for (way, pack) in all.iter().enumerate() {
        match way % 3 {
            0 => spoil(&folder, *pack, 100),
            1 => folder.remove(Path::new(&pack.path())).expect("removes"),
            _ => folder.open_exclusive(Path::new(&pack.path())).expect("opens").set_len(300).expect("cuts"),
        }
    }
    assert!(!verify(&open_repository(&folder), true).is_ok());
    let report = repair(&folder, &[&copy], &[]);
    assert!(report.verified.is_ok(), "{report:?}");
    assert_eq!((report.packs, report.chunks), (all.len() as u64, 0));
    assert_eq!((packs(&folder), markers(&folder)), (all, 0));
    assert_whole(&folder, &points);
}

#[test]
fn chunks_and_nodes_are_had_from_an_image_of_the_disk() {
    for lost in 0..4 {
        let (folder, points) = made();
        let all: Vec<Object> = packs(&folder).into_iter().collect();
        match all.get(lost) {
            Some(pack) => folder.remove(Path::new(&pack.path())).expect("removes"),
            None => all.iter().for_each(|pack| folder.remove(Path::new(&pack.path())).expect("removes")),
        }
        let report = repair(&folder, &[], &[&points[0].1, &points[1].1]);
        assert!(report.verified.is_ok() && report.packs == 0 && report.chunks > 0, "{lost}: {report:?}");
        assert_whole(&folder, &points);
    }
}

#[test]
fn what_is_good_in_a_damaged_pack_is_kept_and_what_is_nowhere_is_said() {
    let (folder, points) = made();
    let all = packs(&folder);
    let largest = *all.iter().max_by_key(|pack| sim_storage(&folder).len(pack).expect("there")).expect("some");
    spoil(&folder, largest, 5000);
    let before = verify(&open_repository(&folder), true);
    let hit: u64 =
        before.damaged[0].affected.iter().flat_map(|hit| &hit.ranges).map(|range| range.end - range.start).sum();
    let report = repair(&folder, &[], &[&[7; 100_000]]);
    assert!(report.chunks > 10, "the good frames were stored anew: {report:?}");
    let left: u64 = report.verified.damaged[0]
        .affected
        .iter()
        .flat_map(|hit| &hit.ranges)
        .map(|range| range.end - range.start)
        .sum();
    assert_eq!(left, hit, "what nobody has is as damaged as before");
    // With the image the rest is whole again, and nothing needs the damaged pack, which stays marked.
    let report = repair(&folder, &[], &[&points[0].1]);
    assert!(report.verified.is_ok(), "{report:?}");
    assert_eq!(markers(&folder), 1);
    assert_whole(&folder, &points);
    assert_eq!(repair(&folder, &[], &[]).chunks, 0, "nothing is left to do");
}

#[test]
fn a_copy_that_is_another_repository_or_damaged_itself_gives_nothing() {
    let (folder, points) = made();
    let copy = copy_of(&folder);
    let all = packs(&folder);
    for pack in &all {
        folder.remove(Path::new(&pack.path())).expect("removes");
        spoil(&copy, *pack, 100);
    }
    let other = SimFolder::new(5);
    new_repository(&other);
    let sources = RepairSources { copies: vec![sim_storage(&other)], images: vec![] };
    let refused = open_repository(&folder).repair(VerifyOptions::default(), &sources, &Progress::new());
    assert!(matches!(refused, Err(RepairError::OtherRepository)), "{refused:?}");
    // The copy's good frames are taken, its bad ones are not.
    let report = repair(&folder, &[&copy], &[]);
    assert!(report.packs == 0 && !report.verified.is_ok(), "{report:?}");
    let report = repair(&folder, &[&copy], &[&points[0].1, &points[1].1]);
    assert!(report.verified.is_ok(), "{report:?}");
    assert_whole(&folder, &points);
}

#[test]
fn a_crash_at_any_operation_of_a_repair_leaves_it_to_be_done_again() {
    let (folder, points) = made();
    let copy = copy_of(&folder);
    for pack in packs(&folder) {
        folder.remove(Path::new(&pack.path())).expect("removes");
    }
    let image = &points[1].1;
    let run = |folder: &SimFolder| {
        let sources = RepairSources { copies: vec![], images: vec![whole(&points[0].1), whole(image)] };
        let opened = Repository::open(sim_storage(folder), Some(&key(1)), 4 << 20);
        opened.is_ok_and(|opened| opened.repair(VerifyOptions::default(), &sources, &Progress::new()).is_ok())
    };
    let damaged = folder.after_kill();
    assert!(run(&damaged));
    for cut in 0..damaged.operations() {
        let folder = folder.after_kill().crash_at(cut);
        run(&folder);
        let after = folder.after_crash_with(cut);
        assert!(repair(&after, &[&copy], &[]).verified.is_ok(), "cut {cut}");
        for (point, disk) in &points {
            assert!(restored(&open_repository(&after), point, "disk0") == *disk, "cut {cut}");
        }
    }
}
