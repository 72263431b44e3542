//! [`Repository::repair`]: what a verification finds damaged is had from elsewhere and stored anew.
//!
//! Sought are the chunks and manifest nodes that no place gives, and those that only a pack gives that is known to be
//! damaged. Where from, in this order:
//!
//! 1. a copy of the repository: the whole pack, by its name, if its bytes hash to it;
//! 2. the repository itself, where the frame is good though its pack is not;
//! 3. a copy of the repository: the chunk, by its id, from whatever pack holds it there;
//! 4. an image that holds the data, of any disk or of the disk it is named for: its chunks are hashed, those that are
//!    wanted are taken, and if it is a whole disk of a point, the nodes of its manifest, too.
//!
//! Nothing is taken that does not hash to the wanted name or id. Durable order, as in a backup: packs, then the index run
//! that names them. A crash in between leaves packs that no run names. A damaged pack that nothing needs any more keeps
//! its marker, so that no backup relies on it; one that was put back loses it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::sync::Arc;

use tracing::{info, warn};

use super::Repository;
use super::open::{OpenError, read_config};
use super::verify::{Verifier, VerifyError, VerifyOptions, VerifyReport};
use crate::backup::Source;
use crate::error::ReadError;
use crate::format::pack::{MAX_PACK_LEN, PackKind, decode_pack};
use crate::id::{ChunkId, IdHash, PackId};
use crate::index::Index;
use crate::index::build::{RunBuilder, describe_pack};
use crate::keys::random;
use crate::lease::{LeaseError, LeaseKind};
use crate::manifest::{FAN_OUT, NODE_LEN, Shape, TreeBuilder};
use crate::pack::buffer::PackBuffer;
use crate::pack::builder::{Compressor, PackBuilder, Payload};
use crate::pack::damaged::DamagedPacks;
use crate::pack::fetch::Fetcher;
use crate::point::RecoveryPoint;
use crate::progress::Progress;
use crate::storage::{Object, Storage};

/// A repaired node may show that what is below it is damaged, too: at most so often, a tree has 7 levels.
const ROUNDS_MAX: u32 = 8;
/// Bytes of an image read at once.
const READ_BYTES: u64 = 1 << 20;

/// Where to look for what is lost.
#[derive(Default)]
pub struct RepairSources {
    /// Copies of this repository.
    pub copies: Vec<Arc<dyn Storage>>,
    /// Disks that may hold the data.
    pub images: Vec<RepairImage>,
}

