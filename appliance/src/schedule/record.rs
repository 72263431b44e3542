//! What is kept of each policy's past. Specification: docs/format/schedules.md

use std::collections::BTreeMap;
use std::path::Path;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::Run;
use crate::journal::{self, JournalError};

const VERSION: u32 = 1;

/// A policy's past.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// The last time that was run or skipped; that the policy came to be, at the beginning.
    pub handled: DateTime<Utc>,
    /// What that was before the last run.
    pub handled_before: Option<DateTime<Utc>>,
    /// The last run.
    pub last: Option<Run>,
    /// The last time that was skipped, and why.
    pub skipped: Option<(DateTime<Utc>, String)>,
}

impl Kept {
    pub fn new(now: DateTime<Utc>) -> Kept {
        Kept { handled: now, handled_before: None, last: None, skipped: None }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
enum Record {
    Schedules {
        version: u32,
    },
    Policy {
        name: String,
        #[serde(flatten)]
        kept: Kept,
    },
}

pub(super) fn write(path: &Path, kept: &BTreeMap<String, Kept>) -> Result<(), JournalError> {
    let head = std::iter::once(Record::Schedules { version: VERSION });
    let policies = kept.iter().map(|(name, kept)| Record::Policy { name: name.clone(), kept: kept.clone() });
    journal::replace(path, head.chain(policies))
}

/// What cannot be read is forgotten: policies then begin anew, and nothing is made up for.
pub(super) fn read(path: &Path) -> BTreeMap<String, Kept> {
    let records = journal::read_table::<Record>(path).unwrap_or_else(|error| {
        tracing::error!(error = %crate::problem::chain(&error), "what policies have run is not known; they begin anew");
        Vec::new()
    });
    let policies = records.into_iter().filter_map(|record| match record {
        Record::Policy { name, kept } => Some((name, kept)),
        Record::Schedules { .. } => None,
    });
    policies.collect()
}
