//! Directories: an index of names, whose blocks are read one after the other, in use or not as their bitmap says; the
//! order of the tree that they form does not matter to a list.

use super::attribute::Value;
use super::record::undo;
use super::{DOS_NAME, Ntfs, Object};
use crate::bytes::{le, part, size, u8, utf16_le};
use crate::fs::{DirEntry, FsError, NodeId, read_vec};

const INDEX: &str = "$I30";
const ROOT: u32 = 0x90;
const ALLOCATION: u32 = 0xa0;
const BITMAP: u32 = 0xb0;
/// Bitmap of the largest index that is read: 8 million blocks.
const BITMAP_MAX: u64 = 1 << 20;
/// Entries after which a page is full.
const PAGE: usize = 512;
/// A cursor is the number of a block, 0 being the root, and a place in it.
const PLACE_BITS: u32 = 17;

pub(super) fn read(fs: &Ntfs, object: &Object, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
    let id = object.id;
    let root = object.attributes.iter().find(|attribute| attribute.kind == ROOT && attribute.name == INDEX);
    let Some(Value::Resident(root)) = root.map(|attribute| &attribute.value) else {
        return Err(FsError::damaged(&id, "it has no index of names"));
    };
    let block_size = u64::from(le::u32(root, 8));
    let mut found = Vec::new();
    let (mut unit, mut place) = (cursor >> PLACE_BITS, size(cursor & ((1 << PLACE_BITS) - 1)));
    if unit == 0 {
        entries(id, part(root, 16, root.len()), 0, place, &mut found)?;
        (unit, place) = (1, 0);
    }
    let Some(allocation) = fs.stream(object, ALLOCATION, INDEX)? else { return Ok(found) };
    if !block_size.is_power_of_two() || !(512..=64 << 10).contains(&block_size) {
        return Err(FsError::damaged(&id, "its index has blocks that make no sense"));
    }
    let bitmap = fs.stream(object, BITMAP, INDEX)?.ok_or_else(|| FsError::damaged(&id, "its index has no bitmap"))?;
    let bitmap = read_vec(bitmap.as_ref(), &id, 0, size(bitmap.size().min(BITMAP_MAX)))?;
    while found.len() < PAGE {
        let block = unit - 1;
        let Some(bits) = bitmap.get(size(block / 8)) else { break };
        let offset = block.saturating_mul(block_size);
        if offset >= allocation.size() {
            break;
        }
        if bits >> (block % 8) & 1 != 0 {
            let mut bytes = read_vec(allocation.as_ref(), &id, offset, size(block_size))?;
            if part(&bytes, 0, 4) != b"INDX" {
                return Err(FsError::damaged(&id, "a block of its index has no signature"));
            }
            undo(&id, &mut bytes)?;
            entries(id, part(&bytes, 24, bytes.len()), unit, place, &mut found)?;
        }
        (unit, place) = (unit + 1, 0);
    }
    Ok(found)
}

/// The entries behind an index header.
fn entries(id: NodeId, bytes: &[u8], unit: u64, place: usize, found: &mut Vec<DirEntry>) -> Result<(), FsError> {
    const LAST: u16 = 2;
    let (mut at, end) = (size(le::u32(bytes, 0).into()), size(le::u32(bytes, 4).into()).min(bytes.len()));
    while at + 16 <= end {
        let (length, flags) = (usize::from(le::u16(bytes, at + 8)), le::u16(bytes, at + 12));
        if flags & LAST != 0 {
            return Ok(());
        }
        if length < 16 || at + length > end {
            break;
        }
        let key = part(bytes, at + 16, le::u16(bytes, at + 10).into());
        let next = at + length;
        if at >= place && key.len() > 66 && u8(key, 65) != DOS_NAME {
            let name = utf16_le(part(key, 66, 2 * usize::from(u8(key, 64))));
            let target = NodeId(le::u64(bytes, at));
            if name != "." {
                found.push(DirEntry { name: name.into_bytes(), id: target, next: unit << PLACE_BITS | next as u64 });
            }
        }
        at = next;
    }
    Err(FsError::damaged(&id, "its index of names makes no sense"))
}
