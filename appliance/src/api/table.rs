//! The route table: one [`Row`] for each operation says its method, its path, what its caller needs, and who answers. The
//! router is made from the rows alone, so an operation that does not say what it needs cannot be reached.
//!
//! A new operation is one more row in `rows()` of its module. What to write for [`Reach`]:
//!
//! - [`Reach::Whole`], unless there is a reason: a token that is limited to machines is refused.
//! - [`Reach::Recovery`] when the path has a recovery's `{name}`: it is looked up, and refused if its machine is not the
//!   caller's.
//! - [`Reach::Judged`] when the handler takes [`Caller`] and keeps to it: points by [`App::resolve_for`], lists by
//!   [`Caller::sees`]. The tests of this module ask each of them for something of another machine.
//!
//! Whoever can name files of the host can read any disk image there is, so an operation that takes such names is
//! `Reach::Whole`.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRequestParts, Path, Request};
use axum::handler::Handler;
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{self, MethodFilter, MethodRouter};

use crate::access::{Caller, Role, forbidden, unknown_caller};
use crate::app::App;
use crate::problem::Problem;

/// What a caller needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Nothing: whoever can connect is answered.
    Nobody,
    /// A role.
    Role(Role),
}

/// A viewer.
pub const VIEWER: Need = Need::Role(Role::Viewer);
/// An operator.
pub const OPERATOR: Need = Need::Role(Role::Operator);
/// An administrator.
pub const ADMIN: Need = Need::Role(Role::Admin);

/// What an operation reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// More than single machines.
    Whole,
    /// The recovery whose name is in the path as `{name}`.
    Recovery,
    /// What its handler lets the caller have.
    Judged,
}

/// One operation.
#[derive(Debug)]
pub struct Row<S> {
    /// Its method.
    pub method: Method,
    /// Its path, with `{parameters}`.
    pub path: &'static str,
    /// What its caller needs.
    pub need: Need,
    /// What it reaches.
    pub reach: Reach,
    answer: MethodRouter<S>,
}

impl<S: Clone + Send + Sync + 'static> Row<S> {
    fn new<H: Handler<T, S>, T: 'static>(
        (method, filter): (Method, MethodFilter),
        path: &'static str,
        (need, reach): (Need, Reach),
        handler: H,
    ) -> Row<S> {
        Row { method, path, need, reach, answer: routing::on(filter, handler) }
    }

    /// Answers GET.
    pub fn get<H: Handler<T, S>, T: 'static>(path: &'static str, need: Need, reach: Reach, handler: H) -> Row<S> {
        Row::new((Method::GET, MethodFilter::GET), path, (need, reach), handler)
    }

    /// Answers POST.
    pub fn post<H: Handler<T, S>, T: 'static>(path: &'static str, need: Need, reach: Reach, handler: H) -> Row<S> {
        Row::new((Method::POST, MethodFilter::POST), path, (need, reach), handler)
    }

    /// Answers PUT.
    pub fn put<H: Handler<T, S>, T: 'static>(path: &'static str, need: Need, reach: Reach, handler: H) -> Row<S> {
        Row::new((Method::PUT, MethodFilter::PUT), path, (need, reach), handler)
    }

    /// Answers PATCH.
    pub fn patch<H: Handler<T, S>, T: 'static>(path: &'static str, need: Need, reach: Reach, handler: H) -> Row<S> {
        Row::new((Method::PATCH, MethodFilter::PATCH), path, (need, reach), handler)
    }

    /// Answers DELETE.
    pub fn delete<H: Handler<T, S>, T: 'static>(path: &'static str, need: Need, reach: Reach, handler: H) -> Row<S> {
        Row::new((Method::DELETE, MethodFilter::DELETE), path, (need, reach), handler)
    }

    /// The same for a router of another state; this one's is given.
    pub fn with_state<S2>(self, state: S) -> Row<S2> {
        let Row { method, path, need, reach, answer } = self;
        Row { method, path, need, reach, answer: answer.with_state(state) }
    }
}

/// A router that asks nobody who he is, for a process that speaks to itself.
pub fn ungated<S: Clone + Send + Sync + 'static>(rows: Vec<Row<S>>) -> Router<S> {
    finish(rows.into_iter().map(|row| (row.path, row.answer)))
}

/// A router that gives every caller what its row says he may have. Who the caller is must be among the request's
/// extensions; who is not there is nobody.
pub fn gated(rows: Vec<Row<Arc<App>>>, app: &Arc<App>) -> Router {
    let gated = rows.into_iter().map(|row| {
        let (app, need, reach) = (app.clone(), row.need, row.reach);
        let gate = from_fn(move |request: Request, next: Next| pass(app.clone(), need, reach, request, next));
        (row.path, row.answer.route_layer(gate))
    });
    finish(gated).with_state(app.clone())
}

fn finish<S: Clone + Send + Sync + 'static>(
    routes: impl Iterator<Item = (&'static str, MethodRouter<S>)>,
) -> Router<S> {
    routes
        .fold(Router::new(), |router, (path, answer)| router.route(path, answer))
        .method_not_allowed_fallback(|| async {
            Problem::usage("this resource has no such method").with_status(StatusCode::METHOD_NOT_ALLOWED)
        })
        .fallback(|| async { Problem::not_found("there is no such resource") })
}

async fn pass(app: Arc<App>, need: Need, reach: Reach, request: Request, next: Next) -> Result<Response, Problem> {
    let Need::Role(role) = need else { return Ok(next.run(request).await) };
    let Some(caller) = request.extensions().get::<Caller>() else { return Err(unknown_caller()) };
    if !caller.has(role) {
        return Err(forbidden(format!("this needs the role {}", role.name()))
            .hint("`lifeboat token create` makes a token with another role"));
    }
    if caller.is_unlimited() || reach == Reach::Judged {
        return Ok(next.run(request).await);
    }
    if reach == Reach::Whole {
        return Err(forbidden("a token that is limited to machines may not do this"));
    }
    let caller = caller.clone();
    let (mut parts, body) = request.into_parts();
    let parameters = Path::<HashMap<String, String>>::from_request_parts(&mut parts, &()).await;
    let name = parameters.ok().and_then(|Path(mut parameters)| parameters.remove("name")).unwrap_or_default();
    let view = app.recoveries.view(&name);
    if !view.is_ok_and(|view| caller.sees(&view.machine)) {
        return Err(Problem::not_found(format!("there is no recovery {name}")));
    }
    Ok(next.run(Request::from_parts(parts, body)).await)
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
