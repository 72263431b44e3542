//! [`Fetcher`]: from a chunk id to its bytes: index, ranged read, seal, zstd, hash.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::config::Config;
use crate::format::pack::{FLAG_ZSTD, PackKind, associated_data, check_lengths};
use crate::id::ChunkId;
use crate::index::Index;
use crate::index::run::Location;
use crate::keys::{Cipher, Keyring, frame_nonce};
use crate::manifest::{NODE_LEN, Node};
use crate::pack::damaged::DamagedPacks;
use crate::storage::{Object, Storage};

/// Neighbours in a pack are read together up to this many bytes.
pub(crate) const READ_MAX: u32 = 1 << 20;

/// How often a chunk is looked for anew after the index changed.
const TRIES_MAX: u32 = 5;

/// Reads chunks and nodes. Shared by everything that reads.
#[derive(Debug)]
pub(crate) struct Fetcher {
    pub storage: Arc<dyn Storage>,
    pub keyring: Arc<Keyring>,
    pub index: Arc<Index>,
    pub config: Config,
    pub damaged: DamagedPacks,
}

/// What is wanted: decides length and hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    Chunk,
    Node { level: u8 },
}

pub(super) type Unzstd = zstd::bulk::Decompressor<'static>;

/// Per thread: a fresh zstd context costs more than many frames.
pub(super) struct Scratch {
    pub zstd: Option<Unzstd>,
    pub stored: Vec<u8>,
}

thread_local! {
    pub(super) static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { zstd: None, stored: Vec::new() }) };
}

impl Fetcher {
    /// One chunk, tried everywhere the index knows, and again after the index repaired itself.
    pub fn chunk(&self, id: &ChunkId) -> Result<Bytes, ReadError> {
        self.get(id, Wanted::Chunk)
    }

    /// One manifest node.
    pub fn node(&self, id: &ChunkId, level: u8) -> Result<Node, ReadError> {
        if id.is_zero() {
            return Ok(Node::ZERO);
        }
        let bytes = self.get(id, Wanted::Node { level })?;
        Node::new(bytes).ok_or(ReadError::MissingChunk { chunk: *id }) // decoded to this length: cannot fail
    }

    /// The bytes of a manifest node.
    pub fn node_bytes(&self, id: &ChunkId, level: u8) -> Result<Bytes, ReadError> {
        self.get(id, Wanted::Node { level })
    }

