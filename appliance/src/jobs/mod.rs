//! Long work: a job has a progress that can be followed, can be cancelled, and ends with a result or a problem.
//! Ended ones are listed until a hundred newer ones have ended, and through restarts: see `log`.

mod log;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use blockstore::Progress;
use chrono::{DateTime, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use self::log::{Ended, Log, Started};
use crate::access::Origin;
use crate::audit::{Audit, Event, quoted};
use crate::events::{Events, Topic};
use crate::problem::Problem;

/// How many ended jobs stay listed.
const KEPT_ENDED: usize = 100;

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Outcome {
    /// Still at work.
    Running,
    /// Ended well.
    Done {
        /// What it brought, by kind of job.
        result: Value,
    },
    /// The process that ran it ended first. It is not started again by itself.
    Interrupted,
    /// Ended badly.
    Failed {
        /// Why.
        problem: Problem,
    },
}

/// What a job works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    text: String,
    machine: Option<String>,
}

impl Subject {
    /// A machine.
    pub fn machine(name: &str) -> Subject {
        Subject::from(format!("machine {name}")).of(name)
    }

    /// The same, which belongs to a machine: who is limited to others does not see the job.
    pub fn of(self, machine: &str) -> Subject {
        Subject { machine: Some(machine.to_owned()), ..self }
    }
}

impl From<String> for Subject {
    fn from(text: String) -> Subject {
        Subject { text, machine: None }
    }
}

impl From<&str> for Subject {
    fn from(text: &str) -> Subject {
        Subject::from(text.to_owned())
    }
}

/// A job as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct JobView {
    /// Number, from 1, never used again in its state folder.
    pub id: u64,
    /// `backup`, `restore`, `verify`.
    pub kind: String,
    /// What it works on, for a person.
    pub subject: String,
    /// The machine that it belongs to, if it does to one.
    #[serde(default)]
    pub machine: Option<String>,
    /// Who started it.
    #[serde(default)]
    pub by: String,
    /// When it began.
    pub started: DateTime<Utc>,
    /// Seconds since then, or that it took.
    pub seconds: f64,
    /// How far it is.
    pub progress: ProgressView,
    /// How it stands.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// How far a job is, in bytes of the disks it works on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProgressView {
    /// All there is to do; 0 while not known.
    pub total: u64,
    /// What is done, holes included.
    pub done: u64,
    /// Bytes read from the source.
    pub read: u64,
    /// Bytes added to the repository, or written to the target.
    pub stored: u64,
}

/// One job.
#[derive(Debug)]
pub struct Job {
    id: u64,
    kind: String,
    subject: Subject,
    by: String,
    /// Of the request that started it.
    key: Option<String>,
    started: DateTime<Utc>,
    clock: Instant,
    ended_after: Mutex<Option<f64>>,
    /// How far one of an earlier process came.
    past: Option<ProgressView>,
    progress: Arc<Progress>,
    outcome: watch::Sender<Outcome>,
}

impl Job {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The machine that it belongs to, if it does to one.
    pub fn machine(&self) -> Option<&str> {
        self.subject.machine.as_deref()
    }

    /// Asks it to stop soon; it then fails as cancelled.
    pub fn cancel(&self) {
        self.progress.cancel();
    }

    /// Follows how it stands.
    pub fn watch(&self) -> watch::Receiver<Outcome> {
        self.outcome.subscribe()
    }

    /// What the API shows.
    pub fn view(&self) -> JobView {
        let ended = *self.ended_after.lock().unwrap_or_else(PoisonError::into_inner);
        JobView {
            id: self.id,
            kind: self.kind.clone(),
            subject: self.subject.text.clone(),
            machine: self.subject.machine.clone(),
            by: self.by.clone(),
            started: self.started,
            seconds: ended.unwrap_or_else(|| self.clock.elapsed().as_secs_f64()),
            progress: self.past.unwrap_or_else(|| ProgressView {
                total: self.progress.total(),
                done: self.progress.done(),
                read: self.progress.read(),
                stored: self.progress.stored(),
            }),
            outcome: self.outcome.borrow().clone(),
        }
    }
}

