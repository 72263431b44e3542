//! Commits of a recovery every so often, and what is known of its commits.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RecoverRequest;
use super::commit::{CommitRequest, Unchanged, Wish};
use super::one::Recovery;
use super::record::Record;
use crate::capture::check_labels;
use crate::jobs::{Outcome, Subject};
use crate::problem::Problem;

/// More often a guest would do little else.
const EVERY_MIN: u64 = 5;
/// Who commits more seldom does it by hand.
const EVERY_MAX: u64 = 366 * 24 * 3600;
/// After a restart a commit that is due waits until the guest has had its disks back for a moment.
const BREATH: Duration = Duration::from_secs(2);
/// The clock is looked at so often, in case it was set.
const LOOK: Duration = Duration::from_secs(60);

/// How often a recovery is committed, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Schedule {
    /// Seconds from one commit to the next.
    pub every_seconds: u64,
    /// Whether the guest is asked to hold still.
    #[serde(default)]
    pub consistency: Wish,
    /// Kept with each point.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What is to become of a recovery's schedule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScheduleRequest {
    /// The new one; none ends it.
    pub schedule: Option<Schedule>,
}

impl Schedule {
    /// Refuses what makes no sense.
    pub fn check(&self) -> Result<(), Problem> {
        if !(EVERY_MIN..=EVERY_MAX).contains(&self.every_seconds) {
            return Err(Problem::usage(format!("a recovery cannot be committed every {} seconds", self.every_seconds))
                .hint("give 5s at least, such as 10m or 1h"));
        }
        check_labels(&self.labels)
    }

    fn every(&self) -> TimeDelta {
        TimeDelta::seconds(i64::try_from(self.every_seconds.min(EVERY_MAX)).unwrap_or(i64::MAX / 1000))
    }
}

/// What is known of a recovery's commits.
#[derive(Debug, Default)]
pub(super) struct Commits {
    pub(super) schedule: Option<Schedule>,
    pub(super) last: Option<Committed>,
    /// When one was last begun by the schedule, whatever came of it.
    attempted: Option<DateTime<Utc>>,
    /// Why the last one of the schedule failed.
    problem: Option<String>,
    /// What the disks' counts of changes added up to at the last commit; absent since they are counted anew.
    pub(super) changes: Option<u64>,
}

/// A commit that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(super) struct Committed {
    /// The recovery point.
    pub(super) point: String,
    /// When.
    #[serde(default)]
    pub(super) time: Option<DateTime<Utc>>,
    /// `crash` or `application`.
    #[serde(default)]
    pub(super) consistency: Option<String>,
}

/// A recovery's commits as the API shows them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommitsView {
    /// Seconds from one to the next, if there is a schedule.
    pub every_seconds: Option<u64>,
    /// The last recovery point that was made of it.
    pub last_point: Option<String>,
    /// When.
    pub last_time: Option<DateTime<Utc>>,
    /// `crash` or `application`.
    pub last_consistency: Option<String>,
    /// When the schedule makes the next one, if the guest has written until then.
    pub next_time: Option<DateTime<Utc>>,
    /// Why the last one of the schedule failed.
    pub problem: Option<String>,
}

impl Commits {
    /// Of a recovery that has none yet.
    pub(super) fn begin(request: &RecoverRequest) -> Commits {
        Commits { schedule: request.commits.clone(), ..Commits::default() }
    }

    /// When the next one is due. A commit by hand counts.
    fn due(&self) -> Option<DateTime<Utc>> {
        let schedule = self.schedule.as_ref()?;
        let last = self.last.as_ref().and_then(|last| last.time).max(self.attempted)?;
        last.checked_add_signed(schedule.every())
    }

    pub(super) fn view(&self) -> Option<CommitsView> {
        if self.schedule.is_none() && self.last.is_none() {
            return None;
        }
        Some(CommitsView {
            every_seconds: self.schedule.as_ref().map(|schedule| schedule.every_seconds),
            last_point: self.last.as_ref().map(|last| last.point.clone()),
            last_time: self.last.as_ref().and_then(|last| last.time),
            last_consistency: self.last.as_ref().and_then(|last| last.consistency.clone()),
            next_time: self.due(),
            problem: self.problem.clone(),
        })
    }
}

