//! `/api/v1/prune`, and the protection and end of single points.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::routing::{delete, post, put};
use axum::{Json, Router};
use serde::Deserialize;

use super::{Answer, Body, Shared, blocking};
use crate::app::App;
use crate::forget::{self, ForgetResult, ProtectRequest, ProtectResult};
use crate::retention::prune::{self, PruneRequest, PruneResult};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/api/v1/prune", post(prune))
        .route("/api/v1/points/{point}", delete(forget))
        .route("/api/v1/points/{point}/protection", put(protect).delete(unprotect))
}

async fn prune(State(app): Shared, Body(request): Body<PruneRequest>) -> Answer<PruneResult> {
    blocking(move || prune::prune(&app, &request)).await.map(Json)
}

#[derive(Debug, Deserialize)]
struct ForgetQuery {
    #[serde(default)]
    newest: bool,
}

async fn forget(
    State(app): Shared,
    Path(point): Path<String>,
    Query(query): Query<ForgetQuery>,
) -> Answer<ForgetResult> {
    blocking(move || forget::forget(&app, &point, query.newest)).await.map(Json)
}

async fn protect(
    State(app): Shared,
    Path(point): Path<String>,
    Body(request): Body<ProtectRequest>,
) -> Answer<ProtectResult> {
    blocking(move || forget::protect(&app, &point, &request)).await.map(Json)
}

async fn unprotect(State(app): Shared, Path(point): Path<String>) -> Answer<ProtectResult> {
    blocking(move || forget::unprotect(&app, &point)).await.map(Json)
}
