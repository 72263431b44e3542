//! [`LocalStorage`]: objects as files of a [`Folder`].

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use quick_cache::sync::Cache;
use tracing::info;

use super::{Listed, Object, ObjectKind, Storage};
use crate::disk::{Disk, Folder, LocalFolder};
use crate::keys::random;
use crate::mapping::Mapping;

/// Packs kept open for reading.
const OPEN_FILES: usize = 256;
/// Names an unfinished init may leave besides temporary files and key slots: empty directories.
const DIRECTORIES: [&str; 10] =
    ["keys", "packs", "index", "points", "damaged", "leases", "protected", "quarantine", "verified", "tmp"];
const TMP: &str = "tmp";
/// A folder that changed longer ago shows by its time if it changes again, on every file system in use.
const TICK: Duration = Duration::from_secs(2);
const LOCK: &str = "lock";
/// How long somebody else may hold it, and how often that is looked at.
const LOCK_WAIT: Duration = Duration::from_secs(30);
/// No writer takes this long between the last byte of a temporary file and its rename.
const TMP_AGE: Duration = Duration::from_secs(24 * 3600);
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// A repository in a folder. Put writes a temporary file, syncs it, renames it and syncs the directory.
///
/// A sync that fails for another reason than lack of space poisons the storage: puts fail until it is opened again.
/// Reads go on.
#[derive(Debug)]
pub struct LocalStorage {
    folder: Arc<dyn Folder>,
    open: Cache<Object, Arc<dyn Disk>>,
    made: Mutex<HashSet<PathBuf>>,
    poisoned: AtomicBool,
}

impl LocalStorage {
    /// Objects in `folder`, which need not exist yet.
    pub fn new(folder: Arc<dyn Folder>) -> LocalStorage {
        LocalStorage {
            folder,
            open: Cache::new(OPEN_FILES),
            made: Mutex::new(HashSet::new()),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Objects in a directory of the host.
    pub fn at(path: impl Into<PathBuf>) -> LocalStorage {
        LocalStorage::new(Arc::new(LocalFolder::new(path)))
    }

    /// Order: bytes, sync, rename, sync of the directory. Rename before sync could give a name to missing bytes;
    /// without the last step the name could vanish after we said it is there.
    fn write(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier write may be lost: the repository must be opened again"));
        }
        let path = PathBuf::from(object.path());
        let dir = path.parent().unwrap_or(Path::new("")).to_owned();
        self.make_dir(Path::new(TMP))?;
        self.make_dir(&dir)?;
        let temporary = Path::new(TMP).join(crate::id::SlotId(random()?).to_string());
        let written = self.write_file(&temporary, bytes).and_then(|()| self.folder.rename(&temporary, &path));
        if let Err(error) = written {
            let _ = self.folder.remove(&temporary); // ignored by readers if it stays
            return Err(error);
        }
        self.open.remove(object); // a pack that is put back is not the file that was open
        self.note_sync(self.folder.sync_dir(&dir))
    }

    fn write_file(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = self.folder.create(path)?;
        // A pack is not read soon, and copying it would cost as much as packing it; the rest is small.
        file.write_past_cache(0, bytes)?;
        self.note_sync(file.sync())
    }

    fn note_sync(&self, result: io::Result<()>) -> io::Result<()> {
        if let Err(error) = &result
            && !is_no_space(error)
        {
            self.poisoned.store(true, Ordering::Release);
        }
        result
    }

    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if !made.contains(dir) {
            self.folder.create_dir(dir)?;
            made.insert(dir.to_owned());
        }
        Ok(())
    }

    /// A directory that was never made has no names to sync.
    fn sync_names(&self, dir: &Path) -> io::Result<()> {
        match self.folder.sync_dir(dir) {
            Err(error) if not_found(&error) => Ok(()),
            synced => self.note_sync(synced),
        }
    }

    /// Where the objects of a kind are.
    fn dirs(&self, kind: ObjectKind) -> io::Result<Vec<PathBuf>> {
        Ok(match kind {
            ObjectKind::KeySlot => vec![PathBuf::from("keys")],
            ObjectKind::Pack => self.folder.list_dirs(Path::new("packs"))?,
            ObjectKind::IndexRun => vec![PathBuf::from("index")],
            ObjectKind::Point => vec![PathBuf::from("points")],
            ObjectKind::DamagedPack => vec![PathBuf::from("damaged")],
            ObjectKind::Lease => vec![PathBuf::from("leases")],
            ObjectKind::Protection => vec![PathBuf::from("protected")],
            ObjectKind::Quarantine => vec![PathBuf::from("quarantine")],
            ObjectKind::Verified => vec![PathBuf::from("verified")],
            ObjectKind::Drill => vec![PathBuf::from("drills")],
        })
    }

