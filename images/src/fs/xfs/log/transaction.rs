//! Transactions, put together from the operations of records. An item of a transaction is a list of regions: the first
//! says what it is and how many there are; a region may go on in the next record.

use std::collections::HashMap;

use super::record::Order;
use crate::bytes::{be, part, size, u8};
use crate::fs::FsError;

/// First bytes of a transaction's header.
const MAGIC: u32 = 0x5452_414e;
const HEADER: usize = 16;
/// Bytes of transactions that wait for their end.
const WAITING_MAX: usize = 256 << 20;
/// Regions of an item.
const REGIONS_MAX: u16 = 2048;
/// Transactions that wait for their end.
const OPEN_MAX: usize = 1 << 16;
/// What an operation is.
mod flag {
    pub const START: u8 = 0x01;
    pub const COMMIT: u8 = 0x02;
    pub const CONTINUED: u8 = 0x04;
    pub const CONTINUES: u8 = 0x08;
    pub const END: u8 = 0x10;
}
/// What an item is.
pub(super) mod kind {
    pub const INODE: u16 = 0x123b;
    pub const BUFFER: u16 = 0x123c;
    pub const NEW_INODES: u16 = 0x123f;
    /// Changes of extents, of attributes, and exchanges of extents that have begun, each followed by that it is done.
    pub const BEGUN: [u16; 3] = [0x1244, 0x1246, 0x1248];
    pub const DONE: [u16; 3] = [0x1245, 0x1247, 0x1249];
}

/// A logged change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub order: Order,
    wanted: u16,
    regions: Vec<Vec<u8>>,
}

impl Item {
    pub(super) fn kind(&self) -> u16 {
        self.order.u16(self.region(0), 0)
    }

    /// A region; an empty one if there are not so many.
    pub(super) fn region(&self, index: usize) -> &[u8] {
        self.regions.get(index).map_or(&[], Vec::as_slice)
    }
}

/// Takes a committed transaction, with the record that it began in.
pub(super) type Take<'a> = &'a mut dyn FnMut(u64, &[Item]) -> Result<(), FsError>;

#[derive(Default)]
struct Open {
    sequence: u64,
    header: usize,
    items: Vec<Item>,
}

/// Transactions that have begun and were not committed yet.
#[derive(Default)]
pub(super) struct Transactions {
    open: HashMap<u32, Open>,
    waiting: usize,
}

impl Transactions {
    /// Takes a record's operations, and gives `take` the transactions that end in it.
    pub(super) fn add(
        &mut self,
        content: &[u8],
        order: Order,
        operations: u32,
        sequence: u64,
        take: Take<'_>,
    ) -> Result<(), FsError> {
        let mut at = 0;
        for _ in 0..operations {
            let header = part(content, at, 12);
            let (id, length, flags) = (be::u32(header, 0), size(be::u32(header, 4).into()), u8(header, 9));
            let bytes = part(content, at + header.len(), length);
            if header.len() < 12 || bytes.len() != length {
                return Err(damaged());
            }
            at += 12 + length;
            let Some(open) = self.open.get_mut(&id) else {
                // What is left of a transaction that began before the first record is written already.
                if flags & flag::START != 0 && self.open.len() < OPEN_MAX {
                    self.open.insert(id, Open { sequence, ..Open::default() });
                }
                continue;
            };
            if flags & flag::COMMIT != 0 {
                let items = &open.items;
                if items.iter().any(|item| item.regions.len() != usize::from(item.wanted)) {
                    return Err(damaged());
                }
                take(open.sequence, items)?;
                self.waiting = self.waiting.saturating_sub(open.bytes());
                self.open.remove(&id);
                continue;
            }
            self.waiting += length;
            if self.waiting > WAITING_MAX {
                return Err(FsError::unsupported(&"the log", "its transactions are larger than any should be"));
            }
            match flags & !flag::END & if flags & flag::CONTINUES != 0 { !flag::CONTINUED } else { !0 } {
                0 | flag::CONTINUED => open.add(order, bytes)?,
                flag::CONTINUES => open.go_on(bytes)?,
                _ => return Err(damaged()),
            }
        }
        Ok(())
    }
}

fn damaged() -> FsError {
    FsError::damaged(&"the log", "an operation in it makes no sense")
}

impl Open {
    fn bytes(&self) -> usize {
        self.header + self.items.iter().flat_map(|item| &item.regions).map(Vec::len).sum::<usize>()
    }

    fn add(&mut self, order: Order, bytes: &[u8]) -> Result<(), FsError> {
        if bytes.is_empty() {
            return Ok(());
        }
        if self.header == 0 {
            if order.u32(bytes, 0) != MAGIC || bytes.len() > HEADER {
                return Err(damaged());
            }
            self.header = bytes.len();
            return Ok(());
        }
        match self.items.last_mut() {
            Some(item) if item.regions.len() < usize::from(item.wanted) => item.regions.push(bytes.to_vec()),
            _ => {
                let wanted = order.u16(bytes, 2);
                if wanted == 0 || wanted > REGIONS_MAX || bytes.len() < 4 {
                    return Err(damaged());
                }
                self.items.push(Item { order, wanted, regions: vec![bytes.to_vec()] });
            }
        }
        Ok(())
    }

    /// The rest of the region that came last.
    fn go_on(&mut self, bytes: &[u8]) -> Result<(), FsError> {
        if self.header < HEADER {
            self.header += bytes.len();
            return if self.header == HEADER { Ok(()) } else { Err(damaged()) };
        }
        let region = self.items.last_mut().and_then(|item| item.regions.last_mut());
        region.ok_or_else(damaged)?.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(id: u32, flags: u8, bytes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(bytes.len()).unwrap();
        [&id.to_be_bytes()[..], &length.to_be_bytes(), &[0x69, flags, 0, 0], bytes].concat()
    }

    #[test]
    fn regions_go_on_in_the_next_record_and_only_what_was_committed_counts() {
        let header = [&MAGIC.to_le_bytes()[..], &[0; 12]].concat();
        let first = [
            operation(7, flag::START, &[]),
            operation(7, 0, &header),
            operation(9, flag::START, &[]),
            operation(9, 0, &header[..4]),
            operation(7, 0, &[0x3c, 0x12, 2, 0]),
            operation(7, flag::CONTINUED, b"the beg"),
        ];
        let second = [
            operation(7, flag::CONTINUES | flag::END, b"inning"),
            operation(9, flag::CONTINUES, &header[4..]),
            operation(9, 0, &[0x3b, 0x12, 1, 0]),
            operation(7, flag::COMMIT, &[]),
            operation(5, flag::COMMIT, &[]),
        ];
        let mut transactions = Transactions::default();
        let mut found = Vec::new();
        for (sequence, operations) in [(1, &first[..]), (2, &second[..])] {
            let mut take = |sequence: u64, items: &[Item]| {
                found.push((sequence, items.to_vec()));
                Ok(())
            };
            let count = u32::try_from(operations.len()).unwrap();
            transactions.add(&operations.concat(), Order::Little, count, sequence, &mut take).unwrap();
        }
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].0, found[0].1.len(), found[0].1[0].kind()), (1, 1, kind::BUFFER));
        assert_eq!(found[0].1[0].region(1), b"the beginning");
        let cut = &first.concat()[..40];
        assert!(Transactions::default().add(cut, Order::Little, 6, 1, &mut |_, _| Ok(())).is_err());
    }
}
