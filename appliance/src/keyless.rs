//! What can be told of a repository without its key.

use std::sync::Arc;
use std::time::Instant;

use blockstore::{Keyless, Progress};

use crate::problem::Problem;
use crate::verify::{VerifyResult, told};

/// Verifies what names and checksums prove.
pub fn verify(repository: &Keyless, read_data: bool, progress: &Arc<Progress>) -> Result<VerifyResult, Problem> {
    let started = Instant::now();
    let report = repository.verify(read_data, progress).map_err(|error| Problem::from_verify(&error))?;
    let damaged: Vec<_> = report.damaged.into_iter().map(told).collect();
    Ok(VerifyResult {
        ok: damaged.is_empty(),
        damaged,
        points: report.points,
        packs_read: report.packs_read,
        bytes_read: report.bytes_read,
        unreferenced: report.unindexed,
        chunks: report.frames,
        seconds: started.elapsed().as_secs_f64(),
        keyless: true,
        ..VerifyResult::default()
    })
}
