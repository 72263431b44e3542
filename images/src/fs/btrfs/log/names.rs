//! Names: each stands in its directory twice, by its number and by its hash, and with the inode that it is of.

use std::collections::BTreeMap;

use super::super::tree::Key;
use super::super::{FIRST, entries, item};
use super::{Replay, set};
use crate::bytes::{le, part};
use crate::fs::{FileType, FsError};

/// A name of an inode: number in the directory, and the name.
type Name = (u64, Vec<u8>);

/// The names in a reference: number, length, name, and so on.
fn refs(mut bytes: &[u8]) -> Vec<Name> {
    let mut found = Vec::new();
    while bytes.len() > 10 {
        let name = part(bytes, 10, le::u16(bytes, 8).into());
        found.push((le::u64(bytes, 0), name.to_vec()));
        bytes = part(bytes, 10 + name.len(), bytes.len());
    }
    found
}

fn encode(names: &[Name]) -> Vec<u8> {
    let one = |(index, name): &Name| {
        let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
        [&index.to_le_bytes()[..], &length.to_le_bytes(), name].concat()
    };
    names.iter().flat_map(one).collect()
}

/// References that have their directory with them, as the others are written.
pub(super) fn long_refs(mut bytes: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let mut found = Vec::new();
    while bytes.len() > 18 {
        let name = part(bytes, 18, le::u16(bytes, 16).into());
        found.push((le::u64(bytes, 0), encode(&[(le::u64(bytes, 8), name.to_vec())])));
        bytes = part(bytes, 18 + name.len(), bytes.len());
    }
    found
}

fn hash(name: &[u8]) -> u64 {
    (!crc32c::crc32c_append(1, name)).into()
}

fn entry(target: Key, name: &[u8]) -> Vec<u8> {
    let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
    let mut bytes = vec![0; 30];
    set(&mut bytes, 0, &target.id.to_le_bytes());
    set(&mut bytes, 8, &[target.kind]);
    set(&mut bytes, 9, &target.offset.to_le_bytes());
    set(&mut bytes, 27, &length.to_le_bytes());
    bytes.extend_from_slice(name);
    bytes
}

