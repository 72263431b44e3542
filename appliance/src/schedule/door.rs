//! A policy's way to the API: whatever it does is a request, so it is a job, is recorded in the audit log, and is refused
//! where it would be refused to anybody.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, header};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tower::ServiceExt;

use crate::app::App;
use crate::jobs::{JobView, Jobs, Outcome};
use crate::problem::{Kind, Problem};

/// Longest answer that is read.
const ANSWER_MAX: usize = 16 << 20;

/// The API, asked by a policy.
#[derive(Debug)]
pub(super) struct Door {
    router: Router,
    jobs: Arc<Jobs>,
}

/// A try that failed, and the job that it was, if it came that far.
#[derive(Debug)]
pub(super) struct Failed {
    pub job: Option<u64>,
    pub problem: Problem,
    /// It was judged: to try again makes no sense, and who has to know is told already.
    pub judged: bool,
}

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Failed {
        Failed { job: None, problem, judged: false }
    }
}

impl Failed {
    pub fn of_job(job: u64, problem: Problem) -> Failed {
        Failed { job: Some(job), problem, judged: false }
    }
}

impl Door {
    pub fn new(app: &Arc<App>, policy: &str) -> Door {
        Door { router: crate::api::of_policy(app, policy), jobs: app.jobs.clone() }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Problem> {
        self.ask(Method::GET, path, Body::empty()).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Problem> {
        let body = serde_json::to_vec(body).map_err(|error| failed(&error))?;
        self.ask(Method::POST, path, Body::from(body)).await
    }

    /// Starts a job and waits for its end: its number and its result.
    pub async fn job(&self, path: &str, body: &impl Serialize) -> Result<(u64, Value), Failed> {
        let view: JobView = self.post(path, body).await?;
        let id = view.id;
        let job = self.jobs.get(id)?;
        let mut outcome = job.watch();
        // The job is held, so its end is told.
        let ended = outcome.wait_for(|outcome| *outcome != Outcome::Running).await;
        let ended = ended.map(|ended| ended.clone()).unwrap_or(Outcome::Interrupted);
        match ended {
            Outcome::Done { result } => Ok((id, result)),
            Outcome::Failed { problem } => Err(Failed::of_job(id, problem)),
            Outcome::Running | Outcome::Interrupted => {
                Err(Failed::of_job(id, Problem::new(Kind::Failed, "the job did not end")))
            }
        }
    }

    async fn ask<T: DeserializeOwned>(&self, method: Method, path: &str, body: Body) -> Result<T, Problem> {
        let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
        let request = request.body(body).map_err(|error| failed(&error))?;
        let response = match self.router.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        let good = response.status().is_success();
        let bytes = axum::body::to_bytes(response.into_body(), ANSWER_MAX).await.map_err(|error| failed(&error))?;
        if good {
            return serde_json::from_slice(&bytes).map_err(|error| failed(&error));
        }
        Err(serde_json::from_slice::<Problem>(&bytes).unwrap_or_else(|error| failed(&error)))
    }
}

fn failed(error: &(dyn std::error::Error + 'static)) -> Problem {
    Problem::failed("cannot ask the API", error)
}
