//! The life of a repository: init, open, damage, verify.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::test_support::*;
use super::*;
use crate::ReadError;
use crate::disk::Folder;
use crate::format::config::Config;
use crate::keys::{Protection, Secret};
use crate::sim::SimFolder;
use crate::storage::{LocalStorage, Object};

fn files(folder: &SimFolder, dir: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = folder.list(Path::new(dir)).expect("lists").into_iter().map(|e| e.path).collect();
    for below in folder.list_dirs(Path::new(dir)).expect("lists") {
        found.extend(files(folder, below.to_str().expect("text")));
    }
    found.sort();
    found
}

/// Flips a bit of a file.
fn flip(folder: &SimFolder, path: &Path, at: u64) {
    let file = folder.open_exclusive(path).expect("opens");
    let mut byte = [0];
    file.read_at(at, &mut byte).expect("reads");
    byte[0] ^= 0x10;
    file.write_at(at, &byte).expect("writes");
}

fn len(folder: &SimFolder, path: &Path) -> u64 {
    folder.open_read(path).expect("opens").len().expect("has a length")
}

fn object_of(path: &Path) -> String {
    path.display().to_string()
}

#[test]
fn a_repository_is_made_once_and_opens_with_its_secret_only() {
    let folder = SimFolder::new(1);
    let made = new_repository(&folder);
    assert!(made.encrypted());
    assert_eq!(made.chunk_size(), CHUNK);
    let again = Repository::init(sim_storage(&folder), CHUNK, Protection::None);
    assert!(matches!(again, Err(InitError::Exists)));
    assert_eq!(open_repository(&folder).id(), made.id());
    let open = |secret: Option<&Secret>| Repository::open(sim_storage(&folder), secret, 0);
    assert!(matches!(open(None), Err(OpenError::SecretNeeded)));
    assert!(matches!(open(Some(&key(2))), Err(OpenError::WrongKey)));
    assert!(matches!(open(Some(&Secret::passphrase("no".into()))), Err(OpenError::WrongKey)));
    let nowhere = Repository::open(sim_storage(&SimFolder::new(2)), None, 0);
    assert!(matches!(nowhere, Err(OpenError::NotARepository)));
}

#[test]
fn of_many_inits_at_once_one_wins_and_the_others_leave_nothing() {
    for round in 0..8 {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let root = dir.path().join("repository");
        let start = std::sync::Barrier::new(8);
        let init = |n: u8| {
            let storage = Arc::new(LocalStorage::at(&root));
            start.wait();
            (n, Repository::init(storage, CHUNK, Protection::Secret(key(n))))
        };
        let init = &init;
        let results: Vec<(u8, Result<Repository, InitError>)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || init(n))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let won: Vec<u8> = results.iter().filter(|(_, made)| made.is_ok()).map(|(n, _)| *n).collect();
        assert_eq!(won.len(), 1, "round {round}: {results:?}");
        assert!(results.iter().all(|(_, made)| matches!(made, Ok(_) | Err(InitError::Exists))), "{results:?}");
        let storage = Arc::new(LocalStorage::at(&root));
        let opened = Repository::open(storage, Some(&key(won[0])), 0).expect("the winner's key opens it");
        assert_eq!(opened.storage().list(ObjectKind::KeySlot).expect("lists").len(), 1);
        assert!(verify(&opened, true).is_ok());
    }
}

#[test]
fn a_repository_without_key_slots_says_so() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    folder.remove(&files(&folder, "keys").remove(0)).expect("removes");
    let opened = Repository::open(sim_storage(&folder), Some(&key(1)), 0).expect_err("nothing opens it");
    assert!(matches!(opened, OpenError::NoKeySlot), "{opened}");
    let report = verify(&repository, false);
    assert_eq!(
        report.damaged.iter().map(|d| (d.object, d.what.clone())).collect::<Vec<_>>(),
        [(Object::Config, "it asks for a passphrase or key file, but no key slot is left".to_owned())]
    );
}

