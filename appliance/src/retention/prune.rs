//! `prune`: decides, tells why, and forgets.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chrono::{DateTime, Local, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Candidate, Decision, Filter, Reason, Rules, decide};
use crate::app::App;
use crate::catalog::{DamagedPoint, PointSummary};
use crate::forget::{self, Uses};
use crate::problem::Problem;

/// What to prune.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PruneRequest {
    /// What is to be kept.
    pub rules: Rules,
    /// Only these machines' points; all if empty.
    pub machines: BTreeSet<String>,
    /// Only points that have all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Points of a machine that differ in this label's value are looked at by themselves.
    pub group_by: Option<String>,
    /// Only tell.
    pub dry_run: bool,
}

/// What became, or would become, of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// It stays.
    Keep,
    /// It would be forgotten.
    Forget,
    /// It is forgotten.
    Forgotten,
    /// It was to be forgotten and is still there.
    Failed,
}

/// A decision as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Told {
    /// The point.
    pub id: String,
    /// Whose it is.
    pub machine: String,
    /// When it was made.
    pub time: DateTime<Utc>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Bytes that it added to the repository.
    pub stored: u64,
    /// What becomes of it.
    pub fate: Fate,
    /// All that keeps it, or why nothing does.
    pub reasons: Vec<String>,
}

/// What a prune did, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PruneResult {
    /// Whether nothing was done.
    pub dry_run: bool,
    /// The moment it was decided at.
    pub now: DateTime<Utc>,
    /// The distance of the local calendar from UTC at that moment.
    pub utc_offset: String,
    /// How many points stay.
    pub kept: usize,
    /// How many points are forgotten, or would be.
    pub forgotten: usize,
    /// How many were to be forgotten and are still there.
    pub failed: usize,
    /// Bytes that the forgotten points had added: `collect` frees up to this many.
    pub stored: u64,
    /// Every point, by machine, newest first.
    pub points: Vec<Told>,
    /// Points that cannot be read. They are never pruned.
    pub damaged: Vec<DamagedPoint>,
}

impl PruneRequest {
    /// Refuses what would keep nothing, or makes no sense.
    pub fn check(&self) -> Result<(), Problem> {
        self.rules.check()?;
        if self.rules.is_empty() {
            return Err(Problem::usage("no rule says what to keep").hint(
                "give --keep-last, --keep-hourly, --keep-daily, --keep-weekly, --keep-monthly, --keep-yearly, \
                 --keep-within or --keep-label",
            ));
        }
        Ok(())
    }
}

/// Prunes. Points go oldest first, one by one: whatever cuts it off, the newest of them are left.
pub fn prune(app: &App, request: &PruneRequest) -> Result<PruneResult, Problem> {
    request.check()?;
    let listing = app.listing()?;
    if let Some(machine) = request.machines.iter().find(|name| !listing.points.iter().any(|p| p.machine == **name)) {
        return Err(Problem::not_found(format!("machine {machine} has no recovery point"))
            .hint("`lifeboat points` lists all machines"));
    }
    let now = Utc::now();
    let uses = Uses::of(app)?;
    // Groups are of one machine each, so the others' points have no part in it.
    let wanted = |machine: &str| request.machines.is_empty() || request.machines.contains(machine);
    let points: Vec<&PointSummary> =
        listing.points.iter().map(Arc::as_ref).filter(|point| wanted(&point.machine)).collect();
    let candidates: Vec<Candidate> = points.iter().map(|point| candidate(point, &uses, now)).collect();
    let filter = Filter {
        machines: request.machines.clone(),
        labels: request.labels.clone(),
        group_by: request.group_by.clone(),
    };
    let decisions = decide(&candidates, &request.rules, &filter, now, &Local);
    let mut told: Vec<Told> = decisions.iter().map(|decision| tell(points[decision.at], decision)).collect();
    if !request.dry_run {
        // The points are listed oldest first, and so are the decisions.
        for (decision, told) in decisions.iter().zip(&mut told).filter(|(decision, _)| decision.keep.is_empty()) {
            let heir = &points[decision.newest].id;
            match forget::forget_one(app, &told.id, Some(heir)) {
                Ok(()) => told.fate = Fate::Forgotten,
                Err(problem) => {
                    told.fate = Fate::Failed;
                    told.reasons.push(problem.to_string());
                }
            }
        }
    }
    told.sort_by(|a, b| (&a.machine, b.time, &b.id).cmp(&(&b.machine, a.time, &a.id)));
    let going = |told: &&Told| matches!(told.fate, Fate::Forget | Fate::Forgotten);
    Ok(PruneResult {
        dry_run: request.dry_run,
        now,
        utc_offset: now.with_timezone(&Local).offset().to_string(),
        kept: told.iter().filter(|told| told.fate == Fate::Keep).count(),
        forgotten: told.iter().filter(going).count(),
        failed: told.iter().filter(|told| told.fate == Fate::Failed).count(),
        stored: told.iter().filter(going).map(|told| told.stored).sum(),
        points: told,
        damaged: listing.damaged,
    })
}

fn candidate(point: &PointSummary, uses: &Uses, now: DateTime<Utc>) -> Candidate {
    let mut holds = Vec::new();
    if point.protection_damaged {
        holds.push(Reason::ProtectionDamaged);
    } else if point.protected && point.protected_until.is_none_or(|until| now < until) {
        holds.push(Reason::Protected(point.protected_until));
    }
    holds.extend(uses.of_point(&point.id).iter().cloned().map(Reason::Held));
    Candidate {
        id: point.id.clone(),
        machine: point.machine.clone(),
        time: point.time,
        labels: point.labels.clone(),
        holds,
    }
}

fn tell(point: &PointSummary, decision: &Decision) -> Told {
    let keeps = !decision.keep.is_empty();
    Told {
        id: point.id.clone(),
        machine: point.machine.clone(),
        time: point.time,
        labels: point.labels.clone(),
        stored: point.stored,
        fate: if keeps { Fate::Keep } else { Fate::Forget },
        reasons: if keeps {
            decision.keep.iter().map(ToString::to_string).collect()
        } else {
            decision.passed_over.clone()
        },
    }
}
