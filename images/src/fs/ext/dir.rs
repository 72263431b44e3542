//! Directories. The index of a large one lies in blocks that look like empty ones to who reads them in order.

use super::Ext;
use super::fast::FastCommits;
use super::inode::Inode;
use crate::DiskImage;
use crate::bytes::{le, part, size, u8};
use crate::fs::{DirEntry, FsError, NodeId, read as read_range};

/// Bytes of a directory read at a time, a multiple of every block size.
const PAGE: u64 = 64 << 10;
/// Largest directory that is read: far beyond what ext4 can make.
const DIR_MAX: u64 = 1 << 40;

/// The entries of the page that the cursor is in.
fn read_page(fs: &Ext, inode: &Inode, content: &dyn DiskImage, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
    let start = cursor / PAGE * PAGE;
    let mut page = vec![0; size(PAGE.min(inode.size - start))];
    read_range(content, &inode.id, start, &mut page)?;
    let block_size = size(fs.sb.block_size());
    let mut found = Vec::new();
    for (index, block) in page.chunks(block_size).enumerate() {
        let base = start + (index * block_size) as u64;
        entries(inode, block, base, fs.sb.has_file_types(), cursor, &mut found)?;
    }
    Ok(found)
}

/// The next entries from a cursor, which is a place in the directory's bytes.
pub(super) fn read(fs: &Ext, inode: &Inode, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
    if inode.size > DIR_MAX {
        return Err(FsError::damaged(&inode.id, "it is larger than any directory"));
    }
    let content = fs.content(inode)?;
    let mut at = cursor;
    while at < inode.size {
        // Holes, which a sound directory does not have, are skipped at once.
        match content.next_data(at).map_err(|source| FsError::Io { object: inode.id.to_string(), source })? {
            Some(data) => at = at.max(data.start),
            None => break,
        }
        let found = read_page(fs, inode, content.as_ref(), at)?;
        if !found.is_empty() {
            return Ok(found);
        }
        at = (at / PAGE + 1) * PAGE;
    }
    Ok(Vec::new())
}

/// Cursors from here on count the names that fast commits told.
const TOLD: u64 = 1 << 62;

/// The entries from a cursor with what fast commits told of the directory: the names that it had before come first, by
/// `read`, without those that are told; then those that it has by now.
pub(super) fn with_fast_commits(
    fast: &FastCommits,
    id: NodeId,
    mut cursor: u64,
    read: &mut dyn FnMut(u64) -> Result<Vec<DirEntry>, FsError>,
) -> Result<Vec<DirEntry>, FsError> {
    let told = fast.names(id.0);
    while cursor < TOLD && !fast.has_created(id.0) {
        let mut found = read(cursor)?;
        let Some(last) = found.last().map(|entry| entry.next) else { break };
        found.retain(|entry| told.is_none_or(|told| !told.contains_key(&entry.name)));
        if !found.is_empty() || last <= cursor {
            return Ok(found);
        }
        cursor = last;
    }
    let names = told.into_iter().flatten().filter_map(|(name, target)| Some((name, (*target)?)));
    let entries = (TOLD..).zip(names).map(|(at, (name, id))| DirEntry { name: name.clone(), id, next: at + 1 });
    Ok(entries.filter(|entry| entry.next > cursor).collect())
}

/// A directory in its inode: the parent's number, then entries in two areas.
pub(super) fn inline(inode: &Inode, bytes: &[u8], cursor: u64) -> Result<Vec<DirEntry>, FsError> {
    let mut found = Vec::new();
    entries(inode, part(bytes, 4, 56), 4, true, cursor, &mut found)?;
    entries(inode, part(bytes, 60, bytes.len()), 60, true, cursor, &mut found)?;
    Ok(found)
}

fn entries(
    inode: &Inode,
    block: &[u8],
    base: u64,
    typed: bool,
    cursor: u64,
    found: &mut Vec<DirEntry>,
) -> Result<(), FsError> {
    let mut at = 0;
    while at + 8 <= block.len() {
        let length = match usize::from(le::u16(block, at + 4)) {
            // A block of 64 KiB with a single entry.
            0 | 0xffff if block.len() == 0x1_0000 => 0x1_0000,
            length => length,
        };
        let name_length = if typed { usize::from(u8(block, at + 6)) } else { usize::from(le::u16(block, at + 6)) };
        if length < 8 || length % 4 != 0 || at + length > block.len() || 8 + name_length > length {
            return Err(FsError::damaged(&inode.id, "a directory entry makes no sense"));
        }
        let (number, name) = (le::u32(block, at), part(block, at + 8, name_length));
        let place = base + at as u64;
        at += length;
        if number != 0 && name_length != 0 && place >= cursor && !matches!(name, b"." | b"..") {
            found.push(DirEntry { name: name.to_vec(), id: NodeId(number.into()), next: base + at as u64 });
        }
    }
    Ok(())
}
