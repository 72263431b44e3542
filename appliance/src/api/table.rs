//! The route table: one [`Row`] for each operation says its method, its path, what its caller needs, and who answers. The
//! router is made from the rows alone, so an operation that does not say what it needs cannot be reached.
//!
//! A new operation is one more row in `rows()` of its module, with what it answers: there is no row without. What it takes
//! is read off its handler. What to write for [`Reach`]:
//!
//! - [`Reach::Whole`], unless there is a reason: a token that is limited to machines is refused.
//! - [`Reach::Recovery`] when the path has a recovery's `{name}`: it is looked up, and refused if its machine is not the
//!   caller's.
//! - [`Reach::Judged`] when the handler takes [`Caller`] and keeps to it: points by [`App::resolve_for`], lists by
//!   [`Caller::sees`]. The tests of this module ask each of them for something of another machine.
//!
//! Whatever is not GET is recorded in the audit log before and after it is done, unless the row says that it
//! [`looks`](Row::looks).
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
use axum::response::{IntoResponse, Response};
use axum::routing::{self, MethodFilter, MethodRouter};
use schemars::JsonSchema;

use super::contract::{Answer, Contract, Part, Takes};
use super::login::Peer;
use crate::access::{Caller, Origin, Role, forbidden, unknown_caller};
use crate::app::App;
use crate::audit::{About, Audit, Event, quoted};
use crate::problem::Problem;

/// What the audit log says instead of a status when the asker did not wait for it.
const GONE_AWAY: u16 = 499;

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
    /// Whether it changes anything or hands data out, which is recorded in the audit log.
    pub audited: bool,
    /// What it takes and answers.
    pub contract: Contract,
    answer: MethodRouter<S>,
}

/// An operation that has yet to say what it answers.
#[derive(Debug)]
pub struct Unanswered<S> {
    method: Method,
    path: &'static str,
    need: Need,
    reach: Reach,
    takes: Vec<Part>,
    answer: MethodRouter<S>,
}

impl<S: Clone + Send + Sync + 'static> Row<S> {
    fn answered_by<H: Handler<T, S>, T: Takes + 'static>(
        (method, filter): (Method, MethodFilter),
        path: &'static str,
        (need, reach): (Need, Reach),
        handler: H,
    ) -> Unanswered<S> {
        Unanswered { method, path, need, reach, takes: T::parts(), answer: routing::on(filter, handler) }
    }

    /// Answers GET.
    pub fn get<H: Handler<T, S>, T: Takes + 'static>(
        path: &'static str,
        need: Need,
        reach: Reach,
        handler: H,
    ) -> Unanswered<S> {
        Row::answered_by((Method::GET, MethodFilter::GET), path, (need, reach), handler)
    }

    /// Answers POST.
    pub fn post<H: Handler<T, S>, T: Takes + 'static>(
        path: &'static str,
        need: Need,
        reach: Reach,
        handler: H,
    ) -> Unanswered<S> {
        Row::answered_by((Method::POST, MethodFilter::POST), path, (need, reach), handler)
    }

    /// Answers PUT.
    pub fn put<H: Handler<T, S>, T: Takes + 'static>(
        path: &'static str,
        need: Need,
        reach: Reach,
        handler: H,
    ) -> Unanswered<S> {
        Row::answered_by((Method::PUT, MethodFilter::PUT), path, (need, reach), handler)
    }

    /// Answers PATCH.
    pub fn patch<H: Handler<T, S>, T: Takes + 'static>(
        path: &'static str,
        need: Need,
        reach: Reach,
        handler: H,
    ) -> Unanswered<S> {
        Row::answered_by((Method::PATCH, MethodFilter::PATCH), path, (need, reach), handler)
    }

    /// Answers DELETE.
    pub fn delete<H: Handler<T, S>, T: Takes + 'static>(
        path: &'static str,
        need: Need,
        reach: Reach,
        handler: H,
    ) -> Unanswered<S> {
        Row::answered_by((Method::DELETE, MethodFilter::DELETE), path, (need, reach), handler)
    }

    /// The same for a router of another state; this one's is given.
    pub fn with_state<S2>(self, state: S) -> Row<S2> {
        let Row { method, path, need, reach, audited, contract, answer } = self;
        Row { method, path, need, reach, audited, contract, answer: answer.with_state(state) }
    }

    /// The same, which only looks although its method is not GET: it has too much to say for a query.
    pub fn looks(self) -> Row<S> {
        Row { audited: false, ..self }
    }
}

impl<S> Unanswered<S> {
    /// Answers 200 with a `T`. `summary` says what it does.
    pub fn answers<T: JsonSchema>(self, summary: &'static str) -> Row<S> {
        self.with(summary, Answer::json::<T>(StatusCode::OK))
    }

    /// Answers 201 with a `T`.
    pub fn creates<T: JsonSchema>(self, summary: &'static str) -> Row<S> {
        self.with(summary, Answer::json::<T>(StatusCode::CREATED))
    }

    /// Answers 202 with a `T`.
    pub fn accepts<T: JsonSchema>(self, summary: &'static str) -> Row<S> {
        self.with(summary, Answer::json::<T>(StatusCode::ACCEPTED))
    }

