//! [`PointDisk`]: a disk of a recovery point, readable at any offset as soon as it is opened.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::ReadShared;
use super::ahead::{CACHE_MIN, Streams, jobs};
use super::manifest::ManifestReader;
use crate::base::{Base, Extent, Segment};
use crate::error::ReadError;
use crate::id::ChunkId;
use crate::manifest::{FAN_OUT, Node};
use crate::pack::fetch::{Fetcher, READ_MAX};
use crate::point::PointedDisk;

/// One answer about extents looks at this many manifest leaves at most, whatever was asked for.
const LEAVES_MAX: u32 = 1024;

/// A disk of a recovery point. Opening costs the same for every size; nodes and chunks are loaded when they are read
/// and kept in the repository's caches. Reads are checked against the chunk's id before a byte is returned.
#[derive(Debug)]
pub struct PointDisk {
    core: Arc<Core>,
    shared: Arc<ReadShared>,
}

/// What jobs of the read-ahead own.
#[derive(Debug)]
struct Core {
    manifest: ManifestReader,
    shared: Arc<ReadShared>,
    size: u64,
    chunk_size: u64,
    streams: Streams,
}

/// The part of a read that one chunk serves.
struct Piece {
    chunk: u64,
    start: usize,
    end: usize,
}

impl PointDisk {
    pub(crate) fn open(shared: Arc<ReadShared>, disk: &PointedDisk) -> Result<PointDisk, ReadError> {
        let core = Core {
            manifest: ManifestReader::new(shared.clone(), disk)?,
            shared: shared.clone(),
            size: disk.size,
            chunk_size: u64::from(disk.chunk_size),
            streams: Streams::default(),
        };
        Ok(PointDisk { core: Arc::new(core), shared })
    }

    /// The chunk size in bytes.
    pub fn chunk_size(&self) -> u64 {
        self.core.chunk_size
    }

    /// Brings chunks into the cache, by their numbers, as few reads as their places allow; those that are there already,
    /// hold zeroes or lie beyond the end are passed over. Returns how many were missing. Blocks.
    pub fn prefetch(&self, chunks: &[u64]) -> Result<usize, ReadError> {
        let mut sorted = chunks.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        let missing = self.core.missing(sorted.into_iter())?;
        let bytes = missing.len() as u64 * self.core.chunk_size;
        if self.shared.cache.holds(bytes) {
            self.shared.cache.get_or_fetch(&missing, &self.shared.fetcher, &mut Vec::new())?;
        }
        Ok(missing.len())
    }

    /// Number of chunks.
    pub(crate) fn chunks(&self) -> u64 {
        self.core.manifest.shape().chunks
    }

    /// The leaf of a chunk.
    pub(crate) fn leaf_of(&self, chunk: u64) -> Result<Node, ReadError> {
        self.core.manifest.leaf(chunk / FAN_OUT)
    }

    /// How many leaves from `leaf` are known to be zero; 0 if it holds data.
    pub(crate) fn zero_leaves(&self, leaf: u64) -> Result<u64, ReadError> {
        self.core.manifest.zero_leaves(leaf)
    }

    pub(crate) fn fetcher(&self) -> &Fetcher {
        &self.shared.fetcher
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), ReadError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.core.size => Ok(()),
            _ => Err(ReadError::OutOfRange { offset, length }),
        }
    }

    fn pieces(&self, offset: u64, length: u64) -> impl Iterator<Item = Piece> {
        let size = self.core.chunk_size;
        let end = offset + length;
        let first = offset / size;
        let last = if length == 0 { first } else { end.div_ceil(size) };
        (first..last).map(move |chunk| {
            let start = offset.max(chunk * size) - chunk * size;
            let end = end.min((chunk + 1) * size) - chunk * size;
            let to_usize = |n: u64| usize::try_from(n).unwrap_or(usize::MAX); // below the chunk size
            Piece { chunk, start: to_usize(start), end: to_usize(end) }
        })
    }

    /// Lets the read-ahead know what was read.
    fn note(&self, offset: u64, length: u64) {
        if length == 0 || !self.shared.cache.holds(CACHE_MIN) {
            return;
        }
        let size = self.core.chunk_size;
        let (first, last) = (offset / size, (offset + length - 1) / size);
        if let Some(wanted) = self.core.streams.note(first, last, size, self.chunks()) {
            for range in jobs(wanted, size) {
                let core = self.core.clone();
                self.shared.pool.offer(Box::new(move || core.prefetch(range)));
            }
        }
    }
}

impl Core {
    /// The chunks of some numbers that hold data and are not in the cache.
    fn missing(&self, chunks: impl Iterator<Item = u64>) -> Result<Vec<ChunkId>, ReadError> {
        let mut missing: Vec<ChunkId> = Vec::new();
        for chunk in chunks {
            let id = self.manifest.leaf(chunk / FAN_OUT)?.child(chunk);
            if !id.is_zero() && !self.shared.cache.contains(&id) {
                missing.push(id);
            }
        }
        Ok(missing)
    }

