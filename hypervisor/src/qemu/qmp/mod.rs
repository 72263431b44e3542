//! A QMP client that survives slow, broken and newer servers.
//!
//! - Commands run concurrently; each has an id and a deadline, and a caller may stop waiting at any moment: its answer
//!   is then dropped when it comes, and the next command is not confused by it. A command that timed out may still
//!   take effect.
//! - One task reads, one writes. A line is handed to the writer whole, so no dropped future can cut it in half.
//! - Events are never an error: what the schema does not know arrives as [`Event::Unknown`].
//! - A line that is not QMP ends the connection, and every waiting command is told why.

mod wire;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::debug;

pub use wire::{Event, MAX_LINE, Refusal, Version, WireError};

use wire::Incoming;

/// Commands waiting for the writer; more wait in [`Client::call`].
const OUTGOING_MAX: usize = 64;
/// Events a slow subscriber may lag behind before it loses some.
const EVENTS_MAX: usize = 1024;

/// What came in beside the answers.
#[derive(Debug, Clone)]
pub struct Occurrence {
    /// Typed where possible.
    pub event: Event,
    /// The event's name.
    pub name: String,
    /// The event's data as sent; null when it has none.
    pub data: Value,
}

/// A connection to a QEMU monitor. Dropping it closes the connection; QEMU runs on.
#[derive(Debug)]
pub struct Client {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Vec<u8>>,
    closed: watch::Receiver<Option<Arc<str>>>,
    version: Version,
    peer_pid: Option<i32>,
    first_events: Mutex<Option<broadcast::Receiver<Occurrence>>>,
    tasks: [JoinHandle<()>; 2],
}

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    next_id: AtomicU64,
    events: broadcast::Sender<Occurrence>,
    shutdown: OnceLock<(bool, String)>,
}

#[derive(Debug, Default)]
struct Waiting {
    slots: HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>,
    closed: Option<Arc<str>>,
}

/// Why no connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No such socket, nobody listening, or no right to connect.
    #[error("cannot connect to QMP socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Connected, but no greeting: QEMU is stuck, or another client holds the socket.
    #[error("no QMP greeting within {waited:?}: another client may hold the monitor, or QEMU hangs")]
    NoGreeting {
        /// The deadline.
        waited: Duration,
    },
    /// Closed or garbled before the greeting was complete.
    #[error("QMP connection ended before the greeting: {reason}")]
    Ended {
        /// What happened.
        reason: String,
    },
    /// The first line was not a greeting.
    #[error("the server does not speak QMP")]
    NotQmp,
    /// The greeting was fine, the negotiation not.
    #[error("QMP capabilities negotiation failed")]
    Negotiation {
        /// Why.
        source: Box<CommandError>,
    },
}

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// QEMU said no.
    #[error("{command}: {message}")]
    Refused {
        /// The command.
        command: String,
        /// `GenericError`, `CommandNotFound`, `DeviceNotFound`...
        class: String,
        /// For people.
        message: String,
    },
    /// No answer in time. The command may still take effect.
    #[error("{command}: no answer within {waited:?}")]
    TimedOut {
        /// The command.
        command: String,
        /// The deadline.
        waited: Duration,
    },
    /// The connection ended first.
    #[error("{command}: the connection to QEMU ended: {reason}")]
    Closed {
        /// The command.
        command: String,
        /// Why it ended.
        reason: String,
    },
    /// An answer this version cannot read, or arguments it cannot write.
    #[error("{command}: the answer has an unexpected form")]
    Unexpected {
        /// The command.
        command: String,
        /// What does not fit.
        source: serde_json::Error,
    },
}

