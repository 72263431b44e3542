//! The chunk cache (shared by all disks of a repository, bounded in bytes, one fetch per missing chunk) and the cache
//! of manifest nodes.

use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quick_cache::sync::{Cache, GuardResult};
use quick_cache::{DefaultHashBuilder, Weighter};

use crate::error::ReadError;
use crate::id::{ChunkId, IdHash};
use crate::manifest::Node;
use crate::pack::fetch::{Fetcher, READ_MAX};

/// What a cached chunk costs besides its bytes.
const CHUNK_OVERHEAD: u64 = 128;
/// The node cache takes this share of the memory, within bounds.
const NODE_SHARE: u64 = 8;
const NODE_BYTES_MIN: u64 = 4 << 20;
const NODE_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug, Clone)]
struct ByBytes;

impl Weighter<ChunkId, Bytes> for ByBytes {
    fn weight(&self, _: &ChunkId, chunk: &Bytes) -> u64 {
        chunk.len() as u64 + CHUNK_OVERHEAD
    }
}

impl Weighter<NodeKey, Node> for ByBytes {
    fn weight(&self, _: &NodeKey, node: &Node) -> u64 {
        node.weight() + CHUNK_OVERHEAD
    }
}

/// Decoded chunks by id.
#[derive(Debug)]
pub(crate) struct ChunkCache {
    chunks: Cache<ChunkId, Bytes, ByBytes, IdHash>,
    fetched: AtomicU64,
}

/// How a chunk cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheUse {
    /// Bytes there is room for.
    pub capacity: u64,
    /// Bytes in use.
    pub used: u64,
    /// Chunks that were not there when they were wanted, since the repository was opened.
    pub fetched: u64,
}

impl ChunkCache {
    pub fn new(bytes: u64, chunk_size: u64) -> ChunkCache {
        let items = usize::try_from(bytes / chunk_size).unwrap_or(usize::MAX).clamp(16, 1 << 24);
        let chunks = Cache::with(items, bytes, ByBytes, IdHash::default(), Default::default());
        ChunkCache { chunks, fetched: AtomicU64::new(0) }
    }

    /// How many bytes there is room for.
    pub fn capacity(&self) -> u64 {
        self.chunks.capacity()
    }

    /// How it is used.
    pub fn usage(&self) -> CacheUse {
        let fetched = self.fetched.load(Ordering::Relaxed);
        CacheUse { capacity: self.chunks.capacity(), used: self.chunks.weight(), fetched }
    }

    /// Whether reading ahead makes sense: what is read must still be there when it is wanted.
    pub fn holds(&self, bytes: u64) -> bool {
        self.chunks.capacity() >= bytes
    }

    pub fn get(&self, id: &ChunkId) -> Option<Bytes> {
        self.chunks.get(id)
    }

    pub fn contains(&self, id: &ChunkId) -> bool {
        self.chunks.contains_key(id)
    }

    /// The chunks of `ids` in order, none of them zero, from the cache or fetched; neighbours are fetched together.
    /// A chunk somebody else fetches is waited for, but never while others wait for us.
    pub fn get_or_fetch(&self, ids: &[ChunkId], fetcher: &Fetcher, out: &mut Vec<Bytes>) -> Result<(), ReadError> {
        let mut at = 0;
        while let Some(id) = ids.get(at) {
            match self.chunks.get_value_or_guard(id, None) {
                GuardResult::Value(chunk) => {
                    out.push(chunk);
                    at += 1;
                }
                GuardResult::Guard(first) => {
                    let mut guards = vec![first];
                    let room = (READ_MAX / fetcher.config.chunk_size).max(1) as usize;
                    for id in ids.iter().skip(at + 1).take(room - 1) {
                        // No waiting while holding guards: two readers could wait for each other.
                        match self.chunks.get_value_or_guard(id, Some(Duration::ZERO)) {
                            GuardResult::Guard(guard) => guards.push(guard),
                            GuardResult::Value(_) | GuardResult::Timeout => break,
                        }
                    }
                    let missing = ids.get(at..at + guards.len()).unwrap_or_default();
                    at += guards.len();
                    self.fetched.fetch_add(guards.len() as u64, Ordering::Relaxed);
                    for (fetched, guard) in fetcher.chunks(missing).into_iter().zip(guards) {
                        let chunk = fetched?; // the other guards are dropped: whoever waits fetches for himself
                        let _ = guard.insert(chunk.clone()); // fails only if the entry was removed meanwhile
                        out.push(chunk);
                    }
                }
                // Without a time limit there is no timeout; fetching alone is right all the same.
                GuardResult::Timeout => {
                    self.fetched.fetch_add(1, Ordering::Relaxed);
                    out.push(fetcher.chunk(id)?);
                    at += 1;
                }
            }
        }
        Ok(())
    }
}

/// A node by its place in the tree of a root: disks that are the same share their nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeKey {
    pub root: ChunkId,
    pub level: u8,
    pub index: u64,
}

impl Hash for NodeKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Of the root, a hash already, a part is enough; all of it is compared.
        (self.root.prefix(), self.level, self.index).hash(state);
    }
}

/// Decoded manifest nodes.
#[derive(Debug)]
pub(crate) struct NodeCache {
    nodes: Cache<NodeKey, Node, ByBytes>,
}

impl NodeCache {
    pub fn new(cache_bytes: u64) -> NodeCache {
        let bytes = (cache_bytes / NODE_SHARE).clamp(NODE_BYTES_MIN, NODE_BYTES_MAX);
        let items = usize::try_from(bytes >> 14).unwrap_or(usize::MAX);
        NodeCache { nodes: Cache::with(items, bytes, ByBytes, DefaultHashBuilder::default(), Default::default()) }
    }

    pub fn get(&self, key: &NodeKey) -> Option<Node> {
        self.nodes.get(key)
    }

    pub fn get_or_load(&self, key: NodeKey, load: impl FnOnce() -> Result<Node, ReadError>) -> Result<Node, ReadError> {
        self.nodes.get_or_insert_with(&key, load)
    }
}
