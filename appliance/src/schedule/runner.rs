//! Runs policies when they are due. Every step is a request of the API, so it is a job, is recorded in the audit log, and
//! is refused where it would be refused to anybody.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, header};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use tower::ServiceExt;

use super::alerts::{self, Alert};
use super::plan::{Verdict, back_off};
use super::policy::{Policy, Program};
use super::{Run, RunResult, ScheduleView, Schedules, Step, program};
use crate::app::App;
use crate::capture::BackupRequest;
use crate::jobs::{JobView, Outcome};
use crate::problem::{Kind, Problem};
use crate::retention::Rules;
use crate::retention::prune::{PruneRequest, PruneResult};

/// The clock may be set, so nobody sleeps for longer.
const LOOK: Duration = Duration::from_secs(30);
/// How often machines and file systems are looked after.
const WATCH: Duration = Duration::from_secs(60);
/// Longest answer that is read.
const ANSWER_MAX: usize = 16 << 20;

/// Runs what is due, for as long as it is polled.
pub async fn run(schedules: Arc<Schedules>, app: Arc<App>) {
    let watch = async {
        loop {
            alerts::watch(&schedules.alerts, &schedules.policies, &app, Utc::now()).await;
            tokio::time::sleep(WATCH).await;
        }
    };
    let work = async {
        loop {
            let now = Utc::now();
            let names: Vec<String> = schedules.policies.keys().cloned().collect();
            let waits = names.iter().map(|name| step(&schedules, &app, name, now));
            let wait = waits.min().unwrap_or(LOOK).min(LOOK);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = schedules.changed.notified() => {}
            }
        }
    };
    tokio::join!(watch, work);
}

/// Begins or skips what is due, and returns how long there is nothing to do.
fn step(schedules: &Arc<Schedules>, app: &Arc<App>, name: &str, now: DateTime<Utc>) -> Duration {
    let Some(policy) = schedules.policies.get(name) else { return LOOK };
    loop {
        let verdict = {
            let kept = schedules.lock();
            let Some(kept) = kept.get(name) else { return LOOK };
            policy.plan.decide(name, kept.past(), kept.is_running(), now)
        };
        match verdict {
            Verdict::Wait(until) => return (until - now).to_std().unwrap_or_default().max(Duration::from_millis(10)),
            Verdict::Never => return LOOK,
            Verdict::Run(due) => {
                // It runs already only if somebody was faster.
                let _ = begin(schedules, app, name, Some(due));
                return Duration::from_millis(10);
            }
            Verdict::Skip(due, why) => {
                tracing::warn!(policy = name, %due, why, "skipped");
                schedules.change(name, |kept| {
                    kept.handled = due;
                    kept.skipped = Some((due, why.to_owned()));
                });
            }
        }
    }
}

/// Begins a run: for a time that is due, or because somebody asks for it.
pub fn begin(
    schedules: &Arc<Schedules>,
    app: &Arc<App>,
    name: &str,
    due: Option<DateTime<Utc>>,
) -> Result<ScheduleView, Problem> {
    let Some(policy) = schedules.policies.get(name).cloned() else { return Err(Schedules::missing(name)) };
    let now = Utc::now();
    let begun = schedules.change(name, |kept| {
        if kept.is_running() {
            return false;
        }
        kept.handled_before = Some(kept.handled);
        kept.handled = due.unwrap_or(kept.handled);
        kept.last = Some(Run { due, started: now, ended: None, result: RunResult::Running, steps: Vec::new() });
        true
    });
    if begun != Some(true) {
        return Err(Problem::refused(format!("policy {name} runs already"))
            .hint("`lifeboat schedule list` shows how far it is"));
    }
    tracing::info!(policy = name, ?due, "a run begins");
    let runner = Runner {
        door: crate::api::of_policy(app, name),
        schedules: schedules.clone(),
        app: app.clone(),
        name: name.to_owned(),
        policy,
    };
    tokio::spawn(runner.run());
    schedules.view(name, now)
}

