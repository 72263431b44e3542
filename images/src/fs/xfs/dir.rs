//! Directories: in the inode, or in blocks of which those before 32 GiB hold the entries and the rest their index.

use super::Xfs;
use super::inode::Inode;
use super::map;
use super::superblock::Superblock;
use crate::DiskImage;
use crate::bytes::{be, part, size, u8};
use crate::fs::{DirEntry, FsError, NodeId, read_vec};

/// Where the index of a directory begins.
const INDEX: u64 = 32 << 30;
/// Entries after which a page is full.
const PAGE: usize = 1024;

/// A directory in its inode. The cursor counts entries.
pub(super) fn short(sb: &Superblock, inode: &Inode, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
    let fork = inode.data_fork();
    let bytes = part(fork, 0, size(inode.size));
    // With a single number that needs them, all have eight bytes.
    let width = if u8(bytes, 1) > 0 { 8 } else { 4 };
    let count = usize::from(u8(bytes, 0).max(u8(bytes, 1)));
    let mut at = 2 + width;
    let mut found = Vec::new();
    for index in 0..count as u64 {
        let length = usize::from(u8(bytes, at));
        let name = part(bytes, at + 3, length);
        let number_at = at + 3 + length + usize::from(sb.has_types);
        if name.is_empty() || name.len() != length || number_at + width > bytes.len() {
            return Err(FsError::damaged(&inode.id, "a directory entry makes no sense"));
        }
        let number = if width == 8 { be::u64(bytes, number_at) } else { be::u32(bytes, number_at).into() };
        if index >= cursor {
            found.push(DirEntry { name: name.to_vec(), id: NodeId(number), next: index + 1 });
        }
        at = number_at + width;
    }
    Ok(found)
}

/// A directory in blocks. The cursor is a place in them.
pub(super) fn blocks(fs: &Xfs, inode: &Inode, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
    let block_size = 1_u64 << fs.sb.dir_block_bits;
    let runs = map::runs(fs, inode, inode.format, inode.data_fork())?;
    let length = runs.end().min(INDEX);
    let content = runs.over(fs.disk.clone(), length);
    let mut found = Vec::new();
    let mut at = cursor;
    while at < length && found.len() < PAGE {
        match content.next_data(at).map_err(|source| FsError::Io { object: inode.id.to_string(), source })? {
            Some(data) => at = at.max(data.start),
            None => break,
        }
        let start = at / block_size * block_size;
        let block = read_vec(&content, &inode.id, start, size(block_size.min(length - start)))?;
        entries(&fs.sb, inode, &block, start, at, &mut found)?;
        at = start + block_size;
    }
    Ok(found)
}

fn entries(
    sb: &Superblock,
    inode: &Inode,
    block: &[u8],
    base: u64,
    from: u64,
    found: &mut Vec<DirEntry>,
) -> Result<(), FsError> {
    let damaged = |reason| Err(FsError::damaged(&inode.id, reason));
    let (mut at, end) = match part(block, 0, 4) {
        b"XD2D" => (16, block.len()),
        b"XDD3" => (64, block.len()),
        // A directory of one block has its index at the block's end.
        magic @ (b"XD2B" | b"XDB3") => {
            let count = size(be::u32(block, block.len().saturating_sub(8)).into());
            let tail = count.saturating_mul(8).saturating_add(8);
            (if magic == b"XD2B" { 16 } else { 64 }, block.len().saturating_sub(tail))
        }
        _ => return damaged("a block of it has no signature"),
    };
    while at + 8 <= end {
        if be::u16(block, at) == 0xffff {
            let length = usize::from(be::u16(block, at + 2));
            if length < 8 || !length.is_multiple_of(8) {
                return damaged("a free place in it makes no sense");
            }
            at += length;
            continue;
        }
        let length = usize::from(u8(block, at + 8));
        let name = part(block, at + 9, length);
        let whole = (9 + length + usize::from(sb.has_types) + 2).next_multiple_of(8);
        if length == 0 || at + whole > end {
            return damaged("a directory entry makes no sense");
        }
        let place = base + at as u64;
        let id = NodeId(be::u64(block, at));
        at += whole;
        if place >= from && !matches!(name, b"." | b"..") {
            found.push(DirEntry { name: name.to_vec(), id, next: base + at as u64 });
        }
    }
    Ok(())
}
