//! Why an overlay refuses or fails, and who it belongs to.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::ReadError;

/// What an overlay belongs to. Its grains mean nothing over another base, so it is bound into the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayIdentity {
    /// The recovery point below.
    pub point: [u8; 32],
    /// Which disk of it.
    pub disk: String,
    /// The disk's size in bytes.
    pub size: u64,
}

impl fmt::Display for OverlayIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {:?} of {} bytes, recovery point ", self.disk, self.size)?;
        self.point.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What is wrong with a file of an overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It is shorter than it ever was.
    #[error("it is too short")]
    TooShort,
    /// It does not begin as it must.
    #[error("its magic is wrong")]
    Magic,
    /// Its content and checksum differ.
    #[error("its checksum is wrong")]
    Checksum,
    /// A field that the checksum vouches for makes no sense.
    #[error("a field is out of its range")]
    Field,
    /// Batch `sequence` is not valid although a later flush proves that it was durable.
    #[error("batch {sequence} is damaged, and later ones stand behind it")]
    Batch {
        /// Its number.
        sequence: u64,
    },
    /// The file is not there.
    #[error("it is missing")]
    Missing,
}

/// Why an operation on an overlay failed.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// No room for a write, or for the journal. Nothing is lost or poisoned: try again when there is room.
    #[error("no space left for overlay {}", dir.display())]
    NoSpace {
        /// The overlay.
        dir: PathBuf,
    },
    /// An earlier write or sync failed, so nobody knows what is durable. Reads work; opening again leads on.
    #[error("overlay {} failed earlier and takes no more writes until it is opened again", dir.display())]
    Poisoned {
        /// The overlay.
        dir: PathBuf,
    },
    /// The base below could not be read.
    #[error("cannot read the recovery point below the overlay")]
    Base(#[from] ReadError),
    /// Storage failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: Action,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("overlay {} is in use", dir.display())]
    Busy {
        /// The overlay.
        dir: PathBuf,
    },
    /// There is no overlay in this folder.
    #[error("there is no overlay in {}", dir.display())]
    Missing {
        /// The folder.
        dir: PathBuf,
    },
    /// There is one already.
    #[error("there is an overlay in {} already", dir.display())]
    Exists {
        /// The folder.
        dir: PathBuf,
    },
    /// It belongs to something else.
    #[error("overlay {} belongs to {found}, not to {expected}", dir.display())]
    Mismatch {
        /// The overlay.
        dir: PathBuf,
        /// What its journal names.
        found: Box<OverlayIdentity>,
        /// What the opener named.
        expected: Box<OverlayIdentity>,
    },
    /// The base does not have the size that the identity names.
    #[error("the recovery point below has {base} bytes where the overlay expects {expected}")]
    BaseSize {
        /// The base's size.
        base: u64,
        /// The identity's.
        expected: u64,
    },
    /// The name of the disk, or its size, is beyond what the format holds.
    #[error("disk name or size is beyond what an overlay holds")]
    Limits,
    /// The journal uses features this version does not know.
    #[error("{} needs features {bits:#x}, which this version does not know", path.display())]
    Unsupported {
        /// The journal.
        path: PathBuf,
        /// The unknown bits.
        bits: u32,
    },
    /// What is stored is not what was written.
    #[error("{} is damaged at offset {offset}: {damage}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How.
        damage: Damage,
    },
    /// The range does not lie inside the disk.
    #[error("{length} bytes at offset {offset} are not inside a disk of {size} bytes")]
    OutOfRange {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u64,
        /// The disk's size.
        size: u64,
    },
}

/// What was tried when storage failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Creating a file or folder.
    Create,
    /// Opening a file.
    Open,
    /// Reading.
    Read,
    /// Writing, or changing a length.
    Write,
    /// Making durable.
    Sync,
    /// Renaming.
    Rename,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Action::Create => "create",
            Action::Open => "open",
            Action::Read => "read",
            Action::Write => "write",
            Action::Sync => "sync",
            Action::Rename => "rename",
        })
    }
}

impl Action {
    /// An error of storage as the overlay's. Lack of space is told apart, but not where nobody knows what was done.
    pub(super) fn failed(self, path: &Path, source: io::Error) -> OverlayError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                if !matches!(self, Action::Sync | Action::Rename) =>
            {
                OverlayError::NoSpace { dir: path.parent().unwrap_or(path).to_path_buf() }
            }
            _ => OverlayError::Io { action: self, path: path.to_path_buf(), source },
        }
    }
}