impl Client {
    /// Connects to a monitor's Unix socket, reads the greeting and leaves the negotiation behind.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Client, ConnectError> {
        let connecting = async {
            let socket = |source| ConnectError::Socket { path: path.to_owned(), source };
            let stream = UnixStream::connect(path).await.map_err(socket)?;
            let pid = stream.peer_cred().map_err(socket)?.pid();
            let (reader, writer) = stream.into_split();
            let mut client = Client::negotiate(reader, writer, deadline).await?;
            client.peer_pid = pid;
            Ok(client)
        };
        match tokio::time::timeout(deadline, connecting).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::NoGreeting { waited: deadline }),
        }
    }

    /// Speaks QMP over any pair of streams, such as the standard streams of a QEMU process.
    pub async fn over<R, W>(reader: R, writer: W, deadline: Duration) -> Result<Client, ConnectError>
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        match tokio::time::timeout(deadline, Client::negotiate(reader, writer, deadline)).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::NoGreeting { waited: deadline }),
        }
    }

    async fn negotiate<R, W>(reader: R, writer: W, deadline: Duration) -> Result<Client, ConnectError>
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let mut lines = Lines { reader: BufReader::new(reader), line: Vec::new() };
        let version = match lines.next().await {
            Ok(Some(Incoming::Greeting(version))) => version,
            Ok(Some(_)) => return Err(ConnectError::NotQmp),
            Ok(None) => return Err(ConnectError::Ended { reason: "closed by the server".to_owned() }),
            Err(error) => return Err(ConnectError::Ended { reason: error }),
        };
        let (events, first_events) = broadcast::channel(EVENTS_MAX);
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            next_id: AtomicU64::new(1),
            events,
            shutdown: OnceLock::new(),
        });
        let (outgoing, commands) = mpsc::channel(OUTGOING_MAX);
        let (closing, closed) = watch::channel(None);
        let closing = Arc::new(closing);
        let reading = tokio::spawn(read(lines, Arc::clone(&shared), Arc::clone(&closing)));
        let writing = tokio::spawn(write(writer, commands, Arc::clone(&shared), closing));
        let first_events = Mutex::new(Some(first_events));
        let tasks = [reading, writing];
        let client = Client { shared, outgoing, closed, version, peer_pid: None, first_events, tasks };
        client
            .call("qmp_capabilities", Value::Null, deadline)
            .await
            .map_err(|source| ConnectError::Negotiation { source: Box::new(source) })?;
        Ok(client)
    }

    /// The server's release.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The process that listens on the socket, as the kernel tells it.
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.closed.borrow().is_some()
    }

    /// Returns when the connection has ended, with the reason.
    pub async fn closed(&self) -> String {
        let mut closed = self.closed.clone();
        match closed.wait_for(Option::is_some).await {
            Ok(reason) => reason.as_deref().unwrap_or_default().to_owned(),
            Err(_) => "closed".to_owned(),
        }
    }

    /// Every event from now on.
    pub fn events(&self) -> broadcast::Receiver<Occurrence> {
        self.shared.events.subscribe()
    }

    /// Every event since the connection began, for the first who asks; for others as [`Client::events`].
    pub fn events_from_start(&self) -> broadcast::Receiver<Occurrence> {
        let first = self.first_events.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.unwrap_or_else(|| self.events())
    }

    /// Whether the guest did it, and why, once QEMU has announced its end on this connection.
    pub fn shutdown_notice(&self) -> Option<(bool, String)> {
        self.shared.shutdown.get().cloned()
    }

    /// Runs a typed command.
    pub async fn execute<C: qapi::Command>(&self, command: &C, deadline: Duration) -> Result<C::Ok, CommandError> {
        let unexpected = |source| CommandError::Unexpected { command: C::NAME.to_owned(), source };
        let arguments = serde_json::to_value(command).map_err(unexpected)?;
        let answer = self.call(C::NAME, arguments, deadline).await?;
        serde_json::from_value(answer).map_err(unexpected)
    }

    /// Runs any command; for answers whose enumerations may grow, and commands the schema does not know.
    pub async fn call(&self, command: &str, arguments: Value, deadline: Duration) -> Result<Value, CommandError> {
        match tokio::time::timeout(deadline, self.ask(command, &arguments)).await {
            Ok(answer) => answer,
            Err(_) => Err(CommandError::TimedOut { command: command.to_owned(), waited: deadline }),
        }
    }

    async fn ask(&self, command: &str, arguments: &Value) -> Result<Value, CommandError> {
        let (slot, answer) = Slot::take(&self.shared).map_err(|reason| closed(command, &reason))?;
        let line = wire::encode(slot.id, command, arguments);
        if self.outgoing.send(line).await.is_err() {
            return Err(closed(command, &self.shared.reason()));
        }
        let answer = answer.await.map_err(|_| closed(command, &self.shared.reason()))?;
        drop(slot);
        answer.map_err(|Refusal { class, message }| CommandError::Refused {
            command: command.to_owned(),
            class,
            message,
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn closed(command: &str, reason: &str) -> CommandError {
    CommandError::Closed { command: command.to_owned(), reason: reason.to_owned() }
}

type Answer = oneshot::Receiver<Result<Value, Refusal>>;

/// A place in the map of waiting commands; dropping it gives the place back, answered or not.
struct Slot<'a> {
    shared: &'a Shared,
    id: u64,
}

impl<'a> Slot<'a> {
    fn take(shared: &'a Shared) -> Result<(Slot<'a>, Answer), Arc<str>> {
        let (sender, answer) = oneshot::channel();
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut waiting = shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = &waiting.closed {
            return Err(Arc::clone(reason));
        }
        waiting.slots.insert(id, sender);
        Ok((Slot { shared, id }, answer))
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner).slots.remove(&self.id);
    }
}

impl Shared {
    fn reason(&self) -> Arc<str> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.closed.clone().unwrap_or_else(|| Arc::from("closed"))
    }

    /// Ends the connection for everybody; the first reason stays.
    fn close(&self, reason: &str, closing: &watch::Sender<Option<Arc<str>>>) {
        let reason: Arc<str> = Arc::from(reason);
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.closed.get_or_insert_with(|| Arc::clone(&reason));
        waiting.slots.clear();
        drop(waiting);
        closing.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert(reason);
            first
        });
    }
}

