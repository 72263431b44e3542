//! `/api/v1/prune`, and the protection and end of single points.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Deserialize;

use super::extract::{Path, Query};
use super::table::{ADMIN, OPERATOR, Reach, Row};
use super::{Answer, Body, Shared, blocking};
use crate::access::Caller;
use crate::app::App;
use crate::forget::{self, ForgetResult, ProtectRequest, ProtectResult};
use crate::retention::prune::{self, PruneRequest, PruneResult};

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::post("/api/v1/prune", ADMIN, Reach::Whole, prune)
            .answers::<PruneResult>("Forgets recovery points that no rule keeps"),
        Row::delete("/api/v1/points/{point}", ADMIN, Reach::Judged, forget)
            .answers::<ForgetResult>("Forgets a recovery point"),
        Row::put("/api/v1/points/{point}/protection", OPERATOR, Reach::Judged, protect)
            .answers::<ProtectResult>("Protects a recovery point from prune and forget"),
        Row::delete("/api/v1/points/{point}/protection", ADMIN, Reach::Judged, unprotect)
            .answers::<ProtectResult>("Ends the protection of a recovery point"),
    ]
}

async fn prune(State(app): Shared, Body(request): Body<PruneRequest>) -> Answer<PruneResult> {
    blocking(move || prune::prune(&app, &request)).await.map(Json)
}

#[derive(Debug, Deserialize, JsonSchema)]
struct ForgetQuery {
    /// Also if it is its machine's newest.
    #[serde(default)]
    newest: bool,
}

async fn forget(
    State(app): Shared,
    caller: Caller,
    Path(point): Path<String>,
    Query(query): Query<ForgetQuery>,
) -> Answer<ForgetResult> {
    blocking(move || forget::forget(&app, &caller, &point, query.newest)).await.map(Json)
}

async fn protect(
    State(app): Shared,
    caller: Caller,
    Path(point): Path<String>,
    Body(request): Body<ProtectRequest>,
) -> Answer<ProtectResult> {
    blocking(move || forget::protect(&app, &caller, &point, &request)).await.map(Json)
}

async fn unprotect(State(app): Shared, caller: Caller, Path(point): Path<String>) -> Answer<ProtectResult> {
    blocking(move || forget::unprotect(&app, &caller, &point)).await.map(Json)
}
