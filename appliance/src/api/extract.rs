//! Requests taken apart. What cannot be read is a problem document like any other.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use crate::problem::Problem;

/// How long a request's body may take to arrive.
pub const BODY: Duration = Duration::from_secs(30);

fn bad(what: &str, status: StatusCode) -> Problem {
    Problem::usage(format!("bad request: {what}")).with_status(status)
}

/// A body in JSON.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        match tokio::time::timeout(BODY, Json::from_request(request, state)).await {
            Ok(Ok(Json(value))) => Ok(Body(value)),
            Ok(Err(error)) => Err(bad(&error.body_text(), error.status())),
            Err(_) => Err(bad("the body does not arrive", StatusCode::REQUEST_TIMEOUT)),
        }
    }
}

/// The parameters in a path.
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Path(value)),
            Err(error) => Err(bad(&error.body_text(), error.status())),
        }
    }
}

/// The parameters behind a path.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Query::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(value)) => Ok(Query(value)),
            Err(error) => Err(bad(&error.body_text(), error.status())),
        }
    }
}

/// The header that says where a listener of events was when its connection broke.
pub const LAST_EVENT: &str = "Last-Event-ID";

/// What that header says; empty if that is no text.
pub struct LastEvent(pub Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for LastEvent {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let last = parts.headers.get(LAST_EVENT);
        Ok(LastEvent(last.map(|id| id.to_str().unwrap_or_default().to_owned())))
    }
}
