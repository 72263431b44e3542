//! Many frames of one pack at once, into memory that the caller reuses: for whoever reads whole disks or whole packs.

use crate::error::ReadError;
use crate::format::pack::PackKind;
use crate::format::run::{Entry, PackRow};
use crate::id::ChunkId;
use crate::index::run::Location;
use crate::pack::fetch::{Fetcher, SCRATCH, Unzstd, Wanted, context};
use crate::storage::Object;

/// A chunk that could be read nowhere.
#[derive(Debug)]
pub(crate) struct Unreadable {
    /// Which of the wanted ones.
    pub at: usize,
    pub source: ReadError,
}

impl Fetcher {
    /// Decodes data chunks that stand in `pack` in this order, the first into the first chunk of `out` and so on. Reads
    /// everything from the first to the last at once, so there should be little between them. A frame that is bad, or
    /// gone, is looked for elsewhere by [`Fetcher::chunk`].
    pub fn fill(&self, pack: &PackRow, entries: &[Entry], out: &mut [u8]) -> Result<(), Unreadable> {
        let size = self.config.chunk_size as usize;
        let mut failed: Vec<usize> = Vec::new();
        if self.fill_from(pack, entries, out, &mut failed).is_err() {
            failed = (0..entries.len()).collect();
        }
        for at in failed {
            let (Some(entry), Some(plain)) = (entries.get(at), out.chunks_exact_mut(size).nth(at)) else { continue };
            let chunk = self.chunk(&entry.id).map_err(|source| Unreadable { at, source })?;
            plain.copy_from_slice(&chunk); // a chunk has the chunk size
        }
        Ok(())
    }

    fn fill_from(
        &self,
        pack: &PackRow,
        entries: &[Entry],
        out: &mut [u8],
        failed: &mut Vec<usize>,
    ) -> Result<(), ReadError> {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return Ok(()) };
        let object = Object::Pack(pack.pack);
        let io = |source| ReadError::io(&object, source);
        let cipher = self.keyring.pack_cipher(&pack.salt);
        let span = last.offset.saturating_add(last.stored_len).saturating_sub(first.offset) as usize; // in a pack
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.stored.resize(span.max(scratch.stored.len()), 0);
            let stored = scratch.stored.get_mut(..span).unwrap_or_default();
            self.storage.get_range(&object, u64::from(first.offset), stored).map_err(io)?;
            let zstd = context(&mut scratch.zstd).map_err(io)?;
            let plains = out.chunks_exact_mut(self.config.chunk_size as usize);
            for ((at, entry), plain) in entries.iter().enumerate().zip(plains) {
                let start = entry.offset.saturating_sub(first.offset) as usize;
                let frame = stored.get_mut(start..).and_then(|rest| rest.get_mut(..entry.stored_len as usize));
                let location = Location { pack: *pack, entry: *entry };
                let opened =
                    frame.map(|frame| self.open_into(&location, Wanted::Chunk, cipher.as_ref(), frame, zstd, plain));
                if !matches!(opened, Some(Ok(()))) {
                    failed.push(at);
                }
            }
            Ok(())
        })
    }

    /// Checks the frames of a whole pack in memory, whose seals are opened in place, and gives those that are bad.
    pub fn bad_frames(&self, bytes: &mut [u8], pack: &PackRow, entries: &[Entry]) -> Result<Vec<ChunkId>, ReadError> {
        let cipher = self.keyring.pack_cipher(&pack.salt);
        let mut bad = Vec::new();
        SCRATCH.with_borrow_mut(|scratch| {
            let zstd: &mut Unzstd =
                context(&mut scratch.zstd).map_err(|source| ReadError::io(&Object::Pack(pack.pack), source))?;
            for entry in entries {
                let wanted = match pack.kind {
                    PackKind::Data => Wanted::Chunk,
                    PackKind::Metadata => Wanted::Node { level: entry.level },
                };
                let (_, plain_len, _) = self.expected(wanted);
                let plain_len = plain_len as usize;
                scratch.stored.resize(plain_len.max(scratch.stored.len()), 0);
                let plain = scratch.stored.get_mut(..plain_len).unwrap_or_default();
                let frame = bytes.get_mut(entry.offset as usize..);
                let frame = frame.and_then(|rest| rest.get_mut(..entry.stored_len as usize));
                let location = Location { pack: *pack, entry: *entry };
                let opened = frame.map(|frame| self.open_into(&location, wanted, cipher.as_ref(), frame, zstd, plain));
                if !matches!(opened, Some(Ok(()))) {
                    bad.push(entry.id);
                }
            }
            Ok(bad)
        })
    }
}
