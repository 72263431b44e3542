//! Errors of reading what the store keeps. Other areas keep their errors beside their code.

use std::io;

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
}
