//! The task of a connection: reads, parses, answers what is resident, hands on the rest, and ends in order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::BufMut;
use tokio::sync::oneshot;

use super::execute::{check_cover, errno, record};
use super::outbox::Sent;
use super::reply::Batch;
use super::request::{Command, Header, HeaderStyle, Refusal, Request, Terms};
use super::shared::{Connection, Shared, held};
use super::stall::StallWatch;
use crate::budget::{Grant, Permit};
use crate::control::Membership;
use crate::dispatch::Job;
use crate::export::Piece;
use crate::statistics::{Operation, Outcome};

/// Input buffer: 9,300 requests without payload, or 63 writes of 4 KiB. Larger payloads are read in place.
const INPUT: usize = 256 << 10;

/// Largest write that is taken out of the input buffer, so that it needs no memory of its own.
const BUFFERED_MAX: u64 = 64 << 10; // well below INPUT, so that it always arrives

/// Largest write that is performed on the connection's task; a larger one is worth a thread.
const WRITE_RESIDENT_MAX: u64 = 32 << 10;

/// A write on the task that took longer than this has waited for the host, or for a processor, which passes: one in a
/// thousand does on a busy host. After the second of two that are so close to each other, and after one that took much
/// longer, the next writes get threads for a while, for other connections need the task's.
const SLOW: Duration = Duration::from_millis(1);
const SLOW_WITHIN: u32 = 64;
const SLOW_AT_ONCE: Duration = Duration::from_millis(20);
const SLOW_FOR: Duration = Duration::from_millis(100);

/// Largest read that is answered from memory on the connection's task; a larger one is worth a thread.
const RESIDENT_MAX: u64 = 256 << 10;

/// Bytes of replies that may wait for the client before its next requests are looked at.
const QUEUED_MAX: usize = 1 << 20;

/// Loops without waiting after which other tasks get their turn.
const TURNS: u32 = 64;

/// Why no more requests are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The client said so, or closed its side.
    Client,
    /// The export or the server goes away: what the client has sent already is answered with `ESHUTDOWN`.
    Retired,
    /// The client broke the protocol.
    Violation,
}

/// What comes next from the client.
enum Expect {
    Header,
    /// The request waits for memory.
    Memory {
        request: Request,
        granted: oneshot::Receiver<Permit>,
    },
    Payload {
        request: Request,
        permit: Option<Permit>,
        data: Vec<u8>,
    },
    /// The payload of a refused request.
    Drain {
        header: Header,
        refusal: Refusal,
        left: u64,
    },
}

struct Task {
    connection: Arc<Connection>,
    shared: Arc<Shared>,
    terms: Terms,
    input: Vec<u8>,
    start: usize,
    end: usize,
    expect: Expect,
    batch: Batch,
    jobs: Vec<Job>,
    pieces: Vec<Piece>,
    resident: (u64, u64),
    /// Until then writes get threads.
    slow_until: Option<Instant>,
    /// Writes on the task since one was slow.
    since_slow: u32,
    ending: Option<Ending>,
}

/// Serves a connection until the client leaves, breaks the protocol, or is told to go.
pub(crate) async fn run(connection: Connection, shared: Arc<Shared>, membership: Membership) {
    let published = Arc::clone(&connection.negotiated.published);
    let terms = Terms {
        style: connection.negotiated.style,
        size: published.size,
        read_only: published.read_only,
        block_size: published.block_size,
        fast_zeroes: published.fast_zeroes,
        contexts: connection.negotiated.context_set(),
    };
    let mut task = Task {
        connection: Arc::new(connection),
        shared,
        terms,
        input: vec![0; INPUT],
        start: 0,
        end: 0,
        expect: Expect::Header,
        batch: Batch::default(),
        jobs: Vec::new(),
        pieces: Vec::new(),
        resident: (0, 0),
        slow_until: None,
        since_slow: SLOW_WITHIN,
        ending: None,
    };
    let result = task.serve().await;
    if let Err(error) = &result {
        tracing::debug!(export = %published.name, %error, "connection lost");
    }
    task.finish(membership).await;
}

