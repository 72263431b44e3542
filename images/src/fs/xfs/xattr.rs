//! Extended attributes: in the inode, or in the leaves of a tree.

use super::Xfs;
use super::inode::{Format, Inode};
use super::map;
use crate::DiskImage;
use crate::bytes::{be, part, size, u8};
use crate::fs::{FsError, Xattr, read_vec};

/// Longest attribute fork that is read.
const FORK_MAX: u64 = 16 << 20;
const LOCAL: u8 = 0x01;
const ROOT: u8 = 0x02;
const SECURE: u8 = 0x04;
/// Parent pointers, and attributes that are not complete.
const HIDDEN: u8 = 0x88;
/// Header of each block of a value in version 5.
const VALUE_HEADER: usize = 56;

pub(super) fn read(fs: &Xfs, inode: &Inode) -> Result<Vec<Xattr>, FsError> {
    let mut found = Vec::new();
    match inode.attribute_fork()? {
        None => {}
        Some((Format::Local, fork)) => {
            let count = u8(fork, 2);
            let mut at = 4;
            for _ in 0..count {
                let (name_length, length, flags) =
                    (usize::from(u8(fork, at)), usize::from(u8(fork, at + 1)), u8(fork, at + 2));
                let (name, value) = (part(fork, at + 3, name_length), part(fork, at + 3 + name_length, length));
                if name.len() != name_length || value.len() != length {
                    return Err(bad(inode));
                }
                add(&mut found, flags, name, value.to_vec());
                at += 3 + name_length + length;
            }
        }
        Some((Format::Device, _)) => return Err(bad(inode)),
        Some((format, fork)) => {
            let runs = map::runs(fs, inode, format, fork)?;
            let length = runs.end().min(FORK_MAX);
            let content = runs.over(fs.disk.clone(), length);
            let block_size = fs.sb.block_size();
            for block in 0..length / block_size {
                let bytes = read_vec(&content, &inode.id, block * block_size, size(block_size))?;
                leaf(fs, inode, &content, &bytes, &mut found)?;
            }
        }
    }
    Ok(found)
}

fn bad(inode: &Inode) -> FsError {
    FsError::damaged(&inode.id, "an extended attribute makes no sense")
}

/// The attributes of a block, if it is a leaf: others are nodes of the tree, or values.
fn leaf(fs: &Xfs, inode: &Inode, content: &dyn DiskImage, block: &[u8], found: &mut Vec<Xattr>) -> Result<(), FsError> {
    let (count_at, entries_at) = match be::u16(block, 8) {
        0xfbee => (12, 32),
        0x3bee => (56, 80),
        _ => return Ok(()),
    };
    let count = usize::from(be::u16(block, count_at));
    for entry in part(block, entries_at, 8 * count).chunks_exact(8) {
        let (at, flags) = (usize::from(be::u16(entry, 4)), u8(entry, 6));
        let (name, value) = if flags & LOCAL != 0 {
            let (length, name_length) = (usize::from(be::u16(block, at)), usize::from(u8(block, at + 2)));
            let (name, value) = (part(block, at + 3, name_length), part(block, at + 3 + name_length, length));
            if name.len() != name_length || value.len() != length {
                return Err(bad(inode));
            }
            (name, value.to_vec())
        } else {
            let (first, length, name_length) =
                (u64::from(be::u32(block, at)), size(be::u32(block, at + 4).into()), usize::from(u8(block, at + 8)));
            let name = part(block, at + 9, name_length);
            if name.len() != name_length || length > 64 << 10 {
                return Err(bad(inode));
            }
            (name, remote(fs, inode, content, first, length)?)
        };
        add(found, flags, name, value);
    }
    Ok(())
}

/// A value in blocks of its own.
fn remote(fs: &Xfs, inode: &Inode, content: &dyn DiskImage, first: u64, length: usize) -> Result<Vec<u8>, FsError> {
    let block = size(fs.sb.block_size());
    let header = if fs.sb.version == 5 { VALUE_HEADER } else { 0 };
    let blocks = length.div_ceil(block - header);
    let bytes = read_vec(content, &inode.id, first * block as u64, blocks * block)?;
    let mut value: Vec<u8> = bytes.chunks(block).flat_map(|block| part(block, header, block.len())).copied().collect();
    value.truncate(length);
    Ok(value)
}

fn add(found: &mut Vec<Xattr>, flags: u8, name: &[u8], value: Vec<u8>) {
    if flags & HIDDEN != 0 {
        return;
    }
    let (prefix, name, value): (&[u8], &[u8], _) = match (flags & (ROOT | SECURE), name) {
        (ROOT, b"SGI_ACL_FILE") => (b"system.posix_acl_access", b"", acl(&value)),
        (ROOT, b"SGI_ACL_DEFAULT") => (b"system.posix_acl_default", b"", acl(&value)),
        (0, name) => (b"user.", name, value),
        (ROOT, name) => (b"trusted.", name, value),
        (_, name) => (b"security.", name, value),
    };
    found.push(([prefix, name].concat(), value));
}

/// ACLs are stored in big-endian numbers: a count, then tag, id and permissions of each entry.
fn acl(stored: &[u8]) -> Vec<u8> {
    const USER: u16 = 2;
    const GROUP: u16 = 8;
    let mut out = 2_u32.to_le_bytes().to_vec();
    let count = size(be::u32(stored, 0).into()).min(stored.len() / 12);
    for entry in part(stored, 4, 12 * count).chunks_exact(12) {
        let tag = u16::try_from(be::u32(entry, 0)).unwrap_or(0);
        let id = if matches!(tag, USER | GROUP) { be::u32(entry, 4) } else { u32::MAX };
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&be::u16(entry, 8).to_le_bytes());
        out.extend_from_slice(&id.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::le;

    #[test]
    fn acls_are_given_as_linux_does() {
        let stored = [0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 2, 0, 0, 3, 0xe8, 0, 7, 0, 0];
        let given = acl(&stored);
        assert_eq!(le::u32(&given, 0), 2);
        assert_eq!((le::u16(&given, 4), le::u16(&given, 6), le::u32(&given, 8)), (1, 6, u32::MAX));
        assert_eq!((le::u16(&given, 12), le::u16(&given, 14), le::u32(&given, 16)), (2, 7, 1000));
    }
}
