//! The tree of logs, replayed in memory: what was synced file by file since the last commit. Rules: "Log tree" of the
//! Btrfs documentation, and `fs/btrfs/tree-log.c` of Linux.
//!
//! There is a log for each subvolume, a tree of the items that were synced. What they change lies over the items of the
//! subvolume; the disk stays as it is. In turn: inodes with what of them was removed, names of directories, then names,
//! attributes and extents of each inode, and last how many names each has.

mod extents;
mod names;

use std::collections::{BTreeMap, BTreeSet};

use super::tree::Key;
use super::{Btrfs, FIRST, Subvolume, item};
use crate::bytes::{le, part};
use crate::fs::{FileType, FsError};

/// Whose root items the roots of logs are.
const LOGS: u64 = 6_u64.wrapping_neg();
/// Bytes of logs, and of what they change, that are kept.
const BYTES_MAX: usize = 128 << 20;
/// The rest of an item is small beside this, whatever it holds.
const ITEM_COST: usize = 64;

/// Items of a subvolume that are others, or not there any more.
pub(super) type Changes = BTreeMap<Key, Option<Vec<u8>>>;

/// The changes of all subvolumes by their number, and how many files were synced.
pub(super) fn replay(fs: &Btrfs, root: u64) -> Result<(BTreeMap<u64, Changes>, u64), FsError> {
    let mut logs = Vec::new();
    let (from, to) = (Key::new(LOGS, item::ROOT, 0), Key::new(LOGS, item::ROOT, u64::MAX));
    fs.tree().scan(root, from, to, &mut |key, data| {
        logs.push((key.offset, le::u64(data, 176)));
        true
    })?;
    let (mut all, mut files, mut cost) = (BTreeMap::new(), 0, 0);
    for (id, root) in logs {
        let mut log = BTreeMap::new();
        let mut full = false;
        fs.tree().scan(root, Key::new(0, 0, 0), Key::LAST, &mut |key, data| {
            cost += data.len() + ITEM_COST;
            full = cost > BYTES_MAX;
            log.insert(key, data.to_vec());
            !full
        })?;
        if full {
            return Err(too_large());
        }
        // A subvolume that is deleted needs nothing any more.
        let Ok(subvolume) = fs.subvolume(id) else { continue };
        let mut replay = Replay { fs, subvolume, log, changes: Changes::new(), cost, renamed: BTreeSet::new() };
        files += replay.run()?;
        cost = replay.cost;
        all.insert(id, replay.changes);
    }
    Ok((all, files))
}

fn too_large() -> FsError {
    FsError::unsupported(&"the log", "it changes more than is kept in memory")
}

/// One subvolume with what its log changes.
struct Replay<'a> {
    fs: &'a Btrfs,
    subvolume: Subvolume,
    log: BTreeMap<Key, Vec<u8>>,
    changes: Changes,
    cost: usize,
    /// Inodes that got or lost names.
    renamed: BTreeSet<u64>,
}

