//! `Idempotency-Key`: a start that is asked for twice, because the answer was lost, is done once.
//!
//! A key belongs to the caller, the method and the path it came with. The first request with it is carried out; a later one
//! gets the same answer, and one that comes while the first is carried out, or with another body, is refused. Keys are
//! known for as long as the process lives, the newest 1,000 of them. What a restart forgets is no start that is done
//! unknowingly: jobs that were at work are listed as interrupted, and recoveries by their names.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::BODY_MAX;
use crate::access::Caller;
use crate::audit::About;
use crate::problem::Problem;

/// The header.
pub const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longest key.
const KEY_LEN_MAX: usize = 255;
/// How many keys are known.
const KEYS_MAX: usize = 1000;
/// Longest answer that is kept. Starts answer with a job or a recovery.
const ANSWER_MAX: usize = 256 << 10;

/// Hash of caller, method, path and key.
type Name = [u8; 32];

#[derive(Debug, Clone)]
struct Answer {
    status: StatusCode,
    kind: Option<HeaderValue>,
    body: Bytes,
}

#[derive(Debug)]
struct Known {
    body: blake3::Hash,
    /// Absent while the request is carried out.
    answer: Option<Answer>,
}

/// The keys of a process.
#[derive(Debug, Default)]
pub struct Keys {
    known: Mutex<(HashMap<Name, Known>, VecDeque<Name>)>,
}

/// What a key says about a request.
enum Verdict {
    First,
    Answered(Answer),
    Refused(Problem),
}

impl Keys {
    /// Carries a request out, or answers it as the first with its key. One without a key, or that is not
    /// a POST, is carried out.
    pub async fn once<F: Future<Output = Response>>(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request,
        carry_out: impl FnOnce(Request) -> F,
    ) -> Result<Response, Problem> {
        let key = request.headers().get(&KEY).filter(|_| request.method() == Method::POST).cloned();
        let Some(key) = key else { return Ok(carry_out(request).await) };
        if key.is_empty() || key.len() > KEY_LEN_MAX {
            return Err(Problem::usage(format!("an Idempotency-Key has 1 to {KEY_LEN_MAX} characters")));
        }
        let (parts, body) = request.into_parts();
        let read = tokio::time::timeout(super::extract::BODY, axum::body::to_bytes(body, BODY_MAX)).await;
        let body = match read {
            Ok(Ok(body)) => body,
            Ok(Err(_)) => {
                return Err(
                    Problem::usage("the body is too long or broke off").with_status(StatusCode::PAYLOAD_TOO_LARGE)
                );
            }
            Err(_) => return Err(Problem::usage("the body does not arrive").with_status(StatusCode::REQUEST_TIMEOUT)),
        };
        let mut hasher = blake3::Hasher::new();
        for part in [caller.to_string().as_bytes(), parts.method.as_str().as_bytes(), parts.uri.to_string().as_bytes()]
        {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let name = *hasher.update(key.as_bytes()).finalize().as_bytes();
        match self.judge(name, blake3::hash(&body)) {
            Verdict::Refused(problem) => return Err(problem),
            Verdict::Answered(answer) => return Ok(answer.into_response()),
            Verdict::First => {}
        }
        // A request that is dropped on the way was not answered: its key is forgotten.
        let pending = Pending { keys: self.clone(), name: Some(name) };
        let response = carry_out(Request::from_parts(parts, Body::from(body))).await;
        pending.answered(response).await
    }

    fn judge(&self, name: Name, body: blake3::Hash) -> Verdict {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (keys, order) = &mut *known;
        match keys.get(&name) {
            Some(found) if found.body != body => Verdict::Refused(
                Problem::usage("this Idempotency-Key came with another body before")
                    .hint("take a new key for a new request")
                    .with_status(StatusCode::UNPROCESSABLE_ENTITY),
            ),
            Some(Known { answer: Some(answer), .. }) => Verdict::Answered(answer.clone()),
            Some(_) => {
                Verdict::Refused(Problem::refused("the first request with this Idempotency-Key is being carried out"))
            }
            None => {
                keys.insert(name, Known { body, answer: None });
                order.push_back(name);
                if order.len() > KEYS_MAX
                    && let Some(oldest) = order.pop_front()
                {
                    keys.remove(&oldest);
                }
                Verdict::First
            }
        }
    }

    fn forget(&self, name: Name) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.0.remove(&name);
        known.1.retain(|kept| *kept != name);
    }

