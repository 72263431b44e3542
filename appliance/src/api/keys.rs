//! `/api/v1/keys`: key slots.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::routing::{delete, get, post};
use axum::{Json, Router};

use super::{Answer, Body, Shared, blocking};
use crate::app::App;
use crate::keys::{self, KeyChange, KeyView, NewKeyRequest};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/api/v1/keys", get(list).post(add))
        .route("/api/v1/keys/rotate", post(rotate))
        .route("/api/v1/keys/{slot}", delete(remove))
}

async fn list(State(app): Shared) -> Answer<Vec<KeyView>> {
    blocking(move || keys::list(&app.repository)).await.map(Json)
}

async fn add(State(app): Shared, Body(request): Body<NewKeyRequest>) -> Answer<KeyChange> {
    blocking(move || keys::add(&app.repository, &request)).await.map(Json)
}

async fn remove(State(app): Shared, Path(slot): Path<String>) -> Answer<KeyChange> {
    blocking(move || keys::remove(&app.repository, &slot)).await.map(Json)
}

async fn rotate(State(app): Shared, Body(request): Body<NewKeyRequest>) -> Answer<KeyChange> {
    blocking(move || keys::rotate(&app.repository, &request)).await.map(Json)
}
