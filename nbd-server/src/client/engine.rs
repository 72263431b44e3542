//! The connection behind a client: a task that sends, a task that receives, and the table of requests in flight.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::handshake::Agreed;
use super::pending::{Answer, Expected};
use super::{ClientError, ClientOptions, Violation};
use crate::limits::MAX_EXTENTS;
use crate::stream::Stream;
use crate::transmission::HeaderStyle;
use crate::wire::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, Errno, REPLY_FLAG_DONE, REQUEST_MAGIC, RawDescriptor, RawError,
    RawExtendedDescriptor, RawExtendedRequest, RawHole, RawRequest, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    command, command_flag, reply_type,
};

/// Input buffer; longer payloads go straight to their place.
const INPUT: usize = 64 << 10;

/// Largest chunk that is not data: descriptors of one context, several times what our own server sends.
const MAX_CONTROL: usize = 8 * MAX_EXTENTS * size_of::<RawDescriptor>() + 64;

pub(super) struct Engine {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Outgoing>,
    slots: Arc<Semaphore>,
    timeout: Duration,
    tasks: [JoinHandle<()>; 2],
}

struct Shared {
    stream: Stream,
    agreed: Agreed,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    next: u64,
    requests: HashMap<u64, InFlight>,
    /// Set when the connection is gone; no request is added after that.
    end: Option<ClientError>,
}

struct InFlight {
    expected: Expected,
    done: oneshot::Sender<Result<Answer, ClientError>>,
    /// Held until the server has answered, whether anybody still waits or not: what is in flight stays bounded.
    _slot: OwnedSemaphorePermit,
}

struct Outgoing {
    header: Head,
    payload: Bytes,
}

enum Head {
    Compact(RawRequest),
    Extended(RawExtendedRequest),
    Disconnect(HeaderStyle),
}

impl Outgoing {
    fn bytes(&self) -> Vec<u8> {
        match &self.header {
            Head::Compact(raw) => raw.as_bytes().to_vec(),
            Head::Extended(raw) => raw.as_bytes().to_vec(),
            Head::Disconnect(HeaderStyle::Extended) => {
                let (magic, command) = (U32::new(EXTENDED_REQUEST_MAGIC), U16::new(command::DISC));
                RawExtendedRequest { magic, command, ..FromZeros::new_zeroed() }.as_bytes().to_vec()
            }
            Head::Disconnect(_) => {
                let (magic, command) = (U32::new(REQUEST_MAGIC), U16::new(command::DISC));
                RawRequest { magic, command, ..FromZeros::new_zeroed() }.as_bytes().to_vec()
            }
        }
    }
}

impl Engine {
    pub(super) fn start(stream: Stream, agreed: Agreed, options: &ClientOptions) -> Engine {
        let requests = options.requests.clamp(1, Semaphore::MAX_PERMITS);
        let shared = Arc::new(Shared { stream, agreed, table: Mutex::default() });
        let (outgoing, queue) = mpsc::channel(requests.min(1024));
        let send = tokio::spawn(send(Arc::clone(&shared), queue));
        let receive = tokio::spawn(receive(Arc::clone(&shared)));
        Engine {
            shared,
            outgoing,
            slots: Arc::new(Semaphore::new(requests)),
            timeout: options.request_timeout,
            tasks: [send, receive],
        }
    }

    pub(super) fn agreed(&self) -> &Agreed {
        &self.shared.agreed
    }

