//! Copying the disks of a running machine to other storage, and moving the machine there.
//!
//! A mirror belongs to the machine: it goes on when the process that began it dies, and the next process finds it by
//! asking. Nothing about it has to be remembered, least of all which disks have moved: that is what
//! [`Mirroring::mirror_state`] tells.
//!
//! A mirror never stops its machine. Where the source or the target fails, the copy waits ([`Copying::Stalled`]) and the
//! guest runs on upon its source.

use crate::definition::DiskSource;
use crate::machine::{MachineError, Pending};

/// What a machine can do to move its disks. `disk` is the position in the machine's definition.
pub trait Mirroring {
    /// Begins to copy a disk to `target`, which exists, is at least as large, and is overwritten; what the guest writes
    /// meanwhile follows. What an earlier mirror of this disk has left behind is taken away first.
    ///
    /// `limit` is in bytes a second. Returns when the copy has begun.
    fn mirror<'a>(
        &'a self,
        disk: usize,
        target: &'a DiskSource,
        limit: Option<u64>,
    ) -> Pending<'a, Result<(), MirrorError>>;

    /// How the move of a disk stands.
    fn mirror_state(&self, disk: usize) -> Pending<'_, Result<MirrorState, MirrorError>>;

    /// Copies at most `limit` bytes a second from now on.
    fn mirror_limit(&self, disk: usize, limit: Option<u64>) -> Pending<'_, Result<(), MirrorError>>;

    /// Copies nothing until [`Mirroring::mirror_resume`]. Fine if it is paused.
    fn mirror_pause(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>>;

    /// Goes on where it was, after a pause or a failure of source or target. Fine if it runs.
    fn mirror_resume(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>>;

    /// Gives the copy up and lets go of the target; the guest stays on its source. Fine if there is none. Refused with
    /// [`MirrorError::Pivoted`] when the guest is on the target.
    fn mirror_cancel(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>>;

    /// Makes what is copied so far durable, and visible to whoever opens the target beside the machine.
    fn mirror_flush(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>>;

    /// Moves the guest from the source to the target, which holds all the guest has written when it does. The source is
    /// held open until [`Mirroring::mirror_release`]. Fine if the guest is there already.
    fn mirror_pivot(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>>;

    /// Lets go of the source after a pivot. Fine if that is done.
    fn mirror_release(&self, disk: usize) -> Pending<'_, Result<(), MirrorError>>;

    /// What the guest has asked of a disk since the machine was started, and how long it has waited for that.
    fn disk_load(&self, disk: usize) -> Pending<'_, Result<DiskLoad, MirrorError>>;
}

/// How the move of a disk stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirrorState {
    /// The guest is on its source and nothing is copied.
    None,
    /// The guest is on its source and is being copied.
    Copying(MirrorProgress),
    /// The copy has ended by itself; the guest is on its source. A new one begins at the beginning.
    Failed {
        /// As far as that is known.
        cause: Cause,
        /// In the hypervisor's words.
        reason: String,
    },
    /// The guest is on the target.
    Pivoted {
        /// The source is still open.
        source_held: bool,
    },
}

/// What a copy has ended by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// This side failed.
    Side(Side),
    /// Somebody has given it up who was not asked to.
    Cancelled,
    /// Nobody says; one that is begun again may tell.
    Unknown,
}

/// How far a copy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MirrorProgress {
    /// Bytes copied, those that the guest has written meanwhile among them.
    pub copied: u64,
    /// Bytes to copy; grows as the guest writes.
    pub total: u64,
    /// All was copied once; since then the target only trails behind the guest.
    pub ready: bool,
    /// What it does.
    pub doing: Copying,
}

/// What a copy does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copying {
    /// It runs.
    Running,
    /// It was told to wait; seen once it may also be a moment's pause that the hypervisor makes by itself.
    Paused,
    /// Something failed; it waits to be resumed.
    Stalled {
        /// Which side, if that is known.
        side: Option<Side>,
        /// There was no space left.
        no_space: bool,
    },
}

/// One end of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the guest is.
    Source,
    /// Where it will be.
    Target,
}

/// Sums over the life of a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLoad {
    /// Reads, writes and flushes that are done.
    pub requests: u64,
    /// How long they took together.
    pub nanos: u64,
    /// Bytes written or trimmed.
    pub changed: u64,
}

/// Why a disk cannot be moved as asked.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The machine has no such disk.
    #[error("the machine has no disk {disk}")]
    NoDisk {
        /// As asked.
        disk: usize,
    },
    /// The target cannot be opened or written by the hypervisor.
    #[error("the hypervisor cannot use the target of disk {disk}")]
    Target {
        /// Which disk.
        disk: usize,
        /// What it says.
        source: MachineError,
    },
    /// It is being copied already.
    #[error("disk {disk} is being copied already")]
    Busy {
        /// Which disk.
        disk: usize,
    },
    /// It is not being copied.
    #[error("disk {disk} is not being copied")]
    NotMirrored {
        /// Which disk.
        disk: usize,
    },
    /// The target does not hold everything yet.
    #[error("the copy of disk {disk} is not complete yet")]
    NotReady {
        /// Which disk.
        disk: usize,
    },
    /// The guest is on the target already.
    #[error("the guest is on the copy of disk {disk} already")]
    Pivoted {
        /// Which disk.
        disk: usize,
    },
    /// The guest stayed on its source.
    #[error("disk {disk} cannot be moved to its copy: {reason}")]
    PivotFailed {
        /// Which disk.
        disk: usize,
        /// In the hypervisor's words.
        reason: String,
    },
    /// This hypervisor cannot do that.
    #[error("this hypervisor cannot {what}")]
    Unsupported {
        /// What was asked.
        what: &'static str,
    },
    /// The machine did not do it.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl MirrorError {
    /// Whether nobody could be asked at the moment: the copy may go on meanwhile.
    pub fn is_unreachable(&self) -> bool {
        match self {
            MirrorError::Machine(source) | MirrorError::Target { source, .. } => source.is_unreachable(),
            _ => false,
        }
    }
}
