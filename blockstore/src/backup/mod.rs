//! [`Backup`]: captures disks into a new recovery point.
//!
//! Durable writes, in this order (docs/format/repository.md): packs, index runs, the point. Before the point a sample
//! of every disk is compared with its source; all the time runs of earlier backups are merged. A backup that fails or is
//! dropped leaves at most packs and runs that no point needs.

mod compare;
mod gather;
mod pipeline;
mod source;
mod writer;

#[cfg(test)]
mod changes_tests;

#[cfg(test)]
mod tests;

pub use source::{FileSource, Source};

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tracing::{error, info, warn};

use crate::error::ReadError;
use crate::format::FormatError;
use crate::index::Merger;
use crate::keys::random;
use crate::lease::{Lease, LeaseError, LeaseKind};
use crate::manifest::Shape;
use crate::point::{Consistency, MAX_DISKS, PointStats, PointText, PointedDisk, RecoveryPoint, is_disk_name};
use crate::progress::Progress;
use crate::read::{ManifestReader, ReadShared};
use crate::storage::{Object, is_no_space};
use compare::{Sample, compare};
use pipeline::Capture;
use writer::{Shared, Writer};

/// Why a backup failed.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The source could not be read.
    #[error("cannot read disk {disk:?} of the source at offset {offset}")]
    Source {
        /// Which disk.
        disk: String,
        /// Where the failed read began.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The source was resized meanwhile.
    #[error("disk {disk:?} changed its size from {before} to {after} bytes while it was read")]
    SourceChanged {
        /// Which disk.
        disk: String,
        /// Size at the beginning.
        before: u64,
        /// Size at the end.
        after: u64,
    },
    /// A chunk of the source is another one than was stored.
    #[error(
        "disk {disk:?} at offset {offset} is not what was stored: the source changed while it was backed up, or was misread"
    )]
    SourceDiffers {
        /// Which disk.
        disk: String,
        /// Where the chunk begins.
        offset: u64,
    },
    /// What was stored cannot be read back.
    #[error("what was stored of disk {disk:?} at offset {offset} cannot be read back")]
    Unreadable {
        /// Which disk.
        disk: String,
        /// Where the chunk begins.
        offset: u64,
        /// Why.
        source: ReadError,
    },
    /// The repository's storage is full.
    #[error("no space left in the repository for {object}")]
    NoSpace {
        /// What could not be written.
        object: String,
        /// What the storage said.
        source: io::Error,
    },
    /// The repository's storage failed.
    #[error("cannot write {object}")]
    Storage {
        /// What could not be written.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// The index cannot be read.
    #[error("cannot read the index")]
    Index(#[source] ReadError),
    /// The recovery point cannot be written down.
    #[error("the recovery point cannot be sealed")]
    Point(#[source] FormatError),
    /// The disk is too large, has an unusable name, one used already, or is one too many.
    #[error("disk {disk:?} cannot be part of the recovery point: {reason}")]
    Disk {
        /// Which disk.
        disk: String,
        /// Why not.
        reason: &'static str,
    },
    /// It cannot say that it is at work, or was away for so long that others no longer count on it.
    #[error("the backup has no lease of the repository")]
    Lease(#[from] LeaseError),
    /// No randomness from the operating system.
    #[error("no randomness from the operating system")]
    Randomness(#[source] io::Error),
    /// No threads, or no memory for their contexts.
    #[error("cannot start worker threads")]
    Threads(#[source] io::Error),
    /// The caller cancelled.
    #[error("the backup was cancelled")]
    Cancelled,
    /// An earlier step of this backup failed; begin a new one.
    #[error("an earlier step of this backup failed")]
    Failed,
}

impl BackupError {
    fn storage(object: Object, source: io::Error) -> BackupError {
        BackupError::write(object.to_string(), source)
    }

    fn index(source: io::Error) -> BackupError {
        BackupError::write("an index run".to_owned(), source)
    }

    fn write(object: String, source: io::Error) -> BackupError {
        if is_no_space(&source) {
            BackupError::NoSpace { object, source }
        } else {
            BackupError::Storage { object, source }
        }
    }
}

/// What capturing a disk did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DiskStats {
    /// Size of the disk.
    pub size: u64,
    /// Bytes read from the source; holes are not read.
    pub read: u64,
    /// Chunks that were not in the repository.
    pub new_chunks: u64,
    /// Their length before compression.
    pub new_bytes: u64,
    /// Manifest nodes that were not in the repository.
    pub new_nodes: u64,
    /// Chunks that are as in the parent.
    pub unchanged_chunks: u64,
    /// Chunks stored once more, so that the disk can be read in larger pieces.
    pub gathered_chunks: u64,
}

/// What the caller knows about a recovery point besides its disks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct PointDetails {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// How consistent the disks are.
    pub consistency: Consistency,
    /// The machine's definition; null if unknown.
    pub hardware: serde_json::Value,
}

/// A recovery point in the making. Dropped without [`Backup::seal`] it leaves nothing that counts.
pub struct Backup<'s> {
    read: Arc<ReadShared>,
    shared: Arc<Shared>,
    writer: Option<Writer>,
    machine: String,
    parent: Option<RecoveryPoint>,
    disks: Vec<PointedDisk>,
    captured: Vec<Captured<'s>>,
    stats: PointStats,
    /// Merges index runs as long as the backup runs.
    _merger: Merger,
    began: Instant,
    time_unix_ns: u64,
    lease: Lease,
}

/// What is to be compared when all is stored.
struct Captured<'s> {
    source: &'s dyn Source,
    sample: Sample,
}

impl std::fmt::Debug for Backup<'_> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Backup").field("machine", &self.machine).field("disks", &self.disks).finish_non_exhaustive()
    }
}

