//! Why an image cannot be opened or made.

use std::io;
use std::path::PathBuf;

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be read.
    #[error("cannot open {}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no file that can hold a disk.
    #[error("{} is {what}, not a file or block device", path.display())]
    NotAnImage {
        /// What was named.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A format, or a feature of one, that is not read here and that QEMU may read.
    #[error("{} is a {format} image that cannot be read directly: {reason}", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// QEMU's name of the format.
        format: String,
        /// What is in the way.
        reason: String,
    },
    /// The image contradicts itself or its format.
    #[error("{} is a damaged {format} image: {reason}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// QEMU's name of the format.
        format: String,
        /// What is wrong.
        reason: String,
    },
    /// It looks like an image that names another file, and may as well be a raw disk whose guest wrote that to it: by
    /// its name it is no such image, and no format was given.
    #[error(
        "{} looks like a {format} image that names {names}, but is not named like one itself: its format is uncertain \
         and has to be given, raw or {format}",
        path.display()
    )]
    Uncertain {
        /// The image.
        path: PathBuf,
        /// QEMU's name of the format that it looks like.
        format: &'static str,
        /// The kind of file it would name.
        names: &'static str,
    },
    /// It names a backing file, and following is not allowed.
    #[error("{} refers to another file, {backing:?}, which is not followed", path.display())]
    BackingFile {
        /// The image.
        path: PathBuf,
        /// What it names.
        backing: String,
    },
}

/// Why a target cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Something is there already.
    #[error("{} exists already", path.display())]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The device is too small.
    #[error("{} has {available} bytes, {needed} are needed", path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        available: u64,
        /// The disk's size in bytes.
        needed: u64,
    },
    /// It cannot hold this format.
    #[error("{} cannot hold a {format} image: {reason}", path.display())]
    Unfit {
        /// The target.
        path: PathBuf,
        /// The format.
        format: &'static str,
        /// What is in the way.
        reason: &'static str,
    },
    /// The file system or device failed.
    #[error("cannot make {}", path.display())]
    Io {
        /// The target.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