    /// Answers 202 with a job, whose result is a `T`.
    pub fn begins<T: JsonSchema>(self, summary: &'static str) -> Row<S> {
        self.with(summary, Answer::job::<T>())
    }

    /// Answers 200 with something that is not JSON, of this media type.
    pub fn sends(self, media: &'static str, summary: &'static str) -> Row<S> {
        self.with(summary, Answer::other(media))
    }

    fn with(self, summary: &'static str, answer: Answer) -> Row<S> {
        let contract = Contract { summary, takes: self.takes, answer };
        let Unanswered { method, path, need, reach, answer, .. } = self;
        let audited = method != Method::GET;
        Row { method, path, need, reach, audited, contract, answer }
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
        let (app, pass) = (app.clone(), Pass { need: row.need, reach: row.reach, audited: row.audited });
        let gate = from_fn(move |request: Request, next: Next| pass.check(app.clone(), request, next));
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

/// What a row asks of a request before its handler sees it.
#[derive(Debug, Clone, Copy)]
struct Pass {
    need: Need,
    reach: Reach,
    audited: bool,
}

impl Pass {
    async fn check(self, app: Arc<App>, request: Request, next: Next) -> Result<Response, Problem> {
        let Need::Role(role) = self.need else { return Ok(next.run(request).await) };
        let Some(caller) = request.extensions().get::<Caller>().cloned() else { return Err(unknown_caller()) };
        if !caller.has(role) {
            return Err(forbidden(format!("this needs the role {}", role.name()))
                .hint("`lifeboat token create` makes a token with another role"));
        }
        let (request, named) = self.within_reach(&app, &caller, request).await?;
        let who = caller.to_string();
        let once = app.keys.once(&caller, request, |request| next.run(request));
        let once = async { once.await.unwrap_or_else(IntoResponse::into_response) };
        let answer = Origin { who: who.clone(), key: None }.scope(once);
        match self.audited {
            true => recorded(&app, &caller, who, named, answer).await,
            false => Ok(answer.await),
        }
    }

    /// The request, and what to call it.
    async fn within_reach(self, app: &App, caller: &Caller, request: Request) -> Result<(Request, Named), Problem> {
        let named = Named {
            what: quoted(&format!("{} {}", request.method(), request.uri().path())),
            from: request.extensions().get::<Peer>().map(|Peer(peer)| peer.to_string()),
        };
        if caller.is_unlimited() || self.reach == Reach::Judged {
            return Ok((request, named));
        }
        if self.reach == Reach::Whole {
            return Err(forbidden("a token that is limited to machines may not do this"));
        }
        let (mut parts, body) = request.into_parts();
        let parameters = Path::<HashMap<String, String>>::from_request_parts(&mut parts, &()).await;
        let name = parameters.ok().and_then(|Path(mut parameters)| parameters.remove("name")).unwrap_or_default();
        if !app.recoveries.view(&name).is_ok_and(|view| caller.sees(&view.machine)) {
            return Err(Problem::not_found(format!("there is no recovery {name}")));
        }
        Ok((Request::from_parts(parts, body), named))
    }
}

/// How a request is called in the audit log.
struct Named {
    what: String,
    from: Option<String>,
}

/// Records who asks for what, has it answered, and records what came of it.
async fn recorded(
    app: &App,
    caller: &Caller,
    who: String,
    Named { what, from }: Named,
    answer: impl Future<Output = Response>,
) -> Result<Response, Problem> {
    let pending = match append(&app.audit, Event::Asked { who, from, what }).await {
        Ok(asked) => Some(Pending { audit: app.audit.clone(), asked: Some(asked) }),
        // A full disk must not keep the owner from recovering a machine, or a policy from backing it up.
        Err(problem) if !matches!(caller, Caller::Token { .. }) => {
            tracing::error!(%problem, "the owner is served without a record in the audit log");
            None
        }
        Err(problem) => return Err(problem.with_status(StatusCode::SERVICE_UNAVAILABLE)),
    };
    let mut response = answer.await;
    if let Some(pending) = pending {
        let about = response.extensions_mut().remove::<About>().map(|About(about)| quoted(&about));
        pending.answered(response.status().as_u16(), about).await;
    }
    Ok(response)
}

async fn append(audit: &Arc<Audit>, event: Event) -> Result<u64, Problem> {
    let audit = audit.clone();
    let appended = tokio::task::spawn_blocking(move || audit.append(event)).await;
    appended.map_err(|error| Problem::failed("cannot write the audit log", &error))?
}

/// A request that is recorded as asked and not yet as answered. One that is dropped has lost its asker.
struct Pending {
    audit: Arc<Audit>,
    asked: Option<u64>,
}

impl Pending {
    async fn answered(mut self, status: u16, about: Option<String>) {
        let Some(asked) = self.asked.take() else { return };
        if let Err(problem) = append(&self.audit, Event::Answered { asked, status, about }).await {
            tracing::error!(%problem, "what was done stands in the audit log as asked only");
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Some(asked) = self.asked.take() else { return };
        let audit = self.audit.clone();
        let about = Some("the asker went away".to_owned());
        // The program may be ending: then it stays as asked.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || audit.append(Event::Answered { asked, status: GONE_AWAY, about }));
        }
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
pub(super) mod tests;