impl Task {
    async fn serve(&mut self) -> io::Result<()> {
        let connection = Arc::clone(&self.connection);
        let stall = self.shared.limits.stall.max(Duration::from_millis(10));
        let mut watch = StallWatch::new(stall);
        let mut turns = 0;
        while self.ending.is_none() {
            if connection.control.is_stopped() {
                self.ending = Some(Ending::Retired);
                break;
            }
            let readable = self.turn()?;
            turns += 1;
            if turns % TURNS == 0 {
                tokio::task::yield_now().await;
            }
            if readable == Readable::Maybe {
                continue;
            }
            let wants_input = readable == Readable::Empty;
            connection.waiting.store(!wants_input, Ordering::SeqCst);
            if !wants_input && self.may_go_on() {
                continue; // something ended between the last look and the store
            }
            let blocked = match connection.outbox.status() {
                Sent::Broken => return Err(io::ErrorKind::BrokenPipe.into()),
                Sent::Blocked => true,
                Sent::Underway => false,
            };
            tokio::select! {
                ready = connection.stream.readable(), if wants_input => ready?,
                ready = connection.stream.writable(), if blocked => {
                    ready?;
                    connection.outbox.resume(&connection.stream);
                }
                () = connection.control.woken() => {}
                permit = granted(&mut self.expect) => self.granted(permit)?,
                () = watch.expired(connection.outbox.written()), if blocked => {
                    if self.shared.budget.is_short() {
                        tracing::warn!(export = %connection.negotiated.published.name,
                            "disconnecting a client that leaves its replies lying while others wait for memory");
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes from the socket what is there and works on it.
    fn turn(&mut self) -> io::Result<Readable> {
        let progress = self.advance();
        self.flush_turn();
        if self.ending.is_some() {
            return Ok(Readable::Maybe);
        }
        match progress {
            Progress::Held => Ok(Readable::Held),
            Progress::NeedInput => self.fill(),
        }
    }

    /// Submits the turn's answers and starts its jobs.
    fn flush_turn(&mut self) {
        if !self.jobs.is_empty() {
            let share = self.connection.negotiated.published.number;
            self.shared.dispatcher.submit(share, self.jobs.drain(..));
        }
        let (reads, bytes) = std::mem::take(&mut self.resident);
        if reads > 0 {
            self.connection.negotiated.published.statistics.record_resident(reads, bytes);
        }
        if !self.batch.is_empty() {
            self.connection.outbox.submit(&self.connection.stream, &mut self.batch);
        }
    }

    /// Whether a request that is held back may be looked at now.
    fn may_go_on(&self) -> bool {
        !matches!(self.expect, Expect::Memory { .. }) && self.has_room()
    }

    /// Whether the client may have one more request in flight. An idle connection always may.
    fn has_room(&self) -> bool {
        let connection = &self.connection;
        let queued = connection.outbox.queued() + self.batch.len();
        let requests = connection.in_flight();
        let bytes = connection.bytes.load(Ordering::SeqCst) + queued;
        let limits = &self.shared.limits;
        queued < QUEUED_MAX
            && (requests == 0 || requests < limits.requests_per_connection && bytes < limits.bytes_per_connection)
    }

    /// Works through the input until it ends or something must be waited for.
    fn advance(&mut self) -> Progress {
        loop {
            match std::mem::replace(&mut self.expect, Expect::Header) {
                Expect::Header => {
                    if !self.has_room() {
                        return Progress::Held;
                    }
                    let buffered = self.input.get(self.start..self.end).unwrap_or(&[]);
                    match Header::parse(buffered, self.terms.style) {
                        None => return Progress::NeedInput,
                        Some(Err(error)) => {
                            tracing::debug!(%error, "closing a connection");
                            self.ending = Some(Ending::Violation);
                            return Progress::Held;
                        }
                        Some(Ok(header)) => {
                            if buffered.len() < wanted_with(&header, self.terms.style) {
                                return Progress::NeedInput;
                            }
                            self.start += self.terms.style.request_len();
                            self.header(header);
                            if self.ending.is_some() {
                                return Progress::Held;
                            }
                        }
                    }
                }
                Expect::Memory { request, granted } => {
                    self.expect = Expect::Memory { request, granted };
                    return Progress::Held;
                }
                Expect::Payload { request, permit, mut data } => {
                    let wanted = held(&request).saturating_sub(data.len());
                    data.extend_from_slice(self.take(wanted));
                    if data.len() < held(&request) {
                        self.expect = Expect::Payload { request, permit, data };
                        return Progress::NeedInput;
                    }
                    self.dispatch(request, data, permit);
                }
                Expect::Drain { header, refusal, left } => {
                    let taken = self.take(usize::try_from(left).unwrap_or(usize::MAX)).len() as u64;
                    if taken < left {
                        self.expect = Expect::Drain { header, refusal, left: left - taken };
                        return Progress::NeedInput;
                    }
                    self.refuse(&header, refusal);
                }
            }
        }
    }

    fn header(&mut self, mut header: Header) {
        if let Some(length) = header.filter_len(self.terms.style) {
            let terms = self.terms;
            match header.filtered(self.take(length), &terms) {
                Ok(filtered) => header = filtered,
                Err(refusal) => return self.refuse(&header, refusal),
            }
        }
        let payload = header.payload_len(self.terms.style);
        match header.check(&self.terms) {
            Ok(request) => self.request(request),
            Err(refusal) if payload == 0 => self.refuse(&header, refusal),
            // Extended headers can announce more than anyone can send: that is not a client worth waiting for.
            Err(_) if payload > u64::from(u32::MAX) => self.ending = Some(Ending::Violation),
            Err(refusal) => self.expect = Expect::Drain { header, refusal, left: payload },
        }
    }

    fn request(&mut self, request: Request) {
        if request.command == Command::Disconnect {
            self.ending = Some(Ending::Client);
            return;
        }
        if self.answer_resident(&request) || self.write_resident(&request) {
            return;
        }
        let bytes = held(&request) as u64;
        if bytes == 0 {
            self.dispatch(request, Vec::new(), None);
            return;
        }
        match self.shared.budget.take(self.connection.negotiated.published.number, bytes) {
            Grant::Now(permit) => self.admitted(request, permit),
            Grant::Later(granted) => self.expect = Expect::Memory { request, granted },
        }
    }

    /// Memory for the request is set aside.
    fn admitted(&mut self, request: Request, permit: Permit) {
        if request.command == Command::Write {
            let data = self.connection.buffer(held(&request));
            self.expect = Expect::Payload { request, permit: Some(permit), data };
        } else {
            self.dispatch(request, Vec::new(), Some(permit));
        }
    }

    fn granted(&mut self, permit: Result<Permit, oneshot::error::RecvError>) -> io::Result<()> {
        let permit = permit.map_err(io::Error::other)?; // who waits is never forgotten
        if let Expect::Memory { request, .. } = std::mem::replace(&mut self.expect, Expect::Header) {
            self.admitted(request, permit);
        }
        Ok(())
    }

    /// Answers a read from memory; the answer goes out with the batch.
    fn answer_resident(&mut self, request: &Request) -> bool {
        let Command::Read { fragment } = request.command else { return false };
        let published = &self.connection.negotiated.published;
        let Ok(length) = u32::try_from(request.length) else { return false };
        if request.length > RESIDENT_MAX || length == 0 {
            return false;
        }
        self.pieces.clear();
        if !published.export.read_resident(request.offset, length, &mut self.pieces) {
            return false;
        }
        if check_cover(published, &self.pieces, request.length).is_err() {
            self.pieces.clear();
            return false; // the slow way may do better, and answers if it does not
        }
        let Task { connection, batch, pieces, .. } = self;
        connection.reply(batch, request.cookie, request.offset).read(pieces, request.length, fragment);
        self.resident = (self.resident.0 + 1, self.resident.1 + request.length);
        true
    }

    /// Performs a write whose payload is in the input buffer if that waits for nothing; the answer goes out with the
    /// batch.
    fn write_resident(&mut self, request: &Request) -> bool {
        if request.command != Command::Write || request.fua || !(1..=WRITE_RESIDENT_MAX).contains(&request.length) {
            return false;
        }
        let began = Instant::now();
        match self.slow_until {
            Some(until) if began < until => return false,
            Some(_) => self.slow_until = None,
            None => {}
        }
        let length = held(request);
        let Some(payload) = self.input.get(self.start..self.end).and_then(|buffered| buffered.get(..length)) else {
            return false;
        };
        let published = &self.connection.negotiated.published;
        let Some(result) = published.export.write_resident(request.offset, payload) else { return false };
        self.start += length;
        let took = began.elapsed();
        published.statistics.record_latency(Operation::Write, took);
        if took > SLOW_AT_ONCE || took > SLOW && self.since_slow < SLOW_WITHIN {
            self.slow_until = Some(began + SLOW_FOR);
        }
        self.since_slow = if took > SLOW { 0 } else { self.since_slow.saturating_add(1) };
        record(published, request, if result.is_ok() { Outcome::Done } else { Outcome::Failed });
        let Task { connection, batch, .. } = self;
        let mut reply = connection.reply(batch, request.cookie, request.offset);
        match result {
            Ok(()) => reply.done(),
            Err(error) => reply.error(errno(error), &error.to_string()),
        }
        true
    }

    fn dispatch(&mut self, request: Request, payload: Vec<u8>, permit: Option<Permit>) {
        let connection = Arc::clone(&self.connection);
        connection.requests.fetch_add(1, Ordering::SeqCst);
        connection.bytes.fetch_add(held(&request), Ordering::SeqCst);
        let since = Instant::now();
        self.jobs.push(Box::new(move || connection.perform(&request, since, payload, permit)));
    }

    fn refuse(&mut self, header: &Header, refusal: Refusal) {
        let published = &self.connection.negotiated.published;
        tracing::debug!(export = %published.name, cookie = header.cookie, command = header.command, %refusal, "refused");
        published.statistics.record_refused();
        let Task { connection, batch, .. } = self;
        connection.reply(batch, header.cookie, header.offset).error(refusal.errno(), &refusal.to_string());
    }

    /// The next bytes of input, at most `count`.
    fn take(&mut self, count: usize) -> &[u8] {
        let count = count.min(self.end - self.start);
        let taken = self.start..self.start + count;
        self.start += count;
        self.input.get(taken).unwrap_or(&[])
    }

    /// Reads once from the socket: into the payload that is being received, or into the input buffer.
    fn fill(&mut self) -> io::Result<Readable> {
        let read = match &mut self.expect {
            Expect::Payload { request, data, .. } => {
                let left = held(request).saturating_sub(data.len());
                self.connection.stream.try_read_buf(&mut data.limit(left))
            }
            Expect::Header | Expect::Drain { .. } | Expect::Memory { .. } => {
                if self.start > 0 {
                    self.input.copy_within(self.start..self.end, 0); // at most part of a header
                    self.end -= self.start;
                    self.start = 0;
                }
                let read = self.connection.stream.try_read(self.input.get_mut(self.end..).unwrap_or(&mut []));
                if let Ok(count) = read {
                    self.end += count;
                }
                read
            }
        };
        match read {
            Ok(0) => {
                self.ending = Some(Ending::Client);
                Ok(Readable::Maybe)
            }
            Ok(_) => Ok(Readable::Maybe),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Readable::Empty),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Readable::Maybe),
            Err(error) => Err(error),
        }
    }

    /// Waits for the requests in flight, lets the client take their replies, and ends the stream.
    async fn finish(mut self, membership: Membership) {
        let connection = Arc::clone(&self.connection);
        if self.ending == Some(Ending::Retired) {
            self.refuse_buffered();
            self.flush_turn();
        }
        connection.waiting.store(true, Ordering::SeqCst);
        // Operations are not cut off: the export must not be used after this returns.
        while connection.in_flight() > 0 {
            if connection.outbox.status() == Sent::Blocked {
                tokio::select! {
                    _ = connection.stream.writable() => {
                        connection.outbox.resume(&connection.stream);
                    }
                    () = connection.control.woken() => {}
                }
            } else {
                connection.control.woken().await;
            }
        }
        drop(membership); // no operation runs and none will start: whoever removes the export may go on
        let goodbye = self.shared.limits.goodbye;
        if self.ending.is_some() && tokio::time::timeout(goodbye, drain(&connection)).await.is_err() {
            tracing::debug!(export = %connection.negotiated.published.name, "a client did not take its last replies");
        }
    }

    /// Answers what the client had already sent when its export went away.
    fn refuse_buffered(&mut self) {
        if let Expect::Memory { request, .. } = &self.expect {
            if request.command == Command::Write {
                return; // its payload stands between us and the next request
            }
            let (cookie, offset) = (request.cookie, request.offset);
            let Task { connection, batch, .. } = self;
            let refusal = Refusal::ShuttingDown;
            connection.reply(batch, cookie, offset).error(refusal.errno(), &refusal.to_string());
        } else if !matches!(self.expect, Expect::Header) {
            return;
        }
        while let Some(Ok(header)) =
            Header::parse(self.input.get(self.start..self.end).unwrap_or(&[]), self.terms.style)
        {
            self.start += self.terms.style.request_len();
            let payload = header.payload_len(self.terms.style);
            if (self.take(usize::try_from(payload).unwrap_or(usize::MAX)).len() as u64) < payload {
                return;
            }
            if header.command == crate::wire::command::DISC {
                return;
            }
            self.refuse(&header, Refusal::ShuttingDown);
        }
    }
}

/// Writes what is left, ends our side, and waits until the client has ended its own: closing a socket with unread
/// input would throw away replies that are still on their way.
async fn drain(connection: &Connection) {
    loop {
        match connection.outbox.status() {
            Sent::Broken => return,
            Sent::Underway => break, // no thread works for this connection any more: underway means written
            Sent::Blocked => {
                if connection.stream.writable().await.is_err() {
                    return;
                }
                connection.outbox.resume(&connection.stream);
            }
        }
    }
    let _ = connection.stream.drain_to_end().await; // a client that has gone needs no goodbye
}

/// Bytes of a request that must be in the input buffer before it is looked at: a payload that is short stays there.
fn wanted_with(header: &Header, style: HeaderStyle) -> usize {
    let payload = match header.filter_len(style) {
        Some(length) => length,
        None => match header.payload_len(style) {
            length @ ..=BUFFERED_MAX => usize::try_from(length).unwrap_or(0),
            _ => 0,
        },
    };
    style.request_len() + payload
}

/// What a turn found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readable {
    /// There may be more.
    Maybe,
    /// The socket is empty.
    Empty,
    /// No more is wanted until something ends.
    Held,
}

enum Progress {
    NeedInput,
    Held,
}

/// Resolves when memory for the waiting request is there; never if none waits.
async fn granted(expect: &mut Expect) -> Result<Permit, oneshot::error::RecvError> {
    match expect {
        Expect::Memory { granted, .. } => granted.await,
        Expect::Header | Expect::Payload { .. } | Expect::Drain { .. } => std::future::pending().await,
    }
}
