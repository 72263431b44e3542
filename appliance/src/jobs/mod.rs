//! Long work: a job has a progress that can be followed, can be cancelled, and ends with a result or a problem.
//! Jobs live in memory; ended ones are listed until a hundred newer ones have ended.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use blockstore::Progress;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use crate::problem::Problem;

/// How many ended jobs stay listed.
const KEPT_ENDED: usize = 100;

/// How a job stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Outcome {
    /// Still at work.
    Running,
    /// Ended well.
    Done {
        /// What it brought, by kind of job.
        result: Value,
    },
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobView {
    /// Number, from 1, of this process.
    pub id: u64,
    /// `backup`, `restore`, `verify`.
    pub kind: String,
    /// What it works on, for a person.
    pub subject: String,
    /// The machine that it belongs to, if it does to one.
    #[serde(default)]
    pub machine: Option<String>,
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    kind: &'static str,
    subject: Subject,
    started: DateTime<Utc>,
    clock: Instant,
    ended_after: Mutex<Option<f64>>,
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
            kind: self.kind.to_owned(),
            subject: self.subject.text.clone(),
            machine: self.subject.machine.clone(),
            started: self.started,
            seconds: ended.unwrap_or_else(|| self.clock.elapsed().as_secs_f64()),
            progress: ProgressView {
                total: self.progress.total(),
                done: self.progress.done(),
                read: self.progress.read(),
                stored: self.progress.stored(),
            },
            outcome: self.outcome.borrow().clone(),
        }
    }
}

/// All jobs of this process.
#[derive(Debug, Default)]
pub struct Jobs {
    next: AtomicU64,
    jobs: Mutex<BTreeMap<u64, Arc<Job>>>,
}

impl Jobs {
    /// Starts `work` on a thread that may block.
    pub fn start(
        self: &Arc<Self>,
        kind: &'static str,
        subject: impl Into<Subject>,
        work: impl FnOnce(&Arc<Progress>) -> Result<Value, Problem> + Send + 'static,
    ) -> Arc<Job> {
        let job = Arc::new(Job {
            id: self.next.fetch_add(1, Ordering::Relaxed) + 1,
            kind,
            subject: subject.into(),
            started: Utc::now(),
            clock: Instant::now(),
            ended_after: Mutex::new(None),
            progress: Arc::new(Progress::new()),
            outcome: watch::channel(Outcome::Running).0,
        });
        self.lock().insert(job.id, job.clone());
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
        // Whoever learns of the end finds the list tidied.
        let mut jobs = self.lock();
        job.outcome.send_replace(match result {
            Ok(result) => Outcome::Done { result },
            Err(problem) => Outcome::Failed { problem },
        });
        let ended: Vec<u64> =
            jobs.values().filter(|job| *job.outcome.borrow() != Outcome::Running).map(|job| job.id).collect();
        for id in ended.iter().rev().skip(KEPT_ENDED) {
            jobs.remove(id);
        }
    }

    /// The job with number `id`.
    pub fn get(&self, id: u64) -> Result<Arc<Job>, Problem> {
        self.lock().get(&id).cloned().ok_or_else(|| Jobs::missing(id))
    }

    /// What to say when there is no job with number `id`.
    pub fn missing(id: u64) -> Problem {
        Problem::not_found(format!("there is no job {id}"))
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<JobView> {
        self.lock().values().map(|job| job.view()).collect()
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
