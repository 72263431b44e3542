//! [`VerifiedPacks`]: when each pack was read whole for the last time, kept in the repository. Specification:
//! docs/format/verified.md

use std::collections::{BTreeMap, HashMap};
use std::io;

use tracing::warn;

use crate::format::FormatError;
use crate::format::verified::{MAX_ENTRIES, MAX_LEN, decode, encode};
use crate::id::{PackId, RepositoryId, VerifiedId};
use crate::storage::{Object, ObjectKind, Storage};

/// So many lists may stand there before they become one.
const LISTS_MAX: usize = 8;

/// What the lists say. They are no more than a hint: without them everything counts as never verified.
#[derive(Debug, Default)]
pub(crate) struct VerifiedPacks {
    times: HashMap<PackId, u64>,
    lists: Vec<VerifiedId>,
}

impl VerifiedPacks {
    /// Reads all lists. One that is damaged is left out, and goes when they are merged.
    pub fn load(storage: &dyn Storage, repository: RepositoryId) -> io::Result<VerifiedPacks> {
        let mut all = VerifiedPacks::default();
        for listed in storage.list(ObjectKind::Verified)? {
            let Object::Verified(id) = listed.object else { continue };
            let bytes = match storage.get(&listed.object, MAX_LEN) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue, // merged meanwhile
                Err(error) => {
                    warn!(object = %listed.object, %error, "left out: when packs were verified is not known");
                    continue;
                }
            };
            let named = blake3::hash(&bytes).as_bytes() == &id.0;
            let entries = if named { decode(&bytes, repository) } else { Err(FormatError::Name) };
            match entries {
                Ok(entries) => entries.into_iter().for_each(|(pack, time)| all.note(pack, time)),
                // A later version's list is not ours to delete.
                Err(FormatError::UnknownVersion { .. } | FormatError::UnknownFeatures { .. }) => continue,
                Err(error) => warn!(object = %listed.object, %error, "left out: when packs were verified is not known"),
            }
            all.lists.push(id);
        }
        Ok(all)
    }

    fn note(&mut self, pack: PackId, time: u64) {
        let known = self.times.entry(pack).or_default();
        *known = time.max(*known);
    }

    /// Seconds since 1970; 0 if never.
    pub fn time(&self, pack: &PackId) -> u64 {
        self.times.get(pack).copied().unwrap_or(0)
    }

    /// Keeps that these packs were found whole now. Order: (1) the new list is durable; with it, where there are many,
    /// one list of everything known of packs that `exists`; (2) the lists that became part of it are deleted. The other
    /// way round a crash would forget what was verified.
    pub fn keep(
        &mut self,
        storage: &dyn Storage,
        repository: RepositoryId,
        fresh: BTreeMap<PackId, u64>,
        exists: impl Fn(&PackId) -> bool,
    ) -> io::Result<()> {
        if fresh.is_empty() {
            return Ok(());
        }
        fresh.iter().for_each(|(pack, time)| self.note(*pack, *time));
        let merge = self.lists.len() >= LISTS_MAX;
        let entries: BTreeMap<PackId, u64> = match merge {
            true => self.times.iter().filter(|(pack, _)| exists(pack)).map(|(pack, time)| (*pack, *time)).collect(),
            false => fresh,
        };
        let entries: Vec<(PackId, u64)> = entries.into_iter().collect();
        let mut made = Vec::new();
        for part in entries.chunks(MAX_ENTRIES as usize) {
            let bytes = encode(repository, part);
            let id = VerifiedId(*blake3::hash(&bytes).as_bytes());
            storage.put(&Object::Verified(id), &bytes)?;
            made.push(id);
        }
        if merge {
            for old in self.lists.drain(..).filter(|old| !made.contains(old)) {
                storage.delete(&Object::Verified(old))?;
            }
        }
        self.lists.extend(made);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::test_support::sim_storage;
    use crate::sim::SimFolder;

    const REPOSITORY: RepositoryId = RepositoryId([7; 16]);

    fn pack(n: u8) -> PackId {
        PackId([n; 32])
    }

    fn lists(storage: &dyn Storage) -> usize {
        storage.list(ObjectKind::Verified).expect("lists").len()
    }

    #[test]
    fn many_lists_become_one_that_forgets_the_packs_that_are_gone() {
        let storage = sim_storage(&SimFolder::new(1));
        for round in 0..30u8 {
            let mut known = VerifiedPacks::load(&*storage, REPOSITORY).expect("loads");
            for earlier in round.saturating_sub(9)..round {
                assert_eq!(known.time(&pack(earlier)), 100 + u64::from(earlier), "round {round}");
            }
            let fresh = BTreeMap::from([(pack(round), 100 + u64::from(round))]);
            known.keep(&*storage, REPOSITORY, fresh, |pack| pack.0[0] + 10 > round).expect("keeps");
            assert!(lists(&*storage) <= LISTS_MAX + 1);
        }
        let known = VerifiedPacks::load(&*storage, REPOSITORY).expect("loads");
        assert_eq!((known.time(&pack(0)), known.time(&pack(29))), (0, 129));
    }

    #[test]
    fn a_damaged_list_is_a_list_less_and_a_crash_forgets_nothing_that_was_kept() {
        let keep = |folder: &SimFolder, round: u8| {
            let storage = sim_storage(folder);
            let mut known = VerifiedPacks::load(&*storage, REPOSITORY)?;
            known.keep(&*storage, REPOSITORY, BTreeMap::from([(pack(round), 1 + u64::from(round))]), |_| true)
        };
        let operations = {
            let folder = SimFolder::new(1);
            (0..12).for_each(|round| keep(&folder, round).expect("keeps"));
            folder.operations()
        };
        for cut in 0..operations {
            let folder = SimFolder::new(cut).crash_at(cut);
            let kept = (0..12).take_while(|round| keep(&folder, *round).is_ok()).count();
            let storage = sim_storage(&folder.after_crash());
            let known = VerifiedPacks::load(&*storage, REPOSITORY).expect("loads");
            for round in 0..u8::try_from(kept).expect("few") {
                assert_eq!(known.time(&pack(round)), 1 + u64::from(round), "cut {cut}");
            }
        }
        let storage = sim_storage(&SimFolder::new(1));
        storage.put(&Object::Verified(VerifiedId([1; 32])), b"rubbish").expect("puts");
        let known = VerifiedPacks::load(&*storage, REPOSITORY).expect("loads");
        assert_eq!(known.time(&pack(1)), 0);
    }
}