    fn get(&self, id: &ChunkId, wanted: Wanted) -> Result<Bytes, ReadError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let seen = self.index.generation();
            let mut error = ReadError::MissingChunk { chunk: *id };
            for location in self.index.locate(id) {
                match self.read_frames(&[(*id, location)], wanted, &mut |_, bytes| bytes) {
                    Ok(mut found) => match found.pop() {
                        Some(Ok(bytes)) => return Ok(bytes),
                        _ => error = ReadError::CorruptChunk { pack: location.pack.pack, chunk: *id },
                    },
                    Err(failed) => error = failed,
                }
            }
            if tries >= TRIES_MAX || !self.index.repair(seen)? {
                // Only now: a bad frame may have been the fault of a damaged index run, which is out of use by now.
                if let ReadError::CorruptChunk { pack, .. } = &error {
                    self.damaged.mark(&*self.storage, *pack);
                }
                return Err(error);
            }
        }
    }

    /// Several chunks in order, none of them zero. Neighbours in a pack are read at once; whatever fails in that is
    /// read again alone, by [`Fetcher::chunk`].
    pub fn chunks(&self, ids: &[ChunkId]) -> Vec<Result<Bytes, ReadError>> {
        let mut out = Vec::with_capacity(ids.len());
        let mut group: Vec<(ChunkId, Location)> = Vec::new();
        for id in ids {
            let location = self.index.first(id);
            let joins = group.last().zip(location.as_ref()).is_some_and(|((_, last), next)| follows(last, next));
            let room = group.iter().map(|(_, at)| at.entry.stored_len).sum::<u32>() < READ_MAX;
            if !(joins && room) {
                self.read_group(&mut group, &mut out);
            }
            match location {
                Some(location) => group.push((*id, location)),
                None => out.push(self.chunk(id)),
            }
        }
        self.read_group(&mut group, &mut out);
        out
    }

    fn read_group(&self, group: &mut Vec<(ChunkId, Location)>, out: &mut Vec<Result<Bytes, ReadError>>) {
        if group.is_empty() {
            return;
        }
        match self.read_frames(group, Wanted::Chunk, &mut |_, bytes| bytes) {
            Ok(found) => {
                let pairs = found.into_iter().zip(group.iter());
                out.extend(pairs.map(|(found, (id, _))| found.or_else(|_| self.chunk(id))));
            }
            Err(_) => out.extend(group.iter().map(|(id, _)| self.chunk(id))),
        }
        group.clear();
    }

    /// Reads frames that follow each other in one pack. The outer error is the read's, the inner ones the frames'.
    fn read_frames<T>(
        &self,
        group: &[(ChunkId, Location)],
        wanted: Wanted,
        each: &mut impl FnMut(usize, Bytes) -> T,
    ) -> Result<Vec<Result<T, FormatError>>, ReadError> {
        let Some((_, first)) = group.first() else { return Ok(Vec::new()) };
        let object = Object::Pack(first.pack.pack);
        let total: usize = group.iter().map(|(_, at)| at.entry.stored_len as usize).sum();
        let cipher = self.keyring.opening_cipher(&first.pack.salt);
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { zstd, stored } = scratch;
            stored.resize(total.max(stored.len()), 0); // grown once; at most a group, or one frame
            let stored = stored.get_mut(..total).unwrap_or_default();
            let offset = u64::from(first.entry.offset);
            self.storage.get_range(&object, offset, stored).map_err(|source| ReadError::io(&object, source))?;
            let zstd = context(zstd).map_err(|source| ReadError::io(&object, source))?;
            let mut rest = stored;
            let mut found = Vec::with_capacity(group.len());
            for (at, (id, location)) in group.iter().enumerate() {
                let cut = (location.entry.stored_len as usize).min(rest.len());
                let (frame, after) = rest.split_at_mut(cut);
                rest = after;
                let opened = self.open_frame(id, location, wanted, cipher.as_deref(), frame, zstd);
                found.push(opened.map(|bytes| each(at, bytes)));
            }
            Ok(found)
        })
    }

    /// Seal, zstd, hash: the only way from stored bytes to a chunk.
    fn open_frame(
        &self,
        id: &ChunkId,
        location: &Location,
        wanted: Wanted,
        cipher: Option<&Cipher>,
        frame: &mut [u8],
        zstd: &mut Unzstd,
    ) -> Result<Bytes, FormatError> {
        let (payload, plain_len) = self.payload(id, location, wanted, cipher, frame)?;
        let plain = unpack(payload, location.entry.flags, plain_len, zstd)?;
        self.check_id(id, wanted, &plain)?;
        Ok(plain.into())
    }

    /// [`Fetcher::open_frame`] into a buffer that the caller owns and that has exactly the plain length.
    pub(super) fn open_into(
        &self,
        location: &Location,
        wanted: Wanted,
        cipher: Option<&Cipher>,
        frame: &mut [u8],
        zstd: &mut Unzstd,
        plain: &mut [u8],
    ) -> Result<(), FormatError> {
        let id = &location.entry.id;
        let (payload, plain_len) = self.payload(id, location, wanted, cipher, frame)?;
        let wrong = FormatError::Length { part: "the frame" };
        if plain.len() != plain_len as usize {
            return Err(wrong);
        }
        if location.entry.flags & FLAG_ZSTD == 0 {
            if payload.len() != plain.len() {
                return Err(wrong);
            }
            plain.copy_from_slice(payload);
        } else {
            let len = zstd.decompress_to_buffer(payload, plain);
            if len.map_err(|_| FormatError::Checksum { part: "the frame" })? != plain.len() {
                return Err(wrong);
            }
        }
        self.check_id(id, wanted, plain)
    }

    /// Checks what the index says of a frame and opens its seal in place: the payload, and how long it is unpacked.
    fn payload<'a>(
        &self,
        id: &ChunkId,
        location: &Location,
        wanted: Wanted,
        cipher: Option<&Cipher>,
        frame: &'a mut [u8],
    ) -> Result<(&'a [u8], u32), FormatError> {
        let (kind, plain_len, level) = self.expected(wanted);
        let entry = &location.entry;
        if location.pack.kind != kind || location.pack.encryption != self.config.encryption || entry.level != level {
            return Err(FormatError::Field { field: "kind of the frame" });
        }
        check_lengths(entry.stored_len, plain_len, self.config.encryption)?;
        let data = associated_data(id, plain_len, entry.flags, level);
        match cipher {
            Some(cipher) => match cipher.open(&frame_nonce(u32::from(entry.frame)), &data, frame) {
                Some(payload) => Ok((payload, plain_len)),
                None => Err(FormatError::Seal),
            },
            None => Ok((frame, plain_len)),
        }
    }

    /// What a frame must be: kind of its pack, plain length, level.
    pub(super) fn expected(&self, wanted: Wanted) -> (PackKind, u32, u8) {
        match wanted {
            Wanted::Chunk => (PackKind::Data, self.config.chunk_size, 0),
            Wanted::Node { level } => (PackKind::Metadata, NODE_LEN, level),
        }
    }

    fn check_id(&self, id: &ChunkId, wanted: Wanted, plain: &[u8]) -> Result<(), FormatError> {
        let hash = match wanted {
            Wanted::Chunk => self.keyring.chunk_id(plain),
            Wanted::Node { level } => self.keyring.node_id(level, plain),
        };
        if hash == *id { Ok(()) } else { Err(FormatError::Checksum { part: "the chunk" }) }
    }
}

fn follows(last: &Location, next: &Location) -> bool {
    last.pack.pack == next.pack.pack && last.entry.offset.checked_add(last.entry.stored_len) == Some(next.entry.offset)
}

pub(super) fn context(slot: &mut Option<Unzstd>) -> io::Result<&mut Unzstd> {
    match slot {
        Some(context) => Ok(context),
        None => Ok(slot.insert(zstd::bulk::Decompressor::new()?)),
    }
}

/// The plain bytes of a payload: exactly `plain_len`, or an error.
fn unpack(payload: &[u8], flags: u8, plain_len: u32, zstd: &mut Unzstd) -> Result<Vec<u8>, FormatError> {
    let wrong = || FormatError::Length { part: "the frame" };
    let mut plain = Vec::with_capacity(plain_len as usize); // bounded by the configuration
    if flags & FLAG_ZSTD == 0 {
        plain.extend_from_slice(payload);
    } else {
        zstd.decompress_to_buffer(payload, &mut plain).map_err(|_| FormatError::Checksum { part: "the frame" })?;
    }
    if plain.len() == plain_len as usize { Ok(plain) } else { Err(wrong()) }
}