    fn keep(&self, name: Name, answer: Answer) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.0.get_mut(&name) {
            known.answer = Some(answer);
        }
    }
}

struct Pending {
    keys: Arc<Keys>,
    name: Option<Name>,
}

impl Pending {
    /// Keeps an answer that says that something was started. A refusal or a failure may be tried again with the same key,
    /// and a stream cannot be repeated.
    async fn answered(mut self, response: Response) -> Result<Response, Problem> {
        let whole = response.headers().contains_key(header::CONTENT_LENGTH)
            || response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
        if !response.status().is_success() || !whole {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, ANSWER_MAX).await;
        let body = body.map_err(|error| Problem::failed("cannot keep the answer for its Idempotency-Key", &error))?;
        let kind = parts.headers.get(header::CONTENT_TYPE).cloned();
        if let Some(name) = self.name.take() {
            self.keys.keep(name, Answer { status: parts.status, kind, body: body.clone() });
        }
        Ok(Response::from_parts(parts, Body::from(body)))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            self.keys.forget(name);
        }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body).into_response();
        response.extensions_mut().insert(About("the answer that was given before".to_owned()));
        if let Some(kind) = self.kind {
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn request(key: Option<&str>, body: &str) -> Request {
        let mut request = Request::post("/api/v1/points");
        if let Some(key) = key {
            request = request.header(KEY, key);
        }
        request.body(Body::from(body.to_owned())).unwrap()
    }

    async fn ask(keys: &Arc<Keys>, done: &AtomicU64, key: Option<&str>, body: &str) -> (u16, String) {
        let answer = keys.once(&Caller::Owner, request(key, body), async |_| {
            let number = done.fetch_add(1, Ordering::Relaxed) + 1;
            match body {
                "fail" => Problem::refused("no").into_response(),
                _ => (StatusCode::ACCEPTED, axum::Json(number)).into_response(),
            }
        });
        let response = answer.await.unwrap_or_else(IntoResponse::into_response);
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_start_with_a_key_is_done_once() {
        let (keys, done) = (Arc::new(Keys::default()), AtomicU64::new(0));
        assert_eq!(ask(&keys, &done, Some("a"), "x").await, (202, "1".to_owned()));
        assert_eq!(ask(&keys, &done, Some("a"), "x").await, (202, "1".to_owned()));
        assert_eq!(ask(&keys, &done, Some("b"), "x").await, (202, "2".to_owned()));
        assert_eq!(ask(&keys, &done, None, "x").await, (202, "3".to_owned()));
        assert_eq!(ask(&keys, &done, Some("a"), "y").await.0, 422);
        assert_eq!(ask(&keys, &done, Some(""), "x").await.0, 400);
        assert_eq!(done.load(Ordering::Relaxed), 3);
        // What was refused was not done, and may be asked again.
        assert_eq!(ask(&keys, &done, Some("c"), "fail").await.0, 409);
        assert_eq!(ask(&keys, &done, Some("c"), "x").await, (202, "5".to_owned()));
    }

    #[tokio::test]
    async fn the_second_is_refused_while_the_first_is_at_work_and_goes_on_if_it_is_dropped() {
        let (keys, done) = (Arc::new(Keys::default()), AtomicU64::new(0));
        let first = keys.once(&Caller::Owner, request(Some("a"), "x"), async |_| std::future::pending().await);
        let mut first = Box::pin(first);
        assert!(first.as_mut().now_or_never().is_none());
        assert_eq!(ask(&keys, &done, Some("a"), "x").await.0, 409);
        drop(first);
        assert_eq!(ask(&keys, &done, Some("a"), "x").await.0, 202);
    }

    #[tokio::test]
    async fn old_keys_are_forgotten() {
        let (keys, done) = (Arc::new(Keys::default()), AtomicU64::new(0));
        for key in 0..KEYS_MAX + 10 {
            ask(&keys, &done, Some(&key.to_string()), "x").await;
        }
        assert_eq!(keys.known.lock().unwrap().0.len(), KEYS_MAX);
        assert_eq!(keys.known.lock().unwrap().1.len(), KEYS_MAX);
    }
}
