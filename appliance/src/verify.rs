//! Verify: what the repository says about its own health, for the API.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use blockstore::{DataCheck, Progress, RepairImage, RepairSources, Repository, VerifyOptions};
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::capture::SourceSpec;
use crate::catalog::PointSummary;
use crate::problem::Problem;

/// What to verify.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyRequest {
    /// One recovery point; all of the repository when not given.
    #[serde(default)]
    pub point: Option<String>,
    /// Read and check the data, too.
    #[serde(default)]
    pub read_data: bool,
    /// How much of it, longest unverified first: `5%`, or bytes as in `10G`; all when not given.
    #[serde(default)]
    pub portion: Option<String>,
    /// Take a pack that hashes to its name to be right, without opening what is in it.
    #[serde(default)]
    pub hash_only: bool,
    /// Have what is damaged from elsewhere, and store it anew.
    #[serde(default)]
    pub repair: bool,
    /// Copies of the repository to have it from, as absolute paths.
    #[serde(default)]
    pub copies: Vec<PathBuf>,
    /// Images to have it from.
    #[serde(default)]
    pub sources: Vec<RepairSource>,
}

/// An image to repair from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RepairSource {
    /// The only disk it is used for; every one when not given.
    #[serde(default)]
    pub disk: Option<String>,
    /// An absolute path, or an NBD URI.
    pub location: String,
}

impl VerifyRequest {
    /// How much data to read.
    pub fn data(&self) -> Result<DataCheck, Problem> {
        match (self.read_data, self.portion.as_deref()) {
            (false, None) => Ok(DataCheck::None),
            (true, None) => Ok(DataCheck::All),
            (_, Some(portion)) => parse_portion(portion),
        }
    }
}

fn parse_portion(text: &str) -> Result<DataCheck, Problem> {
    let bad = || {
        Problem::usage(format!("`{text}` is neither a share like 5% nor a size like 10G"))
            .hint("a POINT stands before --read-data")
    };
    match text.strip_suffix('%') {
        None => crate::cli::parse_size(text).map(DataCheck::Bytes).map_err(|_| bad()),
        Some(share) => {
            let (whole, tenths) = share.split_once('.').unwrap_or((share, "0"));
            let (whole, tenths): (u32, u32) = (whole.parse().map_err(|_| bad())?, tenths.parse().map_err(|_| bad())?);
            match whole.saturating_mul(10).saturating_add(tenths) {
                per_mille @ 1..=1000 if tenths < 10 => Ok(DataCheck::PerMille(per_mille)),
                _ => Err(bad()),
            }
        }
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyResult {
    /// Whether nothing is damaged.
    pub ok: bool,
    /// What is.
    pub damaged: Vec<Damage>,
    /// What was damaged and is whole again.
    #[serde(default)]
    pub repaired: Vec<Damage>,
    /// What a repair did.
    #[serde(default)]
    pub repair: Option<Repair>,
    /// Recovery points looked at.
    pub points: u64,
    /// Packs read whole.
    pub packs_read: u64,
    /// Bytes of them.
    pub bytes_read: u64,
    /// Packs that recovery points need.
    #[serde(default)]
    pub packs_needed: u64,
    /// Bytes of them.
    #[serde(default)]
    pub bytes_needed: u64,
    /// When the one of them that waits longest was verified last; nothing if it never was.
    #[serde(default)]
    pub oldest_verified: Option<DateTime<Utc>>,
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

/// What a repair did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Repair {
    /// Packs put back from a copy.
    pub packs: u64,
    /// Chunks and manifest nodes stored anew.
    pub chunks: u64,
}

/// A damaged object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Damage {
    /// Which object.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    /// Whom it hits, as far as known.
    pub hits: Vec<Hit>,
}

/// A disk that damage hits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hit {
    /// The recovery point.
    pub point: String,
    /// Its machine.
    #[serde(default)]
    pub machine: String,
    /// Its disk.
    pub disk: String,
    /// Bytes of the disk that cannot be read.
    #[serde(default)]
    pub bytes: u64,
    /// Which: `[from, to]`, `to` not among them.
    #[serde(default)]
    pub ranges: Vec<[u64; 2]>,
}

/// Verifies `point`, or everything.
pub fn verify(
    repository: &Repository,
    point: Option<&PointSummary>,
    request: &VerifyRequest,
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
    let options = VerifyOptions { point, data: request.data()?, hash_only: request.hash_only };
    let (report, repair) = if request.repair {
        let done = repository.repair(options, &open_sources(request)?, progress);
        let done = done.map_err(|error| Problem::from_repair(&error))?;
        (done.verified, Some(Repair { packs: done.packs, chunks: done.chunks }))
    } else {
        (repository.verify(options, progress).map_err(|error| Problem::from_verify(&error))?, None)
    };
    let damaged: Vec<Damage> = report.damaged.into_iter().map(told).collect();
    Ok(VerifyResult {
        ok: damaged.is_empty(),
        damaged,
        repaired: report.repaired.into_iter().map(told).collect(),
        repair,
        points: report.points,
        packs_read: report.packs_read,
        bytes_read: report.bytes_read,
        packs_needed: report.packs_needed,
        bytes_needed: report.bytes_needed,
        oldest_verified: i64::try_from(report.oldest_unix_s)
            .ok()
            .filter(|seconds| *seconds > 0)
            .and_then(|seconds| DateTime::from_timestamp(seconds, 0)),
        unreferenced: report.unreferenced,
        chunks: report.chunks,
        seconds: started.elapsed().as_secs_f64(),
        keyless: false,
    })
}

fn open_sources(request: &VerifyRequest) -> Result<RepairSources, Problem> {
    let mut sources = RepairSources::default();
    for copy in &request.copies {
        sources.copies.push(crate::app::storage(copy));
    }
    for source in &request.sources {
        let disk = source.disk.clone().unwrap_or_else(|| "whatever it is".to_owned());
        let spec = SourceSpec { disk, location: source.location.clone() };
        sources
            .images
            .push(RepairImage { disk: source.disk.clone(), source: crate::capture::open_source(&spec, None)? });
    }
    Ok(sources)
}

/// Damage as the API tells it.
pub fn told(damage: blockstore::Damage) -> Damage {
    Damage {
        object: damage.object.to_string(),
        problem: damage.what,
        hits: damage.affected.into_iter().map(hit).collect(),
    }
}

fn hit(affected: blockstore::Affected) -> Hit {
    Hit {
        point: affected.point.to_string(),
        machine: affected.machine,
        disk: affected.disk,
        bytes: affected.ranges.iter().map(|range| range.end - range.start).sum(),
        ranges: affected.ranges.into_iter().map(|range| [range.start, range.end]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portions_are_shares_or_sizes() {
        let data = |portion: &str| parse_portion(portion).ok();
        assert_eq!(data("5%"), Some(DataCheck::PerMille(50)));
        assert_eq!(data("0.5%"), Some(DataCheck::PerMille(5)));
        assert_eq!(data("100%"), Some(DataCheck::PerMille(1000)));
        assert_eq!(data("2G"), Some(DataCheck::Bytes(2 << 30)));
        for bad in ["0%", "101%", "-1%", "%", "5.55%", "web01", "", "99999999999%"] {
            assert_eq!(data(bad), None, "{bad}");
        }
    }
}
