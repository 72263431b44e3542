//! `Idempotency-Key`: a start that is asked for twice, because the answer was lost, is done once.
//!
//! A key belongs to the caller, the method and the path it came with. The first request with it is carried out, to its end
//! even when its asker goes away; a later one gets the same answer, and one that comes while the first is carried out, or
//! with another body, is refused. The newest 1,000 keys are known, through restarts too: `record.rs` says what is kept.

mod record;

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use self::record::{Log, Past};
use super::BODY_MAX;
use crate::access::{Caller, Origin};
use crate::audit::About;
use crate::jobs::Jobs;
use crate::journal::JournalError;
use crate::problem::Problem;

/// The header.
pub const KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longest key.
const KEY_LEN_MAX: usize = 255;
/// How many keys are known.
const KEYS_MAX: usize = 1000;
/// Longest answer that is kept. Starts answer with a job or a recovery.
const ANSWER_MAX: usize = 64 << 10;
/// All answers that are kept.
const ANSWERS_MAX: usize = 8 << 20;
/// What answers with a secret, which is told once and kept nowhere.
const SECRETS: &str = "/api/v1/tokens";

/// What a request was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Answer {
    status: u16,
    kind: Option<String>,
    /// Absent if it is not kept.
    content: Option<String>,
}

/// How a request with a key stands.
#[derive(Debug)]
enum Stand {
    AtWork,
    /// The process that carried it out ended first.
    CutOff,
    Answered(Answer),
}

#[derive(Debug)]
struct Known {
    body: String,
    stand: Stand,
}

/// The requests that are known, oldest first.
#[derive(Debug, Default)]
struct Book {
    known: HashMap<String, Known>,
    order: VecDeque<String>,
    /// Of all answers.
    bytes: usize,
}

/// The keys of a state folder.
#[derive(Debug)]
pub struct Keys {
    jobs: Arc<Jobs>,
    book: Mutex<Book>,
    /// Locked before the book.
    log: Mutex<Log>,
}

/// What a key says about a request.
enum Verdict {
    First,
    Answered(Response),
    Refused(Problem),
}

impl Keys {
    /// Those of a state folder. A request that another process had begun and not answered was cut off.
    pub fn open(path: PathBuf, jobs: Arc<Jobs>) -> Keys {
        let (log, past) = Log::read(path);
        let mut book = Book::default();
        for (key, body, answer) in past {
            book.push(key, Known { body, stand: answer.map_or(Stand::CutOff, Stand::Answered) });
        }
        Keys { jobs, book: Mutex::new(book), log: Mutex::new(log) }
    }

