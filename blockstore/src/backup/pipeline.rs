//! The capture of one disk: all cores read, hash and compress; one thread packs, in disk order.
//!
//! ```text
//! dispenser (mutex)    -> workers: read, hash, compare, compress -> window (ordered, bounded) -> packer
//! units of about 1 MiB                                                                           writer, tree
//! ```
//! Memory is bounded by the window: a worker takes a unit only while the packer is less than [`Window::len`] behind.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::warn;

use super::compare::Sample;
use super::source::Source;
use super::writer::{Place, Shared, Writer};
use super::{BackupError, DiskStats};
use crate::error::ReadError;
use crate::id::ChunkId;
use crate::manifest::{FAN_OUT, NODE_LEN, Node, Shape, TreeBuilder};
use crate::pack::builder::{Compressor, Payload};
use crate::read::ManifestReader;

/// A unit of work reads about this much.
const UNIT_BYTES: u64 = 1 << 20;
/// How long the packer waits before it looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(100);

/// What a disk is captured with.
pub(super) struct Capture<'a> {
    pub name: &'a str,
    pub source: &'a dyn Source,
    pub size: u64,
    pub shape: Shape,
    pub parent: Option<&'a ManifestReader>,
    /// Whether the parent's tree has the same shape, so that parts of it can be taken over.
    pub comparable: bool,
    pub shared: &'a Shared,
}

/// Consecutive chunks.
struct Unit {
    number: u64,
    chunks: Range<u64>,
    kind: Kind,
}

enum Kind {
    /// To be read. The parent's leaf covers them.
    Data(Node),
    /// Known to be a hole.
    Hole,
    /// As in the parent, whose subtrees these are, by their level: [`TreeBuilder::push_at`].
    Same(Vec<(u8, ChunkId)>),
}

/// What became of a chunk.
enum Captured {
    Zero,
    Known(ChunkId),
    New { id: ChunkId, payload: Range<usize>, compressed: bool },
}

struct Done {
    /// The number of the first chunk.
    first: u64,
    chunks: Vec<Captured>,
    zeroes: u64,
    same: Vec<(u8, ChunkId)>,
    payloads: Vec<u8>,
    unchanged: u64,
    read: u64,
}

struct Dispenser {
    number: u64,
    chunk: u64,
    /// The data range found last, in bytes.
    data: Option<Range<u64>>,
    /// The range found last that may differ from the parent, in bytes.
    change: Range<u64>,
    leaf: Option<(u64, Node)>,
    /// The parent's manifest turned out to be unreadable.
    parent_lost: bool,
}

struct Order {
    done: BTreeMap<u64, Done>,
    /// The unit the packer wants next.
    next: u64,
    /// How many units there are, once known.
    units: Option<u64>,
    buffers: Vec<Vec<u8>>,
}

struct Window {
    order: Mutex<Order>,
    changed: Condvar,
    len: u64,
}