impl Replay<'_> {
    /// Takes the names away that a directory's log does not have, in the ranges of numbers that it speaks of.
    pub(super) fn removed_names(&mut self, log: &BTreeMap<Key, Vec<u8>>, dir: u64) -> Result<(), FsError> {
        let (from, to) = (Key::new(dir, item::DIR_LOG, 0), Key::new(dir, item::DIR_LOG, u64::MAX));
        for (range, data) in log.range(from..=to) {
            let mut gone = Vec::new();
            let (from, to) =
                (Key::new(dir, item::DIR_INDEX, range.offset), Key::new(dir, item::DIR_INDEX, le::u64(data, 0)));
            if from > to {
                continue;
            }
            self.items(from, to, &mut |key, data| {
                for entry in entries(data) {
                    let logged = log.get(&key).map(|data| entries(data)).unwrap_or_default();
                    if !logged.iter().any(|logged| logged.name == entry.name) {
                        gone.push((entry.target, (key.offset, entry.name.to_vec())));
                    }
                }
                true
            })?;
            for (target, name) in gone {
                self.unlink(dir, target, &name)?;
            }
        }
        Ok(())
    }

    /// A name that a directory's log has. Those whose inode's log has them, too, are made with the inode.
    pub(super) fn named_in_directory(
        &mut self,
        log: &BTreeMap<Key, Vec<u8>>,
        key: Key,
        data: &[u8],
    ) -> Result<(), FsError> {
        for entry in entries(data) {
            let with_inode = log
                .get(&Key::new(entry.target.id, item::REF, key.id))
                .is_some_and(|data| refs(data).iter().any(|(_, name)| name == entry.name));
            let exists = entry.target.kind != item::INODE || self.get(entry.target)?.is_some();
            if !with_inode && exists && self.get(Key::new(key.id, item::INODE, 0))?.is_some() {
                self.link(key.id, entry.target, &(key.offset, entry.name.to_vec()))?;
            }
        }
        Ok(())
    }

    /// The names of an inode in some directories, as its log has them: others that it had there are gone.
    pub(super) fn named(&mut self, number: u64, key: Key, logged: &[(u64, &[u8])]) -> Result<(), FsError> {
        let target = Key::new(number, item::INODE, 0);
        // The root directory names itself its parent.
        if number == FIRST || self.get(target)?.is_none() {
            return Ok(());
        }
        for (dir, data) in logged {
            if self.get(Key::new(*dir, item::INODE, 0))?.is_none() {
                continue;
            }
            let names = refs(data);
            if key.kind == item::REF {
                let before = self.get(key)?.map(|data| refs(&data)).unwrap_or_default();
                for name in before.iter().filter(|(_, old)| !names.iter().any(|(_, name)| name == old)) {
                    self.unlink(*dir, target, name)?;
                }
            }
            for name in &names {
                self.link(*dir, target, name)?;
            }
        }
        Ok(())
    }

    /// What a directory calls `name`, and by which number.
    fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<(Key, Option<u64>)>, FsError> {
        let item = self.get(Key::new(dir, item::DIR, hash(name)))?.unwrap_or_default();
        let Some(target) = entries(&item).iter().find(|entry| entry.name == name).map(|entry| entry.target) else {
            return Ok(None);
        };
        let of = |names: Vec<Name>| names.into_iter().find(|(_, found)| found == name).map(|(index, _)| index);
        let mut index = self.get(Key::new(target.id, item::REF, dir))?.and_then(|data| of(refs(&data)));
        if index.is_none() {
            let (from, to) = (Key::new(target.id, item::LONG_REF, 0), Key::new(target.id, item::LONG_REF, u64::MAX));
            self.items(from, to, &mut |_, data| {
                let mut here = long_refs(data).into_iter().filter(|(parent, _)| *parent == dir);
                index = here.find_map(|(_, data)| of(refs(&data)));
                index.is_none()
            })?;
        }
        Ok(Some((target, index)))
    }

    fn link(&mut self, dir: u64, target: Key, name: &Name) -> Result<(), FsError> {
        let (index, text) = name;
        let index_key = Key::new(dir, item::DIR_INDEX, *index);
        // Whatever else has this name or this number makes room.
        if let Some((other, at)) = self.lookup(dir, text)?
            && (other != target || at != Some(*index))
        {
            self.unlink(dir, other, &(at.unwrap_or(*index), text.clone()))?;
        }
        let there = self.get(index_key)?.unwrap_or_default();
        let others: Vec<(Key, Name)> = entries(&there)
            .iter()
            .filter(|entry| entry.name != *text || entry.target != target)
            .map(|entry| (entry.target, (*index, entry.name.to_vec())))
            .collect();
        for (other, name) in others {
            self.unlink(dir, other, &name)?;
        }
        self.put(index_key, entry(target, text))?;
        let hash_key = Key::new(dir, item::DIR, hash(text));
        let mut named = self.get(hash_key)?.unwrap_or_default();
        if !entries(&named).iter().any(|entry| entry.name == *text) {
            named.extend(entry(target, text));
            self.put(hash_key, named)?;
        }
        if target.kind == item::INODE {
            let ref_key = Key::new(target.id, item::REF, dir);
            let mut names = self.get(ref_key)?.map(|data| refs(&data)).unwrap_or_default();
            if !names.contains(name) {
                names.push(name.clone());
                self.put(ref_key, encode(&names))?;
            }
            self.renamed.insert(target.id);
        }
        Ok(())
    }

    fn unlink(&mut self, dir: u64, target: Key, name: &Name) -> Result<(), FsError> {
        let (index, text) = name;
        for key in [Key::new(dir, item::DIR_INDEX, *index), Key::new(dir, item::DIR, hash(text))] {
            let Some(data) = self.get(key)? else { continue };
            let (mut left, mut found) = (Vec::new(), false);
            for kept in entries(&data) {
                if kept.name == *text && kept.target == target {
                    found = true;
                } else {
                    left.extend(entry(kept.target, kept.name));
                }
            }
            match found {
                true if left.is_empty() => self.remove(key)?,
                true => self.put(key, left)?,
                false => {}
            }
        }
        if target.kind != item::INODE {
            return Ok(());
        }
        let ref_key = Key::new(target.id, item::REF, dir);
        if let Some(data) = self.get(ref_key)? {
            let mut names = refs(&data);
            names.retain(|found| found != name);
            if names.is_empty() { self.remove(ref_key)? } else { self.put(ref_key, encode(&names))? }
        }
        self.renamed.insert(target.id);
        Ok(())
    }

    /// Says in each inode how many names it has. One without any stays, and nothing leads to it.
    pub(super) fn count_names(&mut self) -> Result<(), FsError> {
        for number in std::mem::take(&mut self.renamed) {
            let key = Key::new(number, item::INODE, 0);
            let Some(mut inode) = self.get(key)? else { continue };
            if number == FIRST || FileType::from_mode(le::u32(&inode, 52)) == Some(FileType::Directory) {
                continue;
            }
            let mut count = 0_u32;
            let (from, to) = (Key::new(number, item::REF, 0), Key::new(number, item::LONG_REF, u64::MAX));
            self.items(from, to, &mut |key, data| {
                let names = if key.kind == item::REF { refs(data).len() } else { long_refs(data).len() };
                count = count.saturating_add(u32::try_from(names).unwrap_or(u32::MAX));
                true
            })?;
            if le::u32(&inode, 40) != count {
                set(&mut inode, 40, &count.to_le_bytes());
                self.put(key, inode)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let names = vec![(5, b"one".to_vec()), (1 << 40, b"two".to_vec())];
        assert_eq!(refs(&encode(&names)), names);
        let target = Key::new(300, item::INODE, 0);
        let written = [entry(target, b"a"), entry(target, b"b")].concat();
        let read: Vec<Vec<u8>> = entries(&written).iter().map(|entry| entry.name.to_vec()).collect();
        assert_eq!(read, [b"a", b"b"]);
        for cut in 0..40 {
            refs(part(&encode(&names), 0, cut));
            long_refs(part(&encode(&names), 0, cut));
        }
        // The root tree's directory calls the default subvolume so in every file system.
        assert_eq!(hash(b"default"), 2_378_154_706);
    }
}
