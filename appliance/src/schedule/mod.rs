//! Schedules: policies that run by themselves. [`plan`] says when, [`policy`] what, [`runner`] does it through the API as
//! anybody else would, [`alerts`] tells who has to know.

pub mod alerts;
pub mod clock;
mod door;
pub mod hooks;
pub mod machines;
pub mod plan;
pub mod policy;
mod program;
mod record;
mod rounds;
pub mod runner;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use self::alerts::Alerts;
use self::clock::Clock;
use self::plan::{Past, Verdict};
use self::policy::Policy;
use self::record::Kept;
use crate::problem::Problem;

/// How a run, or a part of it, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RunResult {
    /// It is at work.
    Running,
    /// All went well.
    Done,
    /// Something failed.
    Failed,
    /// The process that ran it ended first.
    Interrupted,
}

/// A part of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Step {
    /// `find`, `backup`, `prune`, `drill`, `verify` or `collect`.
    pub what: String,
    /// The machine, if it is about one.
    pub machine: Option<String>,
    /// The last job that was started for it.
    pub job: Option<u64>,
    /// How often it was tried.
    pub tries: u32,
    /// How it ended.
    pub result: RunResult,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A run of a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Run {
    /// The time it was due; absent if somebody asked for it.
    pub due: Option<DateTime<Utc>>,
    /// When it began.
    pub started: DateTime<Utc>,
    /// When it ended.
    pub ended: Option<DateTime<Utc>>,
    /// How it stands.
    pub result: RunResult,
    /// Its parts so far.
    pub steps: Vec<Step>,
}

/// A policy as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScheduleView {
    /// The policy.
    pub name: String,
    /// The machines it backs up, by name or pattern.
    pub machines: Vec<String>,
    /// When it begins next; absent while it runs, or if it is never due.
    pub next: Option<DateTime<Utc>>,
    /// The run at work, or the last one.
    pub last: Option<Run>,
    /// The last time that was skipped, and why.
    pub skipped: Option<(DateTime<Utc>, String)>,
}

/// The policies of a service.
#[derive(Debug)]
pub struct Schedules {
    policies: BTreeMap<String, Arc<Policy>>,
    path: PathBuf,
    kept: Mutex<BTreeMap<String, Kept>>,
    alerts: Alerts,
    clock: Clock,
    /// Somebody has changed what the runner waits for.
    changed: Notify,
}

impl Schedules {
    /// Policies, and what the state folder knows of their past. A run that another process had begun was interrupted; its
    /// time is not handled again unless the policy makes up for what it missed.
    pub fn open(policies: BTreeMap<String, Policy>, alerts: Alerts, path: PathBuf, clock: Clock) -> Schedules {
        let now = clock.now();
        let mut kept = record::read(&path);
        kept.retain(|name, _| policies.contains_key(name));
        for name in policies.keys() {
            let kept = kept.entry(name.clone()).or_insert_with(|| Kept::new(now));
            if let Some(run) = kept.last.as_mut().filter(|run| run.result == RunResult::Running) {
                run.result = RunResult::Interrupted;
                run.ended = Some(now);
                for step in run.steps.iter_mut().filter(|step| step.result == RunResult::Running) {
                    step.result = RunResult::Interrupted;
                }
                // Its time has not been handled: it is missed.
                if let (plan::Missed::Run, Some(before)) = (policies[name].plan.missed, kept.handled_before) {
                    kept.handled = before;
                }
            }
        }
        let policies = policies.into_iter().map(|(name, policy)| (name, Arc::new(policy))).collect();
        let schedules = Schedules { policies, path, kept: Mutex::new(kept), alerts, clock, changed: Notify::new() };
        schedules.store(&schedules.lock());
        schedules
    }

    /// All policies.
    pub fn list(&self) -> Vec<ScheduleView> {
        let now = self.clock.now();
        let kept = self.lock();
        let views = self.policies.iter().filter_map(|(name, policy)| {
            let kept = kept.get(name)?;
            let running = kept.is_running();
            let next = match policy.plan.decide(name, kept.past(), running, now) {
                _ if running => None,
                Verdict::Wait(next) => Some(next),
                Verdict::Run(_) | Verdict::Skip(..) => Some(now),
                Verdict::Never => None,
            };
            Some(ScheduleView {
                name: name.clone(),
                machines: policy.machines().map(ToOwned::to_owned).collect(),
                next,
                last: kept.last.clone(),
                skipped: kept.skipped.clone(),
            })
        });
        views.collect()
    }

    /// One policy.
    pub fn view(&self, name: &str) -> Result<ScheduleView, Problem> {
        let found = self.list().into_iter().find(|view| view.name == name);
        found.ok_or_else(|| Schedules::missing(name))
    }

    /// What to say when there is no policy of this name.
    pub fn missing(name: &str) -> Problem {
        Problem::not_found(format!("there is no policy {name}")).hint("`lifeboat schedule list` lists them")
    }

    /// Changes what is known of a policy, and keeps it.
    fn change<T>(&self, name: &str, with: impl FnOnce(&mut Kept) -> T) -> Option<T> {
        let mut kept = self.lock();
        let result = kept.get_mut(name).map(with);
        self.store(&kept);
        result
    }

    /// What cannot be kept is no reason not to back up.
    fn store(&self, kept: &BTreeMap<String, Kept>) {
        if let Err(error) = record::write(&self.path, kept) {
            tracing::error!(error = %crate::problem::chain(&error), "cannot keep when policies have run");
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn past(&self) -> Past {
        Past { handled: self.handled, ended: self.last.as_ref().and_then(|run| run.ended) }
    }

    fn is_running(&self) -> bool {
        self.last.as_ref().is_some_and(|run| run.result == RunResult::Running)
    }
}
