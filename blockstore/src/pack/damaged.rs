//! [`DamagedPacks`]: the packs that are known to be damaged, here and in the repository. Specification:
//! docs/format/repository.md, "Damaged packs"

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use tracing::warn;

use crate::id::PackId;
use crate::storage::{Object, ObjectKind, Storage};

/// Packs whose chunks a backup must not count as stored. Readers still try them: most of their frames may be good.
#[derive(Debug, Default)]
pub(crate) struct DamagedPacks {
    packs: RwLock<HashSet<PackId>>,
    any: AtomicBool,
}

impl DamagedPacks {
    /// Takes over the markers that stand in the repository.
    pub fn load(&self, storage: &dyn Storage) -> io::Result<()> {
        let listed = storage.list(ObjectKind::DamagedPack)?;
        let marked = listed.into_iter().filter_map(|listed| match listed.object {
            Object::DamagedPack(pack) => Some(pack),
            _ => None,
        });
        self.change(|packs| *packs = marked.collect());
        Ok(())
    }

    /// Marks a pack, for other processes too where the storage can be written.
    pub fn mark(&self, storage: &dyn Storage, pack: PackId) {
        if self.contains(&pack) {
            return;
        }
        warn!(%pack, "the pack is damaged: the next backup stores what it still finds of its chunks anew");
        if let Err(error) = storage.put(&Object::DamagedPack(pack), &[]) {
            warn!(%pack, %error, "the damaged pack cannot be marked for other processes");
        }
        self.change(|packs| {
            packs.insert(pack);
        });
    }

    /// Takes the mark from a pack that is whole again.
    pub fn clear(&self, storage: &dyn Storage, pack: PackId) {
        if let Err(error) = storage.delete(&Object::DamagedPack(pack)) {
            warn!(%pack, %error, "the pack is whole again, but its mark cannot be removed");
            return;
        }
        self.change(|packs| {
            packs.remove(&pack);
        });
    }

    /// Whether no pack is marked.
    pub fn is_empty(&self) -> bool {
        !self.any.load(Ordering::Acquire)
    }

    /// Whether a pack is marked.
    pub fn contains(&self, pack: &PackId) -> bool {
        !self.is_empty() && self.packs.read().unwrap_or_else(PoisonError::into_inner).contains(pack)
    }

    /// The packs that are marked.
    pub fn all(&self) -> Vec<PackId> {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).iter().copied().collect()
    }

    fn change(&self, with: impl FnOnce(&mut HashSet<PackId>)) {
        let mut packs = self.packs.write().unwrap_or_else(PoisonError::into_inner);
        with(&mut packs);
        self.any.store(!packs.is_empty(), Ordering::Release);
    }
}
