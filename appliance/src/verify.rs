//! Verify: what the repository says about its own health, for the API.

use std::sync::Arc;
use std::time::Instant;

use blockstore::{Progress, Repository, VerifyOptions};
use serde::{Deserialize, Serialize};

use crate::catalog::PointSummary;
use crate::problem::Problem;

/// What to verify.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyRequest {
    /// One recovery point; all of the repository when not given.
    #[serde(default)]
    pub point: Option<String>,
    /// Read and check every chunk.
    #[serde(default)]
    pub read_data: bool,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// Whether nothing is damaged.
    pub ok: bool,
    /// What is.
    pub damaged: Vec<Damage>,
    /// What was damaged and is whole again.
    #[serde(default)]
    pub repaired: Vec<Damage>,
    /// Recovery points looked at.
    pub points: u64,
    /// Packs read whole.
    pub packs_read: u64,
    /// Bytes of them.
    pub bytes_read: u64,
    /// Packs that no recovery point needs; not damage.
    pub unreferenced: u64,
    /// Chunks looked at.
    pub chunks: u64,
    /// How long it took.
    pub seconds: f64,
    /// Whether it was done without the key, which proves less.
    #[serde(default)]
    pub keyless: bool,
}

/// A damaged object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// Which object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// Whom it hits, as far as known.
    pub hits: Vec<Hit>,
}

/// A disk that damage hits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hit {
    /// The recovery point.
    pub point: String,
    /// Its disk.
    pub disk: String,
}

/// Verifies `point`, or everything.
pub fn verify(
    repository: &Repository,
    point: Option<&PointSummary>,
    read_data: bool,
    progress: &Arc<Progress>,
) -> Result<VerifyResult, Problem> {
    let started = Instant::now();
    let point = match point {
        None => None,
        Some(point) => Some(
            point
                .id
                .parse()
                .map_err(|_| Problem::usage(format!("`{}` is not the id of a recovery point", point.id)))?,
        ),
    };
    let report = repository
        .verify(VerifyOptions { point, read_data }, progress)
        .map_err(|error| Problem::from_verify(&error))?;
    let damaged: Vec<Damage> = report.damaged.into_iter().map(told).collect();
    Ok(VerifyResult {
        ok: damaged.is_empty(),
        damaged,
        repaired: report.repaired.into_iter().map(told).collect(),
        points: report.points,
        packs_read: report.packs_read,
        bytes_read: report.bytes_read,
        unreferenced: report.unreferenced,
        chunks: report.chunks,
        seconds: started.elapsed().as_secs_f64(),
        keyless: false,
    })
}

/// Damage as the API tells it.
pub fn told(damage: blockstore::Damage) -> Damage {
    Damage {
        object: damage.object.to_string(),
        problem: damage.what,
        hits: damage.affected.iter().map(|hit| Hit { point: hit.point.to_string(), disk: hit.disk.clone() }).collect(),
    }
}
