//! A file on its way to its name.
//!
//! A process that is killed leaves its temporary file. Each one is locked (`flock`) by the process that writes it for as
//! long as that lives, so one whose lock can be had is a leftover: making a target removes those of the same target.
//!
//! A file stands unlocked for a moment after it was made, and may be taken for a leftover then. So its maker looks, once
//! it has the lock, whether the file still has its name, and makes another one if not; whoever removes a leftover does so
//! under its lock.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::Overwrite;

/// What every file system takes as a name.
const NAME_MAX: usize = 255;
/// Between a target's name and the numbers of its temporary file.
const MARK: &str = ".lifeboat-";

/// A file under a temporary name, removed when dropped before it got its own.
#[derive(Debug)]
pub(super) struct Temporary {
    file: File,
    temporary: PathBuf,
    name: PathBuf,
    overwrite: Overwrite,
    published: bool,
    /// Whether it stays for [`Temporary::resume`] when it is dropped unfinished.
    kept: bool,
}

impl Temporary {
    /// Creates it beside its final name. A symbolic link there is followed: what it leads to is replaced, not the link.
    pub(super) fn create(name: &Path, overwrite: Overwrite) -> io::Result<Temporary> {
        let name = final_name(name)?;
        let base = name.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        remove_leftovers(&name, base);
        loop {
            let temporary = name.with_file_name(temporary_name(base, std::process::id(), next_number()));
            let file = match File::options().read(true).write(true).create_new(true).open(&temporary) {
                Ok(file) => file,
                // Left by an earlier process with our number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            match own(&file, &temporary) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    fs::remove_file(&temporary)?;
                    return Err(error);
                }
            }
            let created = Temporary { file, temporary, name: name.clone(), overwrite, published: false, kept: false };
            if let Ok(replaced) = fs::metadata(&name) {
                created.file.set_permissions(replaced.permissions())?;
            }
            return Ok(created);
        }
    }

    /// Takes up what an interrupted writer of this name left, or creates a new one; true for the first. It stays when it
    /// is dropped unfinished, to be taken up again.
    pub(super) fn resume(name: &Path, overwrite: Overwrite) -> io::Result<(Temporary, bool)> {
        let name = final_name(name)?;
        let base = name.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?.to_owned();
        let entries = fs::read_dir(name.parent().unwrap_or(Path::new("/")))?;
        for entry in entries.flatten().filter(|entry| is_temporary_of(&base, &entry.file_name())) {
            let temporary = entry.path();
            match lock_leftover(&temporary) {
                Ok(Some(file)) => {
                    return Ok((Temporary { file, temporary, name, overwrite, published: false, kept: true }, true));
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(path = %temporary.display(), %error, "cannot take up an unfinished image");
                }
            }
        }
        let mut created = Temporary::create(&name, overwrite)?;
        created.kept = true;
        Ok((created, false))
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Durable order: the content, the name, the folder.
    pub(super) fn publish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        give_name(&self.temporary, &self.name, self.overwrite)?;
        self.published = true;
        sync_folder_of(&self.name)
    }
}

/// Renames a synced file. The new name is durable once the folder is synced.
pub(super) fn give_name(temporary: &Path, name: &Path, overwrite: Overwrite) -> io::Result<()> {
    match overwrite {
        Overwrite::Replace => fs::rename(temporary, name),
        Overwrite::Refuse => {
            // A link replaces nothing, whoever made a file of this name meanwhile.
            fs::hard_link(temporary, name)?;
            fs::remove_file(temporary)
        }
    }
}

