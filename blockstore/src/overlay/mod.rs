//! [`Overlay`]: takes a guest's writes above a recovery point that never changes, and keeps what it acknowledged.
//! Specification, with the order of durable writes and what a crash leaves: docs/format/overlay.md
//!
//! - What a completed [`Overlay::flush`] covers survives a crash at any point. What no flush covers reads as the old or
//!   the new bytes, sector by sector.
//! - What was acknowledged at all survives the end of the process, however it ends, as long as the machine runs on.
//! - A failed sync, or a failed write that is not for lack of space, poisons the overlay: later writes and flushes are
//!   refused, reads are served, only opening again leads on.
//! - Writers of the same grains take turns; readers and flushes wait for nobody's storage.

mod commit;
mod error;
mod format;
mod intervals;
mod journal;
mod map;
mod ranges;
mod read;
mod recent;
mod upkeep;
mod write;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crate::base::Base;
use crate::disk::{Disk, Folder};
use commit::{Commits, Dirty};
use format::{GRAIN, Header, Record};
use journal::Journal;
use map::GrainMap;
use ranges::RangeLocks;
use recent::Recent;

pub use error::{Action, Damage, OverlayError, OverlayIdentity};
pub use read::ChangedExtent;
pub use upkeep::{Room, Space};

const DATA_NAME: &str = "data";
/// Its name until the overlay is complete.
const DATA_NEW_NAME: &str = "data.new";

/// What an overlay takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Grains of 4 KiB in the data file.
    pub data_grains: u64,
    /// Grains that are zero and take no space.
    pub zero_grains: u64,
    /// Length of the journal without its reserve.
    pub journal_bytes: u64,
}

/// A writable disk above a base. All methods may be called from several threads.
#[derive(Debug)]
pub struct Overlay {
    place: Place,
    size: u64,
    base: Arc<dyn Base>,
    /// Its lock is what keeps a second opener out.
    data: Arc<dyn Disk>,
    map: GrainMap,
    ranges: RangeLocks,
    dirty: Mutex<Dirty>,
    /// None where the folder knows no boot id.
    recent: Option<Recent>,
    /// Counts changes of the data file, each once it is complete.
    writes: AtomicU64,
    journal: Mutex<Journal>,
    journal_bytes: AtomicU64,
    commits: Mutex<Commits>,
    committed: Condvar,
    poisoned: AtomicBool,
    /// The [`Room`] of the last look, to warn once.
    room: AtomicU8,
}