#[test]
fn a_passphrase_opens_what_it_made() {
    let folder = SimFolder::new(1);
    let secret = |text: &str| Secret::passphrase(text.into());
    Repository::init(sim_storage(&folder), CHUNK, Protection::Secret(secret("correct horse"))).expect("init");
    Repository::open(sim_storage(&folder), Some(&secret("correct horse")), 0).expect("opens");
    let wrong = Repository::open(sim_storage(&folder), Some(&secret("battery")), 0);
    assert!(matches!(wrong, Err(OpenError::WrongKey)));
}

#[test]
fn init_refuses_bad_parameters_and_a_place_that_is_not_empty() {
    let folder = SimFolder::new(1);
    for size in [0, 1000, 8 << 10, 8 << 20, 65537] {
        let refused = Repository::init(sim_storage(&folder), size, Protection::None);
        assert!(matches!(refused, Err(InitError::ChunkSize(_))), "{size}");
    }
    for weak in [Secret::passphrase(String::new()), Secret::key_file(vec![1; 31])] {
        let refused = Repository::init(sim_storage(&folder), CHUNK, Protection::Secret(weak));
        assert!(matches!(refused, Err(InitError::WeakSecret)));
    }
    folder.create(Path::new("holiday.jpg")).expect("creates");
    let refused = Repository::init(sim_storage(&folder), CHUNK, Protection::None);
    assert!(matches!(refused, Err(InitError::NotEmpty)));
}

#[test]
fn a_changed_configuration_is_noticed_even_with_a_good_checksum() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let storage = sim_storage(&folder);
    let config = Config { repository: repository.id(), ..repository.fetcher().config };
    let forge = |config: Config| {
        storage.put(&Object::Config, &config.encode()).expect("writes");
        Repository::open(sim_storage(&folder), Some(&key(1)), 0)
    };
    let bigger = forge(Config { chunk_size: 32 << 10, ..config });
    assert!(matches!(bigger, Err(OpenError::Damaged { object: Object::KeySlot(_), .. })));
    let plain = forge(Config { encryption: Encryption::None, ..config });
    assert!(matches!(plain, Err(OpenError::Damaged { object: Object::Config, .. })));
    forge(config).expect("the true one opens");
}

#[test]
fn a_damaged_configuration_or_slot_is_named() {
    let folder = SimFolder::new(1);
    new_repository(&folder);
    let repository = open_repository(&folder);
    let slot = files(&folder, "keys").remove(0);
    flip(&folder, &slot, 140);
    let opened = Repository::open(sim_storage(&folder), Some(&key(1)), 0);
    assert!(matches!(opened, Err(OpenError::Damaged { object: Object::KeySlot(_), .. })));
    let report = verify(&repository, false);
    assert_eq!(report.damaged.iter().map(|d| d.object.path()).collect::<Vec<_>>(), [object_of(&slot)]);
    flip(&folder, Path::new("repository"), 13);
    let opened = Repository::open(sim_storage(&folder), Some(&key(1)), 0);
    assert!(matches!(opened, Err(OpenError::Damaged { object: Object::Config, .. })));
    let paths: Vec<String> = verify(&repository, false).damaged.iter().map(|d| d.object.path()).collect();
    assert_eq!(paths, ["repository".to_owned(), object_of(&slot)]);
}

#[test]
fn a_damaged_point_is_named_and_the_others_stay_readable() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 300_000);
    let (first, _) = back_up(&repository, &disk, None).expect("backs up");
    let (second, _) = back_up(&repository, &disk, Some(&first)).expect("backs up");
    let path = PathBuf::from(Object::Point(first.id).path());
    for at in [3, 70, 120] {
        flip(&folder, &path, at);
        assert!(matches!(repository.load_point(first.id), Err(ReadError::Damaged { .. })));
        let report = verify(&repository, false);
        let named: Vec<Object> = report.damaged.iter().map(|damage| damage.object).collect();
        assert_eq!(named, [Object::Point(first.id)]);
        assert_eq!(repository.load_point(second.id).expect("loads"), second);
        flip(&folder, &path, at);
    }
    assert!(verify(&repository, true).is_ok());
    let unknown = RecoveryPointId([9; 32]);
    assert!(matches!(repository.load_point(unknown), Err(ReadError::NoSuchPoint { .. })));
}

