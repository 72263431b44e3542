//! The log, replayed in memory: what a machine had logged and not yet written to its place. Layout and rules: "XFS
//! Algorithms & Data Structures", chapter "Journaling Log", and `fs/xfs/libxfs/xfs_log_format.h` of Linux for what is
//! newer; what is replayed over what is as in `fs/xfs/xfs_log_recover.c` and its neighbours.
//!
//! The log is a ring of records. The last one tells where the first that is needed lies; from there on, operations are
//! put together to transactions, and those that were committed are applied, in two rounds: buffers that were cancelled
//! later must not be written, so those are found first.

mod apply;
mod record;
mod transaction;

use std::sync::Arc;

use self::apply::Apply;
use self::record::{Record, Ring};
use self::transaction::{Take, Transactions, kind};
use super::Xfs;
use crate::bytes::u8;
use crate::fs::FsError;
use crate::patched::Patched;
use crate::{Cached, SharedDisk};

/// An operation that only says that the file system was unmounted.
const UNMOUNT: u8 = 0x20;

/// What the log says.
pub(super) enum Log {
    /// Nothing waits in it.
    Clean,
    /// The disk with what waited in it, and what a person should know.
    Replayed(SharedDisk, String),
}

/// Replays the log of `fs`.
pub(super) fn replay(fs: &Xfs) -> Result<Log, FsError> {
    let Some(ring) = Ring::open(fs)? else { return Ok(Log::Clean) };
    let Some(last) = ring.last()? else { return Ok(Log::Clean) };
    if last.operations == 1 && u8(&last.content(), 9) & UNMOUNT != 0 {
        return Ok(Log::Clean);
    }
    let mut apply = Apply::new(fs, Patched::new(fs.disk.clone()));
    ring.each_transaction(&last, &mut |_, items| {
        items.iter().filter(|item| item.kind() == kind::BUFFER).for_each(|item| apply.note_cancelled(item));
        Ok(())
    })?;
    let mut count = 0_u64;
    ring.each_transaction(&last, &mut |sequence, items| {
        count += 1;
        apply.transaction(sequence, items)
    })?;
    let transactions = if count == 1 { "1 transaction".to_owned() } else { format!("{count} transactions") };
    let unfinished = match apply.unfinished() {
        0 => String::new(),
        count => format!("; {count} changes of files' extents or attributes had begun and were not finished"),
    };
    let notice = format!("the file system was in use: {transactions} of its log were replayed in memory{unfinished}");
    Ok(Log::Replayed(Arc::new(Cached::new(Arc::new(apply.into_disk()))), notice))
}

impl Ring<'_> {
    /// Gives `take` the committed transactions of all records up to `last`, with the sequence number of each.
    fn each_transaction(&self, last: &Record, take: Take<'_>) -> Result<(), FsError> {
        let mut transactions = Transactions::default();
        let mut at = last.tail % self.sectors;
        // Not more sectors than there are, however the records lead.
        let mut left = self.sectors;
        while let Some(record) = self.record(at, None)? {
            transactions.add(&record.content(), record.order, record.operations, record.sequence, take)?;
            let length = record.sectors();
            if record.sequence == last.sequence || length > left {
                break;
            }
            left -= length;
            at = (at + length) % self.sectors;
        }
        Ok(())
    }
}
