//! What outlives a turn of a connection's task: the server-wide bounds, and the state the task shares with the
//! threads that perform its requests.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::execute::{execute, operation, record};
use super::outbox::{Outbox, Sent};
use super::reply::{Batch, Reply};
use super::request::{Command, Request};
use crate::budget::{Budget, Permit};
use crate::control::Control;
use crate::dispatch::Dispatcher;
use crate::handshake::Negotiated;
use crate::limits::Limits;
use crate::statistics::Outcome;
use crate::stream::Stream;
use crate::wire::Errno;

/// Payload buffers of these capacities are kept for the next write, so many on each connection.
const BUFFER_MIN: usize = 32 << 10;
const BUFFER_MAX: usize = 1 << 20;
const BUFFERS: usize = 4;

/// What every connection of a server shares.
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) dispatcher: Arc<Dispatcher>,
    /// Payload in flight over all connections.
    pub(crate) budget: Arc<Budget>,
}

impl Shared {
    pub(crate) fn new(limits: Limits) -> Shared {
        let bytes = limits.bytes.max(crate::limits::MAX_PAYLOAD as usize) as u64;
        Shared { dispatcher: Arc::new(Dispatcher::new(limits.operations)), budget: Budget::new(bytes), limits }
    }
}

/// What the connection's task and the threads that work for it share.
pub(crate) struct Connection {
    pub(super) stream: Stream,
    pub(super) control: Arc<Control>,
    pub(super) negotiated: Negotiated,
    pub(super) outbox: Outbox,
    /// Requests that run on other threads, and the payload they hold.
    pub(super) requests: AtomicUsize,
    pub(super) bytes: AtomicUsize,
    /// The task waits for requests in flight to end.
    pub(super) waiting: AtomicBool,
    /// Payload buffers to use again: fresh memory of this size costs a page fault every 4 KiB.
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Connection {
    pub(crate) fn new(stream: Stream, control: Arc<Control>, negotiated: Negotiated) -> Connection {
        Connection {
            stream,
            control,
            negotiated,
            outbox: Outbox::new(),
            requests: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            buffers: Mutex::default(),
        }
    }

    /// Runs on a dispatcher thread.
    pub(super) fn perform(&self, request: &Request, since: Instant, payload: Vec<u8>, permit: Option<Permit>) {
        let mut batch = Batch::default();
        let published = &self.negotiated.published;
        let caught = catch_unwind(AssertUnwindSafe(|| {
            let mut reply = self.reply(&mut batch, request.cookie, request.offset);
            execute(published, &self.negotiated.contexts, request, &payload, &mut reply);
        }));
        if caught.is_err() {
            tracing::error!(export = %published.name, cookie = request.cookie, "the export panicked");
            batch.clear(); // nothing is submitted before the call has returned
            self.reply(&mut batch, request.cookie, request.offset).error(Errno::Io, "internal error");
            record(published, request, Outcome::Failed);
        }
        if let Some(operation) = operation(request.command) {
            published.statistics.record_latency(operation, since.elapsed());
        }
        self.keep_buffer(payload);
        if let (Command::Read { .. }, Some(permit)) = (request.command, permit) {
            batch.hold(permit); // the data stays in memory until the client has taken it
        }
        let sent = self.outbox.submit(&self.stream, &mut batch);
        // Counted down after the reply is queued, so that its bytes are always counted somewhere.
        self.requests.fetch_sub(1, Ordering::SeqCst);
        self.bytes.fetch_sub(held(request), Ordering::SeqCst);
        if sent != Sent::Underway || self.waiting.load(Ordering::SeqCst) {
            self.control.wake();
        }
    }

    pub(super) fn reply<'a>(&self, batch: &'a mut Batch, cookie: u64, offset: u64) -> Reply<'a> {
        Reply { batch, style: self.negotiated.style, cookie, offset }
    }

    /// A buffer of at least this capacity. The length has passed the gate and the budget.
    pub(super) fn buffer(&self, length: usize) -> Vec<u8> {
        let kept = if length < BUFFER_MIN { None } else { self.buffers().pop() };
        let mut buffer = kept.unwrap_or_default();
        buffer.clear();
        buffer.reserve_exact(length);
        buffer
    }

    fn keep_buffer(&self, buffer: Vec<u8>) {
        if (BUFFER_MIN..=BUFFER_MAX).contains(&buffer.capacity()) {
            let mut buffers = self.buffers();
            if buffers.len() < BUFFERS {
                buffers.push(buffer);
            }
        }
    }

    fn buffers(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn in_flight(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Bytes a request holds while it is in flight.
pub(super) fn held(request: &Request) -> usize {
    match request.command {
        Command::Read { .. } | Command::Write => usize::try_from(request.length).unwrap_or(usize::MAX),
        Command::Flush
        | Command::Trim
        | Command::Cache
        | Command::WriteZeroes(_)
        | Command::BlockStatus { .. }
        | Command::Disconnect => 0,
    }
}