#[test]
fn a_damaged_data_pack_is_named_with_whom_it_hits_and_never_read_wrong() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 1 << 20);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    let other = back_up(&repository, &mixed_disk(77, 100_000), None).expect("backs up").0;
    let pack = data_pack_of(&repository, &point);
    let path = PathBuf::from(pack.path());
    for at in [0, 40, 100, len(&folder, &path) / 2, len(&folder, &path) - 40, len(&folder, &path) - 1] {
        flip(&folder, &path, at);
        let repository = open_repository(&folder);
        let report = verify(&repository, true);
        let named: Vec<Object> = report.damaged.iter().map(|damage| damage.object).collect();
        assert!(!named.is_empty() && named.iter().all(|object| *object == pack), "byte {at}: {named:?}");
        let hit: Vec<&Affected> = report.damaged.iter().flat_map(|damage| &damage.affected).collect();
        let in_frames = at >= 80 && at < len(&folder, &path) - 1000 - 32;
        assert_eq!(hit.iter().any(|hit| hit.point == point.id && hit.disk == "disk0"), in_frames, "byte {at}");
        assert!(hit.iter().all(|hit| hit.point != other.id));
        if !in_frames {
            assert_eq!(restored(&repository, &point, "disk0"), disk);
        }
        flip(&folder, &path, at);
    }
    assert!(verify(&open_repository(&folder), true).is_ok());
}

fn data_pack_of(repository: &Repository, point: &RecoveryPoint) -> Object {
    let disk = repository.open_disk(point, "disk0").expect("opens");
    let leaf = disk.leaf_of(0).expect("reads");
    let id = (0..512).map(|at| leaf.child(at)).find(|id| !id.is_zero()).expect("holds data");
    Object::Pack(repository.fetcher().index.first(&id).expect("indexed").pack.pack)
}

#[test]
fn a_missing_or_cut_pack_is_named_and_the_next_backup_stores_its_chunks_again() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 1 << 20);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    let pack = data_pack_of(&repository, &point);
    let path = PathBuf::from(pack.path());
    let cut = folder.open_exclusive(&path).expect("opens");
    cut.set_len(5000).expect("cuts");
    let named = |report: VerifyReport| report.damaged.iter().map(|damage| damage.object).collect::<Vec<_>>();
    assert_eq!(named(verify(&open_repository(&folder), false)), [pack]);
    drop(cut);
    folder.remove(&path).expect("removes");
    let repository = open_repository(&folder);
    assert_eq!(named(verify(&repository, false)), [pack]);
    let (second, _) = back_up(&repository, &disk, Some(&point)).expect("backs up");
    assert_eq!(restored(&repository, &second, "disk0"), disk);
    assert_eq!(restored(&open_repository(&folder), &point, "disk0"), disk, "the older point is whole again, too");
    assert!(verify(&open_repository(&folder), true).is_ok());
}

#[test]
fn a_missing_index_is_rebuilt_from_the_packs() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 1 << 20);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    for run in files(&folder, "index") {
        folder.remove(&run).expect("removes");
    }
    let repository = open_repository(&folder);
    assert_eq!(restored(&repository, &point, "disk0"), disk);
    assert_eq!(files(&folder, "index").len(), 1, "the rebuilt run is stored");
    assert!(verify(&open_repository(&folder), true).is_ok());
}