    /// Sends a request and waits for its answer. The range has been checked.
    pub(super) async fn request(
        &self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
        payload: Bytes,
        expected: Expected,
    ) -> Result<Answer, ClientError> {
        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| ClientError::Lost(None))?;
        let short = u32::try_from(length);
        if self.agreed().style != HeaderStyle::Extended && short.is_err() {
            return Err(ClientError::Range { offset, length });
        }
        let (done, answer) = oneshot::channel();
        let cookie = self.shared.insert(InFlight { expected, done, _slot: slot })?;
        let (command, cookie_field, offset) = (U16::new(command), U64::new(cookie), U64::new(offset));
        let header = match (self.agreed().style, short) {
            (HeaderStyle::Simple | HeaderStyle::Structured, Ok(length)) => Head::Compact(RawRequest {
                magic: U32::new(REQUEST_MAGIC),
                flags: U16::new(flags),
                command,
                cookie: cookie_field,
                offset,
                length: U32::new(length),
            }),
            _ => Head::Extended(RawExtendedRequest {
                magic: U32::new(EXTENDED_REQUEST_MAGIC),
                flags: U16::new(if payload.is_empty() { flags } else { flags | command_flag::PAYLOAD_LEN }),
                command,
                cookie: cookie_field,
                offset,
                length: U64::new(length),
            }),
        };
        let answered = self.answered(header, payload, cookie, answer);
        match tokio::time::timeout(self.timeout, answered).await {
            Ok(answer) => answer,
            Err(_) => {
                let error = ClientError::NoAnswer { after: self.timeout };
                self.shared.end(error.clone());
                Err(error)
            }
        }
    }

    async fn answered(
        &self,
        header: Head,
        payload: Bytes,
        cookie: u64,
        answer: oneshot::Receiver<Result<Answer, ClientError>>,
    ) -> Result<Answer, ClientError> {
        // If this future is dropped while it waits for the queue, nothing was sent and the entry must go.
        let mut guard = Unsent { shared: &self.shared, cookie: Some(cookie) };
        if self.outgoing.send(Outgoing { header, payload }).await.is_err() {
            return Err(self.shared.ended());
        }
        guard.cookie = None;
        drop(guard);
        answer.await.unwrap_or_else(|_| Err(self.shared.ended()))
    }

    /// Sends DISC after what is queued, and ends the connection.
    pub(super) async fn disconnect(&self) {
        let header = Head::Disconnect(self.agreed().style);
        if self.outgoing.send(Outgoing { header, payload: Bytes::new() }).await.is_ok() {
            // The sender ends after DISC and drops its queue.
            self.outgoing.closed().await;
        }
        self.shared.end(ClientError::Lost(None));
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Takes a request out of the table unless it has been sent.
struct Unsent<'a> {
    shared: &'a Shared,
    cookie: Option<u64>,
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        if let Some(cookie) = self.cookie {
            self.shared.lock().requests.remove(&cookie);
        }
    }
}

impl Shared {
    fn insert(&self, request: InFlight) -> Result<u64, ClientError> {
        let mut table = self.lock();
        if let Some(error) = &table.end {
            return Err(error.clone());
        }
        let cookie = table.next;
        table.next += 1;
        table.requests.insert(cookie, request);
        Ok(cookie)
    }

    /// Fails everything in flight and everything to come.
    fn end(&self, error: ClientError) {
        let requests = {
            let mut table = self.lock();
            table.end.get_or_insert_with(|| error.clone());
            std::mem::take(&mut table.requests)
        };
        for (_, request) in requests {
            let _ = request.done.send(Err(error.clone())); // nobody may be waiting any more
        }
        let _ = self.stream.shutdown_write(); // fails only if the connection is gone already
    }