struct Runner {
    door: Router,
    schedules: Arc<Schedules>,
    app: Arc<App>,
    name: String,
    policy: Arc<Policy>,
}

impl Runner {
    async fn run(self) {
        let mut done = Vec::new();
        for backup in &self.policy.backups {
            if self.step("backup", Some(&backup.machine), || self.back_up(backup)).await {
                done.push(backup.machine.clone());
            }
        }
        if let Some(rules) = &self.policy.retention {
            for machine in &done {
                self.step("prune", Some(machine), || self.prune(rules, machine)).await;
            }
        }
        if let Some(request) = &self.policy.verify {
            self.step("verify", None, || self.job("/api/v1/verify", request)).await;
        }
        if self.policy.collect {
            let request = serde_json::json!({});
            self.step("collect", None, || self.job("/api/v1/collect", &request)).await;
        }
        let failed = self.schedules.change(&self.name, |kept| {
            let run = kept.last.as_mut()?;
            let failed: Vec<String> = run
                .steps
                .iter()
                .filter(|step| step.result != RunResult::Done)
                .map(|step| {
                    let of = step.machine.as_ref().map_or(String::new(), |machine| format!(" of {machine}"));
                    format!("{}{of}: {}", step.what, step.problem.as_deref().unwrap_or("it did not end well"))
                })
                .collect();
            run.result = if failed.is_empty() { RunResult::Done } else { RunResult::Failed };
            run.ended = Some(Utc::now());
            Some(failed)
        });
        // The runner may wait for this one to end.
        self.schedules.changed.notify_one();
        match failed.flatten().filter(|failed| !failed.is_empty()) {
            None => tracing::info!(policy = self.name, "a run is done"),
            Some(failed) => {
                tracing::error!(policy = self.name, failed = failed.join("; "), "a run failed");
                let alert = Alert::run_failed(&self.name, &failed);
                self.schedules.alerts.tell(&alert).await;
            }
        }
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
        self.show(&step, Show::New);
        loop {
            step.tries += 1;
            match attempt().await {
                Ok(job) => {
                    (step.job, step.result, step.problem) = (job, RunResult::Done, None);
                    self.show(&step, Show::Again);
                    return true;
                }
                Err(Failed { job, problem }) => {
                    tracing::warn!(policy = self.name, what, machine, tries = step.tries, %problem, "this failed");
                    (step.job, step.problem) = (job.or(step.job), Some(problem.to_string().replace('\n', "; ")));
                    // Trying again makes no sense of what makes none.
                    let hopeless = matches!(problem.kind, Kind::Usage | Kind::Damage);
                    if step.tries > self.policy.retries || hopeless {
                        step.result = RunResult::Failed;
                        self.show(&step, Show::Again);
                        return false;
                    }
                    self.show(&step, Show::Again);
                    tokio::time::sleep(back_off(self.policy.retry_delay, step.tries)).await;
                }
            }
        }
    }

    fn show(&self, step: &Step, how: Show) {
        self.schedules.change(&self.name, |kept| {
            let Some(run) = kept.last.as_mut() else { return };
            match (how, run.steps.last_mut()) {
                (Show::Again, Some(last)) => *last = step.clone(),
                _ => run.steps.push(step.clone()),
            }
        });
    }

    async fn back_up(&self, backup: &BackupRequest) -> Result<Option<u64>, Failed> {
        let mut environment = vec![
            ("LIFEBOAT_POLICY", self.name.clone()),
            ("LIFEBOAT_MACHINE", backup.machine.clone()),
            ("LIFEBOAT_STAGE", "before".to_owned()),
        ];
        let result = match self.hook("the command before", self.policy.before.as_ref(), &environment).await {
            Ok(()) => self.job_with_result("/api/v1/points", backup).await,
            Err(problem) => Err(Failed { job: None, problem }),
        };
        let (told, point) = match &result {
            Ok((_, value)) => ("done", value["point"].as_str().unwrap_or_default().to_owned()),
            Err(_) => ("failed", String::new()),
        };
        environment[2].1 = "after".to_owned();
        environment.extend([("LIFEBOAT_RESULT", told.to_owned()), ("LIFEBOAT_POINT", point)]);
        let after = self.hook("the command after", self.policy.after.as_ref(), &environment).await;
        let (job, _) = result?;
        after.map_err(|problem| Failed { job: Some(job), problem })?;
        Ok(Some(job))
    }