#[test]
fn a_damaged_index_run_never_gives_wrong_data_and_is_replaced() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 300_000);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    let run = files(&folder, "index").remove(0);
    for at in 0..len(&folder, &run) {
        let copy = folder.after_crash(); // everything is synced: an exact copy
        flip(&copy, &run, at);
        let repository = open_repository(&copy);
        assert_eq!(restored(&repository, &point, "disk0"), disk, "byte {at}");
        let report = verify(&repository, false);
        assert!(report.is_ok(), "byte {at}: {report:?}");
        let repaired: Vec<String> = report.repaired.iter().map(|damage| damage.object.path()).collect();
        assert_eq!(repaired, [object_of(&run)], "byte {at}: {report:?}");
        assert_eq!(verify(&repository, true).repaired, []);
        assert!(verify(&repository, true).is_ok(), "byte {at}");
        assert_eq!(files(&copy, "index").iter().filter(|path| path.extension().is_none()).count(), 1);
    }
}

#[test]
fn verify_finds_a_flipped_index_entry_and_names_the_run() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    back_up(&repository, &mixed_disk(1, 1 << 20), None).expect("backs up");
    let run = files(&folder, "index").remove(0);
    flip(&folder, &run, len(&folder, &run) / 2);
    let report = verify(&open_repository(&folder), false);
    assert!(report.is_ok());
    assert_eq!(report.repaired.iter().map(|d| d.object.path()).collect::<Vec<_>>(), [object_of(&run)]);
    assert!(verify(&open_repository(&folder), true).is_ok(), "it was rebuilt");
    assert!(folder.open_read(&PathBuf::from(format!("{}.damaged", run.display()))).is_ok(), "and set aside");
}

#[test]
fn many_backups_leave_few_index_runs_and_everything_readable() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let mut points = Vec::new();
    for seed in 0..30 {
        let disk = mixed_disk(seed, 200_000);
        points.push((back_up(&repository, &disk, None).expect("backs up").0, disk));
    }
    assert!(repository.stats().expect("counts").index_runs <= 9);
    let fresh = open_repository(&folder);
    for (point, disk) in &points {
        assert_eq!(&restored(&repository, point, "disk0"), disk);
        assert_eq!(&restored(&fresh, point, "disk0"), disk);
    }
    assert!(verify(&fresh, true).is_ok());
    assert_eq!(fresh.list_points().expect("lists").len(), 30);
}

#[test]
fn an_open_repository_survives_the_merge_of_another_one() {
    let folder = SimFolder::new(1);
    let writer = new_repository(&folder);
    let disk = mixed_disk(1, 200_000);
    let (point, _) = back_up(&writer, &disk, None).expect("backs up");
    let reader = open_repository(&folder);
    let mut last = point.clone();
    for seed in 2..20 {
        last = back_up(&writer, &mixed_disk(seed, 100_000), None).expect("backs up").0;
    }
    assert_eq!(restored(&reader, &point, "disk0"), disk);
    assert_eq!(restored(&reader, &last, "disk0"), mixed_disk(19, 100_000), "a point newer than the opening");
}

#[test]
fn a_repository_on_a_real_folder_works_with_and_without_encryption() {
    for protection in [Protection::None, Protection::Secret(key(1))] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let storage: Arc<dyn crate::Storage> = Arc::new(LocalStorage::at(dir.path().join("repo")));
        let encrypted = matches!(protection, Protection::Secret(_));
        let repository = Repository::init(storage.clone(), CHUNK, protection).expect("init");
        let disk = mixed_disk(3, 5_000_001);
        let (point, _) = back_up(&repository, &disk, None).expect("backs up");
        let repository = Repository::open(storage, Some(&key(1)), 0).expect("opens");
        assert_eq!(repository.encrypted(), encrypted);
        assert_eq!(restored(&repository, &point, "disk0"), disk);
        let report = verify(&repository, true);
        assert!(report.is_ok() && report.unreferenced == 0 && report.packs_read == 2, "{report:?}");
        let needle = &disk[disk.len() - 100..];
        let plain_found = walk(dir.path()).iter().any(|bytes| bytes.windows(100).any(|window| window == needle));
        assert!(!encrypted || !plain_found);
    }
}

