//! Attributes: what a record is made of.

use crate::bytes::{le, part, size, u8, utf16_le};
use crate::fs::{FsError, NodeId};

/// An attribute, or a part of one that is spread over records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attribute {
    pub kind: u32,
    pub name: String,
    pub flags: u16,
    /// The first cluster of the value that this part maps.
    pub first: u64,
    pub value: Value,
}

/// Where the value is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// Here.
    Resident(Vec<u8>),
    /// In clusters.
    Clusters {
        /// Bytes of the value; told by the first part.
        length: u64,
        /// Bytes from the beginning that were ever written.
        written: u64,
        /// The power of two of clusters that are compressed together, or 0.
        unit: u8,
        /// The list of runs.
        runs: Vec<u8>,
    },
}

impl Attribute {
    pub(super) const COMPRESSED: u16 = 0x0001;
    pub(super) const ENCRYPTED: u16 = 0x4000;

    pub(super) fn decode(id: NodeId, bytes: &[u8]) -> Result<Attribute, FsError> {
        let name = part(bytes, le::u16(bytes, 10).into(), 2 * usize::from(u8(bytes, 9)));
        let value = if u8(bytes, 8) == 0 {
            let length = size(le::u32(bytes, 16).into());
            let found = part(bytes, le::u16(bytes, 20).into(), length);
            if found.len() != length {
                return Err(FsError::damaged(&id, "an attribute is longer than its record"));
            }
            Value::Resident(found.to_vec())
        } else {
            let (length, written) = (le::u64(bytes, 48), le::u64(bytes, 56));
            if length > i64::MAX.unsigned_abs() {
                return Err(FsError::damaged(&id, "its size makes no sense"));
            }
            let runs = part(bytes, le::u16(bytes, 32).into(), bytes.len()).to_vec();
            Value::Clusters { length, written, unit: u8(bytes, 34), runs }
        };
        let first = if matches!(value, Value::Resident(_)) { 0 } else { le::u64(bytes, 16) };
        Ok(Attribute { kind: le::u32(bytes, 0), name: utf16_le(name), flags: le::u16(bytes, 12), first, value })
    }

    /// Bytes of the value.
    pub(super) fn length(&self) -> u64 {
        match &self.value {
            Value::Resident(bytes) => bytes.len() as u64,
            Value::Clusters { length, .. } => *length,
        }
    }
}

/// The records that a list of attributes names.
pub(super) fn listed(list: &[u8]) -> impl Iterator<Item = u64> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let length = usize::from(le::u16(list, at + 4));
        if length < 26 || at + 26 > list.len() {
            return None;
        }
        let reference = le::u64(list, at + 16);
        at += length;
        Some(reference)
    })
}
