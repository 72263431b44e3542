//! Trees of items, sorted by key.

use super::chunks::Chunks;
use crate::DiskImage;
use crate::bytes::{le, part, size, u8};
use crate::fs::{FsError, read_vec};

/// The header of every node.
const HEADER: usize = 101;
/// Deepest tree.
const LEVEL_MAX: u8 = 8;
/// Nodes that one scan reads: 4 GiB of items.
const NODES_MAX: u32 = 1 << 18;

/// A key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub id: u64,
    pub kind: u8,
    pub offset: u64,
}

impl Key {
    /// The last key of all.
    pub(super) const LAST: Key = Key { id: u64::MAX, kind: u8::MAX, offset: u64::MAX };

    pub(super) fn new(id: u64, kind: u8, offset: u64) -> Key {
        Key { id, kind, offset }
    }

    pub(super) fn decode(bytes: &[u8]) -> Key {
        Key { id: le::u64(bytes, 0), kind: u8(bytes, 8), offset: le::u64(bytes, 9) }
    }
}

/// What a tree is read from.
pub(super) struct Tree<'a> {
    pub disk: &'a dyn DiskImage,
    pub chunks: &'a Chunks,
    pub node_size: u32,
}

/// Takes an item; false ends the scan.
pub(super) type Visit<'a> = &'a mut dyn FnMut(Key, &[u8]) -> bool;

impl Tree<'_> {
    /// Gives `visit` all items with keys from `from` to `to`.
    pub(super) fn scan(&self, root: u64, from: Key, to: Key, visit: Visit<'_>) -> Result<(), FsError> {
        self.node(root, None, (from, to), visit, &mut 0).map(|_| ())
    }

    fn node(
        &self,
        logical: u64,
        level: Option<u8>,
        range: (Key, Key),
        visit: Visit<'_>,
        read: &mut u32,
    ) -> Result<bool, FsError> {
        let object = format_args!("the tree node at {logical}").to_string();
        let damaged = |reason| FsError::damaged(&object, reason);
        *read += 1;
        if *read > NODES_MAX {
            return Err(damaged("its tree is larger than any"));
        }
        let (offset, length) = self.chunks.place(&object, logical)?;
        if length < self.node_size.into() {
            return Err(damaged("it reaches over its chunk"));
        }
        let bytes = read_vec(self.disk, &object, offset, size(self.node_size.into()))?;
        let (count, own) = (size(le::u32(&bytes, 96).into()), u8(&bytes, 100));
        if le::u64(&bytes, 48) != logical || own > LEVEL_MAX || level.is_some_and(|level| level != own) {
            return Err(damaged("it is not the node that belongs there"));
        }
        let width = if own == 0 { 25 } else { 33 };
        let items = part(&bytes, HEADER, count.saturating_mul(width));
        if items.len() != count.saturating_mul(width) {
            return Err(damaged("it has more items than there is room for"));
        }
        let keys: Vec<Key> = items.chunks_exact(width).map(Key::decode).collect();
        let (from, to) = range;
        // An inner node's key is the first of its child: the one before may reach into the range.
        let first = keys.partition_point(|key| if own == 0 { *key < from } else { *key <= from });
        let first = if own == 0 { first } else { first.saturating_sub(1) };
        for (key, item) in keys.iter().zip(items.chunks_exact(width)).skip(first) {
            if *key > to {
                return Ok(false);
            }
            if let Some(below) = own.checked_sub(1) {
                if !self.node(le::u64(item, 17), Some(below), range, visit, read)? {
                    return Ok(false);
                }
                continue;
            }
            let (at, length) = (size(le::u32(item, 17).into()), size(le::u32(item, 21).into()));
            let data = part(&bytes, HEADER.saturating_add(at), length);
            if data.len() != length {
                return Err(damaged("an item lies outside of it"));
            }
            if *key >= from && !visit(*key, data) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
