//! `/api/v1/drills`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use super::contract::{JSON, PNG, TEXT};
use super::extract::{Path, Query};
use super::table::{OPERATOR, Reach, Row, VIEWER};
use super::{Answer, Body, Shared, accepted, blocking, to_value};
use crate::access::Caller;
use crate::app::App;
use crate::drill::{self, Attachment, DrillReport, DrillRequest, Filter};
use crate::problem::Problem;

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::get("/api/v1/drills", VIEWER, Reach::Judged, list)
            .answers::<Vec<DrillReport>>("Lists drills, newest first"),
        Row::post("/api/v1/drills", OPERATOR, Reach::Judged, start)
            .begins::<Vec<DrillReport>>("Boots recovery points in isolation and judges them"),
        Row::get("/api/v1/drills/{id}", VIEWER, Reach::Judged, show).answers::<DrillReport>("Shows a drill"),
        Row::get("/api/v1/drills/{id}/console", VIEWER, Reach::Judged, console)
            .sends(TEXT, "What the guest said on its console"),
        Row::get("/api/v1/drills/{id}/screenshot", VIEWER, Reach::Judged, screenshot)
            .sends(PNG, "What the guest showed on its screen"),
        Row::get("/api/v1/drills/{id}/trace", VIEWER, Reach::Judged, trace)
            .answers::<serde_json::Value>("Which chunks the guest read, in order"),
    ]
}

/// The job's result is an array of reports, in the order of the points.
async fn start(State(app): Shared, caller: Caller, Body(request): Body<DrillRequest>) -> Result<Response, Problem> {
    let planning = app.clone();
    let plan = blocking(move || drill::plan(&planning, &caller, request)).await?;
    let jobs = app.jobs.clone();
    let job = jobs.start("drill", plan.subject(), move |progress| to_value(&drill::run_all(&app, &plan, progress)?));
    Ok(accepted(&job))
}

async fn list(State(app): Shared, caller: Caller, Query(filter): Query<Filter>) -> Answer<Vec<DrillReport>> {
    blocking(move || drill::list(&app, &caller, &filter)).await.map(Json)
}

async fn show(State(app): Shared, caller: Caller, Path(id): Path<String>) -> Answer<DrillReport> {
    blocking(move || drill::show(&app, &caller, &id)).await.map(Json)
}

async fn console(app: Shared, caller: Caller, id: Path<String>) -> Result<Response, Problem> {
    attached(app, &caller, id, Attachment::Console, TEXT).await
}

async fn screenshot(app: Shared, caller: Caller, id: Path<String>) -> Result<Response, Problem> {
    attached(app, &caller, id, Attachment::Screenshot, PNG).await
}

async fn trace(app: Shared, caller: Caller, id: Path<String>) -> Result<Response, Problem> {
    attached(app, &caller, id, Attachment::Trace, JSON).await
}

async fn attached(
    State(app): Shared,
    caller: &Caller,
    Path(id): Path<String>,
    which: Attachment,
    kind: &'static str,
) -> Result<Response, Problem> {
    let caller = caller.clone();
    let bytes = blocking(move || drill::attachment(&app, &caller, &id, which)).await?;
    Ok(([(CONTENT_TYPE, kind)], bytes).into_response())
}
