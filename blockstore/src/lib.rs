//! The store of Lifeboat: a repository of deduplicated, compressed, encrypted chunks, and the durable overlay that
//! takes a running guest's writes.
//!
//! [`Repository`] makes and opens repositories, [`Backup`] adds recovery points to them, [`PointDisk`] reads their
//! disks, [`restore()`] writes a disk back in full. The formats are specified in docs/format/.
#![deny(unsafe_code)] // but for `mapping` and `uring`

pub mod backup;
pub mod base;
pub mod collect;
pub mod disk;
pub mod drill;
pub mod error;
pub mod format;
mod id;
mod index;
mod keyless;
mod keys;
pub mod lease;
mod manifest;
mod mapping;
pub mod overlay;
mod pack;
mod point;
mod progress;
mod read;
mod repository;
mod restore;
pub mod sim;
pub mod storage;
mod uring;

pub use backup::{Backup, BackupError, DiskStats, FileSource, PointDetails, Source};
pub use base::{Base, Extent, Segment};
pub use collect::{CollectError, CollectOptions, CollectReport, KeylessCollect};
pub use error::ReadError;
pub use format::FormatError;
pub use id::{
    BatchId, ChunkId, DrillId, LeaseId, PackId, ParseIdError, RecoveryPointId, RepositoryId, RunId, SlotId, VerifiedId,
};
pub use keyless::{Keyless, KeylessReport};
pub use keys::{Protection, Secret};
pub use lease::{Lease, LeaseError, LeaseKind, LeaseState};
pub use mapping::Mapping;
pub use point::{Consistency, PointStats, PointedDisk, RecoveryPoint};
pub use progress::Progress;
pub use read::{CacheUse, Locality, PointDisk};
pub use repository::{
    Affected, Damage, DataCheck, InitError, KeyError, KeySlot, OpenError, PointError, Protected, RepairError,
    RepairImage, RepairReport, RepairSources, Repository, RepositoryStats, Rotated, SlotKind, SlotState, VerifyError,
    VerifyOptions, VerifyReport,
};
pub use restore::{Differences, RestoreError, RestoreStats, Target, ZeroPolicy, compare, restore, restore_changed};
pub use storage::{LocalStorage, Storage};
