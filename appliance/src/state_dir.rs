//! The state folder: which process owns it, and where things lie in it.
//!
//! ```text
//! STATE/lock             locked by the owner for as long as it lives; holds its process id and command
//! STATE/lifeboat.sock    the owner's API
//! STATE/catalog/ID/      derived catalog of the repository with that id (sled)
//! STATE/recoveries/NAME/ one running recovery: journal, overlays, sockets, console
//! STATE/drilling/N/      one running drill; taken away by every new owner
//! STATE/drills/ID/       copies of what the last drills left: console log, screenshot
//! STATE/scratch/         throw-away overlays of exports; emptied by every new owner
//! STATE/tokens           who may use the API over the network
//! STATE/audit            who has changed what through the API
//! STATE/jobs             which jobs were started, and how they ended
//! STATE/schedules        when policies have run
//! STATE/requests         which requests came with an idempotency key, and their answers
//! STATE/tls/             certificates that the service made for itself
//! STATE/service.log      what a service started in the background says
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use crate::problem::{Handling, Kind, Problem};

/// Longest path of a socket: a Unix socket address takes 107 bytes, and a driver may add a few of its own.
const SOCKET_PATH_MAX: usize = 100;

/// Where a state folder's parts lie. Making one touches nothing.
#[derive(Debug, Clone)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// The state folder at `root`.
    pub fn new(root: PathBuf) -> StateDir {
        StateDir { root }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The owner's API socket.
    pub fn socket(&self) -> PathBuf {
        self.short_path(self.root.join("lifeboat.sock"))
    }

    /// The folder of recoveries.
    pub fn recoveries(&self) -> PathBuf {
        self.root.join("recoveries")
    }

    /// The catalog of one repository.
    pub fn catalog(&self, repository: &str) -> PathBuf {
        self.root.join("catalog").join(repository)
    }

    /// Running drills.
    pub fn drilling(&self) -> PathBuf {
        self.root.join("drilling")
    }

    /// Copies of what drills left.
    pub fn drills(&self) -> PathBuf {
        self.root.join("drills")
    }

    /// Throw-away overlays.
    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }

    /// The audit log.
    pub fn audit(&self) -> PathBuf {
        self.root.join("audit")
    }

    /// What is known of the past of policies.
    pub fn schedules(&self) -> PathBuf {
        self.root.join("schedules")
    }

    /// Requests with an idempotency key.
    pub fn requests(&self) -> PathBuf {
        self.root.join("requests")
    }

    /// The job log.
    pub fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// The service's own certificates.
    pub fn tls(&self) -> PathBuf {
        self.root.join("tls")
    }

    /// The tokens of the API.
    pub fn tokens(&self) -> PathBuf {
        self.root.join("tokens")
    }

    /// What a background service says.
    pub fn service_log(&self) -> PathBuf {
        self.root.join("service.log")
    }

    /// `path` itself if a Unix socket can have it as its address, else a short stand-in in the runtime folder, the same
    /// for every later process.
    pub fn short_path(&self, path: PathBuf) -> PathBuf {
        if path.as_os_str().len() <= SOCKET_PATH_MAX {
            return path;
        }
        let digest = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
        runtime_dir().join(format!("{}.sock", &digest[..24]))
    }

    /// The same in a folder that every user may pass through, but not read: what lies there is its owner's.
    pub fn shared_path(&self, path: PathBuf) -> PathBuf {
        let digest = blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex();
        shared_dir().join(format!("{}.sock", &digest[..24]))
    }

    /// The names of recoveries that have a folder, whatever their state.
    pub fn recovery_names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.recoveries()) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().join("journal").is_file())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Makes this process the owner, until the returned lock is dropped. `command` is told to whom it keeps out.
    pub fn own(&self, command: &str) -> Result<Ownership, Problem> {
        let cannot = |error: &io::Error| {
            Problem::failed(format!("cannot use the state folder {}", self.root.display()), error)
                .hint("name a folder you may write to with --state or LIFEBOAT_STATE")
        };
        create_private_dir(&self.root).map_err(|e| cannot(&e))?;
        secure_runtime_dir().map_err(|e| cannot(&e))?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.root.join("lock"))
            .map_err(|e| cannot(&e))?;
        if let Err(error) = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(cannot(&error.into()));
            }
            let mut owner = String::new();
            // The text is for a person; an owner that has not written it yet is as good a refusal.
            let _ = lock.read_to_string(&mut owner);
            let owner = if owner.trim().is_empty() { "another process".to_owned() } else { owner.trim().to_owned() };
            return Err(Problem::new(
                Kind::Refused,
                format!("state folder {} is in use by {owner}", self.root.display()),
            )
            .hint("wait for it to end, stop it, or name another folder with --state")
            .handled(Handling::AskAgain));
        }
        let write = |lock: &mut File| {
            lock.set_len(0)?;
            lock.rewind()?;
            write!(lock, "process {} (lifeboat {command})", std::process::id())
        };
        write(&mut lock).map_err(|e| cannot(&e))?;
        // Only an owner that died leaves overlays here.
        match fs::remove_dir_all(self.scratch()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(&error)),
            _ => {}
        }
        for dir in [self.recoveries(), self.scratch(), self.root.join("catalog")] {
            create_private_dir(&dir).map_err(|e| cannot(&e))?;
        }
        Ok(Ownership { _lock: lock })
    }
}

/// Proof that this process owns the state folder.
#[derive(Debug)]
pub struct Ownership {
    _lock: File,
}

/// Creates a folder and its parents that only its owner may enter.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// The folder for sockets whose own place has too long a path. It depends on nothing but the user: a later process must
/// find the same one, whatever its environment.
fn runtime_dir() -> PathBuf {
    let user = rustix::process::geteuid();
    if user.is_root() {
        PathBuf::from("/run/lifeboat")
    } else {
        PathBuf::from(format!("/tmp/lifeboat-{}", user.as_raw()))
    }
}

/// The folder for sockets that another user is given; only root gives any away.
fn shared_dir() -> PathBuf {
    PathBuf::from("/run/lifeboat-shared")
}

/// Makes the folder of [`StateDir::shared_path`], which must be ours.
pub fn make_shared_dir() -> io::Result<()> {
    let dir = shared_dir();
    match fs::DirBuilder::new().mode(0o711).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = fs::symlink_metadata(&dir)?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
        let message = format!("{} is not a folder that only this user may change", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    // The mask of this process may have taken the passage.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))
}

/// Makes the runtime folder, and makes sure that it is ours alone: in a folder that all may write to, somebody else may
/// have been first.
fn secure_runtime_dir() -> io::Result<()> {
    let dir = runtime_dir();
    create_private_dir(&dir)?;
    let found = fs::symlink_metadata(&dir)?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0 {
        let message = format!("{} is not a folder that only this user may enter", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_and_told_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("state"));
        let first = state.own("backup web01").unwrap();
        let refusal = state.own("serve").unwrap_err();
        assert_eq!(refusal.kind, Kind::Refused);
        assert!(refusal.title.contains("lifeboat backup web01"), "{refusal}");
        drop(first);
        state.own("serve").unwrap();
    }

    #[test]
    fn a_long_state_path_gets_a_short_socket_that_is_always_the_same() {
        let state = StateDir::new(PathBuf::from("/x".repeat(100)));
        assert!(state.socket().as_os_str().len() <= SOCKET_PATH_MAX);
        assert_eq!(state.socket(), state.socket());
        assert_eq!(StateDir::new("/s".into()).socket(), Path::new("/s/lifeboat.sock"));
    }
}
