//! What a verification without the key finds, and that it finds it.

use std::path::{Path, PathBuf};

use super::*;
use crate::disk::Folder;
use crate::id::PackId;
use crate::keys::Protection;
use crate::progress::Progress;
use crate::repository::test_support::*;
use crate::sim::SimFolder;
use crate::storage::Object;

/// A repository with two points, and its packs.
fn filled() -> SimFolder {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let (first, _) = back_up(&repository, &mixed_disk(1, 900_000), None).expect("backs up");
    back_up(&repository, &mixed_disk(2, 400_000), Some(&first)).expect("backs up");
    repository.protect(first.id, Some(2000), 1000).expect("protects");
    folder
}

fn files(folder: &SimFolder, dir: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = folder.list(Path::new(dir)).expect("lists").into_iter().map(|e| e.path).collect();
    for below in folder.list_dirs(Path::new(dir)).expect("lists") {
        found.extend(files(folder, below.to_str().expect("text")));
    }
    found.sort();
    found
}

fn flip(folder: &SimFolder, path: &Path, at: u64) {
    let file = folder.open_exclusive(path).expect("opens");
    let mut byte = [0];
    file.read_at(at, &mut byte).expect("reads");
    file.write_at(at, &[byte[0] ^ 0x10]).expect("writes");
}

fn len(folder: &SimFolder, path: &Path) -> u64 {
    folder.open_read(path).expect("opens").len().expect("has a length")
}

fn verify(folder: &SimFolder, read_data: bool) -> KeylessReport {
    let keyless = Repository::open_keyless(sim_storage(folder)).expect("opens");
    keyless.verify(read_data, &Progress::new()).expect("completes")
}

fn damaged(report: &KeylessReport) -> Vec<String> {
    report.damaged.iter().map(|damage| damage.object.path()).collect()
}

#[test]
fn a_whole_repository_is_whole_without_its_key_and_nothing_is_written() {
    let folder = filled();
    let operations = folder.operations();
    let structure = verify(&folder, false);
    assert_eq!(structure.damaged, []);
    assert_eq!((structure.points, structure.key_slots, structure.packs_read), (2, 1, 0));
    let all = verify(&folder, true);
    assert_eq!(all.damaged, []);
    assert_eq!(all.packs_read, all.packs);
    assert_eq!(all.bytes_read, files(&folder, "packs").iter().map(|path| len(&folder, path)).sum::<u64>());
    assert_eq!(all.frames, open_repository(&folder).stats().expect("counts").index_entries);
    assert_eq!(folder.operations(), operations);
}

#[test]
fn a_changed_byte_anywhere_is_found_when_the_data_is_read() {
    let folder = filled();
    for dir in ["keys", "index", "points", "packs", "protected"] {
        for path in files(&folder, dir) {
            let end = len(&folder, &path);
            for at in [0, 12, end / 3, end / 2, end - 33, end - 1] {
                flip(&folder, &path, at);
                let report = verify(&folder, true);
                let named = path.display().to_string();
                assert!(damaged(&report).contains(&named), "byte {at} of {named}: {report:?}");
                assert!(dir == "index" || report.damaged.len() == 1, "byte {at} of {named}: {report:?}");
                flip(&folder, &path, at);
            }
        }
    }
    assert_eq!(verify(&folder, true).damaged, []);
}

#[test]
fn without_reading_the_data_missing_cut_and_mislabelled_packs_are_found() {
    let folder = filled();
    let packs = files(&folder, "packs");
    for path in &packs {
        let copy = folder.after_crash(); // everything is synced: an exact copy
        copy.remove(path).expect("removes");
        assert_eq!(damaged(&verify(&copy, false)), [path.display().to_string()]);
        let copy = folder.after_crash();
        copy.open_exclusive(path).expect("opens").set_len(5000).expect("cuts");
        assert_eq!(damaged(&verify(&copy, false)), [path.display().to_string()]);
        let copy = folder.after_crash();
        let table = len(&copy, path) - 40; // in the last entry of the table
        flip(&copy, path, table);
        assert_eq!(damaged(&verify(&copy, false)), [path.display().to_string()]);
    }
    // A whole pack under the name of another.
    let folder = folder.after_crash();
    let bytes = sim_storage(&folder).get(&pack_of(&packs[0]), u64::MAX).expect("reads");
    sim_storage(&folder).put(&pack_of(&packs[1]), &bytes).expect("writes");
    assert_eq!(damaged(&verify(&folder, false)), [packs[1].display().to_string()]);
}

fn pack_of(path: &Path) -> Object {
    let name = path.file_name().expect("named").to_str().expect("text");
    Object::Pack(name.parse::<PackId>().expect("an id"))
}

#[test]
fn what_belongs_to_another_repository_is_found() {
    let (folder, other) = (filled(), filled());
    for dir in ["points", "packs", "index"] {
        let path = files(&other, dir).remove(0);
        let bytes = other.open_read(&path).expect("opens");
        let mut content = vec![0; usize::try_from(len(&other, &path)).expect("small")];
        bytes.read_at(0, &mut content).expect("reads");
        folder.create_dir(path.parent().expect("below the root")).expect("makes");
        folder.create(&path).expect("creates").write_at(0, &content).expect("writes");
        let report = verify(&folder, true);
        assert!(damaged(&report).contains(&path.display().to_string()), "{report:?}");
        folder.remove(&path).expect("removes");
    }
}

#[test]
fn a_lost_last_key_slot_is_damage_and_a_plain_repository_needs_none() {
    let folder = filled();
    folder.remove(&files(&folder, "keys").remove(0)).expect("removes");
    let report = verify(&folder, false);
    assert_eq!(damaged(&report), ["repository"]);
    let plain = SimFolder::new(2);
    Repository::init(sim_storage(&plain), CHUNK, Protection::None).expect("init");
    assert!(!Repository::open_keyless(sim_storage(&plain)).expect("opens").encrypted());
    assert_eq!(verify(&plain, true).damaged, []);
}

#[test]
fn reads_that_fail_are_findings_and_a_cancelled_verification_says_so() {
    let folder = filled();
    let keyless = Repository::open_keyless(sim_storage(&folder)).expect("opens");
    let progress = Progress::new();
    progress.cancel();
    assert!(keyless.verify(true, &progress).is_err());
    let failing = folder.after_crash().fail_reads();
    let keyless = Keyless { storage: sim_storage(&failing), config: keyless.config };
    let report = keyless.verify(true, &Progress::new()).expect("completes");
    assert!(report.damaged.len() > 4 && report.damaged.iter().all(|damage| damage.what.contains("cannot be read")));
}
