//! One process's hold on a repository and a state folder: what every operation of the API works on.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use blockstore::disk::LocalFolder;
use blockstore::{LocalStorage, Repository, Secret};
use nbd_server::{Limits, Server};
use tokio::net::UnixListener;

use crate::access::Caller;
use crate::access::tokens::Tokens;
use crate::api::listener::Listening;
use crate::api::once::Keys;
use crate::audit::Audit;
use crate::catalog::{Catalog, Listing, PointSummary, spec};
use crate::events::Events;
use crate::jobs::Jobs;
use crate::problem::{Kind, Problem};
use crate::publish::Exports;
use crate::recovery::Recoveries;
use crate::schedule::Schedules;
use crate::state_dir::{Ownership, StateDir};

/// What a process opens.
#[derive(Debug, Clone)]
pub struct Options {
    /// The repository: a folder, as a path or a `file://` URL.
    pub repository: Option<String>,
    /// The state folder.
    pub state: PathBuf,
    /// A file whose first line is the passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// The passphrase itself.
    pub passphrase: Option<String>,
    /// A key file.
    pub key_file: Option<PathBuf>,
    /// Memory in bytes for decoded chunks, shared by all disks that are served.
    pub cache: u64,
}

impl Options {
    /// The repository's folder.
    pub fn repository_path(&self) -> Result<PathBuf, Problem> {
        let Some(location) = self.repository.as_deref().filter(|location| !location.is_empty()) else {
            return Err(Problem::usage("no repository is named").hint("give --repo FOLDER or set LIFEBOAT_REPO"));
        };
        repository_path(location)
    }

    /// The passphrase or key file given, if any.
    pub fn secret(&self) -> Result<Option<Secret>, Problem> {
        if let Some(path) = &self.key_file {
            let bytes = read_small(path, "key file")?;
            return Ok(Some(Secret::key_file(bytes)));
        }
        if let Some(path) = &self.passphrase_file {
            return Ok(Some(Secret::passphrase(read_passphrase(path)?)));
        }
        Ok(self.passphrase.clone().filter(|passphrase| !passphrase.is_empty()).map(Secret::passphrase))
    }
}

/// The first line of a passphrase file.
pub fn read_passphrase(path: &Path) -> Result<String, Problem> {
    let bytes = read_small(path, "passphrase file")?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Problem::usage(format!("passphrase file {} is not text", path.display())))?;
    match text.lines().next() {
        Some(line) if !line.is_empty() => Ok(line.to_owned()),
        _ => Err(Problem::usage(format!("passphrase file {} is empty", path.display()))
            .hint("its first line is the passphrase")),
    }
}

/// Reads a file that holds a secret; a huge one is a mistake.
pub fn read_small(path: &Path, what: &str) -> Result<Vec<u8>, Problem> {
    const LEN_MAX: u64 = 64 << 10;
    let read = || {
        use std::io::Read;
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path)?;
        if file.take(LEN_MAX + 1).read_to_end(&mut bytes)? as u64 > LEN_MAX {
            return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, "it is longer than 64 KiB"));
        }
        Ok(bytes)
    };
    read().map_err(|error| {
        Problem::failed(format!("cannot read {what} {}", path.display()), &error)
            .hint("check the path and who may read it")
    })
}

/// The folder of a repository, from a path or URL.
pub fn repository_path(location: &str) -> Result<PathBuf, Problem> {
    let path = match location.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => path,
        Some(("file", _)) => {
            return Err(Problem::usage(format!("{location} names no local folder")).hint("write file:///path/to/it"));
        }
        Some((scheme, _)) => {
            return Err(Problem::usage(format!("cannot keep a repository at a {scheme}:// URL"))
                .hint("name a local folder, as a path or a file:// URL"));
        }
        None => location,
    };
    std::path::absolute(path).map_err(|error| Problem::failed(format!("cannot use repository {path}"), &error))
}

/// The storage of the repository in folder `path`.
pub fn storage(path: &Path) -> Arc<LocalStorage> {
    Arc::new(LocalStorage::new(Arc::new(LocalFolder::new(path))))
}