impl Window {
    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, order: MutexGuard<'a, Order>) -> MutexGuard<'a, Order> {
        self.changed.wait_timeout(order, TICK).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Capture<'_> {
    /// Captures the disk and returns its root.
    pub fn run(&self, writer: &mut Writer, sample: &mut Sample) -> Result<(ChunkId, DiskStats), BackupError> {
        let workers = thread::available_parallelism().map_or(2, |cores| cores.get().min(32));
        let dispenser =
            Mutex::new(Dispenser { number: 0, chunk: 0, data: None, change: 0..0, leaf: None, parent_lost: false });
        let window = Window {
            order: Mutex::new(Order { done: BTreeMap::new(), next: 0, units: None, buffers: Vec::new() }),
            changed: Condvar::new(),
            len: workers as u64 * 3 + 2,
        };
        thread::scope(|scope| {
            for _ in 0..workers {
                let worker = thread::Builder::new().name("capture".to_owned());
                let started = worker.spawn_scoped(scope, || {
                    let _bell = Bell { shared: self.shared, window: &window };
                    if let Err(error) = self.work(&dispenser, &window) {
                        self.shared.fail(error);
                    }
                });
                if let Err(error) = started {
                    self.shared.fail(BackupError::Threads(error));
                    break;
                }
            }
            let packed = self.pack(&window, writer, sample);
            if let Err(error) = packed {
                self.shared.fail(error);
                window.changed.notify_all();
                return Err(self.shared.take_failure().unwrap_or(BackupError::Failed));
            }
            packed
        })
    }

    fn stopped(&self) -> bool {
        self.shared.has_failed() || self.shared.progress.is_cancelled()
    }

    fn chunk_size(&self) -> u64 {
        u64::from(self.shared.fetcher.config.chunk_size)
    }

    fn work(&self, dispenser: &Mutex<Dispenser>, window: &Window) -> Result<(), BackupError> {
        let mut compressor = Compressor::new().map_err(BackupError::Threads)?;
        let mut plain = Vec::new();
        while !self.stopped() {
            let unit = {
                let mut dispenser = dispenser.lock().unwrap_or_else(PoisonError::into_inner);
                let mut order = window.lock();
                while dispenser.number >= order.next + window.len && !self.stopped() {
                    order = window.wait(order);
                }
                drop(order);
                if self.stopped() {
                    return Ok(());
                }
                self.dispense(&mut dispenser)?
            };
            let Some(unit) = unit else {
                let units = dispenser.lock().unwrap_or_else(PoisonError::into_inner).number;
                window.lock().units = Some(units);
                window.changed.notify_all();
                return Ok(());
            };
            let buffer = window.lock().buffers.pop().unwrap_or_default();
            let number = unit.number;
            let done = self.capture(unit, &mut plain, buffer, &mut compressor)?;
            window.lock().done.insert(number, done);
            window.changed.notify_all();
        }
        Ok(())
    }

    /// The next unit; it never crosses a leaf of the manifest. None at the end of the disk.
    fn dispense(&self, at: &mut Dispenser) -> Result<Option<Unit>, BackupError> {
        if at.chunk >= self.shape.chunks || self.size == 0 {
            return Ok(None);
        }
        if let Some(unit) = self.dispense_same(at)? {
            return Ok(Some(unit));
        }
        let size = self.chunk_size();
        let offset = at.chunk * size;
        let stale = at.data.as_ref().is_none_or(|data| data.end <= offset);
        if stale {
            let error = |source| BackupError::Source { disk: self.name.to_owned(), offset, source };
            let found = self.source.next_data(offset).map_err(error)?;
            let data = match found {
                Some(range) => range.start.max(offset)..range.end.min(self.size),
                None => self.size..u64::MAX, // a hole to the end
            };
            if data.start >= data.end {
                return Err(error(io::Error::new(io::ErrorKind::InvalidData, "the source names an empty data range")));
            }
            at.data = Some(data);
        }
        let data = at.data.clone().unwrap_or(0..self.size);
        let first_data = (data.start / size).clamp(at.chunk, self.shape.chunks);
        let number = at.number;
        at.number += 1;
        let start = at.chunk;
        if first_data > start || data.start >= self.size {
            // At the end of the disk a hole may end inside the last chunk.
            let end = if data.start >= self.size { self.shape.chunks } else { first_data };
            at.chunk = end;
            return Ok(Some(Unit { number, chunks: start..end, kind: Kind::Hole }));
        }
        let data_end = data.end.div_ceil(size).min(self.shape.chunks);
        let leaf_end = (start / FAN_OUT + 1) * FAN_OUT;
        let data_end = data_end.min(at.change.end.div_ceil(size));
        let end = data_end.min(leaf_end).min(start + (UNIT_BYTES / size).max(1));
        at.chunk = end;
        let leaf = self.parent_leaf(at, start / FAN_OUT);
        Ok(Some(Unit { number, chunks: start..end, kind: Kind::Data(leaf) }))
    }

    /// The chunks up to the next that may differ from the parent; none if that is the next one.
    fn dispense_same(&self, at: &mut Dispenser) -> Result<Option<Unit>, BackupError> {
        let Some(parent) = self.parent.filter(|_| self.comparable && !at.parent_lost) else {
            at.change = 0..u64::MAX;
            return Ok(None);
        };
        let size = self.chunk_size();
        let offset = at.chunk * size;
        if at.change.end <= offset {
            let error = |source| BackupError::Source { disk: self.name.to_owned(), offset, source };
            let found = self.source.next_change(offset).map_err(error)?;
            at.change = found.map_or(self.size..u64::MAX, |found| found.start.max(offset)..found.end);
            if at.change.is_empty() {
                return Err(error(io::Error::new(io::ErrorKind::InvalidData, "the source names an empty change")));
            }
        }
        let end = if at.change.start >= self.size { self.shape.chunks } else { at.change.start / size };
        if end <= at.chunk {
            return Ok(None);
        }
        let chunks = at.chunk..end;
        match parent.subtrees(chunks.clone()) {
            Ok(subtrees) => {
                let number = at.number;
                at.number += 1;
                at.chunk = end;
                Ok(Some(Unit { number, chunks, kind: Kind::Same(subtrees) }))
            }
            Err(error) => {
                self.lose_parent(at, &error);
                at.change = 0..u64::MAX;
                Ok(None)
            }
        }
    }

    fn lose_parent(&self, at: &mut Dispenser, error: &ReadError) {
        warn!(disk = self.name, %error, "the parent cannot be read, the backup goes on without it");
        at.parent_lost = true;
    }

    /// The parent's leaf; zero once the parent cannot be read, so that everything is looked up in the index.
    fn parent_leaf(&self, at: &mut Dispenser, leaf: u64) -> Node {
        let Some(parent) = self.parent.filter(|_| !at.parent_lost) else { return Node::ZERO };
        if let Some((known, node)) = &at.leaf
            && *known == leaf
        {
            return node.clone();
        }
        match parent.leaf(leaf) {
            Ok(node) => {
                at.leaf = Some((leaf, node.clone()));
                node
            }
            Err(error) => {
                self.lose_parent(at, &error);
                Node::ZERO
            }
        }
    }

    fn capture(
        &self,
        unit: Unit,
        plain: &mut Vec<u8>,
        mut payloads: Vec<u8>,
        compressor: &mut Compressor,
    ) -> Result<Done, BackupError> {
        payloads.clear();
        let count = unit.chunks.end - unit.chunks.start;
        let first = unit.chunks.start;
        let none = Done {
            first,
            chunks: Vec::new(),
            zeroes: 0,
            same: Vec::new(),
            payloads: Vec::new(),
            unchanged: 0,
            read: 0,
        };
        let leaf = match unit.kind {
            Kind::Hole => return Ok(Done { zeroes: count, payloads, ..none }),
            Kind::Same(same) => return Ok(Done { same, unchanged: count, payloads, ..none }),
            Kind::Data(leaf) => leaf,
        };
        let size = self.chunk_size();
        let offset = unit.chunks.start * size;
        let len = count * size; // bounded: a unit, or one chunk
        let real = len.min(self.size - offset);
        let to_usize = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX); // below 5 MiB
        plain.resize(to_usize(len), 0);
        let (target, padding) = plain.split_at_mut(to_usize(real));
        padding.fill(0); // the last chunk is padded with zeroes
        self.source.read_at(offset, target).map_err(|source| BackupError::Source {
            disk: self.name.to_owned(),
            offset,
            source,
        })?;
        let mut done = Done {
            first: unit.chunks.start,
            chunks: Vec::with_capacity(to_usize(count)),
            zeroes: 0,
            same: Vec::new(),
            payloads,
            unchanged: 0,
            read: real,
        };
        for (number, chunk) in unit.chunks.clone().zip(plain.chunks_exact(to_usize(size))) {
            let captured = if is_zero(chunk) {
                Captured::Zero
            } else {
                let id = self.shared.fetcher.keyring.chunk_id(chunk);
                if leaf.child(number) == id && self.shared.trusts_parent(&id) {
                    done.unchanged += 1;
                    Captured::Known(id)
                } else if self.shared.claim(&id) {
                    let (bytes, compressed) = compressor.compress(chunk);
                    let start = done.payloads.len();
                    done.payloads.extend_from_slice(bytes);
                    Captured::New { id, payload: start..done.payloads.len(), compressed }
                } else {
                    Captured::Known(id)
                }
            };
            done.chunks.push(captured);
        }
        Ok(done)
    }