async fn read<R: AsyncRead + Unpin>(
    mut lines: Lines<R>,
    shared: Arc<Shared>,
    closing: Arc<watch::Sender<Option<Arc<str>>>>,
) {
    let reason = loop {
        match lines.next().await {
            Ok(Some(Incoming::Reply { id: Some(id), result })) => {
                let slot = shared.waiting.lock().unwrap_or_else(PoisonError::into_inner).slots.remove(&id);
                match slot {
                    // The caller may have gone between the lookup and here; its answer goes with it.
                    Some(slot) => drop(slot.send(result)),
                    None => debug!(id, "answer to a command nobody waits for"),
                }
            }
            Ok(Some(Incoming::Reply { id: None, result })) => debug!(?result, "answer without an id"),
            Ok(Some(Incoming::Event { event, name, data })) => {
                if name == "SHUTDOWN" {
                    let by_guest = data.get("guest").and_then(Value::as_bool).unwrap_or(false);
                    let reason = data.get("reason").and_then(Value::as_str).unwrap_or_default().to_owned();
                    shared.shutdown.get_or_init(|| (by_guest, reason));
                }
                // An error only says that nobody listens.
                drop(shared.events.send(Occurrence { event, name, data }));
            }
            Ok(Some(Incoming::Greeting(_))) => debug!("a second greeting"),
            Ok(None) => break "closed by the server".to_owned(),
            Err(reason) => break reason,
        }
    };
    shared.close(&reason, &closing);
}

async fn write<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut commands: mpsc::Receiver<Vec<u8>>,
    shared: Arc<Shared>,
    closing: Arc<watch::Sender<Option<Arc<str>>>>,
) {
    let mut closed = closing.subscribe();
    let writing = async {
        while let Some(line) = commands.recv().await {
            writer.write_all(&line).await?;
            writer.flush().await?;
        }
        Ok::<(), io::Error>(())
    };
    // A line is given up half way only when the connection is over anyway; then this half must close, too.
    let ended = tokio::select! {
        written = writing => written,
        _ = closed.wait_for(Option::is_some) => return,
    };
    if let Err(error) = ended {
        shared.close(&format!("cannot write: {error}"), &closing);
    }
}

/// Lines of bounded length.
struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// The next message; `None` at the end of the stream. Empty lines are skipped.
    async fn next(&mut self) -> Result<Option<Incoming>, String> {
        loop {
            self.line.clear();
            if !self.fill().await? {
                return Ok(None);
            }
            if !self.line.trim_ascii().is_empty() {
                return wire::decode(&self.line).map(Some).map_err(|error| error.to_string());
            }
        }
    }

    async fn fill(&mut self) -> Result<bool, String> {
        loop {
            let available = self.reader.fill_buf().await.map_err(|error| format!("cannot read: {error}"))?;
            if available.is_empty() {
                return match self.line.is_empty() {
                    true => Ok(false),
                    false => Err("closed in the middle of a line".to_owned()),
                };
            }
            let (taken, complete) = match available.iter().position(|byte| *byte == b'\n') {
                Some(end) => (end + 1, true),
                None => (available.len(), false),
            };
            if self.line.len() + taken > MAX_LINE {
                return Err(format!("line longer than {MAX_LINE} bytes"));
            }
            self.line.extend_from_slice(available.get(..taken).unwrap_or_default());
            self.reader.consume(taken);
            if complete {
                return Ok(true);
            }
        }
    }
}

#[cfg(test)]
mod tests;