impl<'s> Backup<'s> {
    pub(crate) fn begin(
        read: Arc<ReadShared>,
        machine: &str,
        parent: Option<&RecoveryPoint>,
        progress: Arc<Progress>,
    ) -> Result<Backup<'s>, BackupError> {
        // First of all: collect frees nothing that the index says from here on.
        let (storage, repository) = (read.fetcher.storage.clone(), read.fetcher.config.repository);
        let owner = format!("backup of {machine}");
        let lease = Lease::take(storage, repository, None, LeaseKind::Backup, &owner, &[])?;
        read.fetcher.index.refresh().map_err(BackupError::Index)?; // other processes write, too
        if let Err(error) = read.fetcher.storage.tidy() {
            warn!(%error, "temporary files of killed writers not removed, the next backup will try again");
        }
        let shared = Shared::new(read.fetcher.clone(), progress);
        let shared = Arc::new(shared.map_err(|source| BackupError::write("packs".to_owned(), source))?);
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let parent = parent.filter(|parent| is_listed(&read, parent));
        Ok(Backup {
            _merger: Merger::start(read.fetcher.index.clone()),
            read,
            writer: Some(Writer::new(shared.clone())?),
            shared,
            machine: machine.to_owned(),
            parent: parent.cloned(),
            disks: Vec::new(),
            captured: Vec::new(),
            stats: PointStats::default(),
            began: Instant::now(),
            time_unix_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
            lease,
        })
    }

    /// Captures a disk. Chunks equal to the parent's disk of the same name are neither looked up nor stored. After an
    /// error the backup is lost: every later call returns [`BackupError::Failed`]. The source is read once more, in
    /// part, when the backup is sealed.
    pub fn add_disk(&mut self, name: &str, source: &'s dyn Source) -> Result<DiskStats, BackupError> {
        let Some(mut writer) = self.writer.take() else { return Err(BackupError::Failed) };
        let captured = self.capture(name, source, &mut writer)?; // an error drops the writer
        self.writer = Some(writer);
        Ok(captured)
    }

    fn capture(&mut self, name: &str, source: &'s dyn Source, writer: &mut Writer) -> Result<DiskStats, BackupError> {
        let refuse = |reason| BackupError::Disk { disk: name.to_owned(), reason };
        if !is_disk_name(name) {
            return Err(refuse("its name is empty, too long or holds a slash or control characters"));
        }
        if self.disks.iter().any(|disk| disk.name == name) {
            return Err(refuse("another disk has this name"));
        }
        if self.disks.len() >= MAX_DISKS {
            return Err(refuse("there are too many disks"));
        }
        let size = source.size();
        let chunk_size = self.read.fetcher.config.chunk_size;
        let shape = Shape::of(size, chunk_size).ok_or(refuse("it is too large"))?;
        let parent = self.parent.as_ref().and_then(|parent| parent.disk(name));
        let comparable = parent.is_some_and(|disk| disk.size == size && disk.chunk_size == chunk_size);
        let parent = parent.and_then(|disk| {
            let opened = ManifestReader::new(self.read.clone(), disk);
            let note = |error: &ReadError| warn!(disk = name, %error, "the parent cannot be read, the backup goes on without it");
            opened.inspect_err(note).ok()
        });
        self.shared.progress.add_total(size);
        let capture = Capture { name, source, size, shape, parent: parent.as_ref(), comparable, shared: &self.shared };
        let mut sample = Sample::new(self.sample_seed(name));
        let (root, mut stats) = capture.run(writer, &mut sample)?;
        let after = source.current_size();
        let after = after.map_err(|source| BackupError::Source { disk: name.to_owned(), offset: size, source })?;
        if after != size {
            return Err(BackupError::SourceChanged { disk: name.to_owned(), before: size, after });
        }
        stats.size = size;
        self.stats.read += stats.read;
        self.stats.new_chunks += stats.new_chunks;
        self.stats.new_bytes += stats.new_bytes;
        self.stats.unchanged_chunks += stats.unchanged_chunks;
        self.stats.gathered_chunks += stats.gathered_chunks;
        self.disks.push(PointedDisk { name: name.to_owned(), size, chunk_size, root });
        self.captured.push(Captured { source, sample });
        Ok(stats)
    }

    /// Another sample for each backup, and the same one for the same backup.
    fn sample_seed(&self, disk: &str) -> u64 {
        let text = format!("{}/{disk}/{}", self.machine, self.time_unix_ns);
        u64::from_le_bytes(blake3::hash(text.as_bytes()).as_bytes().first_chunk().copied().unwrap_or_default())
    }

    /// Whether all disks that were added are as in the parent, and it has no others: the point would say nothing new.
    pub fn is_like_parent(&self) -> bool {
        let Some(parent) = &self.parent else { return false };
        let same = |(a, b): (&PointedDisk, &PointedDisk)| (&a.name, a.size, a.root) == (&b.name, b.size, b.root);
        parent.disks.len() == self.disks.len() && parent.disks.iter().zip(&self.disks).all(same)
    }

    /// Makes everything durable, compares a sample of it with the sources, and writes the recovery point.
    ///
    /// Order: (1) packs, (2) index runs, (3) the compare, (4) the point. A point before 1 or 2 could
    /// survive a power cut that takes what it names; before 3 it could be one that does not hold what the source does.
    /// The lease must count before 4 and after it: else what the point names may have been collected, and it is deleted.
    pub fn seal(mut self, details: PointDetails) -> Result<RecoveryPoint, BackupError> {
        let Some(writer) = self.writer.take() else { return Err(BackupError::Failed) };
        if self.shared.progress.is_cancelled() {
            return Err(BackupError::Cancelled);
        }
        writer.finish()?;
        for (disk, Captured { source, sample }) in self.disks.iter().zip(std::mem::take(&mut self.captured)) {
            self.stats.compared += compare(&self.read, source, disk, sample, &self.shared.progress)?;
        }
        self.stats.stored_bytes = self.shared.stored();
        self.stats.seconds = self.began.elapsed().as_secs_f64();
        let text = PointText {
            machine: self.machine.clone(),
            time_unix_ns: self.time_unix_ns,
            disks: std::mem::take(&mut self.disks),
            hardware: details.hardware,
            parent: self.parent.as_ref().map(|parent| parent.id),
            labels: details.labels,
            consistency: details.consistency,
            stats: self.stats,
        };
        let fetcher = &self.read.fetcher;
        let salt = random().map_err(BackupError::Randomness)?;
        let (bytes, point) = text.seal(salt, &fetcher.config, &fetcher.keyring).map_err(BackupError::Point)?;
        let object = Object::Point(point.id);
        self.lease.confirm()?;
        fetcher.storage.put(&object, &bytes).map_err(|source| BackupError::storage(object, source))?;
        if let Err(error) = self.lease.confirm() {
            if let Err(error) = fetcher.storage.delete(&object) {
                error!(%object, %error, "the lease lapsed while this point was written, and it cannot be deleted");
            }
            return Err(error.into());
        }
        info!(machine = self.machine, point = %point.id, stored = self.stats.stored_bytes, "recovery point written");
        Ok(point)
    }
}

/// Whether a parent is still there, now that the lease is. One that is gone may have been collected: its chunks are
/// looked up like any others.
fn is_listed(read: &ReadShared, parent: &RecoveryPoint) -> bool {
    match read.fetcher.storage.len(&Object::Point(parent.id)) {
        Ok(_) => true,
        Err(error) => {
            warn!(parent = %parent.id, %error, "the parent is gone, the backup goes on without it");
            false
        }
    }
}