    /// Carries a request out, or answers it as the first with its key. One without a key, or that is not
    /// a POST, is carried out.
    pub async fn once<F: Future<Output = Response> + Send + 'static>(
        self: &Arc<Self>,
        caller: &Caller,
        request: Request,
        carry_out: impl FnOnce(Request) -> F + Send + 'static,
    ) -> Result<Response, Problem> {
        let given = request.headers().get(&KEY).filter(|_| request.method() == Method::POST).cloned();
        let Some(given) = given else { return Ok(carry_out(request).await) };
        if given.is_empty() || given.len() > KEY_LEN_MAX {
            return Err(Problem::usage(format!("an Idempotency-Key has 1 to {KEY_LEN_MAX} characters")));
        }
        let (parts, body) = request.into_parts();
        let body = whole(body).await?;
        let who = caller.to_string();
        let mut hasher = blake3::Hasher::new();
        for part in [who.as_bytes(), parts.method.as_str().as_bytes(), parts.uri.to_string().as_bytes()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let key = hasher.update(given.as_bytes()).finalize().to_string();
        let digest = blake3::hash(&body).to_string();
        match self.judge(&key, &digest) {
            Verdict::Refused(problem) => return Err(problem),
            Verdict::Answered(answer) => return Ok(answer),
            Verdict::First => {}
        }
        let (keys, secret) = (self.clone(), parts.uri.path() == SECRETS);
        let origin = Origin { key: Some(key.clone()), ..Origin::current() };
        // Whoever goes away may come back with the key.
        let work = tokio::spawn(async move {
            if let Err(error) = keys.write(move |log, key| log.begun(key, &digest), &key).await {
                keys.lock().remove(&key);
                return Err(Problem::failed("cannot keep the Idempotency-Key, so nothing was begun", &error)
                    .hint("make room for the state folder, or ask without a key")
                    .with_status(StatusCode::SERVICE_UNAVAILABLE));
            }
            let response = origin.scope(carry_out(Request::from_parts(parts, Body::from(body)))).await;
            keys.answered(&key, secret, response).await
        });
        work.await.map_err(|error| Problem::failed("the request ended badly", &error))?
    }

    fn judge(&self, key: &str, body: &str) -> Verdict {
        let mut book = self.lock();
        let Some(found) = book.known.get(key) else {
            book.push(key.to_owned(), Known { body: body.to_owned(), stand: Stand::AtWork });
            return Verdict::First;
        };
        if found.body != body {
            return Verdict::Refused(
                Problem::usage("this Idempotency-Key came with another body before")
                    .hint("take a new key for a new request")
                    .with_status(StatusCode::UNPROCESSABLE_ENTITY),
            );
        }
        match &found.stand {
            Stand::AtWork => {
                Verdict::Refused(Problem::refused("the first request with this Idempotency-Key is being carried out"))
            }
            Stand::Answered(answer) => match answer.again() {
                Some(response) => Verdict::Answered(response),
                None => Verdict::Refused(
                    Problem::refused("the first request with this Idempotency-Key was carried out")
                        .hint("its answer is not kept: look for what it made"),
                ),
            },
            Stand::CutOff => match self.jobs.of_request(key) {
                Some(job) => Verdict::Answered(again(StatusCode::ACCEPTED, Json(job.view()))),
                None => Verdict::Refused(
                    Problem::refused(
                        "the service ended while the first request with this Idempotency-Key was carried out",
                    )
                    .hint("look whether it was done, and take a new key if not"),
                ),
            },
        }
    }

    /// Keeps an answer that says that something was started. A refusal or a failure may be tried again with the same key,
    /// and a stream cannot be repeated.
    async fn answered(self: &Arc<Self>, key: &str, secret: bool, response: Response) -> Result<Response, Problem> {
        let json = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
        if !response.status().is_success() || !(json || response.headers().contains_key(header::CONTENT_LENGTH)) {
            self.lock().remove(key);
            self.note(|log, key| log.free(key), key).await;
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, BODY_MAX).await;
        let body = body.map_err(|error| Problem::failed("cannot keep the answer for its Idempotency-Key", &error))?;
        let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).map(ToOwned::to_owned);
        let kept = (!secret && body.len() <= ANSWER_MAX).then(|| String::from_utf8(body.to_vec()).ok()).flatten();
        let answer = Answer { status: parts.status.as_u16(), kind, content: kept };
        self.lock().answered(key, answer.clone());
        self.note(move |log, key| log.answered(key, &answer), key).await;
        Ok(Response::from_parts(parts, Body::from(body)))
    }

    /// Writes what can be found out without it: a request that stands as begun is answered by its job after a crash.
    async fn note(
        self: &Arc<Self>,
        with: impl FnOnce(&mut Log, &str) -> Result<(), JournalError> + Send + 'static,
        key: &str,
    ) {
        if let Err(error) = self.write(with, key).await {
            tracing::error!(error = %crate::problem::chain(&error), "an answer is not kept for its Idempotency-Key");
        }
    }

    /// Writes to the log where it may block, anew if it is long.
    async fn write(
        self: &Arc<Self>,
        with: impl FnOnce(&mut Log, &str) -> Result<(), JournalError> + Send + 'static,
        key: &str,
    ) -> Result<(), JournalError> {
        let (keys, key) = (self.clone(), key.to_owned());
        let work = tokio::task::spawn_blocking(move || {
            let mut log = keys.log.lock().unwrap_or_else(PoisonError::into_inner);
            if log.is_long() {
                let mut past = keys.lock().past();
                // What is begun here is not yet written.
                past.retain(|(known, _, answer)| *known != key || answer.is_some());
                log.rewrite(past)?;
            }
            with(&mut log, &key)
        });
        // It does not panic, and is not cancelled.
        work.await.unwrap_or(Ok(()))
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn push(&mut self, key: String, known: Known) {
        if let Stand::Answered(answer) = &known.stand {
            self.bytes += answer.length();
        }
        self.known.insert(key.clone(), known);
        self.order.push_back(key);
        self.trim();
    }

    fn answered(&mut self, key: &str, answer: Answer) {
        let Some(known) = self.known.get_mut(key) else { return };
        self.bytes += answer.length();
        known.stand = Stand::Answered(answer);
        self.trim();
    }

    fn remove(&mut self, key: &str) {
        self.order.retain(|known| known != key);
        self.forget(key);
    }

    fn trim(&mut self) {
        while self.order.len() > KEYS_MAX || self.bytes > ANSWERS_MAX {
            let Some(oldest) = self.order.pop_front() else { return };
            self.forget(&oldest);
        }
    }

    fn forget(&mut self, key: &str) {
        if let Some(Known { stand: Stand::Answered(answer), .. }) = self.known.remove(key) {
            self.bytes -= answer.length();
        }
    }

    /// All of it as it is kept.
    fn past(&self) -> Vec<Past> {
        let known = self.order.iter().filter_map(|key| Some((key, self.known.get(key)?)));
        let answer = |stand: &Stand| match stand {
            Stand::Answered(answer) => Some(answer.clone()),
            Stand::AtWork | Stand::CutOff => None,
        };
        known.map(|(key, known)| (key.clone(), known.body.clone(), answer(&known.stand))).collect()
    }
}