/// What operations work on.
#[derive(Debug)]
pub struct App {
    /// Where the repository is.
    pub location: PathBuf,
    /// The repository.
    pub repository: Arc<Repository>,
    /// The state folder.
    pub state: StateDir,
    /// Long work.
    pub jobs: Arc<Jobs>,
    /// What happens.
    pub events: Arc<Events>,
    /// Who may ask over the network.
    pub tokens: Arc<Tokens>,
    /// What runs by itself, if this is a service that has policies.
    pub schedules: OnceLock<Arc<Schedules>>,
    /// Requests that are not to be carried out twice.
    pub keys: Arc<Keys>,
    /// Who has changed what.
    pub audit: Arc<Audit>,
    /// Running recoveries.
    pub recoveries: Arc<Recoveries>,
    /// Exports without a recovery.
    pub exports: Arc<Exports>,
    /// The server whose limits all that is served shares: whoever takes too much takes it from nobody else.
    pub server: Server,
    /// Folders that show the files of disks.
    pub mounts: Arc<crate::files::Mounts>,
    catalog: Catalog,
    _ownership: Ownership,
}

impl App {
    /// Takes the state folder and opens the repository. `command` is what others are told that keeps them out.
    ///
    /// Nothing is served yet; see [`App::listen`] and [`Recoveries::take_up`].
    pub fn open(options: &Options, command: &str) -> Result<Arc<App>, Problem> {
        let location = options.repository_path()?;
        let secret = options.secret()?;
        let repository = Repository::open(storage(&location), secret.as_ref(), options.cache)
            .map_err(|error| Problem::from_open(&location, &error))?;
        let state = StateDir::new(options.state.clone());
        let ownership = state.own(command)?;
        crate::drill::clean_up(&state)?;
        let catalog = Catalog::open(&state.catalog(&repository.id().to_string()))?;
        let repository = Arc::new(repository);
        let server = Server::new(Arc::default(), Limits::default());
        let audit = Arc::new(Audit::open(state.audit()));
        let events = Arc::new(Events::default());
        let jobs = Arc::new(Jobs::open(state.jobs(), audit.clone(), events.clone()));
        let context = crate::recovery::Context {
            repository: repository.clone(),
            state: state.clone(),
            server: server.clone(),
            jobs: jobs.clone(),
            events: events.clone(),
        };
        let keys = Arc::new(Keys::open(state.requests(), jobs.clone()));
        Ok(Arc::new(App {
            location,
            repository,
            jobs,
            events,
            audit,
            schedules: OnceLock::new(),
            keys,
            tokens: Arc::new(Tokens::open(state.tokens())),
            recoveries: Arc::new(Recoveries::new(context)),
            exports: Arc::new(Exports::new(server.clone())),
            server,
            mounts: Arc::default(),
            state,
            catalog,
            _ownership: ownership,
        }))
    }

    /// Serves the API on the state folder's socket.
    pub fn listen(self: &Arc<App>) -> Result<Listening, Problem> {
        let socket = self.state.socket();
        let bind = || {
            match std::fs::remove_file(&socket) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&socket)?;
            std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        let listener =
            bind().map_err(|error| Problem::failed(format!("cannot listen on {}", socket.display()), &error))?;
        Ok(Listening::start(listener, &socket, crate::api::owners(self)))
    }

    /// All recovery points that can be read, oldest first.
    pub fn points(&self) -> Result<Vec<Arc<PointSummary>>, Problem> {
        self.listing().map(|listing| listing.points)
    }

    /// All recovery points.
    pub fn listing(&self) -> Result<Listing, Problem> {
        self.catalog.listing(&self.repository)
    }

    /// All recovery points that `caller` may see. Whose the damaged ones are, nobody knows.
    pub fn listing_for(&self, caller: &Caller) -> Result<Listing, Problem> {
        let mut listing = self.listing()?;
        if !caller.is_unlimited() {
            listing.points.retain(|point| caller.sees(&point.machine));
            listing.damaged.clear();
        }
        Ok(listing)
    }

    /// What is to be known of a drill without its attachments.
    pub fn drill_summary(&self, id: blockstore::DrillId) -> Result<serde_json::Value, blockstore::ReadError> {
        self.catalog.drill(&self.repository, id)
    }

    /// The recovery point that `spec` names.
    pub fn resolve(&self, spec: &str) -> Result<PointSummary, Problem> {
        self.resolve_for(&Caller::Owner, spec)
    }

    /// The recovery point that `spec` names among those that `caller` may see.
    pub fn resolve_for(&self, caller: &Caller, spec: &str) -> Result<PointSummary, Problem> {
        let listing = self.listing_for(caller)?;
        spec::resolve(&listing.points, spec).cloned().map_err(|problem| match listing.damaged_by(spec) {
            Some(point) if problem.kind == Kind::NotFound => {
                Problem::new(Kind::Damage, format!("recovery point {} is damaged", spec::short_id(&point.id)))
                    .hint("put it back from a copy of the repository; `lifeboat forget` drops it")
            }
            _ => problem,
        })
    }

