//! `/api/v1/keys`: key slots.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use super::extract::Path;
use super::table::{ADMIN, Reach, Row};
use super::{Answer, Body, Shared, blocking};
use crate::app::App;
use crate::keys::{self, KeyChange, KeyView, NewKeyRequest};

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::get("/api/v1/keys", ADMIN, Reach::Whole, list).answers::<Vec<KeyView>>("Lists key slots"),
        Row::post("/api/v1/keys", ADMIN, Reach::Whole, add).answers::<KeyChange>("Adds a key slot"),
        Row::post("/api/v1/keys/rotate", ADMIN, Reach::Whole, rotate)
            .answers::<KeyChange>("Replaces a key slot by another"),
        Row::delete("/api/v1/keys/{slot}", ADMIN, Reach::Whole, remove).answers::<KeyChange>("Removes a key slot"),
    ]
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