/// All of a body.
async fn whole(body: Body) -> Result<Bytes, Problem> {
    match tokio::time::timeout(super::extract::BODY, axum::body::to_bytes(body, BODY_MAX)).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => {
            Err(Problem::usage("the body is too long or broke off").with_status(StatusCode::PAYLOAD_TOO_LARGE))
        }
        Err(_) => Err(Problem::usage("the body does not arrive").with_status(StatusCode::REQUEST_TIMEOUT)),
    }
}

impl Answer {
    fn length(&self) -> usize {
        self.content.as_ref().map_or(0, String::len)
    }

    /// The same answer, if it is kept.
    fn again(&self) -> Option<Response> {
        let status = StatusCode::from_u16(self.status).ok()?;
        let mut response = again(status, self.content.clone()?);
        let kind = self.kind.as_ref().and_then(|kind| HeaderValue::from_str(kind).ok());
        if let Some(kind) = kind {
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
        }
        Some(response)
    }
}

fn again(status: StatusCode, content: impl IntoResponse) -> Response {
    let mut response = (status, content).into_response();
    response.extensions_mut().insert(About("the answer that was given before".to_owned()));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tokio::sync::oneshot;

    /// The keys of a folder, and how many requests were carried out.
    struct Bench {
        dir: tempfile::TempDir,
        keys: Arc<Keys>,
        jobs: Arc<Jobs>,
        done: Arc<AtomicU64>,
    }

    impl Bench {
        fn new() -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let jobs = Arc::new(Jobs::default());
            let keys = Arc::new(Keys::open(dir.path().join("requests"), jobs.clone()));
            Bench { dir, keys, jobs, done: Arc::default() }
        }

        /// As the next process finds them.
        fn restart(&mut self) {
            self.keys = Arc::new(Keys::open(self.dir.path().join("requests"), self.jobs.clone()));
        }

        async fn ask(&self, key: Option<&str>, body: &str) -> (u16, String) {
            self.ask_at("/api/v1/points", key, body).await
        }

        async fn ask_at(&self, path: &str, key: Option<&str>, body: &str) -> (u16, String) {
            let (done, fails) = (self.done.clone(), body == "fail");
            let answer = self.keys.once(&Caller::Owner, request(path, key, body), move |_| async move {
                let number = done.fetch_add(1, Ordering::Relaxed) + 1;
                match fails {
                    true => Problem::refused("no").into_response(),
                    false => (StatusCode::ACCEPTED, Json(number)).into_response(),
                }
            });
            told(answer.await).await
        }
    }

    fn request(path: &str, key: Option<&str>, body: &str) -> Request {
        let mut request = Request::post(path);
        if let Some(key) = key {
            request = request.header(KEY, key);
        }
        request.body(Body::from(body.to_owned())).unwrap()
    }

    async fn told(answer: Result<Response, Problem>) -> (u16, String) {
        let response = answer.unwrap_or_else(IntoResponse::into_response);
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_start_with_a_key_is_done_once_through_restarts() {
        let mut bench = Bench::new();
        for round in ["at first", "after a restart"] {
            assert_eq!(bench.ask(Some("a"), "x").await, (202, "1".to_owned()), "{round}");
            assert_eq!(bench.ask(Some("a"), "x").await, (202, "1".to_owned()), "{round}");
            assert_eq!(bench.ask(Some("b"), "x").await, (202, "2".to_owned()), "{round}");
            assert_eq!(bench.ask(Some("a"), "y").await.0, 422, "{round}");
            assert_eq!(bench.ask(Some(""), "x").await.0, 400, "{round}");
            assert_eq!(bench.done.load(Ordering::Relaxed), 2, "{round}");
            bench.restart();
        }
        assert_eq!(bench.ask(None, "x").await, (202, "3".to_owned()));
        // What was refused was not done, and may be asked again.
        assert_eq!(bench.ask(Some("c"), "fail").await.0, 409);
        bench.restart();
        assert_eq!(bench.ask(Some("c"), "x").await, (202, "5".to_owned()));
    }

    #[tokio::test]
    async fn the_second_is_refused_while_the_first_is_at_work_which_is_done_though_its_asker_is_gone() {
        let bench = Bench::new();
        let (release, wait) = oneshot::channel::<()>();
        let (begun, began) = oneshot::channel::<()>();
        let keys = bench.keys.clone();
        let first = tokio::spawn(async move {
            let answer = keys.once(&Caller::Owner, request("/api/v1/points", Some("a"), "x"), |_| async {
                begun.send(()).unwrap();
                wait.await.unwrap();
                (StatusCode::ACCEPTED, Json(7)).into_response()
            });
            answer.await.is_ok()
        });
        began.await.unwrap();
        assert_eq!(bench.ask(Some("a"), "x").await.0, 409);
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        release.send(()).unwrap();
        loop {
            match bench.ask(Some("a"), "x").await {
                (409, _) => tokio::task::yield_now().await,
                answer => break assert_eq!(answer, (202, "7".to_owned())),
            }
        }
        assert_eq!(bench.done.load(Ordering::Relaxed), 0, "only the first was carried out");
    }

    #[tokio::test]
    async fn what_was_cut_off_is_answered_with_its_job_and_else_not_done_again() {
        let mut bench = Bench::new();
        let jobs = bench.jobs.clone();
        for (key, starts) in [("job", true), ("else", false)] {
            let jobs = jobs.clone();
            let (begun, began) = oneshot::channel::<()>();
            let keys = bench.keys.clone();
            // The process ends in the middle of it, so nothing more is written.
            tokio::spawn(async move {
                let hang = keys.once(&Caller::Owner, request("/api/v1/points", Some(key), "x"), move |_| async move {
                    if starts {
                        jobs.start("backup", "all", |_| Ok(7.into()));
                    }
                    begun.send(()).unwrap();
                    std::future::pending().await
                });
                hang.await.map(|_| ())
            });
            began.await.unwrap();
        }
        bench.restart();
        let (status, job) = bench.ask(Some("job"), "x").await;
        assert!(status == 202 && job.contains("\"kind\":\"backup\""), "{job}");
        let (status, problem) = bench.ask(Some("else"), "x").await;
        assert!(status == 409 && problem.contains("the service ended while"), "{problem}");
        assert_eq!(bench.done.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_secret_is_not_kept() {
        let bench = Bench::new();
        assert_eq!(bench.ask_at(SECRETS, Some("a"), "x").await, (202, "1".to_owned()));
        assert_eq!(bench.ask_at(SECRETS, Some("a"), "x").await.0, 409);
        let kept = std::fs::read_to_string(bench.dir.path().join("requests")).unwrap();
        assert!(kept.contains("\"content\":null"), "{kept}");
    }

    #[tokio::test]
    async fn a_cut_at_every_byte_does_nothing_twice() {
        let mut bench = Bench::new();
        bench.ask(Some("a"), "x").await;
        bench.ask(Some("b"), "fail").await;
        let path = bench.dir.path().join("requests");
        let good = std::fs::read(&path).unwrap();
        let ends: Vec<usize> =
            good.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1).collect();
        let (begun, answered) = (ends[1], ends[2]);
        for cut in 0..=good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            bench.restart();
            let before = bench.done.load(Ordering::Relaxed);
            let (status, _) = bench.ask(Some("a"), "x").await;
            let again = bench.done.load(Ordering::Relaxed) - before;
            // Before it was begun nobody had carried it out.
            let expected = if cut < begun {
                (202, 1)
            } else if cut < answered {
                (409, 0)
            } else {
                (202, 0)
            };
            assert_eq!((status, again), expected, "cut {cut}");
        }
    }

    #[tokio::test]
    async fn old_keys_are_forgotten_and_the_file_stays_short() {
        let mut bench = Bench::new();
        let many = 2 * KEYS_MAX + 10;
        let answer = |length| Answer { status: 202, kind: None, content: Some("x".repeat(length)) };
        let past = (0..many).map(|key| (key.to_string(), String::new(), Some(answer(1)))).collect();
        bench.keys.log.lock().unwrap().rewrite(past).unwrap();
        bench.ask(Some("b"), "x").await;
        let lines = |bench: &Bench| std::fs::read_to_string(bench.dir.path().join("requests")).unwrap().lines().count();
        assert_eq!(lines(&bench), 3, "it was too long, and is written anew with what counts");

        let past = (0..many).map(|key| (key.to_string(), String::new(), Some(answer(1)))).collect();
        bench.keys.log.lock().unwrap().rewrite(past).unwrap();
        bench.restart();
        {
            let book = bench.keys.lock();
            assert_eq!((book.known.len(), book.order.len(), book.bytes), (KEYS_MAX, KEYS_MAX, KEYS_MAX));
            assert!(book.known.contains_key(&(many - 1).to_string()));
        }
        bench.ask(Some("c"), "x").await;
        assert_eq!(lines(&bench), 1 + 2 * KEYS_MAX, "what a process finds is written anew before it adds to it");

        let mut book = Book::default();
        for key in 0..KEYS_MAX {
            book.push(key.to_string(), Known { body: String::new(), stand: Stand::Answered(answer(ANSWER_MAX)) });
        }
        assert_eq!((book.known.len(), book.bytes), (ANSWERS_MAX / ANSWER_MAX, ANSWERS_MAX));
    }
}
