//! [`restore`]: writes a whole disk to a target, with all cores, leaving out what is zero. [`compare`] finds out what of a
//! target is as it should be, and [`restore_changed`] writes only the rest. Design: docs/design/restore.md
//!
//! ```text
//! planner (mutex)                     -> workers: read, open, check into a buffer of their own -> target, long writes
//! a window of the disk, by pack
//! ```

mod compare;
mod plan;
#[cfg(test)]
mod tests;
mod work;

pub use compare::{Differences, compare};

use std::io;
use std::ops::Range;
use std::time::Instant;

use crate::base::Base;
use crate::error::ReadError;
use crate::progress::Progress;
use crate::read::PointDisk;
use plan::Planner;
use work::Work;

/// Where a disk is written to. Called from several threads, in no particular order.
pub trait Target: Send + Sync {
    /// Writes all of `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Fills `buf` from `offset`: only for [`compare`].
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let _ = (offset, buf);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The next range at or after `offset` that may hold something else than zeroes. All, where nobody knows.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..u64::MAX))
    }

    /// Makes a range read as zeroes, giving its space back where that is possible.
    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < length {
            let step = usize::try_from(length - done).unwrap_or(usize::MAX).min(ZEROES.len());
            self.write_at(offset + done, ZEROES.get(..step).unwrap_or(&ZEROES))?;
            done += step as u64;
        }
        Ok(())
    }
}

/// What to do about ranges that are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPolicy {
    /// The target reads as zeroes already: leave them out, so that it stays sparse.
    TargetIsZero,
    /// The target may hold anything: write zeroes.
    WriteZeroes,
}

/// Why a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The recovery point could not be read.
    #[error("cannot read the disk at offset {offset}")]
    Read {
        /// Where, to the chunk.
        offset: u64,
        /// Why.
        source: ReadError,
    },
    /// The target could not be written.
    #[error("cannot write the target at offset {offset}")]
    Target {
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// No threads.
    #[error("cannot start worker threads")]
    Threads(#[source] io::Error),
    /// The caller cancelled; the target is incomplete.
    #[error("the restore was cancelled")]
    Cancelled,
}

/// What a restore did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RestoreStats {
    /// Bytes of data written.
    pub data: u64,
    /// Bytes that are zero, written or left out.
    pub zero: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Writes all of `disk` to `target`. The chunk cache is neither used nor filled. Nothing is synced: that is the
/// target's owner's to do. After an error the target is incomplete; [`compare`] tells what of it is right.
pub fn restore(
    disk: &PointDisk,
    target: &dyn Target,
    zeroes: ZeroPolicy,
    progress: &Progress,
) -> Result<RestoreStats, RestoreError> {
    progress.add_total(disk.size());
    run(disk, target, Planner::new(disk, None, zeroes), progress)
}

/// Writes only the chunks in which `target` was found to differ. Zeroes are written.
pub fn restore_changed(
    disk: &PointDisk,
    target: &dyn Target,
    differences: &Differences,
    progress: &Progress,
) -> Result<RestoreStats, RestoreError> {
    progress.add_total(differences.bytes());
    run(disk, target, Planner::new(disk, Some(differences), ZeroPolicy::WriteZeroes), progress)
}

fn run(
    disk: &PointDisk,
    target: &dyn Target,
    planner: Planner<'_>,
    progress: &Progress,
) -> Result<RestoreStats, RestoreError> {
    let began = Instant::now();
    let (data, zero) = Work::new(disk, target, planner, progress).run()?;
    Ok(RestoreStats { data, zero, seconds: began.elapsed().as_secs_f64() })
}
