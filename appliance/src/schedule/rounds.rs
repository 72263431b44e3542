//! One run of a policy: backups, then retention, drills, verify and collect.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use futures_util::stream;

use super::alerts::Alert;
use super::door::{Door, Failed};
use super::machines::{DomainSet, Drills};
use super::plan::back_off;
use super::policy::{Policy, Program};
use super::{RunResult, Schedules, Step, program};
use crate::app::App;
use crate::capture::{BackupRequest, MachineView};
use crate::catalog::ListedPoint;
use crate::cli::segment;
use crate::drill::{DrillReport, DrillRequest, DrillResult};
use crate::problem::{Kind, Problem};
use crate::retention::Rules;
use crate::retention::prune::{PruneRequest, PruneResult};

/// A run.
#[derive(Debug)]
pub(super) struct Rounds {
    door: Door,
    schedules: Arc<Schedules>,
    name: String,
    policy: Arc<Policy>,
    /// What has failed that nobody is told of yet, a line each.
    failed: Mutex<Vec<String>>,
}

impl Rounds {
    pub fn new(schedules: &Arc<Schedules>, app: &Arc<App>, name: &str, policy: Arc<Policy>) -> Rounds {
        let (door, schedules) = (Door::new(app, name), schedules.clone());
        Rounds { door, schedules, name: name.to_owned(), policy, failed: Mutex::default() }
    }

    pub async fn run(self) {
        let done = self.back_up_all().await;
        if let Some(rules) = &self.policy.retention {
            for machine in &done {
                self.step("prune", Some(machine), || self.prune(rules, machine)).await;
            }
        }
        if let Some(drills) = &self.policy.drills {
            self.drill_all(drills, done).await;
        }
        if let Some(request) = &self.policy.verify {
            self.step("verify", None, || self.work("/api/v1/verify", request)).await;
        }
        if self.policy.collect {
            let request = serde_json::json!({});
            self.step("collect", None, || self.work("/api/v1/collect", &request)).await;
        }
        let good = self.schedules.change(&self.name, |kept| {
            let run = kept.last.as_mut()?;
            let good = run.steps.iter().all(|step| step.result == RunResult::Done);
            run.result = if good { RunResult::Done } else { RunResult::Failed };
            run.ended = Some(self.schedules.clock.now());
            Some(good)
        });
        // The runner may wait for this one to end.
        self.schedules.changed.notify_one();
        match good.flatten() {
            Some(true) => tracing::info!(policy = self.name, "a run is done"),
            _ => tracing::error!(policy = self.name, "a run failed"),
        }
        let failed = self.failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !failed.is_empty() {
            self.schedules.alerts.tell(&Alert::run_failed(&self.name, &failed)).await;
        }
    }

    /// Backs up all machines, and returns those that were.
    async fn back_up_all(&self) -> Vec<String> {
        let mut backups = self.policy.backups.clone();
        if let Some(set) = &self.policy.domains {
            let found = Mutex::new(Vec::new());
            let find = || async {
                let domains = self.find(set).await?;
                *found.lock().unwrap_or_else(PoisonError::into_inner) = domains;
                Ok(None)
            };
            self.step("find", None, find).await;
            backups.extend(found.into_inner().unwrap_or_else(PoisonError::into_inner));
        }
        let mut done = Vec::new();
        for backup in &backups {
            if self.step("backup", Some(&backup.machine), || self.back_up(backup)).await {
                done.push(backup.machine.clone());
            }
        }
        done
    }

    async fn find(&self, set: &DomainSet) -> Result<Vec<BackupRequest>, Failed> {
        let on = segment(&format!("libvirt:{}", set.uri));
        let found: Vec<MachineView> = self.door.get(&format!("/api/v1/machines?on={on}")).await?;
        let mut backups = set.backups(&found)?;
        // A machine that has a section of its own is backed up as that says.
        backups.retain(|backup| self.policy.backups.iter().all(|own| own.machine != backup.machine));
        Ok(backups)
    }

    /// Drills the newest point of each machine that was backed up, or of all, if that is not what the policy is for.
    async fn drill_all(&self, drills: &Drills, done: Vec<String>) {
        let machines = Mutex::new(done);
        if !self.policy.backs_up() {
            let list = || async {
                let points: Vec<ListedPoint> = self.door.get("/api/v1/points").await?;
                let named = points.into_iter().filter_map(|point| match point {
                    ListedPoint::Whole(point) => Some(point.machine),
                    ListedPoint::Damaged(_) => None,
                });
                let named: std::collections::BTreeSet<String> = named.collect();
                *machines.lock().unwrap_or_else(PoisonError::into_inner) = named.into_iter().collect();
                Ok(None)
            };
            self.step("find", None, list).await;
        }
        let mut machines = machines.into_inner().unwrap_or_else(PoisonError::into_inner);
        machines.retain(|machine| drills.are_for(machine));
        let each = stream::iter(machines).for_each_concurrent(drills.parallel, |machine| async move {
            let request = drills.of(&machine);
            self.step("drill", Some(&machine), || self.drill(&machine, &request)).await;
        });
        each.await;
    }

