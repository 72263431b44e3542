//! `/api/v1/audit`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use schemars::JsonSchema;
use serde::Deserialize;

use super::extract::Query;
use super::table::{ADMIN, Reach, Row};
use super::{Answer, Shared, blocking};
use crate::app::App;
use crate::audit::{AuditQuery, Chained, VerifyResult};

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::get("/api/v1/audit", ADMIN, Reach::Whole, list).answers::<Vec<Chained>>("Lists the audit log"),
        Row::get("/api/v1/audit/verification", ADMIN, Reach::Whole, verify)
            .answers::<VerifyResult>("Proves that the audit log is whole"),
    ]
}

async fn list(State(app): Shared, Query(query): Query<AuditQuery>) -> Answer<Vec<Chained>> {
    blocking(move || app.audit.list(&query)).await.map(Json)
}

#[derive(Debug, Deserialize, JsonSchema)]
struct VerifyQuery {
    /// The hash that must still be in it, 64 hexadecimal digits.
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    head: Option<String>,
}

async fn verify(State(app): Shared, Query(query): Query<VerifyQuery>) -> Answer<VerifyResult> {
    blocking(move || app.audit.verify(query.head.as_deref())).await.map(Json)
}
