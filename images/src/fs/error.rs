//! Why an object of a file system cannot be read.

use std::fmt::Display;
use std::io;

/// Why an object of a file system cannot be read. Other objects may well be readable.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// What is stored makes no sense.
    #[error("{object} is damaged: {reason}")]
    Damaged {
        /// What was read.
        object: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// It uses something that is not read here.
    #[error("{object} cannot be read: {reason}")]
    Unsupported {
        /// What was read.
        object: String,
        /// What is in the way.
        reason: &'static str,
    },
    /// A path leads nowhere.
    #[error("there is no {path}")]
    NotFound {
        /// As far as it was followed.
        path: String,
    },
    /// A path goes on behind something that is no directory.
    #[error("{path} is not a directory")]
    NotADirectory {
        /// What it is that is not.
        path: String,
    },
    /// Symbolic links lead in circles, or directories hold themselves.
    #[error("{path} leads in circles")]
    Loop {
        /// Where it began.
        path: String,
    },
    /// The disk cannot be read.
    #[error("cannot read {object}")]
    Io {
        /// What was read.
        object: String,
        /// Why.
        source: io::Error,
    },
}

impl FsError {
    /// Something makes no sense.
    pub(crate) fn damaged(object: &dyn Display, reason: &'static str) -> FsError {
        FsError::Damaged { object: object.to_string(), reason }
    }

    /// Something is not read here.
    pub(crate) fn unsupported(object: &dyn Display, reason: &'static str) -> FsError {
        FsError::Unsupported { object: object.to_string(), reason }
    }
}

impl From<FsError> for io::Error {
    fn from(error: FsError) -> io::Error {
        match error {
            FsError::NotFound { .. } => io::Error::new(io::ErrorKind::NotFound, error),
            FsError::NotADirectory { .. } => io::Error::new(io::ErrorKind::NotADirectory, error),
            FsError::Io { ref source, .. } => io::Error::new(source.kind(), error),
            error => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}