    fn ended(&self) -> ClientError {
        self.lock().end.clone().unwrap_or(ClientError::Lost(None))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends whole requests; never cancelled half-way but by the end of the connection.
async fn send(shared: Arc<Shared>, mut queue: mpsc::Receiver<Outgoing>) {
    while let Some(outgoing) = queue.recv().await {
        let last = matches!(outgoing.header, Head::Disconnect(_));
        if let Err(error) = send_one(&shared.stream, &outgoing.bytes(), &outgoing.payload).await {
            shared.end(ClientError::Lost(Some(Arc::new(error))));
            return;
        }
        if last {
            return;
        }
    }
}

async fn send_one(stream: &Stream, header: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut written = 0;
    while written < header.len() + payload.len() {
        let head = header.get(written..).unwrap_or(&[]);
        let body = payload.get(written.saturating_sub(header.len())..).unwrap_or(&[]);
        match stream.try_write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    stream.flush().await
}

/// Why receiving ended.
enum Failure {
    Io(io::Error),
    Protocol(Violation),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Io(error)
    }
}

impl From<Violation> for Failure {
    fn from(violation: Violation) -> Failure {
        Failure::Protocol(violation)
    }
}

async fn receive(shared: Arc<Shared>) {
    let mut receiver = Receiver { shared: &shared, input: vec![0; INPUT], start: 0, end: 0 };
    let error = loop {
        match receiver.reply().await {
            Ok(()) => {}
            Err(Failure::Io(error)) => break ClientError::Lost(Some(Arc::new(error))),
            Err(Failure::Protocol(violation)) => break ClientError::Protocol(violation),
        }
    };
    shared.end(error);
}

struct Receiver<'a> {
    shared: &'a Shared,
    input: Vec<u8>,
    start: usize,
    end: usize,
}

impl Receiver<'_> {
    async fn reply(&mut self) -> Result<(), Failure> {
        let magic: U32 = self.value().await?;
        match magic.get() {
            SIMPLE_REPLY_MAGIC if self.style() != HeaderStyle::Extended => self.simple().await,
            STRUCTURED_REPLY_MAGIC if self.style() == HeaderStyle::Structured => {
                let (flags, kind): (U16, U16) = (self.value().await?, self.value().await?);
                let (cookie, length): (U64, U32) = (self.value().await?, self.value().await?);
                self.chunk(flags.get(), kind.get(), cookie.get(), length.get() as usize).await
            }
            EXTENDED_REPLY_MAGIC if self.style() == HeaderStyle::Extended => {
                let (flags, kind): (U16, U16) = (self.value().await?, self.value().await?);
                let (cookie, _offset): (U64, U64) = (self.value().await?, self.value().await?);
                let length: U64 = self.value().await?;
                let length = usize::try_from(length.get()).map_err(|_| Violation::Length)?;
                self.chunk(flags.get(), kind.get(), cookie.get(), length).await
            }
            other => Err(Violation::Magic(u64::from(other)).into()),
        }
    }

    async fn simple(&mut self) -> Result<(), Failure> {
        let (error, cookie): (U32, U64) = (self.value().await?, self.value().await?);
        let mut request = self.take(cookie.get())?;
        let result = self.simple_answer(error.get(), &mut request.expected).await;
        self.settle(cookie.get(), request, result.map(|()| true))
    }

    async fn simple_answer(&mut self, error: u32, expected: &mut Expected) -> Result<(), Failure> {
        if expected.is_read() && self.style().is_structured() {
            return Err(Violation::ReplyType(reply_type::NONE).into());
        }
        if error != 0 {
            expected.fail(Errno::from_number(error));
        } else if expected.is_read() {
            self.exact(expected.place_all()?).await?;
        }
        Ok(())
    }

    fn style(&self) -> HeaderStyle {
        self.shared.agreed.style
    }

    async fn chunk(&mut self, flags: u16, kind: u16, cookie: u64, length: usize) -> Result<(), Failure> {
        let mut request = self.take(cookie)?;
        let done = flags & REPLY_FLAG_DONE != 0;
        let result = self.chunk_payload(kind, length, done, &mut request.expected).await;
        self.settle(cookie, request, result.map(|()| done))
    }

