//! Records of the log: a header of one or more sectors, and content in which the first four bytes of each sector tell
//! the round of the ring that it was written in; what stood there is kept in the header.

use super::super::Xfs;
use crate::bytes::{be, le, part, size};
use crate::fs::{FsError, read};

pub(super) const SECTOR: u64 = 512;
const MAGIC: u32 = 0xfeed_babe;
/// Longest content of a record.
const CONTENT_MAX: u64 = 256 << 10;
/// Content whose sectors one sector of header knows.
const KNOWN: u64 = 32 << 10;
/// How far behind the head the last record is looked for: eight of the longest were written at once.
const BACK_MAX: u64 = 8 * (CONTENT_MAX / SECTOR + CONTENT_MAX / KNOWN);
/// Longest log, in sectors: 4 GiB.
const SECTORS_MAX: u64 = 8 << 20;
const OBJECT: &str = "the log";

/// How numbers stand in what is logged: as in the memory of the machine that wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Little,
    Big,
}

impl Order {
    pub(super) fn u16(self, bytes: &[u8], at: usize) -> u16 {
        if self == Order::Little { le::u16(bytes, at) } else { be::u16(bytes, at) }
    }

    pub(super) fn u32(self, bytes: &[u8], at: usize) -> u32 {
        if self == Order::Little { le::u32(bytes, at) } else { be::u32(bytes, at) }
    }

    pub(super) fn u64(self, bytes: &[u8], at: usize) -> u64 {
        if self == Order::Little { le::u64(bytes, at) } else { be::u64(bytes, at) }
    }
}

/// A record whose bytes are as they were written.
pub(super) struct Record {
    /// Round and place: records that are newer have larger ones.
    pub sequence: u64,
    /// The place of the first record that is still needed.
    pub tail: u64,
    pub operations: u32,
    pub order: Order,
    at: u64,
    headers: u64,
    length: u64,
    /// All its sectors, as they were written.
    bytes: Vec<u8>,
}

impl Record {
    /// Sectors of header and content.
    pub(super) fn sectors(&self) -> u64 {
        self.headers + self.length.div_ceil(SECTOR)
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        self.bytes.split_at(size(self.headers * SECTOR).min(self.bytes.len()))
    }

    /// The content as it was before it was written.
    pub(super) fn content(&self) -> Vec<u8> {
        let (headers, content) = self.parts();
        let mut content = content.to_vec();
        for (index, sector) in content.chunks_exact_mut(512).enumerate() {
            let (header, within) = (index / 64, index % 64);
            let kept_at = if header == 0 { 44 } else { header * 512 + 4 } + 4 * within;
            sector.iter_mut().zip(part(headers, kept_at, 4)).for_each(|(to, from)| *to = *from);
        }
        content.truncate(size(self.length));
        content
    }

    /// Whether all of it was written: every sector tells its round, and from version 5 on there is a checksum. Behind the
    /// end of a ring of `sectors` the next round begins.
    fn is_whole(&self, round: u32, sectors: u64, version: u16) -> bool {
        let (headers, content) = self.parts();
        let round_of = |sector: u64| if sector < sectors { round } else { round.wrapping_add(1) };
        let mut written = (self.at + self.headers..).zip(content.chunks_exact(512));
        if !written.all(|(sector, bytes)| be::u32(bytes, 0) == round_of(sector)) {
            return false;
        }
        let stored = le::u32(headers, 32);
        // Version 4 has none, and a log may be older than its checksums.
        if stored == 0 || version < 5 {
            return true;
        }
        // The structure ends in four bytes of padding on 64-bit machines.
        [328, 324].into_iter().any(|length| {
            let mut sum = crc32c::crc32c(part(headers, 0, 32));
            sum = crc32c::crc32c_append(sum, &[0; 4]);
            sum = crc32c::crc32c_append(sum, part(headers, 36, length - 36));
            for more in headers.chunks_exact(512).skip(1) {
                sum = crc32c::crc32c_append(sum, part(more, 0, 260));
            }
            crc32c::crc32c_append(sum, part(content, 0, size(self.length))) == stored
        })
    }
}

/// The log's sectors.
pub(super) struct Ring<'a> {
    fs: &'a Xfs,
    base: u64,
    pub sectors: u64,
}