impl Replay<'_> {
    fn run(&mut self) -> Result<u64, FsError> {
        let log = std::mem::take(&mut self.log);
        let of_kind = |kind: u8| log.iter().filter(move |(key, _)| key.kind == kind);
        // What was unlinked while it was open is not to come back.
        let unlinked =
            |number: u64| log.get(&Key::new(number, item::INODE, 0)).is_some_and(|inode| le::u32(inode, 40) == 0);
        let mut files = 0;
        for (key, inode) in of_kind(item::INODE).filter(|(key, _)| !unlinked(key.id)) {
            files += 1;
            self.inode(&log, key.id, inode)?;
        }
        for (key, data) in of_kind(item::DIR_INDEX) {
            self.named_in_directory(&log, *key, data)?;
        }
        for (key, data) in log.iter().filter(|(key, _)| !unlinked(key.id)) {
            match key.kind {
                item::XATTR => self.put(*key, data.clone())?,
                item::REF => self.named(key.id, *key, &[(key.offset, data)])?,
                item::LONG_REF => {
                    let refs = names::long_refs(data);
                    let refs: Vec<(u64, &[u8])> =
                        refs.iter().map(|(parent, data)| (*parent, data.as_slice())).collect();
                    self.named(key.id, *key, &refs)?;
                }
                _ => {}
            }
        }
        let mut written: Vec<u64> = of_kind(item::EXTENT).map(|(key, _)| key.id).collect();
        written.dedup();
        for number in written.into_iter().filter(|number| !unlinked(*number)) {
            let (from, to) = (Key::new(number, item::EXTENT, 0), Key::new(number, item::EXTENT, u64::MAX));
            let extents: Vec<(u64, &[u8])> =
                log.range(from..=to).map(|(key, data)| (key.offset, data.as_slice())).collect();
            self.extents(number, &extents, None)?;
        }
        self.count_names()?;
        Ok(files)
    }

    /// The items of the subvolume as they are by now.
    fn items(&self, from: Key, to: Key, visit: &mut dyn FnMut(Key, &[u8]) -> bool) -> Result<(), FsError> {
        self.fs.items_over(Some(&self.changes), self.subvolume.root, (from, to), visit)
    }

    fn get(&self, key: Key) -> Result<Option<Vec<u8>>, FsError> {
        let mut found = None;
        self.items(key, key, &mut |_, data| {
            found = Some(data.to_vec());
            false
        })?;
        Ok(found)
    }

    fn put(&mut self, key: Key, data: Vec<u8>) -> Result<(), FsError> {
        self.cost += data.len() + ITEM_COST;
        self.changes.insert(key, Some(data));
        if self.cost > BYTES_MAX { Err(too_large()) } else { Ok(()) }
    }

    fn remove(&mut self, key: Key) -> Result<(), FsError> {
        self.cost += ITEM_COST;
        self.changes.insert(key, None);
        if self.cost > BYTES_MAX { Err(too_large()) } else { Ok(()) }
    }

    /// A synced inode: attributes and names that its log does not have are gone, and so is what lies behind its end.
    fn inode(&mut self, log: &BTreeMap<Key, Vec<u8>>, number: u64, logged: &[u8]) -> Result<(), FsError> {
        let mut attributes = Vec::new();
        let (from, to) = (Key::new(number, item::XATTR, 0), Key::new(number, item::XATTR, u64::MAX));
        self.items(from, to, &mut |key, _| {
            attributes.push(key);
            true
        })?;
        for key in attributes.into_iter().filter(|key| !log.contains_key(key)) {
            self.remove(key)?;
        }
        let kind = FileType::from_mode(le::u32(logged, 52));
        let key = Key::new(number, item::INODE, 0);
        let there = self.get(key)?;
        if kind == Some(FileType::Directory) && there.is_some() {
            self.removed_names(log, number)?;
        }
        let mut inode = logged.to_vec();
        if let Some(there) = there.filter(|there| there.len() == logged.len()) {
            let same = FileType::from_mode(le::u32(&there, 52)) == kind;
            // Without a generation, all it says is that the inode exists, and the size that it had when it was synced.
            if le::u64(logged, 0) == 0 {
                inode.clone_from(&there);
                if same && kind == Some(FileType::File) && le::u64(logged, 16) != 0 {
                    set(&mut inode, 16, part(logged, 16, 8));
                }
            } else if same && kind == Some(FileType::Directory) {
                set(&mut inode, 16, part(&there, 16, 8));
            }
        }
        let length = le::u64(&inode, 16);
        self.put(key, inode)?;
        if kind == Some(FileType::File) {
            self.extents(number, &[], Some(length.saturating_add(u64::from(self.fs.sector) - 1)))?;
        }
        // The root directory has no name, and names of others are counted when all are known.
        if number != FIRST {
            self.renamed.insert(number);
        }
        Ok(())
    }
}

/// Replaces bytes of an item.
fn set(item: &mut [u8], at: usize, bytes: &[u8]) {
    item.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
}