    /// A part of the run, tried as often as the policy says. Returns whether it went well.
    async fn step<F: Future<Output = Result<Option<u64>, Failed>>>(
        &self,
        what: &str,
        machine: Option<&str>,
        attempt: impl Fn() -> F,
    ) -> bool {
        let mut step = Step {
            what: what.to_owned(),
            machine: machine.map(ToOwned::to_owned),
            job: None,
            tries: 0,
            result: RunResult::Running,
            problem: None,
        };
        let place = self.show(None, &step);
        loop {
            step.tries += 1;
            match attempt().await {
                Ok(job) => {
                    (step.job, step.result, step.problem) = (job, RunResult::Done, None);
                    self.show(place, &step);
                    return true;
                }
                Err(Failed { job, problem, judged }) => {
                    tracing::warn!(policy = self.name, what, machine, tries = step.tries, %problem, "this failed");
                    let line = problem.to_string().replace('\n', "; ");
                    // Trying again makes no sense of what makes none.
                    let hopeless = judged || matches!(problem.kind, Kind::Usage | Kind::Damage);
                    let last = step.tries > self.policy.retries || hopeless;
                    if last {
                        step.result = RunResult::Failed;
                    }
                    if last && !judged {
                        let of = machine.map_or(String::new(), |machine| format!(" of {machine}"));
                        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.push(format!("{what}{of}: {line}"));
                    }
                    (step.job, step.problem) = (job.or(step.job), Some(line));
                    self.show(place, &step);
                    if last {
                        return false;
                    }
                    tokio::time::sleep(back_off(self.policy.retry_delay, step.tries)).await;
                }
            }
        }
    }

    /// Shows a step in its place among those of the run, or as a new one, and returns its place.
    fn show(&self, place: Option<usize>, step: &Step) -> Option<usize> {
        let shown = self.schedules.change(&self.name, |kept| {
            let steps = &mut kept.last.as_mut()?.steps;
            match place.and_then(|place| steps.get_mut(place)) {
                Some(there) => *there = step.clone(),
                None => steps.push(step.clone()),
            }
            place.or(steps.len().checked_sub(1))
        });
        shown.flatten()
    }

    async fn back_up(&self, backup: &BackupRequest) -> Result<Option<u64>, Failed> {
        let mut environment = vec![
            ("LIFEBOAT_POLICY", self.name.clone()),
            ("LIFEBOAT_MACHINE", backup.machine.clone()),
            ("LIFEBOAT_STAGE", "before".to_owned()),
        ];
        let result = match self.hook("the command before", self.policy.before.as_ref(), &environment).await {
            Ok(()) => self.door.job("/api/v1/points", backup).await,
            Err(problem) => Err(problem.into()),
        };
        let (told, point) = match &result {
            Ok((_, value)) => ("done", value["point"].as_str().unwrap_or_default().to_owned()),
            Err(_) => ("failed", String::new()),
        };
        environment[2].1 = "after".to_owned();
        environment.extend([("LIFEBOAT_RESULT", told.to_owned()), ("LIFEBOAT_POINT", point)]);
        let after = self.hook("the command after", self.policy.after.as_ref(), &environment).await;
        let (job, _) = result?;
        after.map_err(|problem| Failed::of_job(job, problem))?;
        Ok(Some(job))
    }

    async fn hook(&self, what: &str, hook: Option<&Program>, environment: &[(&str, String)]) -> Result<(), Problem> {
        let Some(hook) = hook else { return Ok(()) };
        program::run(what, hook, environment, "", self.policy.hook_deadline).await
    }

    async fn prune(&self, rules: &Rules, machine: &str) -> Result<Option<u64>, Failed> {
        let machines = [machine.to_owned()].into();
        let request = PruneRequest { rules: rules.clone(), machines, ..PruneRequest::default() };
        let result: PruneResult = self.door.post("/api/v1/prune", &request).await?;
        match result.failed {
            0 => Ok(None),
            failed => {
                Err(Problem::new(Kind::Failed, format!("{failed} recovery points could not be forgotten")).into())
            }
        }
    }

    async fn drill(&self, machine: &str, request: &DrillRequest) -> Result<Option<u64>, Failed> {
        let (job, result) = self.door.job("/api/v1/drills", request).await?;
        let reports: Vec<DrillReport> = serde_json::from_value(result)
            .map_err(|error| Failed::of_job(job, Problem::failed("cannot read what the drill found", &error)))?;
        let Some(report) = reports.into_iter().find(|report| report.result == DrillResult::Failed) else {
            return Ok(Some(job));
        };
        self.schedules.alerts.tell(&Alert::drill_failed(&self.name, &report)).await;
        let reason = report.reason.unwrap_or_default();
        let problem = Problem::new(Kind::Failed, format!("{machine} does not come up: {}: {reason}", report.stage));
        Err(Failed { job: Some(job), problem, judged: true })
    }

    /// A job about the whole repository.
    async fn work(&self, path: &str, request: &impl serde::Serialize) -> Result<Option<u64>, Failed> {
        let (job, result) = self.door.job(path, request).await?;
        // A verify that finds damage has done what it was asked for.
        if result["ok"] == serde_json::Value::Bool(false) {
            let problem = Problem::new(Kind::Damage, "damage was found").hint(format!("job {job} names it"));
            return Err(Failed::of_job(job, problem));
        }
        Ok(Some(job))
    }
}
