//! The client: many requests in flight from many tasks over one connection, replies in any order.
//!
//! A server is not trusted: every length is checked before it is believed, replies must match a request, and the data of
//! a read must cover it exactly once. A server that breaks the protocol costs the connection, never memory.
//!
//! Dropping a future gives up its answer; the request itself may still be carried out.

mod blocking;
mod engine;
mod handshake;
mod pending;
mod tls;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub use blocking::BlockingClient;

use crate::export::{BlockSize, ContextExtent, Extent, ExtentKind, ZeroMode};
use crate::limits::MAX_PAYLOAD;
use crate::stream::Stream;
use crate::tls::TlsError;
use crate::transmission::HeaderStyle;
use crate::uri::{Endpoint, NbdUri};
use crate::wire::{BASE_ALLOCATION, Errno, command, command_flag, state, transmission_flag};
use engine::Engine;
use handshake::Agreed;
use pending::{Answer, Expected};

/// Longest effect of one request without payload in a compact header: a multiple of every block size, and safely below
/// 32 bits.
const MAX_EFFECT: u64 = 1 << 30;

/// How a client connects and what it asks for.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Metadata contexts to select; those the server does not have are left out.
    pub contexts: Vec<String>,
    /// The best headers to ask for.
    pub headers: HeaderStyle,
    /// For connecting and negotiating together.
    pub connect_timeout: Duration,
    /// Requests in flight; more wait.
    pub requests: usize,
    /// How long the answer to one request may take before the connection is given up.
    pub request_timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            contexts: vec![BASE_ALLOCATION.to_owned()],
            headers: HeaderStyle::Extended,
            connect_timeout: Duration::from_secs(10),
            requests: 64,
            request_timeout: Duration::from_secs(120),
        }
    }
}

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// No connection came about.
    #[error("cannot connect to {uri}")]
    Connect {
        /// Where to.
        uri: String,
        /// Why.
        source: Arc<io::Error>,
    },
    /// The certificates for TLS cannot be used.
    #[error("cannot use TLS for {uri}")]
    Tls {
        /// Where to.
        uri: String,
        /// Why.
        source: Arc<TlsError>,
    },
    /// The URI asks for TLS and says nowhere what to trust.
    #[error("{uri} names no folder with certificates (?tls-certificates=DIR)")]
    NoCertificates {
        /// Where to.
        uri: String,
    },
    /// The TLS handshake failed: one side does not trust the other, or the server is for another name.
    #[error("cannot establish TLS with {uri}")]
    TlsHandshake {
        /// Where to.
        uri: String,
        /// Why.
        source: Arc<io::Error>,
    },
    /// The server did not get through the handshake in time.
    #[error("{uri} did not answer in time")]
    Timeout {
        /// Where to.
        uri: String,
    },
    /// The server refused an option; for a missing export this is what comes back.
    #[error("the server refuses export '{export}': {refusal}")]
    Refused {
        /// The export.
        export: String,
        /// Why.
        refusal: OptionRefusal,
    },
    /// The server did something the protocol does not allow; the connection is gone.
    #[error("the server breaks the protocol: {0}")]
    Protocol(Violation),
    /// The connection was lost; what was in flight may or may not have been carried out.
    #[error("the connection to the server is lost")]
    Lost(#[source] Option<Arc<io::Error>>),
    /// The answer to a request did not come in time; the connection is gone, and it may have been carried out or not.
    #[error("the server did not answer within {} s", .after.as_secs())]
    NoAnswer {
        /// How long it was waited for.
        after: Duration,
    },
    /// The server answered with an error.
    #[error("the server answers with {0:?}")]
    Server(Errno),
    /// The range is not inside the export or not aligned to its minimum block size; nothing was sent.
    #[error("{length} bytes at {offset} cannot be asked of this export")]
    Range {
        /// Where.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// The server does not offer the operation or the context; nothing was sent.
    #[error("the server does not offer {0}")]
    NotOffered(&'static str),
}

/// Why a server refuses an option.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (reply {kind:#x})")]
pub struct OptionRefusal {
    /// Type of the reply, one of `wire::option_reply`.
    pub kind: u32,
    /// What the server says to a person, cut and cleaned.
    pub message: String,
}

/// How a server breaks the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// It does not greet as a newstyle server does.
    #[error("not a fixed newstyle NBD server")]
    Greeting,
    /// A magic number is wrong.
    #[error("bad magic {0:#x}")]
    Magic(u64),
    /// An option reply is longer than any should be, or there is no end to them.
    #[error("too much data in answer to an option")]
    OptionReply,
    /// An option reply answers something else, or cannot be understood.
    #[error("unexpected answer to an option")]
    UnexpectedOptionReply,
    /// It described no size before it accepted the export.
    #[error("the export's size is missing")]
    NoSize,
    /// No request has this cookie.
    #[error("reply to an unknown request")]
    Cookie,
    /// A reply of this type cannot answer the request.
    #[error("reply of an unexpected type {0}")]
    ReplyType(u16),
    /// A length contradicts the type of the reply or the request.
    #[error("reply of a wrong length")]
    Length,
    /// A metadata context says more than it may.
    #[error("a metadata context has more than 32 flags")]
    Flags,
    /// Data outside the request, twice, or missing.
    #[error("the data of a read does not cover it exactly once")]
    Coverage,
}

/// A connection to one export. Clones share it.
#[derive(Clone)]
pub struct Client {
    engine: Arc<Engine>,
}

impl Client {
    /// Connects and opens the export the URI names.
    pub async fn connect(uri: &NbdUri, options: &ClientOptions) -> Result<Client, ClientError> {
        let connecting = async {
            let failed = |source: io::Error| ClientError::Connect { uri: uri.to_string(), source: Arc::new(source) };
            let tls = tls::prepare(uri).await?; // before anything is sent
            let mut stream = match &uri.endpoint {
                Endpoint::Unix(path) => Stream::unix(tokio::net::UnixStream::connect(path).await.map_err(failed)?),
                Endpoint::Tcp { host, port } => {
                    let stream = tokio::net::TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
                    Stream::tcp(stream).map_err(failed)?
                }
            };
            let agreed = handshake::negotiate(&mut stream, uri, tls, options).await?;
            Ok(Client { engine: Arc::new(Engine::start(stream, agreed, options)) })
        };
        tokio::time::timeout(options.connect_timeout, connecting)
            .await
            .map_err(|_| ClientError::Timeout { uri: uri.to_string() })?
    }

    fn agreed(&self) -> &Agreed {
        self.engine.agreed()
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.agreed().size
    }

    /// `wire::transmission_flag` bits.
    pub fn flags(&self) -> u16 {
        self.agreed().flags
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.has(transmission_flag::READ_ONLY)
    }

    /// Block size constraints, the protocol's defaults where the server states none.
    pub fn block_size(&self) -> BlockSize {
        self.agreed().block_size
    }

    /// Names of the metadata contexts that were selected.
    pub fn contexts(&self) -> impl Iterator<Item = &str> {
        self.agreed().contexts.iter().map(|(_, name)| name.as_str())
    }

    fn has(&self, flag: u16) -> bool {
        self.agreed().flags & flag != 0
    }

    /// Fills `buffer` from `offset`. Long reads are several requests, one after the other.
    pub async fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ClientError> {
        self.check(offset, buffer.len() as u64)?;
        let mut at = offset;
        for part in buffer.chunks_mut(self.payload_max()) {
            part.copy_from_slice(&self.read_once(at, part.len()).await?);
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Reads without copying; at most [`Client::payload_max`] bytes.
    pub async fn read_bytes(&self, offset: u64, length: usize) -> Result<Bytes, ClientError> {
        self.check(offset, length as u64)?;
        if length > self.payload_max() {
            return Err(ClientError::Range { offset, length: length as u64 });
        }
        Ok(Bytes::from(self.read_once(offset, length).await?))
    }

    async fn read_once(&self, offset: u64, length: usize) -> Result<Vec<u8>, ClientError> {
        if length == 0 {
            return Ok(Vec::new());
        }
        let expected = Expected::read(offset, length);
        match self.engine.request(command::READ, 0, offset, length as u64, Bytes::new(), expected).await? {
            Answer::Data(data) => Ok(data),
            Answer::Done | Answer::Status(_) => Err(ClientError::Protocol(Violation::Coverage)),
        }
    }

    /// Writes `data` at `offset`; durable after the next [`Client::flush`] that starts after this returned.
    pub async fn write(&self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.write_with(offset, data, 0).await
    }

    /// Writes `data` at `offset` and returns once it is durable.
    pub async fn write_durable(&self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        if self.has(transmission_flag::SEND_FUA) {
            return self.write_with(offset, data, command_flag::FUA).await;
        }
        self.write_with(offset, data, 0).await?;
        self.flush().await
    }

    async fn write_with(&self, offset: u64, data: &[u8], flags: u16) -> Result<(), ClientError> {
        self.check(offset, data.len() as u64)?;
        self.writable()?;
        let mut at = offset;
        for part in data.chunks(self.payload_max()) {
            let length = part.len() as u64;
            let payload = Bytes::copy_from_slice(part);
            self.engine.request(command::WRITE, flags, at, length, payload, Expected::nothing()).await?;
            at += length;
        }
        Ok(())
    }

    /// Makes every write that has returned durable. A server that does not offer it has nothing to flush.
    pub async fn flush(&self) -> Result<(), ClientError> {
        if !self.has(transmission_flag::SEND_FLUSH) {
            return Ok(());
        }
        self.engine.request(command::FLUSH, 0, 0, 0, Bytes::new(), Expected::nothing()).await.map(drop)
    }

    /// Gives up the content of a range.
    pub async fn trim(&self, offset: u64, length: u64) -> Result<(), ClientError> {
        self.writable()?;
        if !self.has(transmission_flag::SEND_TRIM) {
            return Err(ClientError::NotOffered("trim"));
        }
        self.effect(command::TRIM, 0, offset, length).await
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), ClientError> {
        self.writable()?;
        if !self.has(transmission_flag::SEND_WRITE_ZEROES) {
            return Err(ClientError::NotOffered("writing zeroes"));
        }
        let flags = match mode {
            ZeroMode::MayPunch => 0,
            ZeroMode::KeepAllocated => command_flag::NO_HOLE,
        };
        self.effect(command::WRITE_ZEROES, flags, offset, length).await
    }

    /// Asks the server to bring a range into its cache; does nothing where that is not offered.
    pub async fn cache(&self, offset: u64, length: u64) -> Result<(), ClientError> {
        if !self.has(transmission_flag::SEND_CACHE) {
            return Ok(());
        }
        self.effect(command::CACHE, 0, offset, length).await
    }

    async fn effect(&self, command: u16, flags: u16, offset: u64, length: u64) -> Result<(), ClientError> {
        self.check(offset, length)?;
        let (mut at, mut left) = (offset, length);
        while left > 0 {
            let part = left.min(self.effect_max());
            self.engine.request(command, flags, at, part, Bytes::new(), Expected::nothing()).await?;
            at += part;
            left -= part;
        }
        Ok(())
    }

    /// What a range holds: consecutive extents from `offset`, covering at least one byte and at most `length`. Ask
    /// again from where the answer ends. Everything counts as data if the server cannot tell.
    pub async fn block_status(&self, offset: u64, length: u64) -> Result<Vec<Extent>, ClientError> {
        self.check(offset, length)?;
        if self.context_id(BASE_ALLOCATION).is_none() && length > 0 {
            return Ok(vec![Extent { length, kind: ExtentKind::Data }]);
        }
        let found = self.context_status(BASE_ALLOCATION, offset, length).await?;
        let extent = |extent: ContextExtent| Extent { length: extent.length, kind: allocation(extent.flags) };
        Ok(found.into_iter().map(extent).collect())
    }

    /// What a selected metadata context says of a range, as [`Client::block_status`].
    pub async fn context_status(
        &self,
        context: &str,
        offset: u64,
        length: u64,
    ) -> Result<Vec<ContextExtent>, ClientError> {
        self.check(offset, length)?;
        let id = self.context_id(context).ok_or(ClientError::NotOffered("this metadata context"))?;
        let length = length.min(self.effect_max());
        if length == 0 {
            return Ok(Vec::new());
        }
        let expected = Expected::status(length);
        match self.engine.request(command::BLOCK_STATUS, 0, offset, length, Bytes::new(), expected).await? {
            Answer::Status(mut status) => status
                .iter_mut()
                .find(|(of, _)| *of == id)
                .map(|(_, extents)| std::mem::take(extents))
                .ok_or(ClientError::Protocol(Violation::Coverage)),
            Answer::Done | Answer::Data(_) => Err(ClientError::Protocol(Violation::Coverage)),
        }
    }

    /// Says goodbye. Requests in flight are not waited for: call it when there are none. Other clones get
    /// [`ClientError::Lost`] from now on.
    pub async fn disconnect(&self) {
        self.engine.disconnect().await;
    }

    /// Largest read or write in one request.
    pub fn payload_max(&self) -> usize {
        self.agreed().block_size.maximum.min(MAX_PAYLOAD) as usize
    }

    fn effect_max(&self) -> u64 {
        if self.agreed().style == HeaderStyle::Extended { u64::MAX } else { MAX_EFFECT }
    }

    fn context_id(&self, name: &str) -> Option<u32> {
        self.agreed().contexts.iter().find(|(_, context)| context == name).map(|(id, _)| *id)
    }

    fn writable(&self) -> Result<(), ClientError> {
        if self.read_only() { Err(ClientError::Server(Errno::Perm)) } else { Ok(()) }
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), ClientError> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.size());
        let mask = u64::from(self.agreed().block_size.minimum) - 1; // a power of two, checked in the handshake
        if inside && (offset | length) & mask == 0 { Ok(()) } else { Err(ClientError::Range { offset, length }) }
    }
}

/// A hole that does not read as zeroes has content nobody knows: reading it is the safe answer.
fn allocation(flags: u32) -> ExtentKind {
    match (flags & state::HOLE != 0, flags & state::ZERO != 0) {
        (true, true) => ExtentKind::Hole,
        (false, true) => ExtentKind::AllocatedZero,
        (_, false) => ExtentKind::Data,
    }
}
