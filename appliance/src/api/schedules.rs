//! `/api/v1/schedules`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};

use super::extract::Path;
use super::table::{OPERATOR, Reach, Row, VIEWER};
use super::{Answer, Shared};
use crate::app::App;
use crate::audit::About;
use crate::problem::Problem;
use crate::schedule::{ScheduleView, Schedules, runner};

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::get("/api/v1/schedules", VIEWER, Reach::Whole, list)
            .answers::<Vec<ScheduleView>>("Lists policies and when they run"),
        Row::get("/api/v1/schedules/{policy}", VIEWER, Reach::Whole, show).answers::<ScheduleView>("Shows a policy"),
        Row::post("/api/v1/schedules/{policy}/run", OPERATOR, Reach::Whole, run)
            .accepts::<ScheduleView>("Runs a policy now"),
    ]
}

async fn list(State(app): Shared) -> Json<Vec<ScheduleView>> {
    Json(app.schedules.get().map_or(Vec::new(), |schedules| schedules.list()))
}

fn schedules<'a>(app: &'a App, policy: &str) -> Result<&'a Arc<Schedules>, Problem> {
    app.schedules.get().ok_or_else(|| {
        Schedules::missing(policy)
            .hint("policies are in the configuration of a service: `lifeboat serve --config FILE`")
    })
}

async fn show(State(app): Shared, Path(policy): Path<String>) -> Answer<ScheduleView> {
    schedules(&app, &policy)?.view(&policy).map(Json)
}

async fn run(State(app): Shared, Path(policy): Path<String>) -> Result<Response, Problem> {
    let view = runner::begin(schedules(&app, &policy)?, &app, &policy, None)?;
    Ok((StatusCode::ACCEPTED, Extension(About(format!("policy {policy}"))), Json(view)).into_response())
}