    /// Refuses to write to the repository or the state folder as if they were anybody's, and where nobody but this
    /// process knows where that is.
    pub fn check_target(&self, path: &Path) -> Result<(), Problem> {
        if !path.is_absolute() {
            return Err(Problem::usage(format!("`{}` is not an absolute path", path.display()))
                .hint("begin it with /: a service has a folder of its own"));
        }
        // What does not exist yet lies where its nearest parent lies.
        let real = path.ancestors().find_map(|at| at.canonicalize().ok()).unwrap_or_else(|| path.to_owned());
        for (own, what) in [(self.location.as_path(), "repository"), (self.state.root(), "state folder")] {
            if own.canonicalize().is_ok_and(|own| real.starts_with(own)) {
                return Err(Problem::refused(format!("{} lies in the {what}", path.display()))
                    .hint("name a place outside of it"));
            }
        }
        Ok(())
    }

    /// Ends what this process serves, and leaves recoveries for the next one to take up.
    pub async fn close(&self) {
        self.exports.close().await;
        self.mounts.close();
        self.recoveries.leave().await;
    }

    /// Work that others than this process's own command have begun and that is not over.
    pub fn busy_with(&self) -> Vec<String> {
        let jobs = self.jobs.running().into_iter().map(|job| {
            let view = job.view();
            format!("{} of {}", view.kind, view.subject)
        });
        let exports = self.exports.list().into_iter().map(|export| format!("export of {export}"));
        let mounts = self.mounts.list().into_iter().map(|dir| format!("mount on {}", dir.display()));
        jobs.chain(exports).chain(mounts).collect()
    }
}

/// Makes a repository.
pub fn init(options: &Options, chunk_size: u32, encryption: Encryption) -> Result<blockstore::RepositoryId, Problem> {
    use blockstore::Protection;
    let location = options.repository_path()?;
    if !(chunk_size.is_power_of_two() && (16 << 10..=4 << 20).contains(&chunk_size)) {
        return Err(Problem::from_init(&location, &blockstore::InitError::ChunkSize(chunk_size)));
    }
    if location.join("repository").exists() {
        return Err(Problem::from_init(&location, &blockstore::InitError::Exists));
    }
    if let (Some(path), Encryption::Aes256Gcm) = (&options.key_file, encryption) {
        make_key_file(path)?;
    }
    let protection = match (encryption, options.secret()?) {
        (Encryption::None, None) => Protection::None,
        (Encryption::None, Some(_)) => {
            return Err(Problem::usage("a repository without encryption has no passphrase or key file")
                .hint("leave out --no-encryption, or the passphrase"));
        }
        (Encryption::Aes256Gcm, Some(secret)) => Protection::Secret(secret),
        (Encryption::Aes256Gcm, None) => {
            return Err(Problem::usage("an encrypted repository needs a passphrase or a key file")
                .hint("set LIFEBOAT_PASSPHRASE, give --passphrase-file or --key-file, or choose --no-encryption"));
        }
    };
    std::fs::create_dir_all(&location)
        .map_err(|error| Problem::failed(format!("cannot make repository folder {}", location.display()), &error))?;
    let repository = Repository::init(storage(&location), chunk_size, protection)
        .map_err(|error| Problem::from_init(&location, &error))?;
    Ok(repository.id())
}

/// Whether a new repository is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// Everything is stored as it is.
    None,
    /// Chunks and recovery points are encrypted.
    Aes256Gcm,
}

/// Makes a new key file that only its owner can read, and says whether it did. An existing one is used as it is.
///
/// Order: (1) the bytes, synced, under another name; (2) a link to its name, which replaces nothing; (3) the folder's
/// sync. A crash must not leave a short key file that a later command takes for the key.
pub fn make_key_file(path: &Path) -> Result<bool, Problem> {
    use std::fs;
    use std::io::{ErrorKind, Write};
    use std::os::unix::fs::OpenOptionsExt;
    if path.exists() {
        return Ok(false);
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = path.with_added_extension(format!("{}.tmp", std::process::id()));
    let write = || {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(&Repository::generate_key_file()?)?;
        file.sync_all()?;
        let made = match fs::hard_link(&temporary, path) {
            Ok(()) => true,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => false, // somebody was faster
            Err(error) => return Err(error),
        };
        fs::remove_file(&temporary)?;
        fs::File::open(folder)?.sync_all()?;
        Ok(made)
    };
    let cannot = |error: std::io::Error| {
        Problem::because(Kind::Failed, format!("cannot make key file {}", path.display()), &error)
    };
    let written = write();
    if written.is_err() {
        let _ = fs::remove_file(&temporary); // of no use to anybody, and the error is what counts
    }
    written.map_err(cannot)
}