impl Recovery {
    /// Takes a schedule, or ends it.
    pub(super) async fn set_schedule(self: &Arc<Self>, schedule: Option<Schedule>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        if schedule.is_some() && !driver.state.commits() {
            let (name, state) = (self.name(), driver.state);
            return Err(Problem::refused(format!("recovery {name} is {state}; it cannot be committed any more")));
        }
        driver
            .journal
            .append(&Record::Schedule { schedule: schedule.clone() })
            .map_err(|error| Problem::failed(format!("cannot note how often {} is committed", self.name()), &error))?;
        self.show(|shown| {
            shown.commits.problem = None;
            shown.commits.attempted = schedule.as_ref().map(|_| Utc::now());
            shown.commits.schedule = schedule;
        });
        self.watch(&mut driver);
        Ok(())
    }
}

/// Commits a recovery as its schedule says, as long as it is asked to.
pub(super) async fn run(recovery: Arc<Recovery>) {
    tokio::time::sleep(BREATH).await;
    loop {
        let due = {
            let commits = &mut recovery.lock().commits;
            commits
                .attempted
                .get_or_insert_with(|| commits.last.as_ref().and_then(|last| last.time).unwrap_or_else(Utc::now));
            commits.due()
        };
        let Some(due) = due else { return };
        match (due - Utc::now()).to_std() {
            Ok(wait) if !wait.is_zero() => tokio::time::sleep(wait.min(LOOK)).await,
            // One that has begun goes on to its end, whatever becomes of this.
            _ => drop(tokio::spawn(attempt(recovery.clone())).await),
        }
    }
}

async fn attempt(recovery: Arc<Recovery>) {
    let Some(schedule) = recovery.lock().commits.schedule.clone() else { return };
    recovery.show(|shown| shown.commits.attempted = Some(Utc::now()));
    if recovery.is_as_committed() {
        tracing::debug!(recovery = %recovery.name(), "nothing was written since the last commit");
        return;
    }
    let problem = match commit(&recovery, schedule).await {
        Ok(()) => None,
        Err(problem) => {
            tracing::error!(recovery = %recovery.name(), %problem, "a scheduled commit failed");
            Some(problem.to_string())
        }
    };
    recovery.show(|shown| shown.commits.problem = problem);
}

async fn commit(recovery: &Arc<Recovery>, schedule: Schedule) -> Result<(), Problem> {
    if recovery.lock().committing.is_some() {
        return Ok(()); // one by hand is under way
    }
    let commit = recovery.freeze(schedule.consistency).await?;
    let request = CommitRequest { labels: schedule.labels, consistency: schedule.consistency };
    let subject = Subject::from(format!("recovery {}", recovery.name())).of(&recovery.definition.machine);
    let job = recovery.context.jobs.start("commit", subject, move |progress| {
        let result = commit.run(&request, progress, Unchanged::Skip)?;
        serde_json::to_value(&result).map_err(|error| Problem::failed("cannot write the result", &error))
    });
    let mut watch = job.watch();
    let outcome = watch.wait_for(|outcome| *outcome != Outcome::Running).await;
    match outcome.as_deref() {
        Ok(Outcome::Failed { problem }) => Err(problem.clone()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(seconds, 0)
    }

    fn schedule(every_seconds: u64) -> Schedule {
        Schedule { every_seconds, consistency: Wish::Auto, labels: BTreeMap::new() }
    }

    #[test]
    fn the_next_commit_is_counted_from_the_last_whoever_made_it() {
        let mut commits = Commits::default();
        assert_eq!((commits.due(), commits.view()), (None, None));
        commits.schedule = Some(schedule(600));
        commits.attempted = at(1000);
        assert_eq!(commits.due(), at(1600));
        commits.last = Some(Committed { point: "p".into(), time: at(1300), consistency: None });
        assert_eq!(commits.due(), at(1900));
        assert_eq!(commits.view().and_then(|view| view.next_time), at(1900));
        commits.schedule = None;
        assert_eq!(commits.view().map(|view| (view.next_time, view.last_time)), Some((None, at(1300))));
    }

    #[test]
    fn a_schedule_that_makes_no_sense_is_refused() {
        assert!(schedule(600).check().is_ok() && schedule(EVERY_MAX).check().is_ok());
        for seconds in [0, 4, EVERY_MAX + 1, u64::MAX] {
            assert!(schedule(seconds).check().is_err(), "{seconds}");
        }
        let bad = Schedule { labels: BTreeMap::from([("a b".to_owned(), String::new())]), ..schedule(600) };
        assert!(bad.check().is_err());
    }
}
