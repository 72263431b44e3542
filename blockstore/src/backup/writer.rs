//! [`Writer`]: turns new chunks and nodes into durable packs and index runs, off the caller's thread.
//!
//! Order: a pack is durable (storage's put returned) before its entries reach the ledger; the ledger's runs are put
//! after that. So no run ever names a pack that a power cut could take away.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use tracing::warn;

use super::BackupError;
use super::gather::Gather;
use crate::collect::quarantined_packs;
use crate::format::pack::{PackKind, decode_pack};
use crate::format::run::PackRow;
use crate::id::{ChunkId, IdHash, PackId, RunId};
use crate::index::build::{RunBuilder, describe_pack};
use crate::index::run::Run;
use crate::keys::random;
use crate::pack::buffer::PackBuffer;
use crate::pack::builder::{FinishedPack, PackBuilder, Payload};
use crate::pack::fetch::Fetcher;
use crate::progress::Progress;
use crate::storage::{Object, ObjectKind};

/// Threads that store packs.
const UPLOADS: usize = 2;
/// Finished packs that may wait for one of them.
const QUEUE: usize = 1;
/// Entries kept in memory before a run of them is stored.
const SPILL_ENTRIES: usize = 256 << 10;
const SHARDS: usize = 64;

/// What the threads of a backup share.
pub(crate) struct Shared {
    pub fetcher: Arc<Fetcher>,
    pub progress: Arc<Progress>,
    /// The runs there were when the backup began.
    known: HashSet<RunId>,
    /// Packs of these runs that are not there, or not at that length, or wait for their deletion.
    unfit: HashSet<PackId>,
    /// Packs that were named later, and whether they can be counted on.
    later: RwLock<HashMap<PackId, bool>>,
    /// Ids this backup stores that the index does not know yet.
    claims: Vec<Mutex<HashSet<ChunkId, IdHash>>>,
    ledger: Mutex<RunBuilder>,
    buffers: Mutex<Vec<PackBuffer>>,
    failure: Mutex<Option<BackupError>>,
    failed: AtomicBool,
    stored: AtomicU64,
}

impl Shared {
    pub fn new(fetcher: Arc<Fetcher>, progress: Arc<Progress>) -> io::Result<Shared> {
        fetcher.damaged.load(&*fetcher.storage)?; // what other processes found, and what was put right
        let (known, unfit) = look(&fetcher)?;
        Ok(Shared {
            known,
            unfit,
            later: RwLock::default(),
            fetcher,
            progress,
            claims: (0..SHARDS).map(|_| Mutex::default()).collect(),
            ledger: Mutex::default(),
            buffers: Mutex::default(),
            failure: Mutex::default(),
            failed: AtomicBool::new(false),
            stored: AtomicU64::new(0),
        })
    }

    /// Whether a chunk is in a pack that exists and is not known to be damaged. What other packs held is stored anew
    /// while the source has it.
    pub fn is_stored(&self, id: &ChunkId) -> bool {
        let fit = &mut |run: &Run, pack: &PackId| self.is_fit(run, pack) && !self.fetcher.damaged.contains(pack);
        self.fetcher.index.any(id, fit)
    }

    /// Whether a pack that a run names is there and will stay. One that a later run names is asked for: first whether it
    /// is in quarantine, then whether it is there. When it is not in quarantine, then either it will not be deleted while
    /// this backup has its lease, or it has been already. Without this, an index run that somebody rebuilt from packs
    /// that collect deletes at the same time could be believed.
    fn is_fit(&self, run: &Run, pack: &PackId) -> bool {
        if self.known.contains(&run.id) {
            return !self.unfit.contains(pack);
        }
        if let Some(fit) = self.later.read().unwrap_or_else(PoisonError::into_inner).get(pack) {
            return *fit;
        }
        let fetcher = &self.fetcher;
        let quarantined = quarantined_packs(&*fetcher.storage, fetcher.config.repository);
        let fit =
            quarantined.is_ok_and(|packs| !packs.contains(pack)) && fetcher.storage.len(&Object::Pack(*pack)).is_ok();
        self.later.write().unwrap_or_else(PoisonError::into_inner).insert(*pack, fit);
        fit
    }

    /// Whether no pack is known to be missing, cut, damaged or about to go.
    fn trusts_all(&self) -> bool {
        self.unfit.is_empty() && self.fetcher.damaged.is_empty()
    }

