//! Whether the log was written back: it ends in a record of an unmount, and nothing else.

use super::Xfs;
use crate::bytes::{be, u8};

/// Sectors of a record's header.
const SECTOR: u64 = 512;
const RECORD: u32 = 0xfeed_babe;
/// Sectors that are looked at before the head for its last record: the longest record, 256 KiB.
const BACK_MAX: u64 = 512 + 64;
const UNMOUNT: u8 = 0x20;

/// Whether nothing waits in the log. A log that cannot be read, or lies on another device, is taken to wait.
pub(super) fn is_clean(fs: &Xfs) -> bool {
    last_is_unmount(fs).unwrap_or(false)
}

fn last_is_unmount(fs: &Xfs) -> Option<bool> {
    let base = fs.sb.block_offset(fs.sb.log_start, 1).filter(|_| fs.sb.log_start != 0)?;
    let sectors = (fs.sb.log_blocks << fs.sb.block_bits) / SECTOR;
    let read = |sector: u64| -> Option<[u8; 512]> {
        let mut bytes = [0; 512];
        fs.disk.read_at(base + sector * SECTOR, &mut bytes).ok()?;
        Some(bytes)
    };
    // Every sector tells in which round it was written; a header has its signature there, and the round behind it.
    let cycle = |sector: u64| {
        read(sector).map(|bytes| if be::u32(&bytes, 0) == RECORD { be::u32(&bytes, 4) } else { be::u32(&bytes, 0) })
    };
    let (first, last) = (cycle(0)?, cycle(sectors.checked_sub(1)?)?);
    if first == 0 {
        return Some(true);
    }
    // The head is where the newest round ends.
    let head = if first == last {
        sectors
    } else {
        let (mut newest, mut older) = (0, sectors - 1);
        while older - newest > 1 {
            let middle = newest + (older - newest) / 2;
            if cycle(middle)? == first { newest = middle } else { older = middle }
        }
        older
    };
    // The last record before it, which may lie at the end of the ring.
    let back = (1..=BACK_MAX.min(sectors)).map(|back| (head + sectors - back) % sectors);
    for sector in back {
        let header = read(sector)?;
        if be::u32(&header, 0) != RECORD {
            continue;
        }
        // Version 2 may have more sectors of header, one for each 32 KiB.
        let headers =
            if be::u32(&header, 8) & 2 != 0 { u64::from(be::u32(&header, 320)).div_ceil(32 << 10).max(1) } else { 1 };
        let operation = read((sector + headers) % sectors)?;
        return Some(be::u32(&header, 40) == 1 && u8(&operation, 9) & UNMOUNT != 0);
    }
    Some(false)
}
