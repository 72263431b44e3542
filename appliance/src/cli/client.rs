//! Speaks the API: to the router in this process, or to another process over its socket.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tower::ServiceExt;

use crate::problem::{Handling, Kind, Problem};

/// Longest answer that is read whole.
const ANSWER_MAX: usize = 64 << 20;

/// How long the owner of a socket may be away between two requests.
const AWAY_MAX: Duration = Duration::from_millis(1500);

/// A way to the API.
#[derive(Debug)]
pub enum Client {
    /// In this process.
    Router(Router),
    /// A socket that another process listens on.
    Socket {
        /// Where it listens.
        path: PathBuf,
        /// Whether it has taken a request yet.
        taken: AtomicBool,
    },
}

impl Client {
    /// Through the socket at `path`.
    pub fn socket(path: PathBuf) -> Client {
        Client::Socket { path, taken: AtomicBool::new(false) }
    }

    /// A request whose answer is one value.
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Problem> {
        let response = self.send(method, path, body).await?;
        let bytes = collect(response.into_body()).await?;
        serde_json::from_slice(&bytes).map_err(|error| Problem::failed("cannot read the answer", &error))
    }

    /// A request whose answer is a stream of events.
    pub async fn stream(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Events, Problem> {
        let response = self.send(method, path, body).await?;
        Ok(Events { body: response.into_body(), buffer: Vec::new() })
    }

    /// A request whose answer is a stream of bytes.
    pub async fn download(&self, path: &str, body: &impl Serialize) -> Result<Download, Problem> {
        let response = self.send(Method::POST, path, Some(body)).await?;
        Ok(Download { body: response.into_body() })
    }

    async fn send(&self, method: Method, path: &str, body: Option<&impl Serialize>) -> Result<Response<Body>, Problem> {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "lifeboat");
        let content = match body {
            None => Body::empty(),
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                let bytes =
                    serde_json::to_vec(body).map_err(|error| Problem::failed("cannot write the request", &error))?;
                Body::from(bytes)
            }
        };
        let request = request.body(content).map_err(|error| Problem::usage(format!("bad request: {error}")))?;
        let response = match self {
            Client::Router(router) => match router.clone().oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            },
            Client::Socket { path, taken } => over_socket(path, taken, request).await?,
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes = collect(response.into_body()).await?;
        Err(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
            let kind = if status == StatusCode::NOT_FOUND { Kind::NotFound } else { Kind::Usage };
            Problem::new(kind, format!("the service answered {status}: {}", String::from_utf8_lossy(&bytes)))
        }))
    }
}

async fn over_socket(path: &Path, taken: &AtomicBool, request: Request<Body>) -> Result<Response<Body>, Problem> {
    let cannot = |error: &(dyn std::error::Error + 'static)| {
        Problem::failed(format!("cannot speak with the service on {}", path.display()), error)
    };
    let since = Instant::now();
    let stream = loop {
        match tokio::net::UnixStream::connect(path).await {
            Ok(stream) => break stream,
            // Another command hosted the API and has ended; whoever asks first asks somebody else.
            Err(error) if !taken.load(Ordering::Relaxed) => return Err(cannot(&error).handled(Handling::AskAgain)),
            Err(_) if since.elapsed() < AWAY_MAX => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => return Err(cannot(&error)),
        }
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| cannot(&error))?;
    // Its end shows in the answer, which breaks off.
    tokio::spawn(connection);
    taken.store(true, Ordering::Relaxed);
    let response = sender.send_request(request).await.map_err(|error| cannot(&error))?;
    Ok(response.map(Body::new))
}

async fn collect(body: Body) -> Result<Vec<u8>, Problem> {
    axum::body::to_bytes(body, ANSWER_MAX)
        .await
        .map(Vec::from)
        .map_err(|error| Problem::failed("the answer broke off", &error))
}

/// A stream of bytes.
#[derive(Debug)]
pub struct Download {
    body: Body,
}

impl Download {
    /// The next bytes, or `None` when the stream ended.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(Problem::failed("the answer broke off", &error)),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data()
                        && !bytes.is_empty()
                    {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }
}

/// A stream of server-sent events.
#[derive(Debug)]
pub struct Events {
    body: Body,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event's name and data, or `None` when the stream ended.
    pub async fn next(&mut self) -> Result<Option<(String, String)>, Problem> {
        loop {
            while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(event) = parse_event(&String::from_utf8_lossy(&event)) {
                    return Ok(Some(event));
                }
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(Problem::failed("the service went away", &error)),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                    if self.buffer.len() > ANSWER_MAX {
                        return Err(Problem::new(Kind::Failed, "the service sent an event without an end"));
                    }
                }
            }
        }
    }
}

/// The `event` and `data` fields of a block of lines; comments alone are no event.
fn parse_event(block: &str) -> Option<(String, String)> {
    let field = |name: &str| {
        block
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(|value| value.trim_start().to_owned()))
    };
    Some((field("event")?, field("data")?))
}

/// A path segment with everything escaped that a path cannot hold.
pub fn segment(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_taken_apart() {
        assert_eq!(parse_event("event: progress\ndata: {}\n\n"), Some(("progress".into(), "{}".into())));
        assert_eq!(parse_event(":\n\n"), None);
        assert_eq!(segment("web01@2026-11-21T03:00 x/y"), "web01%402026-11-21T03%3A00%20x%2Fy");
    }
}
