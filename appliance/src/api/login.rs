//! Who asks over the network: a bearer token, and not too many wrong ones.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use chrono::Utc;

use crate::access::throttle::Throttle;
use crate::access::tokens::Tokens;
use crate::problem::Problem;

/// The address that a request comes from; the listener puts it into the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// What logins are judged by.
#[derive(Debug, Clone)]
pub struct Logins {
    tokens: Arc<Tokens>,
    throttle: Arc<Throttle>,
}

impl Logins {
    /// Lets in who has one of these tokens.
    pub fn new(tokens: Arc<Tokens>) -> Logins {
        Logins { tokens, throttle: Arc::default() }
    }
}

/// Says who the caller is. A request without a token goes on as nobody's.
pub async fn identify(State(logins): State<Logins>, mut request: Request, next: Next) -> Response {
    let Some(shown) = request.headers().get(header::AUTHORIZATION) else { return next.run(request).await };
    let Some(Peer(peer)) = request.extensions().get::<Peer>().copied() else {
        return Problem::refused("this request comes from nowhere").with_status(StatusCode::FORBIDDEN).into_response();
    };
    let now = Instant::now();
    if let Some(wait) = logins.throttle.wait(peer, now) {
        let problem = Problem::refused("too many failed logins from this address")
            .hint("wait as long as Retry-After says")
            .with_status(StatusCode::TOO_MANY_REQUESTS);
        let mut headers = HeaderMap::new();
        headers.insert(header::RETRY_AFTER, HeaderValue::from(wait.as_secs() + 1));
        return (headers, problem).into_response();
    }
    match bearer(shown).and_then(|token| logins.tokens.caller(token, Utc::now())) {
        Some(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        None => {
            if logins.throttle.fail(peer, now) {
                tracing::warn!(%peer, "too many failed logins; not listened to for a while");
            }
            Problem::refused("this token is not one of ours, or it has ended")
                .hint("`lifeboat token list` shows who has one; `lifeboat token create` makes another")
                .with_status(StatusCode::UNAUTHORIZED)
                .into_response()
        }
    }
}

fn bearer(header: &HeaderValue) -> Option<&str> {
    let (scheme, token) = header.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}