fn walk(dir: &Path) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("lists") {
        let path = entry.expect("lists").path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(std::fs::read(path).expect("reads")) }
    }
    found
}

#[test]
fn generated_key_files_are_long_and_differ() {
    let one = Repository::generate_key_file().expect("random");
    assert_eq!(one.len(), 64);
    assert_ne!(one, Repository::generate_key_file().expect("random"));
}

/// Lets nothing be written.
#[derive(Debug)]
struct ReadOnly(Arc<dyn crate::Storage>);

fn refuse<T>() -> std::io::Result<T> {
    Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
}

impl crate::Storage for ReadOnly {
    fn put(&self, _: &Object, _: &[u8]) -> std::io::Result<()> {
        refuse()
    }
    fn create(&self, _: &Object, _: &[u8]) -> std::io::Result<()> {
        refuse()
    }
    fn delete(&self, _: &Object) -> std::io::Result<()> {
        refuse()
    }
    fn settle(&self, _: ObjectKind) -> std::io::Result<()> {
        refuse()
    }
    fn get(&self, object: &Object, max: u64) -> std::io::Result<bytes::Bytes> {
        self.0.get(object, max)
    }
    fn get_range(&self, object: &Object, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.0.get_range(object, offset, buf)
    }
    fn len(&self, object: &Object) -> std::io::Result<u64> {
        self.0.len(object)
    }
    fn list(&self, kind: ObjectKind) -> std::io::Result<Vec<crate::storage::Listed>> {
        self.0.list(kind)
    }
    fn map(&self, object: &Object) -> std::io::Result<crate::Mapping> {
        self.0.map(object)
    }
    fn is_vacant(&self) -> std::io::Result<bool> {
        self.0.is_vacant()
    }
}

#[test]
fn a_read_only_repository_with_a_lost_index_is_readable_and_a_lost_chunk_is_an_error_not_a_hang() {
    let folder = SimFolder::new(1);
    let repository = new_repository(&folder);
    let disk = mixed_disk(1, 1 << 20);
    let (point, _) = back_up(&repository, &disk, None).expect("backs up");
    let run = files(&folder, "index").remove(0);
    let pack = data_pack_of(&repository, &point);
    for lost in ["index header", "index entry", "index", "pack"] {
        let copy = folder.after_crash();
        match lost {
            "index header" => flip(&copy, &run, 20),
            "index entry" => flip(&copy, &run, len(&copy, &run) / 2),
            "index" => copy.remove(&run).expect("removes"),
            _ => {
                copy.remove(&run).expect("removes");
                copy.remove(Path::new(&pack.path())).expect("removes");
            }
        }
        let storage = Arc::new(ReadOnly(sim_storage(&copy)));
        let repository = Repository::open(storage, Some(&key(1)), 0).expect("opens");
        let opened = repository.open_disk(&point, "disk0").expect("opens");
        let mut out = Vec::new();
        let read = crate::Base::read(&*opened, 0, 1 << 20, &mut out);
        if lost == "pack" {
            assert!(matches!(read, Err(ReadError::MissingChunk { .. })), "{read:?}");
            assert!(out.is_empty());
        } else {
            assert_eq!(restored(&repository, &point, "disk0"), disk, "{lost}");
        }
        let expected = usize::from(lost.starts_with("index "));
        assert_eq!(files(&copy, "index").len(), expected, "nothing was written");
    }
}

#[test]
fn a_backup_uses_what_another_process_stored_since_the_opening() {
    let folder = SimFolder::new(1);
    let one = new_repository(&folder);
    let other = open_repository(&folder);
    let disk = mixed_disk(1, 1 << 20);
    back_up(&one, &disk, None).expect("backs up");
    let (_, stats) = back_up(&other, &disk, None).expect("backs up");
    assert_eq!((stats.new_chunks, stats.new_nodes), (0, 0));
}