impl Job {
    fn of_past(started: Started, ended: Ended) -> Job {
        Job {
            id: started.id,
            kind: started.kind,
            subject: Subject { text: started.subject, machine: started.machine },
            by: started.by,
            key: started.key,
            started: started.time,
            clock: Instant::now(),
            ended_after: Mutex::new(Some(ended.seconds)),
            past: Some(ended.progress),
            progress: Arc::new(Progress::new()),
            outcome: watch::channel(ended.outcome).0,
        }
    }

    /// What the log says of it.
    fn logged(&self) -> (Started, Ended) {
        let JobView { id, kind, subject, machine, by, started, seconds, progress, outcome } = self.view();
        let started = Started { id, kind, subject, machine, by, time: started, key: self.key.clone() };
        (started, Ended { id, seconds, progress, outcome })
    }

    /// For a person.
    fn what(&self) -> String {
        format!("{} of {}", self.kind, self.subject.text)
    }
}

/// All jobs of a state folder that are listed.
#[derive(Debug, Default)]
pub struct Jobs {
    /// The highest number in use.
    last: AtomicU64,
    jobs: Mutex<BTreeMap<u64, Arc<Job>>>,
    /// Locked after `jobs`.
    log: Option<Mutex<Log>>,
    audit: Option<Arc<Audit>>,
    events: Arc<Events>,
    totals: Mutex<BTreeMap<(String, &'static str), Totals>>,
}

/// What ended jobs of a kind and result come to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// How many there were.
    pub count: u64,
    /// How long they took.
    pub seconds: f64,
    /// Bytes that they read.
    pub read: u64,
    /// Bytes that they stored.
    pub stored: u64,
}

impl Jobs {
    /// Those of a state folder. Jobs that another process had begun and not ended are interrupted.
    pub fn open(path: PathBuf, audit: Arc<Audit>, events: Arc<Events>) -> Jobs {
        let (log, past) = Log::open(path);
        let interrupted = past.jobs.iter().filter(|(_, ended)| ended.outcome == Outcome::Interrupted);
        let jobs = Jobs {
            last: AtomicU64::new(past.next.saturating_sub(1)),
            jobs: Mutex::new(BTreeMap::new()),
            log: Some(Mutex::new(log)),
            audit: Some(audit),
            events,
            totals: Mutex::default(),
        };
        for (started, _) in interrupted.filter(|(started, _)| past.fresh.contains(&started.id)) {
            jobs.record(started.id, format!("{} of {}", started.kind, started.subject), "interrupted");
        }
        let kept = past.jobs.into_iter().map(|(started, ended)| (started.id, Arc::new(Job::of_past(started, ended))));
        jobs.lock().extend(kept);
        jobs
    }

    fn record(&self, job: u64, what: String, result: &str) {
        let Some(audit) = &self.audit else { return };
        let event = Event::JobEnded { job, what: quoted(&what), result: result.to_owned() };
        if let Err(problem) = audit.append(event) {
            tracing::error!(job, %problem, "the end of this job stands in no record");
        }
    }

    fn tell(&self, job: &Job) {
        self.events.tell(Topic::Job, job.machine(), &job.view());
    }

