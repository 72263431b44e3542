//! Collect: frees what no recovery point needs, for the API.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockstore::collect::{CollectOptions, CollectReport, KeylessCollect, PackReport};
use blockstore::{Keyless, Progress, Repository};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// Longest time in quarantine.
const QUARANTINE_MAX: u64 = 10 * 366 * 24 * 3600;

/// What is to be explained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Explain {
    /// All packs that are not needed in full.
    All,
    /// The pack whose name begins so, and who needs it.
    Pack(String),
}

/// How to collect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CollectRequest {
    /// Change nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// Change nothing, and tell about packs.
    #[serde(default)]
    pub explain: Option<Explain>,
    /// Do not wait for the dates of what is in quarantine.
    #[serde(default)]
    pub reclaim_now: bool,
    /// How long packs stay in quarantine; a day when not given.
    #[serde(default)]
    pub quarantine_seconds: Option<u64>,
    /// A pack less of which is needed is repacked, in per cent; 50 when not given.
    #[serde(default)]
    pub threshold: Option<u8>,
}

/// What a collect did.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CollectResult {
    /// What it did, or would do.
    #[serde(flatten)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub report: CollectReport,
    /// The packs that were to be explained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<serde_json::Value>>")]
    pub explained: Option<Vec<PackReport>>,
    /// How long it took.
    pub seconds: f64,
}

/// The same without the key.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct KeylessResult {
    /// Always true: what could be said goes by what the last collect with the key found.
    pub keyless: bool,
    /// What can be said.
    #[serde(flatten)]
    #[schemars(with = "serde_json::Map<String, serde_json::Value>")]
    pub report: KeylessCollect,
}

impl CollectRequest {
    /// Refuses what makes no sense.
    pub fn options(&self) -> Result<CollectOptions, Problem> {
        let default = CollectOptions::default();
        let threshold = self.threshold.unwrap_or(default.threshold);
        if threshold > 100 {
            return Err(Problem::usage(format!("{threshold} % cannot be a threshold")).hint("give 0 to 100 per cent"));
        }
        let seconds = self.quarantine_seconds.unwrap_or(default.quarantine.as_secs());
        if seconds > QUARANTINE_MAX {
            return Err(Problem::usage("a quarantine of more than ten years").hint("give days, such as 7d"));
        }
        let dry_run = self.dry_run || self.explain.is_some();
        Ok(CollectOptions {
            dry_run,
            reclaim_now: self.reclaim_now,
            quarantine: Duration::from_secs(seconds),
            threshold,
        })
    }
}

/// Collects, rehearses it or explains packs.
pub fn collect(
    repository: &Repository,
    request: &CollectRequest,
    progress: &Arc<Progress>,
) -> Result<CollectResult, Problem> {
    let started = Instant::now();
    let options = request.options()?;
    let failed = |error| Problem::from_collect(&error);
    let explained = match &request.explain {
        None => None,
        Some(Explain::All) => Some(repository.explain_packs(&options, progress).map_err(failed)?),
        Some(Explain::Pack(prefix)) => Some(vec![repository.explain_pack(prefix, &options, progress).map_err(failed)?]),
    };
    let report = match explained {
        None => repository.collect(&options, progress).map_err(failed)?,
        Some(_) => CollectReport { dry_run: true, ..CollectReport::default() },
    };
    Ok(CollectResult { report, explained, seconds: started.elapsed().as_secs_f64() })
}

/// What can be said without the key.
pub fn rehearse_keyless(keyless: &Keyless) -> Result<KeylessResult, Problem> {
    let report = keyless.rehearse_collect().map_err(|error| Problem::from_collect(&error))?;
    Ok(KeylessResult { keyless: true, report })
}