impl Ring<'_> {
    /// The log of a file system; nothing when it was never written to.
    pub(super) fn open(fs: &Xfs) -> Result<Option<Ring<'_>>, FsError> {
        if fs.sb.log_start == 0 {
            return Err(FsError::unsupported(&OBJECT, "it is on another disk"));
        }
        let base = fs.sb.block_offset(fs.sb.log_start, fs.sb.log_blocks);
        let base = base.ok_or_else(|| FsError::damaged(&OBJECT, "it lies outside of the file system"))?;
        let sectors = (fs.sb.log_blocks << fs.sb.block_bits) / SECTOR;
        if !(2..=SECTORS_MAX).contains(&sectors) {
            return Err(FsError::damaged(&OBJECT, "its size makes no sense"));
        }
        let ring = Ring { fs, base, sectors };
        Ok((ring.round(0)? != 0).then_some(ring))
    }

    /// Reads from a sector on, around the end.
    fn read(&self, sector: u64, length: usize) -> Result<Vec<u8>, FsError> {
        let mut bytes = vec![0; length];
        let first = length.min(size((self.sectors - sector % self.sectors) * SECTOR));
        let (head, tail) = bytes.split_at_mut(first);
        let disk = self.fs.disk.as_ref();
        read(disk, &OBJECT, self.base + sector % self.sectors * SECTOR, head)?;
        read(disk, &OBJECT, self.base, tail)?;
        Ok(bytes)
    }

    /// The round that a sector was written in. A header has its signature first.
    fn round(&self, sector: u64) -> Result<u32, FsError> {
        let bytes = self.read(sector, 8)?;
        Ok(if be::u32(&bytes, 0) == MAGIC { be::u32(&bytes, 4) } else { be::u32(&bytes, 0) })
    }

    /// Where the newest round ends: behind it stands what was written a round before, or never.
    fn head(&self) -> Result<u64, FsError> {
        let first = self.round(0)?;
        if self.round(self.sectors - 1)? == first {
            return Ok(self.sectors);
        }
        let (mut newest, mut older) = (0, self.sectors - 1);
        while older - newest > 1 {
            let middle = newest + (older - newest) / 2;
            if self.round(middle)? == first { newest = middle } else { older = middle }
        }
        Ok(older)
    }

    /// The last record that was written as a whole.
    pub(super) fn last(&self) -> Result<Option<Record>, FsError> {
        let head = self.head()?;
        for back in 1..=BACK_MAX.min(self.sectors) {
            let sector = (head + self.sectors - back) % self.sectors;
            if let Some(record) = self.record(sector, Some(back))? {
                return Ok(Some(record));
            }
        }
        Err(FsError::damaged(&OBJECT, "no whole record is where the newest should be"))
    }

    /// The record that begins at a sector, if one does that is whole, and not longer than `room`.
    pub(super) fn record(&self, sector: u64, room: Option<u64>) -> Result<Option<Record>, FsError> {
        let header = self.read(sector, 512)?;
        if be::u32(&header, 0) != MAGIC {
            return Ok(None);
        }
        let (round, length, capacity) =
            (be::u32(&header, 4), u64::from(be::u32(&header, 12)), u64::from(be::u32(&header, 320)));
        let long = be::u32(&header, 8) & 2 != 0;
        let sequence = be::u64(&header, 16);
        // Version 2 may have more sectors of header, one for each 32 KiB.
        let headers = if long { capacity.div_ceil(KNOWN).max(1) } else { 1 };
        let order = match be::u32(&header, 300) {
            1 => Order::Little,
            2 => Order::Big,
            _ => return Err(FsError::unsupported(&OBJECT, "no Linux wrote it")),
        };
        let mut record = Record {
            sequence,
            tail: be::u64(&header, 24) & u64::from(u32::MAX),
            operations: be::u32(&header, 40),
            order,
            at: sector,
            headers,
            length,
            bytes: Vec::new(),
        };
        let sound = sequence == u64::from(round) << 32 | sector
            && length <= CONTENT_MAX
            && headers <= CONTENT_MAX / KNOWN
            && length <= headers * KNOWN
            && record.tail < self.sectors
            && record.sectors() <= room.unwrap_or(self.sectors).min(self.sectors);
        if !sound {
            return Ok(None);
        }
        record.bytes = self.read(sector, size(record.sectors() * SECTOR))?;
        Ok(record.is_whole(round, self.sectors, self.fs.sb.version).then_some(record))
    }
}
