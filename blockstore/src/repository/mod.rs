//! [`Repository`]: makes, opens and lists; everything else starts here. Specification: docs/format/repository.md

mod open;
mod protect;
mod repair;
mod slots;
mod verify;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod damage_tests;
#[cfg(test)]
mod protect_tests;
#[cfg(test)]
mod repair_tests;
#[cfg(test)]
mod slots_tests;
#[cfg(test)]
pub(crate) mod test_support;
#[cfg(test)]
mod tests;

pub use open::{InitError, OpenError};
pub(crate) use open::{read_config, read_slot};
pub use protect::{PointError, Protected};
pub(crate) use protect::{damaged_protection, read_protection};
pub use repair::{RepairError, RepairImage, RepairReport, RepairSources};
pub use slots::{KeyError, KeySlot, Rotated, SlotKind, SlotState};
pub use verify::{Affected, Damage, DataCheck, VerifyError, VerifyOptions, VerifyReport};

use std::io;
use std::sync::{Arc, Mutex};

use crate::backup::{Backup, BackupError};
use crate::error::ReadError;
use crate::format::Encryption;
use crate::format::point::{HEADER_LEN, MAX_PAYLOAD_LEN};
use crate::id::{ChunkId, RecoveryPointId, RepositoryId, SlotId};
use crate::keys::{MIN_KEY_FILE_LEN, random};
use crate::pack::fetch::Fetcher;
use crate::point::RecoveryPoint;
use crate::progress::Progress;
use crate::read::{CacheUse, Locality, PointDisk, ReadShared};
use crate::storage::{Object, ObjectKind, Storage};

/// An open repository. Cheap to clone; all clones share one cache.
#[derive(Debug, Clone)]
pub struct Repository {
    shared: Arc<ReadShared>,
    /// The key slot whose secret opened it, or took that one's place since.
    opened_by: Arc<Mutex<Option<SlotId>>>,
}

/// What a repository holds and takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RepositoryStats {
    /// Recovery points.
    pub points: u64,
    /// Packs.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
    /// Index runs.
    pub index_runs: u64,
    /// Their bytes.
    pub index_bytes: u64,
    /// Chunks and nodes the index knows, counted once for every pack that holds them.
    pub index_entries: u64,
}

impl Repository {
    fn of(fetcher: Fetcher, cache_bytes: u64, opened_by: Option<SlotId>) -> Repository {
        let shared = Arc::new(ReadShared::new(Arc::new(fetcher), cache_bytes));
        Repository { shared, opened_by: Arc::new(Mutex::new(opened_by)) }
    }