    async fn hook(&self, what: &str, hook: Option<&Program>, environment: &[(&str, String)]) -> Result<(), Problem> {
        let Some(hook) = hook else { return Ok(()) };
        program::run(what, hook, environment, "", self.policy.hook_deadline).await
    }

    async fn prune(&self, rules: &Rules, machine: &str) -> Result<Option<u64>, Failed> {
        let machines = [machine.to_owned()].into();
        let request = PruneRequest { rules: rules.clone(), machines, ..PruneRequest::default() };
        let value = self.ask("/api/v1/prune", &request).await?;
        let result: PruneResult =
            serde_json::from_value(value).map_err(|error| Problem::failed("cannot read the answer", &error))?;
        match result.failed {
            0 => Ok(None),
            failed => {
                Err(Problem::new(Kind::Failed, format!("{failed} recovery points could not be forgotten")).into())
            }
        }
    }

    async fn job(&self, path: &str, request: &impl Serialize) -> Result<Option<u64>, Failed> {
        let (job, result) = self.job_with_result(path, request).await?;
        // A verify that finds damage has done what it was asked for.
        if result["ok"] == Value::Bool(false) {
            let problem = Problem::new(Kind::Damage, "damage was found").hint(format!("job {job} names it"));
            return Err(Failed { job: Some(job), problem });
        }
        Ok(Some(job))
    }

    /// Starts a job and waits for its end.
    async fn job_with_result(&self, path: &str, request: &impl Serialize) -> Result<(u64, Value), Failed> {
        let value = self.ask(path, request).await?;
        let view: JobView =
            serde_json::from_value(value).map_err(|error| Problem::failed("cannot read the answer", &error))?;
        let id = view.id;
        let job = self.app.jobs.get(id)?;
        let mut outcome = job.watch();
        // The job is held, so its end is told.
        let ended = outcome.wait_for(|outcome| *outcome != Outcome::Running).await;
        let ended = ended.map(|ended| ended.clone()).unwrap_or(Outcome::Interrupted);
        match ended {
            Outcome::Done { result } => Ok((id, result)),
            Outcome::Failed { problem } => Err(Failed { job: Some(id), problem }),
            Outcome::Running | Outcome::Interrupted => {
                Err(Failed { job: Some(id), problem: Problem::new(Kind::Failed, "the job did not end") })
            }
        }
    }

    async fn ask(&self, path: &str, body: &impl Serialize) -> Result<Value, Problem> {
        let failed = |error: &(dyn std::error::Error + 'static)| Problem::failed("cannot ask the API", error);
        let body = serde_json::to_vec(body).map_err(|error| failed(&error))?;
        let request =
            Request::builder().method(Method::POST).uri(path).header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body)).map_err(|error| failed(&error))?;
        let response = match self.door.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let good = response.status().is_success();
        let bytes = axum::body::to_bytes(response.into_body(), ANSWER_MAX).await.map_err(|error| failed(&error))?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| failed(&error))?;
        if good {
            return Ok(value);
        }
        Err(serde_json::from_value::<Problem>(value).unwrap_or_else(|error| failed(&error)))
    }
}

/// Whether a step is new or shown already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Show {
    New,
    Again,
}

/// A try that failed, and the job that it was, if it came that far.
struct Failed {
    job: Option<u64>,
    problem: Problem,
}

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Failed {
        Failed { job: None, problem }
    }
}