    /// Takes the units in order, appends what is new and builds the tree.
    fn pack(
        &self,
        window: &Window,
        writer: &mut Writer,
        sample: &mut Sample,
    ) -> Result<(ChunkId, DiskStats), BackupError> {
        let mut tree = TreeBuilder::new(self.shape);
        let mut stats = DiskStats::default();
        loop {
            let done = {
                let mut order = window.lock();
                loop {
                    if self.shared.progress.is_cancelled() {
                        return Err(BackupError::Cancelled);
                    }
                    if let Some(failure) = self.shared.take_failure() {
                        return Err(failure);
                    }
                    let next = order.next;
                    if let Some(done) = order.done.remove(&next) {
                        order.next += 1;
                        break Some(done);
                    }
                    if order.units == Some(next) {
                        break None;
                    }
                    order = window.wait(order);
                }
            };
            window.changed.notify_all();
            let Some(done) = done else { break };
            let first = done.first;
            (first..).zip(&done.chunks).for_each(|(chunk, _)| sample.offer(chunk));
            sample.offer_hole(first, done.zeroes);
            let payloads = self.pack_unit(done, &mut tree, writer, &mut stats)?;
            window.lock().buffers.push(payloads);
        }
        let root = tree.finish(&mut |level, node| self.store_node(writer, &mut stats, level, node))?;
        Ok((root, stats))
    }

