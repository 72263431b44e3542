//! Errors of reading what the store keeps. Other areas keep their errors beside their code.

use std::io;

use crate::format::FormatError;
use crate::id::{ChunkId, PackId, RecoveryPointId};
use crate::storage::Object;

/// Why stored data could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Storage failed.
    #[error("cannot read {object}")]
    Io {
        /// What was read.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// An object is not what it was when it was written.
    #[error("{object} is damaged")]
    Damaged {
        /// Which object.
        object: Object,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A chunk's frame is not what it was when it was written; no other copy of it is readable.
    #[error("chunk {chunk} in pack {pack} is damaged")]
    CorruptChunk {
        /// The pack.
        pack: PackId,
        /// The chunk or manifest node.
        chunk: ChunkId,
    },
    /// No pack holds a chunk.
    #[error("chunk {chunk} is in no pack")]
    MissingChunk {
        /// The chunk or manifest node.
        chunk: ChunkId,
    },
    /// There is no such recovery point.
    #[error("there is no recovery point {point}")]
    NoSuchPoint {
        /// The id asked for.
        point: RecoveryPointId,
    },
    /// The recovery point has no disk of this name.
    #[error("the recovery point has no disk {disk:?}")]
    NoSuchDisk {
        /// The name asked for.
        disk: String,
    },
    /// A range reaches past the end of the disk.
    #[error("{length} bytes at offset {offset} reach past the end of the disk")]
    OutOfRange {
        /// Where the range begins.
        offset: u64,
        /// Its length.
        length: u64,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl ReadError {
    pub(crate) fn io(object: &Object, source: io::Error) -> ReadError {
        ReadError::Io { object: object.to_string(), source }
    }
}
