//! Inodes.

use super::superblock::Superblock;
use crate::bytes::{be, part, u8};
use crate::fs::{FileType, FsError, Node, NodeId, Timestamp};

const REALTIME: u16 = 0x1;
/// Times as nanoseconds from 1901.
const BIG_TIME: u64 = 0x8;
/// Counts of extents with 64 bits.
const BIG_COUNTS: u64 = 0x10;

/// How a fork maps its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// A device's numbers.
    Device,
    /// The content itself.
    Local,
    /// A list of extents.
    Extents,
    /// The root of a tree of extents.
    Tree,
}

impl Format {
    fn decode(id: NodeId, format: u8) -> Result<Format, FsError> {
        Ok(match format {
            0 => Format::Device,
            1 => Format::Local,
            2 => Format::Extents,
            3 => Format::Tree,
            _ => return Err(FsError::damaged(&id, "its content is mapped in no known way")),
        })
    }
}

/// An inode with the bytes that it was read from.
pub(super) struct Inode {
    pub id: NodeId,
    pub kind: FileType,
    pub size: u64,
    pub format: Format,
    /// Extents of the data fork, and of the attribute fork.
    pub extents: u64,
    pub attribute_extents: u64,
    raw: Vec<u8>,
}

impl Inode {
    pub(super) fn decode(sb: &Superblock, id: NodeId, raw: Vec<u8>) -> Result<Inode, FsError> {
        if part(&raw, 0, 2) != b"IN" {
            return Err(FsError::damaged(&id, "its inode has no signature"));
        }
        if sb.version == 5 && be::u64(&raw, 152) != id.0 {
            return Err(FsError::damaged(&id, "its inode is another's"));
        }
        let kind =
            FileType::from_mode(be::u16(&raw, 2).into()).ok_or_else(|| FsError::damaged(&id, "it was deleted"))?;
        let size = be::u64(&raw, 56);
        if size > i64::MAX.unsigned_abs() {
            return Err(FsError::damaged(&id, "its size makes no sense"));
        }
        let format = Format::decode(id, u8(&raw, 5))?;
        let big = u8(&raw, 4) >= 3 && be::u64(&raw, 120) & BIG_COUNTS != 0;
        let (extents, attribute_extents) = if big {
            (be::u64(&raw, 24), u64::from(be::u32(&raw, 76)))
        } else {
            (be::u32(&raw, 76).into(), be::u16(&raw, 80).into())
        };
        Ok(Inode { id, kind, size, format, extents, attribute_extents, raw })
    }

    fn core(&self) -> usize {
        if u8(&self.raw, 4) >= 3 { 176 } else { 100 }
    }

    /// Where the attribute fork begins within the forks; 0 if there is none.
    fn fork_offset(&self) -> usize {
        usize::from(u8(&self.raw, 82)) * 8
    }

    pub(super) fn data_fork(&self) -> &[u8] {
        let all = part(&self.raw, self.core(), self.raw.len());
        if self.fork_offset() == 0 { all } else { part(all, 0, self.fork_offset()) }
    }

    /// The attribute fork, if there is one.
    pub(super) fn attribute_fork(&self) -> Result<Option<(Format, &[u8])>, FsError> {
        if self.fork_offset() == 0 {
            return Ok(None);
        }
        let format = Format::decode(self.id, u8(&self.raw, 83))?;
        Ok(Some((format, part(&self.raw, self.core() + self.fork_offset(), self.raw.len()))))
    }

    pub(super) fn is_realtime(&self) -> bool {
        be::u16(&self.raw, 90) & REALTIME != 0
    }

    fn time(&self, at: usize) -> Timestamp {
        if u8(&self.raw, 4) >= 3 && be::u64(&self.raw, 120) & BIG_TIME != 0 {
            let time = be::u64(&self.raw, at);
            let seconds = i64::try_from(time / 1_000_000_000).unwrap_or(0) - (1 << 31);
            return Timestamp { seconds, nanoseconds: u32::try_from(time % 1_000_000_000).unwrap_or(0) };
        }
        let seconds = i64::from(be::u32(&self.raw, at).cast_signed());
        Timestamp { seconds, nanoseconds: be::u32(&self.raw, at + 4).min(999_999_999) }
    }

    pub(super) fn node(&self) -> Node {
        let device = match self.format {
            Format::Device => {
                let device = be::u32(self.data_fork(), 0);
                ((device >> 18) & 0x3fff, device & 0x3_ffff)
            }
            _ => (0, 0),
        };
        let links = if u8(&self.raw, 4) == 1 { be::u16(&self.raw, 6).into() } else { be::u32(&self.raw, 16) };
        Node {
            id: self.id,
            kind: self.kind,
            mode: u32::from(be::u16(&self.raw, 2)) & 0o7777,
            uid: be::u32(&self.raw, 8),
            gid: be::u32(&self.raw, 12),
            size: self.size,
            links,
            modified: self.time(40),
            accessed: self.time(32),
            changed: self.time(48),
            device,
        }
    }
}