impl Overlay {
    /// Makes an empty overlay in `dir`: the files `data` and `journal`. Durable when it returns. What a crash left of
    /// an earlier call is taken over; an existing overlay is refused, and so is one that has lost a file.
    pub fn create(
        folder: Arc<dyn Folder>,
        dir: &Path,
        identity: OverlayIdentity,
        base: Arc<dyn Base>,
    ) -> Result<Overlay, OverlayError> {
        let place = Place { folder, dir: dir.to_path_buf() };
        check_base(&identity, &*base)?;
        if !format::fits(&identity) {
            return Err(OverlayError::Limits);
        }
        // 1. `data.new`, locked, of its full length, synced.
        place.folder.create_dir(dir).map_err(|error| Action::Create.failed(&place.shown(""), error))?;
        if let Some(parent) = dir.parent() {
            // It may have been made by a process that was killed before this.
            place.folder.sync_dir(parent).map_err(|error| Action::Sync.failed(&place.shown(""), error))?;
        }
        place.refuse_existing()?;
        match place.folder.create(&place.file(DATA_NEW_NAME)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Action::Create.failed(&place.shown(DATA_NEW_NAME), error));
            }
            _ => {}
        }
        let path = place.shown(DATA_NEW_NAME);
        let data = match place.folder.open_exclusive(&place.file(DATA_NEW_NAME)) {
            Ok(data) => data,
            // Somebody else creates it, or has just finished.
            Err(error) if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::NotFound) => {
                return Err(place.busy());
            }
            Err(error) => return Err(Action::Open.failed(&path, error)),
        };
        if let Err(error) = place.refuse_existing() {
            let _ = place.folder.remove(&place.file(DATA_NEW_NAME)); // ours, since who finished has renamed his
            return Err(error);
        }
        let size = identity.size;
        let sized = data.set_len(0).and_then(|()| data.set_len(size));
        sized.map_err(|error| Action::Write.failed(&path, error))?;
        data.sync().map_err(|error| Action::Sync.failed(&path, error))?;
        // 2. Its name, before any journal can exist.
        place.sync()?;
        // 3, 4. The journal, complete before it has its name; in the place of one that an earlier call left.
        let map = GrainMap::new(size.div_ceil(GRAIN));
        let mut journal = Journal::write_new(&place, Header { generation: 1, identity }, &map, journal::COMPACT_MIN)?;
        journal.sync()?;
        journal.install(&place)?;
        // 5. `data` gets its name last: where it stands, there was a journal.
        let renamed = place.folder.rename(&place.file(DATA_NEW_NAME), &place.file(DATA_NAME));
        renamed.map_err(|error| Action::Rename.failed(&path, error))?;
        place.sync()?;
        let recent = place.folder.boot_id().map(|boot| Recent::create(&place, boot)).transpose()?;
        let mut overlay = Overlay::assemble(place, base, data, map, journal, recent, Dirty::default());
        *overlay.writes.get_mut() = 0; // all of it is synced
        Ok(overlay)
    }

    /// Opens an overlay after a stop or a crash. A second opener is refused as long as the first lives, and so is one
    /// that expects another identity.
    pub fn open(
        folder: Arc<dyn Folder>,
        dir: &Path,
        identity: OverlayIdentity,
        base: Arc<dyn Base>,
    ) -> Result<Overlay, OverlayError> {
        let place = Place { folder, dir: dir.to_path_buf() };
        check_base(&identity, &*base)?;
        let data = place.lock_data()?;
        match place.folder.remove(&place.file(journal::NEW_NAME)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Action::Open.failed(&place.shown(journal::NEW_NAME), error));
            }
            _ => {}
        }
        let (journal, map) = Journal::load(&place)?;
        let found = &journal.header().identity;
        if *found != identity {
            return Err(OverlayError::Mismatch {
                dir: place.shown(""),
                found: Box::new(found.clone()),
                expected: Box::new(identity),
            });
        }
        let path = place.shown(DATA_NAME);
        let len = data.len().map_err(|error| Action::Read.failed(&path, error))?;
        if len < identity.size {
            return Err(OverlayError::Damaged { path, offset: len, damage: Damage::TooShort });
        }
        // What a process that was killed had acknowledged; it was journalled by no flush, so the next one has to.
        let mut dirty = Dirty::default();
        let replay = |boot| {
            Recent::open(&place, boot, map.grains(), |Record { start, count, state }| {
                let range = start..start + u64::from(count);
                if map.set(range.clone(), state) {
                    dirty.insert(range);
                }
            })
        };
        let recent = place.folder.boot_id().map(replay).transpose()?;
        Ok(Overlay::assemble(place, base, data, map, journal, recent, dirty))
    }

    fn assemble(
        place: Place,
        base: Arc<dyn Base>,
        data: Arc<dyn Disk>,
        map: GrainMap,
        journal: Journal,
        recent: Option<Recent>,
        dirty: Dirty,
    ) -> Overlay {
        Overlay {
            size: journal.header().identity.size,
            place,
            base,
            data,
            map,
            ranges: RangeLocks::default(),
            dirty: Mutex::new(dirty),
            recent,
            // Unlike `synced`: the first flush syncs what an earlier process wrote.
            writes: AtomicU64::new(1),
            journal_bytes: AtomicU64::new(journal.bytes()),
            journal: Mutex::new(journal),
            commits: Mutex::default(),
            committed: Condvar::new(),
            poisoned: AtomicBool::new(false),
            room: AtomicU8::new(0),
        }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What it stands on.
    pub fn base(&self) -> &Arc<dyn Base> {
        &self.base
    }

    /// What the overlay takes.
    pub fn usage(&self) -> Usage {
        Usage {
            data_grains: self.map.data_grains(),
            zero_grains: self.map.zero_grains(),
            journal_bytes: self.journal_bytes.load(Ordering::Relaxed),
        }
    }

    /// Whether an earlier failure lets it take no more writes.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Acquire)
    }

    fn check_poison(&self) -> Result<(), OverlayError> {
        if self.is_poisoned() { Err(OverlayError::Poisoned { dir: self.place.shown("") }) } else { Ok(()) }
    }

    /// Poisons the overlay unless `error` is one that leaves everything known.
    fn judge(&self, error: OverlayError) -> OverlayError {
        if matches!(error, OverlayError::Io { .. }) && !self.poisoned.swap(true, Ordering::AcqRel) {
            if let Some(recent) = &self.recent {
                recent.discard();
            }
            tracing::error!(overlay = %self.place.shown("").display(), %error, "the overlay takes no more writes");
        }
        error
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), OverlayError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(OverlayError::OutOfRange { offset, length, size: self.size }),
        }
    }
}

fn check_base(identity: &OverlayIdentity, base: &dyn Base) -> Result<(), OverlayError> {
    if base.size() == identity.size {
        return Ok(());
    }
    Err(OverlayError::BaseSize { base: base.size(), expected: identity.size })
}

/// Where an overlay's files stand.
#[derive(Debug, Clone)]
struct Place {
    folder: Arc<dyn Folder>,
    dir: PathBuf,
}

impl Place {
    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A path for a message.
    fn shown(&self, name: &str) -> PathBuf {
        let path = if name.is_empty() { self.dir.clone() } else { self.file(name) };
        self.folder.real_path(&path).unwrap_or(path)
    }

    fn sync(&self) -> Result<(), OverlayError> {
        self.folder.sync_dir(&self.dir).map_err(|error| Action::Sync.failed(&self.shown(""), error))
    }

    fn busy(&self) -> OverlayError {
        OverlayError::Busy { dir: self.shown("") }
    }

    fn missing(&self) -> OverlayError {
        OverlayError::Missing { dir: self.shown("") }
    }

    fn has(&self, name: &str) -> Result<bool, OverlayError> {
        match self.folder.open_read(&self.file(name)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Action::Open.failed(&self.shown(name), error)),
        }
    }

    /// Refuses a folder with an overlay, or with what is left of one. A creation that was cut off is neither.
    fn refuse_existing(&self) -> Result<(), OverlayError> {
        let lost = |name| OverlayError::Damaged { path: self.shown(name), offset: 0, damage: Damage::Missing };
        match (self.has(DATA_NAME)?, self.has(journal::NAME)?) {
            (true, true) => Err(OverlayError::Exists { dir: self.shown("") }),
            (true, false) => Err(lost(journal::NAME)),
            (false, true) if !self.has(DATA_NEW_NAME)? => Err(lost(DATA_NAME)),
            (false, _) => Ok(()),
        }
    }

    fn lock_data(&self) -> Result<Arc<dyn Disk>, OverlayError> {
        match self.folder.open_exclusive(&self.file(DATA_NAME)) {
            Ok(data) => Ok(data),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(self.busy()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.refuse_existing()?;
                Err(self.missing())
            }
            Err(error) => Err(Action::Open.failed(&self.shown(DATA_NAME), error)),
        }
    }
}

#[cfg(test)]
mod tests;