    async fn chunk_payload(
        &mut self,
        kind: u16,
        length: usize,
        done: bool,
        expected: &mut Expected,
    ) -> Result<(), Failure> {
        match kind {
            reply_type::NONE => {
                if length != 0 || !done {
                    return Err(Violation::Length.into());
                }
            }
            reply_type::OFFSET_DATA => {
                let count = length.checked_sub(size_of::<U64>()).ok_or(Violation::Length)?;
                let offset: U64 = self.value().await?;
                self.exact(expected.place(offset.get(), count)?).await?;
            }
            reply_type::OFFSET_HOLE => {
                if length != size_of::<RawHole>() {
                    return Err(Violation::Length.into());
                }
                let hole: RawHole = self.value().await?;
                expected.place(hole.offset.get(), hole.length.get() as usize)?;
            }
            reply_type::BLOCK_STATUS => {
                let payload = self.control(length).await?;
                let (context, rest) = U32::ref_from_prefix(&payload).map_err(|_| Violation::Length)?;
                let descriptors = <[RawDescriptor]>::ref_from_bytes(rest).map_err(|_| Violation::Length)?;
                let extents = descriptors.iter().map(|raw| (u64::from(raw.length.get()), raw.flags.get()));
                expected.describe(context.get(), extents)?;
            }
            reply_type::BLOCK_STATUS_EXT if self.style() == HeaderStyle::Extended => {
                let payload = self.control(length).await?;
                let (context, rest) = U32::ref_from_prefix(&payload).map_err(|_| Violation::Length)?;
                let (count, rest) = U32::ref_from_prefix(rest).map_err(|_| Violation::Length)?;
                let descriptors = <[RawExtendedDescriptor]>::ref_from_bytes(rest).map_err(|_| Violation::Length)?;
                if usize::try_from(count.get()) != Ok(descriptors.len()) {
                    return Err(Violation::Length.into());
                }
                let extent = |raw: &RawExtendedDescriptor| {
                    let flags = u32::try_from(raw.flags.get()).map_err(|_| Violation::Flags)?;
                    Ok((raw.length.get(), flags))
                };
                let extents: Vec<(u64, u32)> = descriptors.iter().map(extent).collect::<Result<_, Violation>>()?;
                expected.describe(context.get(), extents.into_iter())?;
            }
            kind if kind & reply_type::ERROR_BIT != 0 => {
                let payload = self.control(length).await?;
                let (raw, rest) = RawError::ref_from_prefix(&payload).map_err(|_| Violation::Length)?;
                if usize::from(raw.message_length.get()) > rest.len() {
                    return Err(Violation::Length.into());
                }
                expected.fail(Errno::from_number(raw.error.get()));
            }
            kind => return Err(Violation::ReplyType(kind).into()),
        }
        Ok(())
    }

    /// Answers the request, or keeps it until its other chunks have come. After a failure it is kept too: the end of the
    /// connection, which follows, tells its caller why.
    fn settle(&self, cookie: u64, request: InFlight, done: Result<bool, Failure>) -> Result<(), Failure> {
        match done {
            Ok(true) => finish(request),
            other => {
                self.shared.lock().requests.insert(cookie, request);
                other.map(|_| ())
            }
        }
    }

    /// The request of a cookie; it goes back into the table if more chunks follow.
    fn take(&self, cookie: u64) -> Result<InFlight, Violation> {
        self.shared.lock().requests.remove(&cookie).ok_or(Violation::Cookie)
    }

    /// A small payload as a whole.
    async fn control(&mut self, length: usize) -> Result<Vec<u8>, Failure> {
        if length > MAX_CONTROL {
            return Err(Violation::Length.into());
        }
        let mut payload = vec![0; length];
        self.exact(&mut payload).await?;
        Ok(payload)
    }

    async fn value<T: FromBytes + IntoBytes>(&mut self) -> io::Result<T> {
        let mut value = T::new_zeroed();
        self.exact(value.as_mut_bytes()).await?;
        Ok(value)
    }

    async fn exact(&mut self, mut place: &mut [u8]) -> io::Result<()> {
        loop {
            let count = place.len().min(self.end - self.start);
            let (now, later) = place.split_at_mut(count);
            now.copy_from_slice(self.input.get(self.start..self.start + count).unwrap_or(&[]));
            self.start += count;
            place = later;
            if place.is_empty() {
                return Ok(());
            }
            if place.len() >= INPUT {
                return self.shared.stream.read_exact(place).await;
            }
            (self.start, self.end) = (0, 0);
            match self.shared.stream.try_read(&mut self.input) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.end = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.shared.stream.readable().await?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Hands the answer to whoever waits for it.
fn finish(request: InFlight) -> Result<(), Failure> {
    let answer = match request.expected.finish() {
        Ok(answer) => answer,
        Err(violation) => {
            let _ = request.done.send(Err(ClientError::Protocol(violation)));
            return Err(violation.into());
        }
    };
    let _ = request.done.send(answer); // the future may have been dropped
    Ok(())
}