    fn log(&self, with: impl FnOnce(&mut Log)) {
        if let Some(log) = &self.log {
            with(&mut log.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Starts `work` on a thread that may block.
    pub fn start(
        self: &Arc<Self>,
        kind: &'static str,
        subject: impl Into<Subject>,
        work: impl FnOnce(&Arc<Progress>) -> Result<Value, Problem> + Send + 'static,
    ) -> Arc<Job> {
        let origin = Origin::current();
        let job = Arc::new(Job {
            id: self.last.fetch_add(1, Ordering::Relaxed) + 1,
            kind: kind.to_owned(),
            subject: subject.into(),
            by: origin.who,
            key: origin.key,
            started: Utc::now(),
            clock: Instant::now(),
            ended_after: Mutex::new(None),
            past: None,
            progress: Arc::new(Progress::new()),
            outcome: watch::channel(Outcome::Running).0,
        });
        {
            let mut jobs = self.lock();
            jobs.insert(job.id, job.clone());
            self.log(|log| log.started(job.logged().0));
        }
        self.tell(&job);
        tracing::info!(job = job.id, kind, subject = job.subject.text, "job started");
        let (jobs, running) = (self.clone(), job.clone());
        tokio::task::spawn_blocking(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&running.progress)));
            let result = result.unwrap_or_else(|_| {
                Err(Problem::new(
                    crate::problem::Kind::Failed,
                    format!("{kind} of {} ended by a panic", running.subject.text),
                )
                .hint("this is a fault of Lifeboat; the log has the place"))
            });
            jobs.end(&running, result);
        });
        job
    }

    fn end(&self, job: &Job, result: Result<Value, Problem>) {
        let seconds = job.clock.elapsed().as_secs_f64();
        *job.ended_after.lock().unwrap_or_else(PoisonError::into_inner) = Some(seconds);
        match &result {
            Ok(_) => tracing::info!(job = job.id, kind = job.kind, subject = job.subject.text, seconds, "job done"),
            Err(problem) => {
                tracing::error!(job = job.id, kind = job.kind, subject = job.subject.text, seconds, %problem, "job failed");
            }
        }
        let outcome = match result {
            Ok(result) => Outcome::Done { result },
            Err(problem) => Outcome::Failed { problem },
        };
        let told = if matches!(outcome, Outcome::Done { .. }) { "done" } else { "failed" };
        self.record(job.id, job.what(), told);
        {
            let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
            let totals = totals.entry((job.kind.clone(), told)).or_default();
            totals.count += 1;
            totals.seconds += seconds;
            totals.read += job.progress.read();
            totals.stored += job.progress.stored();
        }
        // Whoever learns of the end finds it logged and the list tidied.
        let mut jobs = self.lock();
        self.log(|log| log.ended(Ended { outcome: outcome.clone(), ..job.logged().1 }));
        job.outcome.send_replace(outcome);
        self.tell(job);
        let ended: Vec<u64> =
            jobs.values().filter(|job| *job.outcome.borrow() != Outcome::Running).map(|job| job.id).collect();
        for id in ended.iter().rev().skip(KEPT_ENDED) {
            jobs.remove(id);
        }
        self.log(|log| {
            if log.is_long() {
                log.rewrite(self.last.load(Ordering::Relaxed) + 1, jobs.values().map(|job| job.logged()));
            }
        });
    }

    /// The job with number `id`.
    pub fn get(&self, id: u64) -> Result<Arc<Job>, Problem> {
        self.lock().get(&id).cloned().ok_or_else(|| Jobs::missing(id))
    }

    /// The job that the request with this key has started.
    pub fn of_request(&self, key: &str) -> Option<Arc<Job>> {
        self.lock().values().find(|job| job.key.as_deref() == Some(key)).cloned()
    }

    /// What to say when there is no job with number `id`.
    pub fn missing(id: u64) -> Problem {
        Problem::not_found(format!("there is no job {id}"))
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<JobView> {
        self.lock().values().map(|job| job.view()).collect()
    }

    /// What has ended since the start, by kind and `done` or `failed`.
    pub fn totals(&self) -> BTreeMap<(String, &'static str), Totals> {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The jobs still at work.
    pub fn running(&self) -> Vec<Arc<Job>> {
        self.lock().values().filter(|job| *job.outcome.borrow() == Outcome::Running).cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_ends_with_its_result_its_problem_or_its_panic() {
        let jobs = Arc::new(Jobs::default());
        let good = jobs.start("verify", "all", |_| Ok(Value::from(7)));
        let bad = jobs.start("verify", "all", |_| Err(Problem::refused("no")));
        let broken = jobs.start("verify", "all", |_| panic!("oh"));
        for job in [&good, &bad, &broken] {
            job.watch().wait_for(|outcome| *outcome != Outcome::Running).await.unwrap();
        }
        assert_eq!(good.view().outcome, Outcome::Done { result: Value::from(7) });
        assert_eq!(bad.view().outcome, Outcome::Failed { problem: Problem::refused("no") });
        assert!(matches!(broken.view().outcome, Outcome::Failed { .. }));
        assert!(jobs.running().is_empty());
    }

    #[tokio::test]
    async fn jobs_are_known_to_the_next_process_and_numbers_are_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let audit = Arc::new(Audit::open(dir.path().join("audit")));
            (audit.clone(), Arc::new(Jobs::open(dir.path().join("jobs"), audit, Arc::default())))
        };
        let (_, jobs) = open();
        let good = jobs.start("verify", "all", |_| Ok(Value::from(7)));
        good.watch().wait_for(|outcome| *outcome != Outcome::Running).await.unwrap();
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let work = move |_: &Arc<Progress>| {
            let _ = wait.recv();
            Ok(Value::Null)
        };
        let cut_off = jobs.start("backup", Subject::machine("web01"), work);
        // The process that comes after a kill -9 finds the log as it is now.
        let (audit, next) = open();
        assert_eq!(next.get(good.id()).unwrap().view(), good.view());
        let view = next.get(cut_off.id()).unwrap().view();
        assert_eq!((view.outcome, view.machine.as_deref()), (Outcome::Interrupted, Some("web01")));
        assert!(next.running().is_empty());
        let fresh = next.start("verify", "all", |_| Ok(Value::Null));
        assert_eq!(fresh.id(), cut_off.id() + 1);
        fresh.watch().wait_for(|outcome| *outcome != Outcome::Running).await.unwrap();
        let told = |audit: &Audit| {
            let records = audit.list(&crate::audit::AuditQuery::default()).unwrap();
            let ends = records.into_iter().filter_map(|chained| match chained.record.event {
                Event::JobEnded { job, result, .. } => Some((job, result)),
                _ => None,
            });
            ends.collect::<Vec<_>>()
        };
        let expected = [(1, "done"), (2, "interrupted"), (3, "done")].map(|(job, result)| (job, result.to_owned()));
        assert_eq!(told(&audit), expected);
        drop((audit, next));
        assert_eq!(told(&open().0), expected, "an interruption is recorded once");
        drop(release);
    }

    #[tokio::test]
    async fn a_log_of_many_jobs_stays_short() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, _) = Log::open(dir.path().join("jobs"));
        assert!(!log.is_long());
        let (started, ended) = Job::of_past(
            Started {
                id: 1,
                kind: "k".into(),
                subject: "s".into(),
                machine: None,
                by: "b".into(),
                time: Utc::now(),
                key: None,
            },
            Ended { id: 1, seconds: 0.0, progress: ProgressView::default(), outcome: Outcome::Interrupted },
        )
        .logged();
        for _ in 0..1001 {
            log.started(started.clone());
            log.ended(ended.clone());
        }
        assert!(log.is_long());
        log.rewrite(2, std::iter::once((started, ended)));
        assert!(!log.is_long());
        let (_, past) = Log::open(dir.path().join("jobs"));
        assert_eq!((past.next, past.jobs.len()), (2, 1));
    }

    #[tokio::test]
    async fn ended_jobs_do_not_pile_up() {
        let jobs = Arc::new(Jobs::default());
        for _ in 0..KEPT_ENDED + 20 {
            let job = jobs.start("verify", "all", |_| Ok(Value::Null));
            job.watch().wait_for(|outcome| *outcome != Outcome::Running).await.unwrap();
        }
        assert_eq!(jobs.list().len(), KEPT_ENDED);
        assert!(jobs.get(1).is_err());
    }
}