    pub(crate) fn fetcher(&self) -> &Fetcher {
        &self.shared.fetcher
    }

    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.shared.fetcher.storage
    }

    pub(crate) fn storage_handle(&self) -> Arc<dyn Storage> {
        self.shared.fetcher.storage.clone()
    }

    /// Random bytes for a new key file.
    pub fn generate_key_file() -> io::Result<Vec<u8>> {
        const { assert!(64 >= MIN_KEY_FILE_LEN) };
        Ok(random::<64>()?.to_vec())
    }

    /// The repository's identity.
    pub fn id(&self) -> RepositoryId {
        self.fetcher().config.repository
    }

    /// The chunk size in bytes.
    pub fn chunk_size(&self) -> u32 {
        self.fetcher().config.chunk_size
    }

    /// How the chunk cache is used.
    pub fn cache_use(&self) -> CacheUse {
        self.shared.cache.usage()
    }

    /// Memory in bytes for decoded chunks.
    pub fn cache_bytes(&self) -> u64 {
        self.shared.cache.capacity()
    }

    /// Whether chunks and recovery points are sealed.
    pub fn encrypted(&self) -> bool {
        self.fetcher().config.encryption == Encryption::Aes256Gcm
    }

    /// The ids of all recovery points, in no particular order.
    pub fn list_points(&self) -> Result<Vec<RecoveryPointId>, ReadError> {
        let listed = self.storage().list(ObjectKind::Point);
        let listed = listed.map_err(|source| ReadError::Io { object: "points".to_owned(), source })?;
        let ids = listed.into_iter().filter_map(|listed| match listed.object {
            Object::Point(id) => Some(id),
            _ => None,
        });
        Ok(ids.collect())
    }

    /// Something that is another as soon as a recovery point, a protection or a drill has come, gone or been replaced;
    /// nothing where that is not known.
    pub fn mark(&self) -> Option<[u64; 3]> {
        let [points, protections, drills] =
            [ObjectKind::Point, ObjectKind::Protection, ObjectKind::Drill].map(|kind| self.storage().mark(kind));
        Some([points?, protections?, drills?])
    }

    /// Reads a recovery point and checks it against its id.
    pub fn load_point(&self, id: RecoveryPointId) -> Result<RecoveryPoint, ReadError> {
        let object = Object::Point(id);
        let max = u64::from(MAX_PAYLOAD_LEN) + HEADER_LEN as u64;
        let bytes = self.storage().get(&object, max).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ReadError::NoSuchPoint { point: id },
            _ => ReadError::io(&object, source),
        })?;
        let fetcher = self.fetcher();
        RecoveryPoint::decode(id, &bytes, &fetcher.config, &fetcher.keyring)
            .map_err(|source| ReadError::Damaged { object, source })
    }

    /// Begins a recovery point. With a parent, chunks equal to the parent's are recognised without a lookup.
    pub fn begin_backup<'s>(
        &self,
        machine: &str,
        parent: Option<&RecoveryPoint>,
        progress: Arc<Progress>,
    ) -> Result<Backup<'s>, BackupError> {
        Backup::begin(self.shared.clone(), machine, parent, progress)
    }

    /// Opens a disk of a recovery point; reads nothing yet.
    pub fn open_disk(&self, point: &RecoveryPoint, disk: &str) -> Result<Arc<PointDisk>, ReadError> {
        let found = point.disk(disk).ok_or_else(|| ReadError::NoSuchDisk { disk: disk.to_owned() })?;
        Ok(Arc::new(PointDisk::open(self.shared.clone(), found)?))
    }

    /// What reading a disk of a recovery point in order costs; a large disk is only sampled.
    pub fn locality(&self, point: &RecoveryPoint, disk: &str) -> Result<Locality, ReadError> {
        let found = point.disk(disk).ok_or_else(|| ReadError::NoSuchDisk { disk: disk.to_owned() })?;
        crate::read::locality(&self.shared, found)
    }

    /// Whether the index knows a chunk; nothing else is read.
    pub fn knows(&self, chunk: &ChunkId) -> bool {
        self.fetcher().index.first(chunk).is_some()
    }

    /// Looks for damaged and missing index runs and makes new ones from the tables of the packs. A lookup that leads
    /// nowhere does the same.
    pub fn rebuild_index(&self) -> Result<(), ReadError> {
        let index = &self.fetcher().index;
        index.repair(index.generation()).map(drop)
    }

    /// Counts objects and bytes.
    pub fn stats(&self) -> Result<RepositoryStats, ReadError> {
        let sum = |kind, name: &str| {
            let listed = self.storage().list(kind);
            let listed = listed.map_err(|source| ReadError::Io { object: name.to_owned(), source })?;
            Ok((listed.len() as u64, listed.iter().map(|listed| listed.len).sum::<u64>()))
        };
        let (points, _) = sum(ObjectKind::Point, "points")?;
        let (packs, pack_bytes) = sum(ObjectKind::Pack, "packs")?;
        let (index_runs, index_bytes) = sum(ObjectKind::IndexRun, "index")?;
        let index_entries = self.fetcher().index.runs().iter().map(|run| run.entry_count()).sum();
        Ok(RepositoryStats { points, packs, pack_bytes, index_runs, index_bytes, index_entries })
    }
}