    /// Whether a chunk that is as in the parent need not be looked up.
    pub fn trusts_parent(&self, id: &ChunkId) -> bool {
        self.trusts_all() || self.is_stored(id)
    }

    /// Whether the caller must store this chunk: nobody has, and it is now the caller's.
    pub fn claim(&self, id: &ChunkId) -> bool {
        !self.is_stored(id) && self.take(id)
    }

    /// Whether the caller must store this manifest node. One that is said to be stored is read: a point whose
    /// manifest cannot be read is worth nothing, and there is only one node for every 512 chunks.
    pub fn claim_node(&self, id: &ChunkId, level: u8) -> bool {
        if self.is_stored(id) {
            match self.fetcher.node(id, level) {
                Ok(_) => return false,
                Err(error) => warn!(node = %id, %error, "a stored manifest node cannot be read and is stored anew"),
            }
        }
        self.take(id)
    }

    fn take(&self, id: &ChunkId) -> bool {
        self.claims_of(id).is_some_and(|mut ids| ids.insert(*id))
    }

    fn claims_of(&self, id: &ChunkId) -> Option<std::sync::MutexGuard<'_, HashSet<ChunkId, IdHash>>> {
        let shard = usize::from(*id.0.first()?) % SHARDS;
        self.claims.get(shard).map(|ids| ids.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes the first failure; later ones follow from it.
    pub fn fail(&self, error: BackupError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
        self.failed.store(true, Ordering::Release);
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The failure, if there was one; it stays failed.
    pub fn take_failure(&self) -> Option<BackupError> {
        if !self.has_failed() {
            return None;
        }
        let taken = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        Some(taken.unwrap_or(BackupError::Failed))
    }

    /// Bytes of packs stored so far.
    pub fn stored(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    fn buffer(&self) -> PackBuffer {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Stores a pack, then tells the ledger.
    fn store(&self, pack: FinishedPack) -> Result<(), BackupError> {
        let FinishedPack { bytes, header, frames } = pack;
        let id = PackId(*blake3::hash(&bytes).as_bytes());
        let object = Object::Pack(id);
        // Parse back what was built before it is written.
        let parsed = decode_pack(&bytes).is_ok_and(|parsed| parsed == (header, frames.clone()));
        let len = u32::try_from(bytes.len()).ok().filter(|_| parsed);
        let Some(len) = len else {
            return Err(BackupError::storage(object, io::Error::other("the pack does not read back")));
        };
        self.fetcher.storage.put(&object, &bytes).map_err(|source| BackupError::storage(object, source))?;
        self.stored.fetch_add(u64::from(len), Ordering::Relaxed);
        self.progress.add_stored(u64::from(len));
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
        let (row, entries) = describe_pack(id, &header, len, &frames);
        self.later.write().unwrap_or_else(PoisonError::into_inner).insert(id, true);
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        ledger.add_pack(row, &entries);
        if ledger.len() >= SPILL_ENTRIES {
            let full = std::mem::take(&mut *ledger);
            drop(ledger);
            self.spill(full)?;
        }
        Ok(())
    }

    /// Stores a run of what the ledger held. The index knows the ids before the claims forget them.
    fn spill(&self, entries: RunBuilder) -> Result<(), BackupError> {
        let ids: Vec<ChunkId> = entries.ids().collect();
        self.fetcher.index.add(entries).map_err(BackupError::index)?;
        for id in ids {
            if let Some(mut claims) = self.claims_of(&id) {
                claims.remove(&id);
            }
        }
        Ok(())
    }
}

/// The runs there are, and the packs they name that cannot be counted on. The quarantine is listed before the packs: a
/// pack that left it in between is not listed any more. The runs are taken before both: a pack that a run names was stored
/// before.
fn look(fetcher: &Fetcher) -> io::Result<(HashSet<RunId>, HashSet<PackId>)> {
    let runs = fetcher.index.runs();
    let quarantined = quarantined_packs(&*fetcher.storage, fetcher.config.repository).map_err(io::Error::other)?;
    let listed: HashMap<Object, u64> =
        fetcher.storage.list(ObjectKind::Pack)?.into_iter().map(|listed| (listed.object, listed.len)).collect();
    let there = |row: &PackRow| listed.get(&Object::Pack(row.pack)) == Some(&u64::from(row.len));
    let named = || runs.iter().flat_map(|run| run.packs());
    let lost: HashSet<PackId> = named().filter(|row| !there(row)).map(|row| row.pack).collect();
    if !lost.is_empty() {
        warn!(
            packs = lost.len(),
            "packs are missing or cut: what they held is stored anew where the source still has it"
        );
    }
    let dying = named().map(|row| row.pack).filter(|pack| quarantined.contains(pack));
    let unfit = lost.iter().copied().chain(dying).collect();
    Ok((runs.iter().map(|run| run.id).collect(), unfit))
}

/// Which pack a frame goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// New chunks.
    Data,
    /// New nodes.
    Metadata,
    /// Second copies of chunks.
    Gathered,
}

/// The single writer of a backup: appends frames in the order it is given them.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    data: Option<PackBuilder>,
    metadata: Option<PackBuilder>,
    gathered: Option<PackBuilder>,
    /// Chooses what goes there.
    pub gather: Gather,
    queue: Option<SyncSender<FinishedPack>>,
    uploads: Vec<JoinHandle<()>>,
}

impl Writer {
    /// Starts the upload threads.
    pub fn new(shared: Arc<Shared>) -> Result<Writer, BackupError> {
        let (queue, packs) = sync_channel(QUEUE);
        let packs = Arc::new(Mutex::new(packs));
        let mut writer = Writer {
            shared,
            data: None,
            metadata: None,
            gathered: None,
            gather: Gather::default(),
            queue: Some(queue),
            uploads: Vec::with_capacity(UPLOADS),
        };
        for _ in 0..UPLOADS {
            let (shared, packs) = (writer.shared.clone(), packs.clone());
            let thread = std::thread::Builder::new().name("pack-upload".to_owned());
            let started = thread.spawn(move || upload(&shared, &packs)).map_err(BackupError::Threads)?;
            writer.uploads.push(started);
        }
        Ok(writer)
    }

    /// Appends a frame to a pack.
    pub fn append(&mut self, to: Place, payload: Payload<'_>) -> Result<(), BackupError> {
        let (slot, kind) = match to {
            Place::Data => (&mut self.data, PackKind::Data),
            Place::Metadata => (&mut self.metadata, PackKind::Metadata),
            Place::Gathered => (&mut self.gathered, PackKind::Data),
        };
        if let Some(full) = slot.take_if(|pack| pack.is_full()) {
            send(&self.shared, self.queue.as_ref(), full)?;
        }
        let pack = match slot {
            Some(pack) => pack,
            None => {
                let salt = random().map_err(BackupError::Randomness)?;
                let fetcher = &self.shared.fetcher;
                let buffer = self.shared.buffer();
                let pack = PackBuilder::new(kind, fetcher.config.repository, &fetcher.keyring, salt, buffer);
                slot.insert(if to == Place::Gathered { pack.gathered() } else { pack })
            }
        };
        pack.append(payload).map_err(BackupError::index)
    }

    /// Finishes the packs, waits until they are durable, and stores the index run that names them.
    pub fn finish(mut self) -> Result<(), BackupError> {
        for pack in [self.data.take(), self.metadata.take(), self.gathered.take()]
            .into_iter()
            .flatten()
            .filter(|pack| !pack.is_empty())
        {
            send(&self.shared, self.queue.as_ref(), pack)?;
        }
        self.join();
        if let Some(failure) = self.shared.take_failure() {
            return Err(failure);
        }
        let ledger = std::mem::take(&mut *self.shared.ledger.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.spill(ledger)
    }

    fn join(&mut self) {
        self.queue = None;
        for upload in self.uploads.drain(..) {
            if upload.join().is_err() {
                self.shared.fail(BackupError::Failed);
            }
        }
    }
}

impl Drop for Writer {
    /// Without [`Writer::finish`] what is not stored yet is dropped.
    fn drop(&mut self) {
        if self.queue.is_some() {
            self.shared.fail(BackupError::Failed);
        }
        self.join();
    }
}

fn send(shared: &Shared, queue: Option<&SyncSender<FinishedPack>>, pack: PackBuilder) -> Result<(), BackupError> {
    let pack = pack.finish().map_err(BackupError::index)?;
    match queue.map(|queue| queue.send(pack)) {
        Some(Ok(())) if !shared.has_failed() => Ok(()),
        _ => Err(shared.take_failure().unwrap_or(BackupError::Failed)),
    }
}

fn upload(shared: &Shared, packs: &Mutex<Receiver<FinishedPack>>) {
    loop {
        let next = packs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(pack) = next else { return };
        if shared.has_failed() {
            continue; // drains the queue, so that the sender never waits for nobody
        }
        if let Err(error) = shared.store(pack) {
            shared.fail(error);
        }
    }
}