pub(super) fn sync_folder_of(name: &Path) -> io::Result<()> {
    File::open(name.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// Distinguishes the temporary names of one process.
pub(super) fn next_number() -> u64 {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    COUNTER.fetch_add(1, Ordering::Relaxed)
}

/// Locks what was just made at `path`, and tells whether it is still there.
pub(super) fn own(made: &File, path: &Path) -> io::Result<bool> {
    match flock(made, FlockOperation::NonBlockingLockExclusive) {
        // A file system without locks: nobody takes it for a leftover there.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK | Errno::INVAL) => is_named(made, path),
        // Somebody takes it for a leftover right now.
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn temporary_name(base: &OsStr, process: u32, number: u64) -> OsString {
    let ending = format!("{MARK}{process}-{number}");
    let kept = base.as_bytes().get(..NAME_MAX - ending.len()).unwrap_or(base.as_bytes());
    let mut name = OsString::from(OsStr::from_bytes(kept));
    name.push(ending);
    name
}

/// Whether a name is one that [`temporary_name`] gives for a target.
fn is_temporary_of(base: &OsStr, name: &OsStr) -> bool {
    let Some(at) = name.as_bytes().windows(MARK.len()).rposition(|part| part == MARK.as_bytes()) else { return false };
    let numbers = name.as_bytes().get(at + MARK.len()..).and_then(|rest| str::from_utf8(rest).ok());
    let Some((process, number)) = numbers.and_then(|numbers| numbers.split_once('-')) else { return false };
    match (process.parse(), number.parse()) {
        (Ok(process), Ok(number)) => temporary_name(base, process, number) == name,
        _ => false,
    }
}

/// Removes what killed processes left of this target. Nothing hangs on it: what cannot be removed stays.
pub(super) fn remove_leftovers(name: &Path, base: &OsStr) {
    let Some(Ok(entries)) = name.parent().map(fs::read_dir) else { return };
    for entry in entries.flatten().filter(|entry| is_temporary_of(base, &entry.file_name())) {
        let path = entry.path();
        match remove_leftover(&path) {
            Ok(true) => tracing::info!(path = %path.display(), "removed an unfinished image of a process that is gone"),
            Ok(false) => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "cannot remove an unfinished image"),
        }
    }
}

pub(super) fn final_name(name: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(name),
        found => found,
    }
}

/// Returns whether it was one.
fn remove_leftover(path: &Path) -> io::Result<bool> {
    if fs::symlink_metadata(path)?.is_dir() {
        let folder = File::open(path)?;
        let free = flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok() && is_named(&folder, path)?;
        if free {
            fs::remove_dir_all(path)?;
        }
        return Ok(free);
    }
    let Some(_held) = lock_leftover(path)? else { return Ok(false) };
    fs::remove_file(path)?;
    Ok(true)
}

/// The file, locked, if nobody else has it.
fn lock_leftover(path: &Path) -> io::Result<Option<File>> {
    // Neither a symbolic link is followed nor a FIFO waited for. Some file systems lock only what is open for writing.
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).unwrap_or(0);
    let file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    if !is_named(&file, path)? {
        return Ok(None);
    }
    // Opened so as not to wait for a pipe; a regular file takes no notice.
    Ok(Some(file))
}

/// Whether the name leads to this very file.
fn is_named(file: &File, name: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::symlink_metadata(name) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published
            && !self.kept
            && let Err(error) = fs::remove_file(&self.temporary)
        {
            tracing::warn!(path = %self.temporary.display(), %error, "cannot remove an unfinished image");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process holds its files by their locks; one that is gone is a file nobody locks.
    fn leave(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, "half a disk").expect("writable");
        path
    }

    #[test]
    fn what_a_killed_process_left_goes_and_what_a_living_one_writes_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let name = dir.path().join("disk.raw");
        let dead = [leave(dir.path(), "disk.raw.lifeboat-1-0"), leave(dir.path(), "disk.raw.lifeboat-999999-17")];
        let others = [
            "disk.raw",
            "other.raw.lifeboat-1-0",
            "disk.raw.lifeboat-1",
            "disk.raw.lifeboat-1-x",
            "disk.raw.lifeboat-01-0",
            "disk.raw.lifeboat-1-0.bak",
            "disk.raw.old.lifeboat-1-0",
            "disk.raw.lifeboat-1-0.lifeboat-1-0",
        ];
        for other in others {
            leave(dir.path(), other);
        }
        let target = leave(dir.path(), "elsewhere");
        let link = dir.path().join("disk.raw.lifeboat-3-3");
        std::os::unix::fs::symlink(&target, &link).expect("a link");
        let living = leave(dir.path(), "disk.raw.lifeboat-2-0");
        let lock = File::open(&living).expect("readable");
        flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("nobody else has it");

        let first = Temporary::create(&name, Overwrite::Replace).expect("a file");
        assert!(dead.iter().all(|path| !path.exists()), "a leftover is still there");
        assert!(living.exists() && target.exists() && link.is_symlink());
        for other in others {
            assert!(dir.path().join(other).exists(), "{other}");
        }
        // Our own unfinished one is no leftover for the next one, nor what was locked until its process died.
        drop(lock);
        let second = Temporary::create(&name, Overwrite::Replace).expect("a file");
        assert!(first.path().exists() && second.path().exists() && !living.exists());
        first.publish().expect("its name is free");
        second.publish().expect("it replaces");
    }

    #[test]
    fn the_leftover_of_a_long_name_is_known_by_what_is_kept_of_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let name = dir.path().join("x".repeat(255));
        let left = temporary_name(name.file_name().expect("it has one"), 4_000_000, 12);
        assert_eq!(left.len(), NAME_MAX);
        let left = leave(dir.path(), left.to_str().expect("it is text"));
        drop(Temporary::create(&name, Overwrite::Refuse).expect("a file"));
        assert!(!left.exists());
    }

    #[test]
    fn many_targets_of_one_name_do_not_take_each_other_for_leftovers() {
        let dir = tempfile::tempdir().expect("a folder");
        let name = dir.path().join("disk.raw");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let temporary = Temporary::create(&name, Overwrite::Replace).expect("a file");
                        assert!(is_named(temporary.file(), temporary.path()).expect("readable"));
                        temporary.publish().expect("it is still there");
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 1, "something was left");
    }
}
