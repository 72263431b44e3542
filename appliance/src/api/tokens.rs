//! `/api/v1/tokens`.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use chrono::Utc;

use super::extract::Path;
use super::table::{ADMIN, Reach, Row};
use super::{Answer, Body, Shared, blocking};
use crate::access::tokens::{NewToken, NewTokenRequest, TokenView};
use crate::app::App;
use crate::audit::About;
use crate::problem::Problem;

const PATH: &str = "/api/v1/tokens";

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::get(PATH, ADMIN, Reach::Whole, list).answers::<Vec<TokenView>>("Lists tokens, without their secrets"),
        Row::post(PATH, ADMIN, Reach::Whole, create).creates::<NewToken>("Makes a token; its secret is told once"),
        Row::delete("/api/v1/tokens/{token}", ADMIN, Reach::Whole, revoke).answers::<TokenView>("Revokes a token"),
    ]
}

async fn list(State(app): Shared) -> Answer<Vec<TokenView>> {
    app.tokens.list(Utc::now()).map(Json)
}

async fn create(State(app): Shared, Body(request): Body<NewTokenRequest>) -> Result<Response, Problem> {
    let made = blocking(move || app.tokens.create(request, Utc::now())).await?;
    let about = About(format!("token {} ({}), {}", made.view.name, made.view.id, made.view.role.name()));
    Ok((StatusCode::CREATED, Extension(about), Json(made)).into_response())
}

async fn revoke(State(app): Shared, Path(token): Path<String>) -> Answer<TokenView> {
    blocking(move || app.tokens.revoke(&token, Utc::now())).await.map(Json)
}
