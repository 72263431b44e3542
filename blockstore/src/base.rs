//! [`Base`]: the read-only side of a disk, below an overlay.

use std::fmt::Debug;

use bytes::Bytes;

use crate::error::ReadError;

/// A part of what a read returns; segments stand in order and cover exactly what was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Bytes as they are.
    Data(Bytes),
    /// This many zero bytes that nothing stores.
    Hole(u64),
}

/// What a range holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub length: u64,
    /// Whether it is a hole (reads as zeroes, takes no space) or data.
    pub hole: bool,
}

/// A disk's content that never changes.
pub trait Base: Send + Sync + Debug {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Appends the segments of a range if they are in memory, else leaves `out` as it was and returns false.
    fn read_resident(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> bool;

    /// Appends the segments of a range that lies inside the disk. May block.
    fn read(&self, offset: u64, length: u64, out: &mut Vec<Segment>) -> Result<(), ReadError>;

    /// Consecutive extents from `offset`, at most `limit`, covering at least one byte and at most `length`.
    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ReadError>;
}
