//! Inodes.

use crate::bytes::{le, part};
use crate::fs::{FileType, FsError, Node, NodeId, Timestamp};

const ENCRYPTED: u32 = 0x800;
const EXTENTS: u32 = 0x8_0000;
const INLINE_DATA: u32 = 0x1000_0000;

/// An inode with the bytes that it was read from.
pub(super) struct Inode {
    pub id: NodeId,
    pub kind: FileType,
    pub size: u64,
    /// The block with more extended attributes, or 0.
    pub xattr_block: u64,
    raw: Vec<u8>,
}

impl Inode {
    pub(super) fn decode(id: NodeId, raw: Vec<u8>) -> Result<Inode, FsError> {
        let mode = le::u16(&raw, 0);
        let kind = FileType::from_mode(mode.into()).ok_or_else(|| FsError::damaged(&id, "it is of no known type"))?;
        if le::u16(&raw, 0x1a) == 0 {
            return Err(FsError::damaged(&id, "it was deleted"));
        }
        let high = if matches!(kind, FileType::File | FileType::Directory) { le::u32(&raw, 0x6c) } else { 0 };
        let size = u64::from(le::u32(&raw, 4)) | u64::from(high) << 32;
        if size > i64::MAX.unsigned_abs() {
            return Err(FsError::damaged(&id, "its size makes no sense"));
        }
        let xattr_block = u64::from(le::u32(&raw, 0x68)) | u64::from(le::u16(&raw, 0x76)) << 32;
        Ok(Inode { id, kind, size, xattr_block, raw })
    }

    fn flags(&self) -> u32 {
        le::u32(&self.raw, 0x20)
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.flags() & ENCRYPTED != 0
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags() & EXTENTS != 0
    }

    pub(super) fn is_inline(&self) -> bool {
        self.flags() & INLINE_DATA != 0
    }

    /// The 60 bytes that map the content, or are it.
    pub(super) fn block(&self) -> &[u8] {
        part(&self.raw, 0x28, 60)
    }

    /// What lies behind the fields: extended attributes.
    pub(super) fn tail(&self) -> &[u8] {
        let extra = if self.raw.len() > 128 { usize::from(le::u16(&self.raw, 0x80)) } else { 0 };
        part(&self.raw, 128 + extra, self.raw.len())
    }

    /// Times have 32 bits of seconds, and where there is room 2 more and 30 of nanoseconds.
    fn time(&self, at: usize, extra_at: usize) -> Timestamp {
        let seconds = i64::from(le::u32(&self.raw, at).cast_signed());
        let there = self.raw.len() > 128 && extra_at + 4 <= 128 + usize::from(le::u16(&self.raw, 0x80));
        if !there {
            return Timestamp { seconds, nanoseconds: 0 };
        }
        let extra = le::u32(&self.raw, extra_at);
        Timestamp { seconds: seconds + (i64::from(extra & 3) << 32), nanoseconds: (extra >> 2).min(999_999_999) }
    }

    pub(super) fn node(&self) -> Node {
        let device = match (self.kind, le::u32(&self.raw, 0x28), le::u32(&self.raw, 0x2c)) {
            (FileType::CharDevice | FileType::BlockDevice, 0, new) => {
                ((new >> 8) & 0xfff, (new & 0xff) | (new >> 12) & 0xf_ff00)
            }
            (FileType::CharDevice | FileType::BlockDevice, old, _) => ((old >> 8) & 0xff, old & 0xff),
            _ => (0, 0),
        };
        let id =
            |low: usize, high: usize| u32::from(le::u16(&self.raw, low)) | u32::from(le::u16(&self.raw, high)) << 16;
        Node {
            id: self.id,
            kind: self.kind,
            mode: u32::from(le::u16(&self.raw, 0)) & 0o7777,
            uid: id(0x2, 0x78),
            gid: id(0x18, 0x7a),
            size: self.size,
            links: le::u16(&self.raw, 0x1a).into(),
            modified: self.time(0x10, 0x88),
            accessed: self.time(0x8, 0x8c),
            changed: self.time(0xc, 0x84),
            device,
        }
    }
}
