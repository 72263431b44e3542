//! [`ManifestReader`]: the leaves of one disk's tree, loaded when they are wanted.

use std::ops::Range;
use std::sync::Arc;

use super::ReadShared;
use super::cache::NodeKey;
use crate::error::ReadError;
use crate::id::ChunkId;
use crate::manifest::{FAN_OUT, Node, Shape};
use crate::point::PointedDisk;

/// A disk's manifest. Opening it reads nothing.
#[derive(Debug)]
pub(crate) struct ManifestReader {
    shared: Arc<ReadShared>,
    root: ChunkId,
    shape: Shape,
}

impl ManifestReader {
    pub fn new(shared: Arc<ReadShared>, disk: &PointedDisk) -> Result<ManifestReader, ReadError> {
        let shape = Shape::of(disk.size, disk.chunk_size);
        let shape = shape.ok_or(ReadError::OutOfRange { offset: 0, length: disk.size })?;
        Ok(ManifestReader { shared, root: disk.root, shape })
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The leaf that covers chunks `512 * leaf ..`; one beyond the end of the disk is zero.
    pub fn leaf(&self, leaf: u64) -> Result<Node, ReadError> {
        if leaf >= self.shape.chunks.div_ceil(FAN_OUT) {
            return Ok(Node::ZERO);
        }
        self.node(0, leaf)
    }

    /// A leaf if it is in memory.
    pub fn resident_leaf(&self, leaf: u64) -> Option<Node> {
        if self.root.is_zero() {
            return Some(Node::ZERO);
        }
        self.shared.nodes.get(&NodeKey { root: self.root, level: 0, index: leaf })
    }

    /// A subtree that is zero spans this many leaves from `leaf`, at least; 0 if the leaf holds data.
    pub fn zero_leaves(&self, leaf: u64) -> Result<u64, ReadError> {
        let mut level = self.shape.levels - 1;
        loop {
            // Leaves below a node of this level.
            let span = Shape::span(level) / FAN_OUT;
            let node = self.node(level, leaf / span)?;
            if node.is_zero() {
                return Ok(span - leaf % span);
            }
            if level == 0 {
                return Ok(0);
            }
            level -= 1;
        }
    }

    /// The largest subtrees that make up a range of chunks, each with the level of the node that names it; none of them
    /// is the whole tree. Reads only what lies above them.
    pub fn subtrees(&self, chunks: Range<u64>) -> Result<Vec<(u8, ChunkId)>, ReadError> {
        let mut found = Vec::new();
        let mut chunk = chunks.start;
        while chunk < chunks.end {
            // A subtree named on this level has so many chunks; the last one of a tree may have fewer.
            let mut level = 0;
            let mut span = 1;
            let whole = |span: u64| chunk.is_multiple_of(span) && (chunk + span).min(self.shape.chunks) <= chunks.end;
            while level + 1 < self.shape.levels && whole(span * FAN_OUT) {
                level += 1;
                span *= FAN_OUT;
            }
            found.push((level, self.node(level, chunk / Shape::span(level))?.child(chunk / span)));
            chunk += span;
        }
        Ok(found)
    }

    fn node(&self, level: u8, index: u64) -> Result<Node, ReadError> {
        let key = NodeKey { root: self.root, level, index };
        self.shared.nodes.get_or_load(key, || {
            let id = if level + 1 == self.shape.levels {
                self.root
            } else {
                self.node(level + 1, index / FAN_OUT)?.child(index) // at most 7 levels deep
            };
            self.shared.fetcher.node(&id, level)
        })
    }
}
