//! The content of files.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::compression::decompress;
use super::tree::Key;
use super::{Btrfs, Subvolume, item, stored_as};
use crate::bytes::{le, part, size, u8};
use crate::fs::{FsError, NodeId, read, read_vec};
use crate::mapped::Runs;
use crate::{DiskImage, SharedDisk};

/// Extents of one file.
const EXTENTS_MAX: usize = 4 << 20;
/// Longest compressed extent; Linux makes 128 KiB.
const COMPRESSED_MAX: u64 = 1 << 20;
pub(super) const INLINE: u8 = 0;
const REGULAR: u8 = 1;

/// Content of which some is compressed, or lies in the tree.
struct Content {
    disk: SharedDisk,
    id: NodeId,
    length: u64,
    sector: usize,
    pieces: Vec<Piece>,
    /// The extent that was unpacked last: reads come in order.
    last: Mutex<Option<Unpacked>>,
}

/// The content of the extent that lies at a place.
type Unpacked = (u64, Arc<Vec<u8>>);

/// A piece of a file; what lies between two reads as zeroes.
struct Piece {
    start: u64,
    length: u64,
    stored: Stored,
}

enum Stored {
    Plain { place: u64 },
    Inline(Arc<Vec<u8>>),
    Compressed { place: u64, stored: u64, plain: u64, skip: u64, kind: u8 },
}

/// Opens a file of `length` bytes.
pub(super) fn open(
    fs: &Btrfs,
    id: NodeId,
    subvolume: &Subvolume,
    number: u64,
    length: u64,
) -> Result<Box<dyn DiskImage>, FsError> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut failure = None;
    let (from, to) = (Key::new(number, item::EXTENT, 0), Key::new(number, item::EXTENT, u64::MAX));
    fs.items(subvolume, from, to, &mut |key, data| {
        let added = if pieces.len() < EXTENTS_MAX {
            add(fs, id, key.offset, data, &mut pieces)
        } else {
            Err(FsError::damaged(&id, "it has more extents than any file should"))
        };
        failure = added.err();
        failure.is_none()
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    if pieces.iter().all(|piece| matches!(piece.stored, Stored::Plain { .. })) {
        let mut runs = Runs::default();
        for piece in pieces {
            if let Stored::Plain { place } = piece.stored {
                runs.push(&id, (piece.start, piece.length, place))?;
            }
        }
        return Ok(Box::new(runs.over(fs.disk.clone(), length)));
    }
    let sector = size(fs.sector.into());
    Ok(Box::new(Content { disk: fs.disk.clone(), id, length, sector, pieces, last: Mutex::new(None) }))
}

fn add(fs: &Btrfs, id: NodeId, start: u64, extent: &[u8], pieces: &mut Vec<Piece>) -> Result<(), FsError> {
    let bad = || FsError::damaged(&id, "an extent makes no sense");
    let (plain, kind) = (le::u64(extent, 8), u8(extent, 16));
    if u8(extent, 17) != 0 || kind > 3 {
        return Err(FsError::unsupported(&id, "it is encrypted, or compressed in an unknown way"));
    }
    let end = pieces.last().map_or(0, |piece| piece.start + piece.length);
    if start < end {
        return Err(bad());
    }
    if stored_as(extent) == INLINE {
        let bytes = part(extent, 21, extent.len());
        if plain > COMPRESSED_MAX {
            return Err(bad());
        }
        let bytes = if kind == 0 {
            bytes.to_vec()
        } else {
            decompress(kind, bytes, size(plain), size(fs.sector.into())).ok_or_else(bad)?
        };
        pieces.push(Piece { start, length: bytes.len() as u64, stored: Stored::Inline(Arc::new(bytes)) });
        return Ok(());
    }
    let (address, stored, skip, length) =
        (le::u64(extent, 21), le::u64(extent, 29), le::u64(extent, 37), le::u64(extent, 45));
    // Without an address it is a hole; what is only reserved reads as zeroes, too.
    if address == 0 || stored_as(extent) != REGULAR {
        return Ok(());
    }
    if length == 0 || start.checked_add(length).is_none() {
        return Err(bad());
    }
    if kind != 0 {
        let (place, room) = fs.chunks.place(&id, address)?;
        let inside = skip.checked_add(length).is_some_and(|end| end <= plain);
        if stored > COMPRESSED_MAX || plain > COMPRESSED_MAX || !inside || stored > room {
            return Err(bad());
        }
        pieces.push(Piece { start, length, stored: Stored::Compressed { place, stored, plain, skip, kind } });
        return Ok(());
    }
    let mut at = 0;
    while at < length {
        let address = address.checked_add(skip).and_then(|address| address.checked_add(at)).ok_or_else(bad)?;
        let (place, room) = fs.chunks.place(&id, address)?;
        let step = room.min(length - at);
        if place.checked_add(step).is_none_or(|end| end > fs.disk.size()) {
            return Err(FsError::damaged(&id, "it points outside of its volume"));
        }
        pieces.push(Piece { start: start + at, length: step, stored: Stored::Plain { place } });
        at += step;
    }
    Ok(())
}

impl Content {
    fn first(&self, offset: u64) -> usize {
        self.pieces.partition_point(|piece| piece.start + piece.length <= offset)
    }

    fn unpacked(&self, place: u64, stored: u64, plain: u64, kind: u8) -> io::Result<Arc<Vec<u8>>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, bytes)) = last.as_ref()
            && *known == place
            && bytes.len() as u64 == plain
        {
            return Ok(bytes.clone());
        }
        let bytes = read_vec(self.disk.as_ref(), &self.id, place, size(stored))?;
        let bytes = decompress(kind, &bytes, size(plain), self.sector)
            .ok_or_else(|| FsError::damaged(&self.id, "its compressed content makes no sense"))?;
        let bytes = Arc::new(bytes);
        *last = Some((place, bytes.clone()));
        Ok(bytes)
    }
}

impl DiskImage for Content {
    fn size(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.length);
        let Some(end) = end else {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the end"));
        };
        buf.fill(0);
        for piece in self.pieces.get(self.first(offset)..).unwrap_or_default() {
            let (from, to) = (piece.start.max(offset), (piece.start + piece.length).min(end));
            if from >= to {
                break;
            }
            let within = from - piece.start;
            let out = buf.get_mut(size(from - offset)..size(to - offset)).unwrap_or_default();
            match &piece.stored {
                Stored::Plain { place } => read(self.disk.as_ref(), &self.id, place + within, out)?,
                Stored::Inline(bytes) => out.copy_from_slice(part(bytes, size(within), out.len())),
                Stored::Compressed { place, stored, plain, skip, kind } => {
                    let bytes = self.unpacked(*place, *stored, *plain, *kind)?;
                    out.copy_from_slice(part(&bytes, size(skip + within), out.len()));
                }
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let piece = self.pieces.get(self.first(offset));
        let range = piece.map(|piece| piece.start.max(offset)..(piece.start + piece.length).min(self.length));
        Ok(range.filter(|range| range.start < range.end))
    }
}
