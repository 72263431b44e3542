//! `/api/v1/audit`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;

use super::extract::Query;
use super::table::{ADMIN, Reach, Row};
use super::{Answer, Shared, blocking};
use crate::app::App;
use crate::audit::{AuditQuery, Chained, VerifyResult};

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::get("/api/v1/audit", ADMIN, Reach::Whole, list),
        Row::get("/api/v1/audit/verification", ADMIN, Reach::Whole, verify),
    ]
}

async fn list(State(app): Shared, Query(query): Query<AuditQuery>) -> Answer<Vec<Chained>> {
    blocking(move || app.audit.list(&query)).await.map(Json)
}

#[derive(Debug, Deserialize)]
struct VerifyQuery {
    head: Option<String>,
}

async fn verify(State(app): Shared, Query(query): Query<VerifyQuery>) -> Answer<VerifyResult> {
    blocking(move || app.audit.verify(query.head.as_deref())).await.map(Json)
}