    /// The file of an object; those of packs stay open.
    fn file(&self, object: &Object) -> io::Result<Arc<dyn Disk>> {
        let open = || self.folder.open_read(Path::new(&object.path()));
        match object {
            Object::Pack(_) => self.open.get_or_insert_with(object, open),
            _ => open(),
        }
    }

    /// Waits for its turn: whoever holds the lock writes few small objects.
    fn lock(&self) -> io::Result<Arc<dyn Disk>> {
        self.folder.create_dir(Path::new(""))?;
        match self.folder.create(Path::new(LOCK)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let began = Instant::now();
        loop {
            match self.folder.open_exclusive(Path::new(LOCK)) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && began.elapsed() < LOCK_WAIT => {
                    std::thread::sleep(LOCK_PAUSE);
                }
                other => return other,
            }
        }
    }

    /// [`Storage::create`] by whoever holds the lock.
    fn create_locked(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        match self.folder.open_read(Path::new(&object.path())) {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if not_found(&error) => self.write(object, bytes),
            Err(error) => Err(error),
        }
    }
}

/// Whether an error says that the storage is full.
pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn not_found(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

impl Storage for LocalStorage {
    fn put(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        self.write(object, bytes)
    }

    fn create(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        let _held = self.lock()?; // released when dropped, also by the end of the process
        self.create_locked(object, bytes)
    }

    /// Under the lock from the first look to the configuration: without it, one of two could delete the other's slot
    /// as a left-over before the other's configuration is there.
    fn init(&self, slot: Option<(&Object, &[u8])>, config: &[u8]) -> io::Result<()> {
        let _held = self.lock()?;
        match self.len(&Object::Config) {
            Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if not_found(&error) => {}
            Err(error) => return Err(error),
        }
        for left_over in self.list(ObjectKind::KeySlot)? {
            self.delete(&left_over.object)?;
        }
        if let Some((object, bytes)) = slot {
            self.create_locked(object, bytes)?;
        }
        self.create_locked(&Object::Config, config)
    }

    fn hold(&self) -> io::Result<Box<dyn Send>> {
        Ok(Box::new(self.lock()?))
    }

    fn get(&self, object: &Object, max: u64) -> io::Result<Bytes> {
        let file = self.folder.open_read(Path::new(&object.path()))?;
        let len = file.len()?;
        if len > max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut bytes = vec![0; len];
        file.read_at(0, &mut bytes)?;
        Ok(bytes.into())
    }

    fn get_range(&self, object: &Object, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file(object)?.read_at(offset, buf)
    }

    fn len(&self, object: &Object) -> io::Result<u64> {
        self.folder.open_read(Path::new(&object.path()))?.len()
    }

    fn list(&self, kind: ObjectKind) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        for dir in self.dirs(kind)? {
            for entry in self.folder.list(&dir)? {
                let name = entry.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let object = Object::parse(kind, name);
                // A pack in the wrong directory is not found under its name.
                if let Some(object) = object.filter(|object| Path::new(&object.path()) == entry.path) {
                    listed.push(Listed { object, len: entry.len });
                }
            }
        }
        Ok(listed)
    }

    /// When the folder's names last changed, unless that is so recent that they may change again within one tick.
    fn mark(&self, kind: ObjectKind) -> Option<u64> {
        let [dir] = self.dirs(kind).ok()?.try_into().ok()?;
        let changed = match fs::metadata(self.folder.real_path(&dir)?) {
            Ok(metadata) => metadata.modified().ok()?,
            Err(error) if not_found(&error) => return Some(0),
            Err(_) => return None,
        };
        let settled = SystemTime::now().duration_since(changed).is_ok_and(|age| age >= TICK);
        let since = changed.duration_since(UNIX_EPOCH).ok()?;
        u64::try_from(since.as_nanos()).ok().filter(|_| settled)
    }

    fn delete(&self, object: &Object) -> io::Result<()> {
        self.open.remove(object);
        let path = PathBuf::from(object.path());
        match self.folder.remove(&path) {
            // Whoever removed it may have been killed before that was durable.
            Err(error) if not_found(&error) => {}
            removed => removed?,
        }
        self.sync_names(path.parent().unwrap_or(Path::new("")))
    }

    fn settle(&self, kind: ObjectKind) -> io::Result<()> {
        self.dirs(kind)?.iter().try_for_each(|dir| self.sync_names(dir))
    }

    fn map(&self, object: &Object) -> io::Result<Mapping> {
        match self.folder.real_path(Path::new(&object.path())) {
            Some(path) => Mapping::of_immutable_file(&path),
            None => self.get(object, u64::MAX).map(Mapping::Owned),
        }
    }

    fn forget(&self, object: &Object, offset: u64, len: u64) {
        if let Ok(file) = self.file(object) {
            file.forget(offset, len);
        }
    }

    fn tidy(&self) -> io::Result<()> {
        let Some(real) = self.folder.real_path(Path::new(TMP)) else { return Ok(()) };
        for entry in self.folder.list(Path::new(TMP))? {
            let Some(name) = entry.path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.parse::<crate::id::SlotId>().is_err() {
                continue; // not one of ours
            }
            let changed = std::fs::symlink_metadata(real.join(name)).and_then(|metadata| metadata.modified());
            let age = changed.ok().and_then(|changed| changed.elapsed().ok());
            if age.is_some_and(|age| age > TMP_AGE) {
                match self.folder.remove(&entry.path) {
                    Err(error) if !not_found(&error) => return Err(error),
                    _ => info!(file = %entry.path.display(), "removed what a killed writer left"),
                }
            }
        }
        Ok(())
    }

    fn is_vacant(&self) -> io::Result<bool> {
        let root = Path::new("");
        let only_lock = self.folder.list(root)?.iter().all(|entry| entry.path == Path::new(LOCK));
        let dirs = self.folder.list_dirs(root)?;
        let known = dirs.iter().all(|dir| DIRECTORIES.iter().any(|known| dir == Path::new(known)));
        if !only_lock || !known || !self.folder.list_dirs(Path::new("packs"))?.is_empty() {
            return Ok(false);
        }
        for dir in ["packs", "index", "points", "damaged", "leases", "protected", "quarantine", "verified"] {
            if !self.folder.list(Path::new(dir))?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::PackId;

    #[test]
    fn an_object_is_there_whole_or_not_at_all_and_created_once() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let storage = LocalStorage::at(dir.path().join("new/place"));
        assert!(storage.is_vacant().expect("readable"));
        let pack = Object::Pack(PackId([0xab; 32]));
        assert_eq!(storage.get(&pack, 10).expect_err("absent").kind(), io::ErrorKind::NotFound);
        storage.put(&pack, b"hello").expect("written");
        storage.put(&pack, b"hello").expect("replaced");
        assert_eq!(storage.get(&pack, 10).expect("read"), &b"hello"[..]);
        assert_eq!(storage.get(&pack, 4).expect_err("too long").kind(), io::ErrorKind::FileTooLarge);
        let mut part = [0; 3];
        storage.get_range(&pack, 2, &mut part).expect("read");
        assert_eq!(&part, b"llo");
        let past = storage.get_range(&pack, 3, &mut part).expect_err("past the end");
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(&*storage.map(&pack).expect("mapped"), b"hello");
        assert_eq!(storage.list(ObjectKind::Pack).expect("listed"), [Listed { object: pack, len: 5 }]);
        assert!(!storage.is_vacant().expect("readable"));
        storage.create(&Object::Config, b"one").expect("created");
        let again = storage.create(&Object::Config, b"two").expect_err("exists");
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(storage.get(&Object::Config, 10).expect("read"), &b"one"[..]);
        storage.delete(&pack).expect("deleted");
        storage.delete(&pack).expect("gone already");
        assert!(storage.list(ObjectKind::Pack).expect("listed").is_empty());
    }

    #[test]
    fn old_temporary_files_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let storage = LocalStorage::at(dir.path());
        storage.tidy().expect("nothing there yet");
        storage.put(&Object::Config, b"one").expect("written");
        let old = std::time::SystemTime::now() - TMP_AGE - Duration::from_secs(60);
        let (stale, fresh, foreign) = ("ab".repeat(16), "cd".repeat(16), "notes.txt".to_owned());
        for (name, is_old) in [(&stale, true), (&fresh, false), (&foreign, true)] {
            let file = std::fs::File::create(dir.path().join(TMP).join(name)).expect("creates");
            if is_old {
                file.set_modified(old).expect("sets the time");
            }
        }
        storage.tidy().expect("tidies");
        let left = |name: &str| dir.path().join(TMP).join(name).exists();
        assert_eq!([left(&stale), left(&fresh), left(&foreign)], [false, true, true]);
        assert_eq!(storage.get(&Object::Config, 10).expect("read"), &b"one"[..]);
    }
}
