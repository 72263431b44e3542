//! Extended attributes: in the inode, in a block of their own, and values in inodes of their own.

use super::Ext;
use super::inode::Inode;
use crate::bytes::{le, part, size, u8};
use crate::fs::{FsError, NodeId, Xattr, read_vec};

const MAGIC: u32 = 0xea02_0000;
/// Longest value; Linux takes no longer one.
const VALUE_MAX: u64 = 64 << 10;

/// The attributes in the inode. Values are counted from the first entry.
pub(super) fn inline(fs: &Ext, inode: &Inode) -> Result<Vec<Xattr>, FsError> {
    let tail = inode.tail();
    if le::u32(tail, 0) != MAGIC {
        return Ok(Vec::new());
    }
    let entries = part(tail, 4, tail.len());
    decode(fs, inode, entries, entries)
}

/// The attributes in their own block. Values are counted from the block's beginning.
pub(super) fn block(fs: &Ext, inode: &Inode) -> Result<Vec<Xattr>, FsError> {
    if inode.xattr_block == 0 {
        return Ok(Vec::new());
    }
    let bytes = fs.read_block(&inode.id, inode.xattr_block)?;
    if le::u32(&bytes, 0) != MAGIC {
        return Err(FsError::damaged(&inode.id, "its block of extended attributes has no signature"));
    }
    decode(fs, inode, part(&bytes, 32, bytes.len()), &bytes)
}

fn decode(fs: &Ext, inode: &Inode, entries: &[u8], values: &[u8]) -> Result<Vec<Xattr>, FsError> {
    let damaged = || FsError::damaged(&inode.id, "an extended attribute makes no sense");
    let mut found = Vec::new();
    let mut at = 0;
    while at + 16 <= entries.len() && le::u32(entries, at) != 0 {
        let (name_length, index) = (usize::from(u8(entries, at)), u8(entries, at + 1));
        let name = part(entries, at + 16, name_length);
        if name.len() != name_length {
            return Err(damaged());
        }
        let (offset, owner, length) =
            (usize::from(le::u16(entries, at + 2)), le::u32(entries, at + 4), u64::from(le::u32(entries, at + 8)));
        at += (16 + name_length).next_multiple_of(4);
        if length > VALUE_MAX {
            return Err(damaged());
        }
        let value = if owner == 0 {
            let value = part(values, offset, size(length));
            if value.len() as u64 != length {
                return Err(damaged());
            }
            value.to_vec()
        } else {
            let holder = fs.inode(NodeId(owner.into()))?;
            read_vec(&fs.mapped(&holder)?, &inode.id, 0, size(length))?
        };
        let (prefix, value): (&[u8], _) = match index {
            1 => (b"user.", value),
            2 => (b"system.posix_acl_access", acl(&value)),
            3 => (b"system.posix_acl_default", acl(&value)),
            4 => (b"trusted.", value),
            6 => (b"security.", value),
            7 => (b"system.", value),
            8 => (b"system.richacl", value),
            _ => continue,
        };
        found.push(([prefix, name].concat(), value));
    }
    Ok(found)
}

/// ACLs are stored shorter than Linux gives them: only entries that name somebody have an id, and the version differs.
fn acl(stored: &[u8]) -> Vec<u8> {
    const USER: u16 = 2;
    const GROUP: u16 = 8;
    let mut out = 2_u32.to_le_bytes().to_vec();
    let mut at = 4;
    while at + 4 <= stored.len() {
        let tag = le::u16(stored, at);
        out.extend_from_slice(part(stored, at, 4));
        at += 4;
        if matches!(tag, USER | GROUP) {
            out.extend_from_slice(&le::u32(stored, at).to_le_bytes());
            at += 4;
        } else {
            out.extend_from_slice(&u32::MAX.to_le_bytes());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acls_are_given_as_linux_does() {
        let stored = [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 7, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0];
        let given = acl(&stored);
        assert_eq!(given[..4], [2, 0, 0, 0]);
        assert_eq!(given[4..12], [1, 0, 6, 0, 255, 255, 255, 255]);
        assert_eq!(given[12..20], [2, 0, 7, 0, 0xe8, 3, 0, 0]);
        assert_eq!(given.len(), 28);
    }
}