    /// Brings chunks into the cache. Errors are left to whoever reads them.
    fn prefetch(&self, range: Range<u64>) {
        let Ok(missing) = self.missing(range) else { return };
        let _ = self.shared.cache.get_or_fetch(&missing, &self.shared.fetcher, &mut Vec::new());
    }
}

fn push_hole(out: &mut Vec<Segment>, from: usize, length: u64) {
    // Holes of this read only are joined: what stands before belongs to the caller.
    if out.len() > from
        && let Some(Segment::Hole(last)) = out.last_mut()
    {
        *last += length;
    } else {
        out.push(Segment::Hole(length));
    }
}

fn push_data(out: &mut Vec<Segment>, chunk: &Bytes, piece: &Piece) {
    // A chunk has the chunk size, which was checked when it was decoded.
    out.push(Segment::Data(chunk.slice(piece.start.min(chunk.len())..piece.end.min(chunk.len()))));
}

impl Base for PointDisk {
    fn size(&self) -> u64 {
        self.core.size
    }

    fn read_resident(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> bool {
        if self.check(offset, length).is_err() {
            return false;
        }
        let before = out.len();
        let mut leaf: Option<(u64, Node)> = None;
        for piece in self.pieces(offset, length) {
            let number = piece.chunk / FAN_OUT;
            let id = match &leaf {
                Some((known, node)) if *known == number => node.child(piece.chunk),
                _ => match self.core.manifest.resident_leaf(number) {
                    Some(node) => leaf.insert((number, node)).1.child(piece.chunk),
                    None => {
                        out.truncate(before);
                        return false;
                    }
                },
            };
            if id.is_zero() {
                push_hole(out, before, (piece.end - piece.start) as u64);
            } else if let Some(chunk) = self.shared.cache.get(&id) {
                push_data(out, &chunk, &piece);
            } else {
                out.truncate(before);
                return false;
            }
        }
        self.note(offset, length);
        true
    }

    fn read(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), ReadError> {
        self.check(offset, length)?;
        let before = out.len();
        let mut wanted: Vec<(Piece, ChunkId)> = Vec::new();
        let mut leaf: Option<(u64, Node)> = None;
        let room = usize::try_from(u64::from(READ_MAX) / self.core.chunk_size).unwrap_or(1).max(1);
        let result = self.pieces(offset, length).try_for_each(|piece| {
            let number = piece.chunk / FAN_OUT;
            let id = match &leaf {
                Some((known, node)) if *known == number => node.child(piece.chunk),
                _ => leaf.insert((number, self.core.manifest.leaf(number)?)).1.child(piece.chunk),
            };
            wanted.push((piece, id));
            if wanted.len() >= room { self.deliver(&mut wanted, before, out) } else { Ok(()) }
        });
        let result = result.and_then(|()| self.deliver(&mut wanted, before, out));
        match result {
            Ok(()) => self.note(offset, length),
            Err(_) => out.truncate(before),
        }
        result
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ReadError> {
        self.check(offset, length)?;
        let (size, end) = (self.core.chunk_size, offset + length);
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = offset;
        let mut leaf: Option<(u64, Node)> = None;
        let mut leaves = 0;
        while at < end {
            let chunk = at / size;
            let number = chunk / FAN_OUT;
            if leaf.as_ref().is_none_or(|(known, _)| *known != number) {
                leaves += 1;
                if leaves > LEAVES_MAX {
                    break;
                }
                leaf = Some((number, self.core.manifest.leaf(number)?));
            }
            let Some((_, node)) = &leaf else { break };
            let (hole, chunks) = if node.is_zero() {
                (true, self.core.manifest.zero_leaves(number)?.max(1) * FAN_OUT - chunk % FAN_OUT)
            } else {
                (node.child(chunk).is_zero(), 1)
            };
            let next = chunk.saturating_add(chunks).saturating_mul(size).min(end);
            let full = extents.len() >= limit.max(1);
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.length += next - at,
                _ if full => break,
                _ => extents.push(Extent { length: next - at, hole }),
            }
            at = next;
        }
        Ok(extents)
    }
}

impl PointDisk {
    /// Appends the segments of some pieces; zero chunks as holes, the others from cache or packs.
    fn deliver(
        &self,
        wanted: &mut Vec<(Piece, ChunkId)>,
        before: usize,
        out: &mut Vec<Segment>,
    ) -> Result<(), ReadError> {
        let ids: Vec<ChunkId> = wanted.iter().map(|(_, id)| *id).filter(|id| !id.is_zero()).collect();
        let mut chunks = Vec::with_capacity(ids.len());
        self.shared.cache.get_or_fetch(&ids, &self.shared.fetcher, &mut chunks)?;
        let mut chunks = chunks.iter();
        for (piece, id) in wanted.drain(..) {
            match if id.is_zero() { None } else { chunks.next() } {
                Some(chunk) => push_data(out, chunk, &piece),
                None => push_hole(out, before, (piece.end - piece.start) as u64),
            }
        }
        Ok(())
    }
}