/// A disk that may hold what is lost.
pub struct RepairImage {
    /// The only disk of recovery points that it is used for, by its name; every one when none is given.
    pub disk: Option<String>,
    /// Its data.
    pub source: Box<dyn Source>,
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RepairReport {
    /// Packs put back from a copy.
    pub packs: u64,
    /// Chunks and manifest nodes stored anew.
    pub chunks: u64,
    /// What is so now.
    pub verified: VerifyReport,
}

/// Why a repair could not be completed. What was stored anew until then stays.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// The verification failed.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// It cannot be said in the repository that a repair is at work.
    #[error("cannot take a lease")]
    Lease(#[from] LeaseError),
    /// A copy cannot be opened.
    #[error("cannot open the copy")]
    Copy(#[source] OpenError),
    /// It is another repository.
    #[error("the copy belongs to another repository")]
    OtherRepository,
    /// An image is for a disk that there is not.
    #[error("no recovery point that is verified has a disk called {disk}")]
    NoSuchDisk {
        /// The name asked for.
        disk: String,
        /// The names there are.
        known: Vec<String>,
    },
    /// An image cannot be read.
    #[error("cannot read the image at offset {offset}")]
    Image {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The repository cannot be written.
    #[error("cannot write {object}")]
    Write {
        /// What.
        object: String,
        /// Why.
        source: io::Error,
    },
}

/// Chunks, and nodes with their level.
pub(super) type Wanted = HashMap<ChunkId, Option<u8>, IdHash>;

impl Repository {
    /// Verifies, and repairs what is found with what `sources` give, until nothing is left or nothing helps any more.
    pub fn repair(
        &self,
        options: VerifyOptions,
        sources: &RepairSources,
        progress: &Progress,
    ) -> Result<RepairReport, RepairError> {
        let copies = sources.copies.iter().map(|copy| self.open_copy(copy)).collect::<Result<Vec<_>, _>>()?;
        // As a backup does: what it stores is named by no point yet, and must not be collected.
        let _lease = self.lease(LeaseKind::Backup, "repair", &[])?;
        let mut verifier = Verifier::begin(self, options, progress)?;
        verifier.load()?;
        expect_disks(&verifier.points, &sources.images)?;
        verifier.look()?;
        let mut report = RepairReport::default();
        let mut done = HashSet::new();
        for _ in 0..ROUNDS_MAX {
            let mut put_back = 0;
            // A pack of nodes that is back may show that those below it are lost.
            while let put @ 1.. = self.put_back(&mut verifier, &copies, &mut done)? {
                put_back += put;
                verifier.look_again()?;
            }
            let mut wanted = verifier.wanted();
            report.packs += put_back;
            if wanted.is_empty() {
                break;
            }
            let mut mender = Mender::new(self)?;
            self.mend_from_packs(&verifier, &copies, &mut wanted, &mut mender)?;
            for image in &sources.images {
                if wanted.is_empty() {
                    break;
                }
                let Some(disk) = &image.disk else {
                    self.mend_from_image(&*image.source, &mut wanted, &mut mender, progress)?;
                    continue;
                };
                let of_disk = verifier.wanted_of(disk, &wanted)?;
                let mut left = of_disk.clone();
                if !of_disk.is_empty() {
                    self.mend_from_image(&*image.source, &mut left, &mut mender, progress)?;
                }
                wanted.retain(|id, _| left.contains_key(id) || !of_disk.contains_key(id));
            }
            let mended = mender.finish()?;
            report.chunks += mended;
            if mended == 0 {
                break;
            }
            verifier.look_again()?;
        }
        info!(packs = report.packs, chunks = report.chunks, "repair done");
        report.verified = verifier.finish()?;
        Ok(report)
    }

    /// Reads a copy with this repository's keys.
    fn open_copy(&self, storage: &Arc<dyn Storage>) -> Result<Fetcher, RepairError> {
        let ours = self.fetcher();
        let config = read_config(&**storage).map_err(RepairError::Copy)?;
        if config != ours.config {
            return Err(RepairError::OtherRepository);
        }
        let index = Index::open(storage.clone(), config.repository);
        let index = index.map_err(|error| RepairError::Copy(OpenError::Index(error)))?;
        Ok(Fetcher {
            storage: storage.clone(),
            keyring: ours.keyring.clone(),
            index: Arc::new(index),
            config,
            damaged: DamagedPacks::default(),
        })
    }

    /// Puts whole packs back from a copy that has them as they were.
    fn put_back(
        &self,
        verifier: &mut Verifier<'_>,
        copies: &[Fetcher],
        done: &mut HashSet<PackId>,
    ) -> Result<u64, RepairError> {
        let mut count = 0;
        for pack in verifier.lost_packs() {
            if done.contains(&pack) {
                continue; // once is enough: its storage does not keep it
            }
            let object = Object::Pack(pack);
            for copy in copies {
                let Ok(bytes) = copy.storage.get(&object, u64::from(MAX_PACK_LEN)) else { continue };
                if blake3::hash(&bytes).as_bytes() != &pack.0 {
                    continue;
                }
                self.storage().put(&object, &bytes).map_err(|source| write(&object, source))?;
                self.fetcher().damaged.clear(self.storage(), pack);
                verifier.is_back(pack);
                done.insert(pack);
                info!(%pack, "the pack was put back from a copy");
                count += 1;
                break;
            }
        }
        Ok(count)
    }

    /// Takes what frames give: of the repository itself where something else in their pack is damaged, or of a copy.
    fn mend_from_packs(
        &self,
        verifier: &Verifier<'_>,
        copies: &[Fetcher],
        wanted: &mut Wanted,
        mender: &mut Mender<'_>,
    ) -> Result<(), RepairError> {
        let ids: Vec<(ChunkId, Option<u8>)> = wanted.iter().map(|(id, level)| (*id, *level)).collect();
        for (id, level) in ids {
            verifier.stop_if_cancelled()?;
            let own = (!verifier.bad.contains_key(&id)).then(|| self.fetcher());
            let found = own.into_iter().chain(copies).find_map(|from| from.plain(&id, level).ok());
            if let Some(plain) = found {
                mender.add(id, level, &plain)?;
                wanted.remove(&id);
            }
        }
        Ok(())
    }

    /// Hashes an image and takes what is wanted.
    fn mend_from_image(
        &self,
        image: &dyn Source,
        wanted: &mut Wanted,
        mender: &mut Mender<'_>,
        progress: &Progress,
    ) -> Result<(), RepairError> {
        let size = u64::from(self.chunk_size());
        let Some(shape) = Shape::of(image.size(), self.chunk_size()) else { return Ok(()) }; // larger than any disk
        progress.add_total(image.size());
        let keyring = &self.fetcher().keyring;
        let mut tree = TreeBuilder::new(shape);
        let mut buffer = vec![0; usize::try_from(READ_BYTES.max(size)).unwrap_or(usize::MAX)];
        let mut chunk = 0;
        while chunk < shape.chunks {
            if progress.is_cancelled() {
                return Err(VerifyError::Cancelled.into());
            }
            let offset = chunk * size;
            let failed = |source| RepairError::Image { offset, source };
            let data = image.next_data(offset).map_err(failed)?.map_or(image.size(), |range| range.start);
            let holes = (data.max(offset) / size).min(shape.chunks) - chunk;
            // Where nothing but a hole follows, its last chunk belongs to it.
            let holes = if data >= image.size() { shape.chunks - chunk } else { holes };
            if holes > 0 {
                let mut store =
                    |level: u8, node: &[u8]| mender.take(keyring.node_id(level, node), Some(level), node, wanted);
                tree.push_zeroes(holes, &mut store)?;
                chunk += holes;
                progress.add_done((holes * size).min(image.size() - offset));
                continue;
            }
            let length = (buffer.len() as u64 / size * size).min(image.size() - offset);
            let length = usize::try_from(length).unwrap_or(usize::MAX); // inside the buffer
            let padded = length.next_multiple_of(size.try_into().unwrap_or(1));
            let Some(bytes) = buffer.get_mut(..padded) else { return Ok(()) };
            let (read, padding) = bytes.split_at_mut(length);
            image.read_at(offset, read).map_err(failed)?;
            padding.fill(0);
            for plain in bytes.chunks_exact(size.try_into().unwrap_or(1)) {
                let id = match plain.iter().all(|byte| *byte == 0) {
                    true => ChunkId::ZERO,
                    false => mender.take(keyring.chunk_id(plain), None, plain, wanted)?,
                };
                let mut store =
                    |level: u8, node: &[u8]| mender.take(keyring.node_id(level, node), Some(level), node, wanted);
                tree.push(&id, &mut store)?;
                chunk += 1;
            }
            progress.add_done(length as u64);
        }
        let mut store = |level: u8, node: &[u8]| mender.take(keyring.node_id(level, node), Some(level), node, wanted);
        tree.finish(&mut store)?;
        Ok(())
    }
}

impl Fetcher {
    /// The bytes of a chunk, or of a node of a level.
    fn plain(&self, id: &ChunkId, level: Option<u8>) -> Result<Vec<u8>, ReadError> {
        match level {
            None => Ok(self.chunk(id)?.to_vec()),
            Some(level) => {
                let node = self.node(id, level)?;
                Ok((0..FAN_OUT).flat_map(|at| node.child(at).0).collect())
            }
        }
    }
}

/// Before anything is done: a name that is written wrong would be an image that repairs nothing.
fn expect_disks(points: &[RecoveryPoint], images: &[RepairImage]) -> Result<(), RepairError> {
    let known: BTreeSet<&str> = points.iter().flat_map(|point| &point.disks).map(|disk| disk.name.as_str()).collect();
    match images.iter().filter_map(|image| image.disk.as_deref()).find(|disk| !known.contains(disk)) {
        None => Ok(()),
        Some(disk) => Err(RepairError::NoSuchDisk {
            disk: disk.to_owned(),
            known: known.into_iter().map(str::to_owned).collect(),
        }),
    }
}

fn write(object: &Object, source: io::Error) -> RepairError {
    RepairError::Write { object: object.to_string(), source }
}

/// Stores chunks and nodes in new packs.
struct Mender<'a> {
    repository: &'a Repository,
    compressor: Compressor,
    data: Option<PackBuilder>,
    metadata: Option<PackBuilder>,
    ledger: RunBuilder,
    count: u64,
}

impl<'a> Mender<'a> {
    fn new(repository: &'a Repository) -> Result<Mender<'a>, RepairError> {
        let compressor = Compressor::new();
        let compressor = compressor.map_err(|source| RepairError::Write { object: "a pack".to_owned(), source })?;
        Ok(Mender { repository, compressor, data: None, metadata: None, ledger: RunBuilder::default(), count: 0 })
    }

    /// Stores what is wanted, once; gives the id back.
    fn take(
        &mut self,
        id: ChunkId,
        level: Option<u8>,
        plain: &[u8],
        wanted: &mut Wanted,
    ) -> Result<ChunkId, RepairError> {
        if wanted.get(&id) == Some(&level) {
            self.add(id, level, plain)?;
            wanted.remove(&id);
        }
        Ok(id)
    }

    fn add(&mut self, id: ChunkId, level: Option<u8>, plain: &[u8]) -> Result<(), RepairError> {
        let failed = |source| RepairError::Write { object: "a pack".to_owned(), source };
        let fetcher = self.repository.fetcher();
        let (kind, plain_len) = match level {
            None => (PackKind::Data, fetcher.config.chunk_size),
            Some(_) => (PackKind::Metadata, NODE_LEN),
        };
        let slot = if kind == PackKind::Data { &mut self.data } else { &mut self.metadata };
        let full = slot.take_if(|pack| pack.is_full());
        let pack = match slot {
            Some(pack) => pack,
            None => {
                let salt = random().map_err(failed)?;
                slot.insert(PackBuilder::new(
                    kind,
                    fetcher.config.repository,
                    &fetcher.keyring,
                    salt,
                    PackBuffer::default(),
                ))
            }
        };
        let (bytes, compressed) = self.compressor.compress(plain);
        pack.append(Payload { id, bytes, plain_len, compressed, level: level.unwrap_or(0) }).map_err(failed)?;
        self.count += 1;
        full.map_or(Ok(()), |full| self.store(full))
    }

    fn store(&mut self, pack: PackBuilder) -> Result<(), RepairError> {
        let pack = pack.finish().map_err(|source| RepairError::Write { object: "a pack".to_owned(), source })?;
        let id = PackId(*blake3::hash(&pack.bytes).as_bytes());
        let object = Object::Pack(id);
        // Parse back what was built before it is written.
        let parsed = decode_pack(&pack.bytes).is_ok_and(|parsed| parsed == (pack.header, pack.frames.clone()));
        let Some(len) = u32::try_from(pack.bytes.len()).ok().filter(|_| parsed) else {
            return Err(write(&object, io::Error::other("the pack does not read back")));
        };
        self.repository.storage().put(&object, &pack.bytes).map_err(|source| write(&object, source))?;
        let (row, entries) = describe_pack(id, &pack.header, len, &pack.frames);
        self.ledger.add_pack(row, &entries);
        Ok(())
    }

    /// Packs, then the run that names them. Returns how many chunks and nodes there were.
    fn finish(mut self) -> Result<u64, RepairError> {
        for pack in [self.data.take(), self.metadata.take()].into_iter().flatten() {
            self.store(pack)?;
        }
        let added = self.repository.fetcher().index.add(std::mem::take(&mut self.ledger));
        added.map_err(|source| RepairError::Write { object: "an index run".to_owned(), source })?;
        if self.count > 0 {
            warn!(chunks = self.count, "chunks that were damaged or missing are stored anew");
        }
        Ok(self.count)
    }
}
