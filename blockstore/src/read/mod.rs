//! Reading disks of recovery points: manifests, the chunk cache, read-ahead, and [`PointDisk`].

mod ahead;
mod cache;
mod disk;
mod locality;
mod manifest;

#[cfg(test)]
mod tests;

pub use cache::CacheUse;
pub use disk::PointDisk;
pub use locality::Locality;
pub(crate) use locality::locality;
pub(crate) use manifest::ManifestReader;

use std::sync::Arc;

use crate::pack::fetch::Fetcher;
use ahead::Pool;
use cache::{ChunkCache, NodeCache};

/// What all disks of an open repository share.
#[derive(Debug)]
pub(crate) struct ReadShared {
    pub fetcher: Arc<Fetcher>,
    pub cache: ChunkCache,
    nodes: NodeCache,
    pool: Pool,
}

impl ReadShared {
    /// Caches of `cache_bytes` altogether; 0 turns the chunk cache off.
    pub fn new(fetcher: Arc<Fetcher>, cache_bytes: u64) -> ReadShared {
        let chunk_size = u64::from(fetcher.config.chunk_size);
        ReadShared {
            fetcher,
            cache: ChunkCache::new(cache_bytes, chunk_size),
            nodes: NodeCache::new(cache_bytes),
            pool: Pool::default(),
        }
    }
}