    fn pack_unit(
        &self,
        done: Done,
        tree: &mut TreeBuilder,
        writer: &mut Writer,
        stats: &mut DiskStats,
    ) -> Result<Vec<u8>, BackupError> {
        let progress = &self.shared.progress;
        let chunk_size = self.shared.fetcher.config.chunk_size;
        stats.read += done.read;
        stats.unchanged_chunks += done.unchanged;
        progress.add_read(done.read);
        let taken_over = if done.same.is_empty() { 0 } else { done.unchanged };
        progress.add_done(((done.zeroes + taken_over) * self.chunk_size()).max(done.read));
        let store = |level: u8, node: &[u8], writer: &mut Writer, stats: &mut DiskStats| {
            self.store_node(writer, stats, level, node)
        };
        if done.zeroes > 0 {
            tree.push_zeroes(done.zeroes, &mut |level, node| store(level, node, writer, stats))?;
        }
        for (level, id) in done.same {
            tree.push_at(level, &id, &mut |level, node| store(level, node, writer, stats))?;
        }
        for chunk in done.chunks {
            let id = match chunk {
                Captured::Zero => ChunkId::ZERO,
                Captured::Known(id) => id,
                Captured::New { id, payload, compressed } => {
                    let bytes = done.payloads.get(payload).unwrap_or_default();
                    let payload = Payload { id, bytes, plain_len: chunk_size, compressed, level: 0 };
                    writer.append(Place::Data, payload)?;
                    stats.new_chunks += 1;
                    stats.new_bytes += u64::from(chunk_size);
                    progress.add_new_chunks(1);
                    progress.add_new_bytes(u64::from(chunk_size));
                    id
                }
            };
            tree.push(&id, &mut |level, node| store(level, node, writer, stats))?;
        }
        Ok(done.payloads)
    }

    fn store_node(
        &self,
        writer: &mut Writer,
        stats: &mut DiskStats,
        level: u8,
        node: &[u8],
    ) -> Result<ChunkId, BackupError> {
        let id = self.shared.fetcher.keyring.node_id(level, node);
        let new = self.shared.claim_node(&id, level);
        if new {
            let mut compressor = Compressor::new().map_err(BackupError::Threads)?;
            let (bytes, compressed) = compressor.compress(node);
            let payload = Payload { id, bytes, plain_len: NODE_LEN, compressed, level };
            writer.append(Place::Metadata, payload)?;
            stats.new_nodes += 1;
        }
        if level == 0 {
            let (ids, _) = node.as_chunks::<32>();
            let ids = ids.iter().map(|id| ChunkId(*id));
            if new {
                self.gather(&ids.collect::<Vec<_>>(), writer, stats)?;
            } else {
                writer.gather.pass(ids, self.chunk_size());
            }
        }
        Ok(id)
    }

    /// Stores chunks of a new region once more that are scattered over too many packs. One that cannot be read is
    /// left where it is.
    fn gather(&self, region: &[ChunkId], writer: &mut Writer, stats: &mut DiskStats) -> Result<(), BackupError> {
        let fetcher = &self.shared.fetcher;
        let chosen = writer.gather.choose(region, self.chunk_size(), &fetcher.index);
        if chosen.is_empty() {
            return Ok(());
        }
        let mut compressor = Compressor::new().map_err(BackupError::Threads)?;
        for (id, chunk) in chosen.iter().zip(fetcher.chunks(&chosen)) {
            let Ok(chunk) = chunk.inspect_err(|error| warn!(chunk = %id, %error, "a stored chunk cannot be read"))
            else {
                continue;
            };
            let (bytes, compressed) = compressor.compress(&chunk);
            let plain_len = fetcher.config.chunk_size;
            writer.append(Place::Gathered, Payload { id: *id, bytes, plain_len, compressed, level: 0 })?;
            stats.gathered_chunks += 1;
        }
        Ok(())
    }
}

/// Wakes everybody when a worker ends, and notes its panic.
struct Bell<'a> {
    shared: &'a Shared,
    window: &'a Window,
}

impl Drop for Bell<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.shared.fail(BackupError::Failed);
        }
        self.window.changed.notify_all();
    }
}

/// Compares with zeroes; `memcmp` is fast at any optimisation level.
fn is_zero(chunk: &[u8]) -> bool {
    static ZEROES: [u8; 16 << 10] = [0; 16 << 10];
    chunk.chunks(ZEROES.len()).all(|part| ZEROES.get(..part.len()) == Some(part))
}
