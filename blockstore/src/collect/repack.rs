//! Repack: copies the live frames of some packs into new ones.
//!
//! Order: (1) a new pack is durable, (2) a run that names it is. The old packs are not touched; whoever called puts them
//! into quarantine after that. Each frame is opened and hashed on the way: what cannot be read stays where it is.

use std::collections::{HashMap, HashSet};
use std::io;

use tracing::warn;

use super::CollectError;
use super::mark::{Marks, stop};
use super::plan::Tally;
use crate::format::pack::{PackKind, decode_pack};
use crate::id::{ChunkId, PackId};
use crate::index::build::{RunBuilder, describe_pack};
use crate::index::run::Location;
use crate::keys::random;
use crate::pack::buffer::PackBuffer;
use crate::pack::builder::{Compressor, PackBuilder, Payload};
use crate::pack::fetch::Fetcher;
use crate::progress::Progress;
use crate::storage::Object;

/// Entries whose places are held in memory at once.
const GROUP_FRAMES: u64 = 512 << 10;
/// Entries of new packs before a run of them is stored.
const SPILL_ENTRIES: usize = 256 << 10;
/// Frames read at once.
const BATCH: usize = 64;

/// What was copied.
#[derive(Debug, Default)]
pub(super) struct Repacked {
    /// Packs that nothing needs any more.
    pub packs: Vec<PackId>,
    /// Bytes of the new packs.
    pub written: u64,
}

struct Copier<'a> {
    fetcher: &'a Fetcher,
    compressor: Compressor,
    data: Option<PackBuilder>,
    metadata: Option<PackBuilder>,
    entries: RunBuilder,
    written: u64,
}

/// Copies what is live in `packs`. All of it is durable and indexed when this returns.
pub(super) fn repack(
    fetcher: &Fetcher,
    marks: &Marks,
    tallies: &HashMap<PackId, Tally>,
    packs: &[PackId],
    progress: &Progress,
) -> Result<Repacked, CollectError> {
    let compressor = Compressor::new().map_err(|source| CollectError::write("packs", source))?;
    let entries = RunBuilder::default();
    let mut copier = Copier { fetcher, compressor, data: None, metadata: None, entries, written: 0 };
    let mut failed = HashSet::new();
    let frames = |pack: &PackId| tallies.get(pack).map_or(0, |tally| u64::from(tally.live_frames));
    progress.add_total(packs.iter().filter_map(|pack| tallies.get(pack)).map(|tally| tally.live_bytes).sum());
    let mut rest = packs;
    while !rest.is_empty() {
        let mut sum = 0;
        let fits = |pack: &&PackId| {
            sum += frames(pack);
            sum <= GROUP_FRAMES
        };
        let count = rest.iter().take_while(fits).count().max(1); // one pack has at most 65,535
        let (group, after) = rest.split_at(count.min(rest.len()));
        rest = after;
        let group: HashSet<PackId> = group.iter().copied().collect();
        let mut places: Vec<Location> = (0..marks.runs().len())
            .flat_map(|run| marks.marked(run))
            .filter(|place| group.contains(&place.pack.pack))
            .collect();
        places.sort_unstable_by_key(|place| (place.pack.kind, place.pack.pack, place.entry.offset));
        for batch in places.chunks(BATCH) {
            stop(progress)?;
            copier.copy(batch, &mut failed, progress)?;
        }
    }
    copier.finish()?;
    let packs = packs.iter().copied().filter(|pack| !failed.contains(pack)).collect();
    Ok(Repacked { packs, written: copier.written })
}

impl Copier<'_> {
    fn copy(
        &mut self,
        batch: &[Location],
        failed: &mut HashSet<PackId>,
        progress: &Progress,
    ) -> Result<(), CollectError> {
        let data: Vec<ChunkId> =
            batch.iter().filter(|place| place.pack.kind == PackKind::Data).map(|place| place.entry.id).collect();
        let mut chunks = self.fetcher.chunks(&data).into_iter();
        for place in batch {
            let read = match place.pack.kind {
                PackKind::Data => chunks.next().unwrap_or_else(|| self.fetcher.chunk(&place.entry.id)),
                PackKind::Metadata => self.fetcher.node_bytes(&place.entry.id, place.entry.level),
            };
            progress.add_done(u64::from(place.entry.stored_len));
            match read {
                Ok(bytes) => self.append(place.pack.kind, place.entry.id, place.entry.level, &bytes)?,
                Err(error) => {
                    if failed.insert(place.pack.pack) {
                        warn!(pack = %place.pack.pack, %error, "the pack is kept: not all of it can be read");
                    }
                }
            }
        }
        Ok(())
    }

    fn append(&mut self, kind: PackKind, id: ChunkId, level: u8, plain: &[u8]) -> Result<(), CollectError> {
        let slot = match kind {
            PackKind::Data => &mut self.data,
            PackKind::Metadata => &mut self.metadata,
        };
        if let Some(full) = slot.take_if(|pack| pack.is_full()) {
            self.written += store(self.fetcher, full, &mut self.entries)?;
            if self.entries.len() >= SPILL_ENTRIES {
                let entries = std::mem::take(&mut self.entries);
                self.fetcher.index.add(entries).map_err(|source| CollectError::write("an index run", source))?;
            }
        }
        let write = |source| CollectError::write("a pack", source);
        let pack = match slot {
            Some(pack) => pack,
            None => {
                let (repository, keyring) = (self.fetcher.config.repository, &self.fetcher.keyring);
                slot.insert(PackBuilder::new(
                    kind,
                    repository,
                    keyring,
                    random().map_err(write)?,
                    PackBuffer::default(),
                ))
            }
        };
        let (bytes, compressed) = self.compressor.compress(plain);
        let plain_len = u32::try_from(plain.len()).map_err(|_| write(io::ErrorKind::FileTooLarge.into()))?;
        pack.append(Payload { id, bytes, plain_len, compressed, level }).map_err(write)
    }

    fn finish(&mut self) -> Result<(), CollectError> {
        for pack in [self.data.take(), self.metadata.take()].into_iter().flatten().filter(|pack| !pack.is_empty()) {
            self.written += store(self.fetcher, pack, &mut self.entries)?;
        }
        let entries = std::mem::take(&mut self.entries);
        self.fetcher.index.add(entries).map_err(|source| CollectError::write("an index run", source))
    }
}

/// Stores a pack and notes its entries. Parsed back before it is written.
fn store(fetcher: &Fetcher, pack: PackBuilder, entries: &mut RunBuilder) -> Result<u64, CollectError> {
    let write = |source| CollectError::write("a pack", source);
    let pack = pack.finish().map_err(write)?;
    let id = PackId(*blake3::hash(&pack.bytes).as_bytes());
    let parsed = decode_pack(&pack.bytes).is_ok_and(|parsed| parsed == (pack.header, pack.frames.clone()));
    let len = u32::try_from(pack.bytes.len()).ok().filter(|_| parsed);
    let len = len.ok_or_else(|| write(io::Error::other("the pack does not read back")))?;
    let object = Object::Pack(id);
    fetcher.storage.put(&object, &pack.bytes).map_err(|source| CollectError::write(&object.to_string(), source))?;
    let (row, frames) = describe_pack(id, &pack.header, len, &pack.frames);
    entries.add_pack(row, &frames);
    Ok(u64::from(len))
}
