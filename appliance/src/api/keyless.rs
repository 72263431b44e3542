//! The part of the API that needs no key, for a process that was given none.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use axum::routing::post;
use axum::{Extension, Router};
use blockstore::Keyless;

use super::{Body, accepted, job_rows, table, to_value};
use crate::access::Caller;
use crate::jobs::Jobs;
use crate::problem::Problem;
use crate::verify::VerifyRequest;

/// A repository without its secret.
#[derive(Debug)]
pub struct KeylessApp {
    repository: Keyless,
    jobs: Arc<Jobs>,
}

impl KeylessApp {
    /// Offers what can be done with `repository`.
    pub fn new(repository: Keyless) -> Arc<KeylessApp> {
        Arc::new(KeylessApp { repository, jobs: Arc::default() })
    }
}

/// All routes.
pub fn router(app: Arc<KeylessApp>) -> Router {
    let jobs = app.jobs.clone();
    Router::new()
        .route("/api/v1/verify", post(verify))
        .with_state(app)
        .merge(table::ungated(job_rows()).with_state(jobs).layer(Extension(Caller::Owner)))
        .fallback(|| async { needs_key("this cannot be done without the key") })
}

fn needs_key(title: &str) -> Problem {
    Problem::refused(title).hint("set LIFEBOAT_PASSPHRASE, or give --passphrase-file or --key-file")
}

async fn verify(State(app): State<Arc<KeylessApp>>, Body(request): Body<VerifyRequest>) -> Result<Response, Problem> {
    if let Some(point) = &request.point {
        return Err(needs_key(&format!("recovery point `{point}` cannot be looked into without the key")));
    }
    if request.repair {
        return Err(needs_key("the repository cannot be repaired without its key"));
    }
    if request.portion.is_some() {
        return Err(needs_key("without the key all data is verified or none, not a portion of it"));
    }
    let worker = app.clone();
    let job = app.jobs.start("verify", "the repository, without its key".to_owned(), move |progress| {
        to_value(&crate::keyless::verify(&worker.repository, request.read_data, progress)?)
    });
    Ok(accepted(&job))
}
