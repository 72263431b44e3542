//! Option haggling: one option at a time, read whole within its bound, answered in one write.

use std::io;
use std::sync::Arc;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use super::options::{ContextRequest, InfoRequest, OptionError, no_data};
use super::{Context, ContextSource, Negotiated, Outcome};
use crate::control::Control;
use crate::limits::{MAX_CONTEXTS, MAX_OPTION, MAX_OPTION_DRAINED, MAX_OPTIONS};
use crate::name::ExportName;
use crate::stream::Stream;
use crate::table::{ExportTable, Published};
use crate::tls::TlsServer;
use crate::transmission::HeaderStyle;
use crate::wire::{
    BASE_ALLOCATION, EXPORT_NAME_PADDING, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, RawExportNameAnswer,
    RawGreeting, RawOption, RawOptionReply, client_flag, handshake_flag, info, option, option_reply,
};

/// Why a handshake ended without an export.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("the client went away")]
    Io(#[from] io::Error),
    #[error("the client sets flags {0:#x}, which nobody offered")]
    ClientFlags(u32),
    #[error("option magic is {0:#018x}")]
    OptionMagic(u64),
    #[error("option {option} has {length} bytes of data")]
    OptionTooLong { option: u32, length: u32 },
    #[error("more than {MAX_OPTIONS} options")]
    TooManyOptions,
    #[error("there is no export '{0}'")]
    UnknownExport(ExportName),
    #[error("the name of the export cannot be read")]
    Name(#[from] OptionError),
    #[error("the client asks for another option than the old form allows")]
    NotFixed,
    #[error("the client asks for an export in the old form after extended headers")]
    OldFormWithExtendedHeaders,
    #[error("the client asks for an export in the old form before TLS")]
    OldFormBeforeTls,
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
}

/// What the client has settled so far.
struct Haggling<'a> {
    stream: &'a mut Stream,
    tls: Option<&'a TlsServer>,
    table: &'a ExportTable,
    control: &'a Arc<Control>,
    client_flags: u32,
    style: HeaderStyle,
    /// Set by SET_META_CONTEXT; holds for one export only.
    contexts: Option<(ExportName, Vec<Context>)>,
    out: Vec<u8>,
}

enum Next {
    Haggle,
    StartTls,
    Abort,
    /// The server ends, and has said so.
    Shutdown,
    Transmit(Outcome),
}

/// Leads one handshake. `Ok(None)`: the client ended it in order, or the server ends.
pub(crate) async fn negotiate(
    stream: &mut Stream,
    tls: Option<&TlsServer>,
    table: &ExportTable,
    control: &Arc<Control>,
) -> Result<Option<Outcome>, HandshakeError> {
    let greeting = RawGreeting {
        init_magic: U64::new(INIT_MAGIC),
        option_magic: U64::new(OPTION_MAGIC),
        flags: U16::new(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES),
    };
    stream.write_all(greeting.as_bytes()).await?;
    let mut flags = U32::ZERO;
    if !read_unless_stopped(stream, control, flags.as_mut_bytes()).await? {
        return Ok(None);
    }
    let client_flags = flags.get();
    if client_flags & !(client_flag::FIXED_NEWSTYLE | client_flag::NO_ZEROES) != 0 {
        return Err(HandshakeError::ClientFlags(client_flags));
    }
    let (style, contexts) = (HeaderStyle::Simple, None);
    let mut haggling = Haggling { stream, tls, table, control, client_flags, style, contexts, out: Vec::new() };
    for _ in 0..MAX_OPTIONS {
        match haggling.option().await? {
            Next::Haggle => {}
            Next::StartTls => haggling.start_tls().await.map_err(HandshakeError::Tls)?,
            Next::Abort => return Ok(None),
            Next::Shutdown => {
                // Closed with unread input, a socket would throw the refusal away.
                return haggling.stream.drain_to_end().await.map(|()| None).map_err(HandshakeError::Io);
            }
            Next::Transmit(outcome) => return Ok(Some(outcome)),
        }
    }
    Err(HandshakeError::TooManyOptions)
}

impl Haggling<'_> {
    async fn option(&mut self) -> Result<Next, HandshakeError> {
        let mut raw = RawOption::new_zeroed();
        if !read_unless_stopped(self.stream, self.control, raw.as_mut_bytes()).await? {
            return Ok(Next::Abort);
        }
        if raw.magic.get() != OPTION_MAGIC {
            return Err(HandshakeError::OptionMagic(raw.magic.get()));
        }
        let (kind, length) = (raw.option.get(), raw.length.get());
        if length > MAX_OPTION_DRAINED {
            return Err(HandshakeError::OptionTooLong { option: kind, length });
        }
        if kind != option::EXPORT_NAME && self.client_flags & client_flag::FIXED_NEWSTYLE == 0 {
            return Err(HandshakeError::NotFixed); // such a client could not read a reply
        }
        if length > MAX_OPTION {
            if kind == option::EXPORT_NAME {
                return Err(HandshakeError::OptionTooLong { option: kind, length });
            }
            self.drain(length).await?;
            self.error(kind, option_reply::ERR_TOO_BIG, "the option is too long");
            return self.send(Next::Haggle).await;
        }
        let mut data = vec![0; length as usize]; // at most MAX_OPTION
        self.stream.read_exact(&mut data).await?;
        if kind == option::EXPORT_NAME {
            return self.export_name(&data).await;
        }
        let next = self.answer(kind, &data);
        self.send(next).await
    }

    /// Whether the client must change to TLS before anything else.
    fn needs_tls(&self) -> bool {
        self.tls.is_some() && self.stream.tls().is_none()
    }

    /// Nothing has been settled before that could need to be forgotten: there is only one option until here.
    async fn start_tls(&mut self) -> io::Result<()> {
        let Some(tls) = self.tls else { return Ok(()) };
        let tls = tls.clone();
        let connection = tokio::task::spawn_blocking(move || tls.connection()).await?.map_err(io::Error::other)?;
        self.stream.start_tls(connection).await
    }

    async fn drain(&self, length: u32) -> io::Result<()> {
        let mut scrap = [0; 4096];
        let mut left = length as usize;
        while left > 0 {
            let count = left.min(scrap.len());
            self.stream.read_exact(scrap.split_at_mut(count).0).await?;
            left -= count;
        }
        Ok(())
    }

    async fn send(&mut self, next: Next) -> Result<Next, HandshakeError> {
        let sent = self.stream.write_all(&self.out).await;
        self.out.clear();
        match (&next, sent) {
            (Next::Abort, _) => {} // a client that aborts need not wait for our answer
            (_, sent) => sent?,
        }
        Ok(next)
    }

    fn answer(&mut self, kind: u32, data: &[u8]) -> Next {
        let result = match kind {
            option::ABORT => {
                self.reply(kind, option_reply::ACK, &[]);
                return Next::Abort;
            }
            _ if self.control.is_stopped() => {
                self.error(kind, option_reply::ERR_SHUTDOWN, "this server is shutting down");
                return Next::Shutdown;
            }
            option::STARTTLS => match no_data(data) {
                Ok(()) if self.needs_tls() => {
                    self.reply(kind, option_reply::ACK, &[]);
                    return Next::StartTls;
                }
                Ok(()) if self.tls.is_some() => {
                    self.error(kind, option_reply::ERR_INVALID, "TLS is in use already");
                    Ok(())
                }
                Ok(()) => {
                    self.error(kind, option_reply::ERR_POLICY, "this server does not offer TLS");
                    Ok(())
                }
                Err(error) => Err(error),
            },
            _ if self.needs_tls() => {
                self.error(kind, option_reply::ERR_TLS_REQD, "this server wants TLS first");
                Ok(())
            }
            option::LIST => self.list(data),
            option::INFO => self.info(kind, data).map(|_| ()),
            option::GO => match self.info(kind, data) {
                Ok(Some(outcome)) => return Next::Transmit(outcome),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            },
            option::STRUCTURED_REPLY => no_data(data).map(|()| match self.style {
                HeaderStyle::Simple => self.settle(kind, HeaderStyle::Structured),
                HeaderStyle::Structured => {
                    self.error(kind, option_reply::ERR_INVALID, "structured replies are in use already");
                }
                HeaderStyle::Extended => {
                    self.error(kind, option_reply::ERR_EXT_HEADER_REQD, "extended headers are in use already");
                }
            }),
            option::EXTENDED_HEADERS => no_data(data).map(|()| match self.style {
                HeaderStyle::Simple | HeaderStyle::Structured => self.settle(kind, HeaderStyle::Extended),
                HeaderStyle::Extended => {
                    self.error(kind, option_reply::ERR_INVALID, "extended headers are in use already");
                }
            }),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(kind, data),
            _ => {
                self.error(kind, option_reply::ERR_UNSUP, "unknown option");
                Ok(())
            }
        };
        if let Err(error) = result {
            self.error(kind, option_reply::ERR_INVALID, &error.to_string());
        }
        Next::Haggle
    }

    fn settle(&mut self, kind: u32, style: HeaderStyle) {
        self.style = style;
        self.reply(kind, option_reply::ACK, &[]);
    }

    fn list(&mut self, data: &[u8]) -> Result<(), OptionError> {
        no_data(data)?;
        for published in self.table.published() {
            if !published.admits(self.stream) {
                continue;
            }
            let name = published.name.as_str();
            let mut body = Vec::with_capacity(4 + name.len());
            body.extend_from_slice(U32::new(clamp(name.len())).as_bytes());
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(description(&published).as_bytes());
            self.reply(option::LIST, option_reply::SERVER, &body);
        }
        self.reply(option::LIST, option_reply::ACK, &[]);
        Ok(())
    }

    /// INFO and GO. Returns the outcome only for a GO that is granted.
    fn info(&mut self, kind: u32, data: &[u8]) -> Result<Option<Outcome>, OptionError> {
        let request = InfoRequest::parse(data)?;
        let Some(published) = self.find(&request.name) else {
            self.error(kind, option_reply::ERR_UNKNOWN, "there is no export of that name");
            return Ok(None);
        };
        let asks_sizes = request.wanted.contains(&info::BLOCK_SIZE);
        if published.block_size.minimum > 1 && !asks_sizes {
            // A client that does not ask would send requests this export cannot serve.
            self.error(kind, option_reply::ERR_BLOCK_SIZE_REQD, "this export needs a client that heeds block sizes");
            return Ok(None);
        }
        let membership = if kind == option::GO {
            match published.connections.join(self.control, usize::MAX) {
                Some(membership) => Some(membership),
                None => {
                    self.error(kind, option_reply::ERR_UNKNOWN, "the export is going away");
                    return Ok(None);
                }
            }
        } else {
            None
        };
        self.describe(kind, &request, &published);
        self.reply(kind, option_reply::ACK, &[]);
        Ok(membership.map(|membership| self.outcome(&request.name, published, membership)))
    }

    /// The facts: size and flags always, block sizes always (they do no harm), the rest when asked for.
    fn describe(&mut self, kind: u32, request: &InfoRequest, published: &Published) {
        let mut body = Vec::new();
        let mut fact = |haggling: &mut Self, of: u16, value: &[&[u8]]| {
            body.clear();
            body.extend_from_slice(U16::new(of).as_bytes());
            value.iter().for_each(|part| body.extend_from_slice(part));
            haggling.reply(kind, option_reply::INFO, &body);
        };
        let flags = U16::new(published.flags(self.style, self.has_contexts(&request.name)));
        fact(self, info::EXPORT, &[U64::new(published.size).as_bytes(), flags.as_bytes()]);
        if request.wanted.contains(&info::NAME) {
            fact(self, info::NAME, &[published.name.as_str().as_bytes()]);
        }
        if request.wanted.contains(&info::DESCRIPTION) {
            let description = description(published);
            if !description.is_empty() {
                fact(self, info::DESCRIPTION, &[description.as_bytes()]);
            }
        }
        let sizes = published.block_size;
        let sizes = [U32::new(sizes.minimum), U32::new(sizes.preferred), U32::new(sizes.maximum)];
        fact(self, info::BLOCK_SIZE, &[sizes.as_bytes()]);
    }

    fn meta_context(&mut self, kind: u32, data: &[u8]) -> Result<(), OptionError> {
        if kind == option::SET_META_CONTEXT {
            self.contexts = None; // a failed attempt leaves nothing selected
        }
        if !self.style.is_structured() {
            self.error(kind, option_reply::ERR_INVALID, "structured replies first");
            return Ok(());
        }
        let request = ContextRequest::parse(data)?;
        let Some(published) = self.find(&request.name) else {
            self.error(kind, option_reply::ERR_UNKNOWN, "there is no export of that name");
            return Ok(());
        };
        let mut selected = Vec::new();
        for (id, context) in (1..).zip(published.context_names().take(MAX_CONTEXTS)) {
            let (wanted, shown) = match kind {
                option::SET_META_CONTEXT => (request.selects(context), id),
                _ => (request.lists(context), 0),
            };
            if !wanted {
                continue;
            }
            let source = match context {
                BASE_ALLOCATION => ContextSource::BaseAllocation,
                own => ContextSource::Own(own.to_owned()),
            };
            selected.push(Context { id, source });
            let mut body = U32::new(shown).as_bytes().to_vec();
            body.extend_from_slice(context.as_bytes());
            self.reply(kind, option_reply::META_CONTEXT, &body);
        }
        self.reply(kind, option_reply::ACK, &[]);
        if kind == option::SET_META_CONTEXT {
            self.contexts = Some((request.name, selected));
        }
        Ok(())
    }

    /// The old form: cannot be refused, only left.
    async fn export_name(&mut self, data: &[u8]) -> Result<Next, HandshakeError> {
        if self.style == HeaderStyle::Extended {
            return Err(HandshakeError::OldFormWithExtendedHeaders);
        }
        let name = ExportName::from_wire(data).map_err(OptionError::from)?;
        if self.needs_tls() {
            return Err(HandshakeError::OldFormBeforeTls);
        }
        let found = self.find(&name);
        let joined = found.and_then(|published| {
            let membership = published.connections.join(self.control, usize::MAX)?;
            Some((published, membership))
        });
        let Some((published, membership)) = joined else { return Err(HandshakeError::UnknownExport(name)) };
        let flags = U16::new(published.flags(self.style, self.has_contexts(&name)));
        let answer = RawExportNameAnswer { size: U64::new(published.size), flags };
        self.out.extend_from_slice(answer.as_bytes());
        if self.client_flags & client_flag::NO_ZEROES == 0 {
            self.out.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
        }
        let outcome = self.outcome(&name, published, membership);
        self.send(Next::Transmit(outcome)).await
    }

    /// The export of this name, if it exists and the client may know it.
    fn find(&self, name: &ExportName) -> Option<Arc<Published>> {
        let published = self.table.find(name)?;
        if published.admits(self.stream) {
            return Some(published);
        }
        match published.stranger(self.stream).as_deref() {
            None => tracing::warn!(export = %published.name, "refused a client without a certificate"),
            Some([]) => tracing::warn!(export = %published.name,
                "refused a client whose certificate has no subject alternative name; its common name does not count"),
            Some(names) => tracing::warn!(export = %published.name, ?names, "refused a client by its certificate"),
        }
        None
    }

    /// Whether contexts are selected for the export of this name.
    fn has_contexts(&self, name: &ExportName) -> bool {
        self.contexts.as_ref().is_some_and(|(of, contexts)| of == name && !contexts.is_empty())
    }

    fn outcome(
        &mut self,
        name: &ExportName,
        published: Arc<Published>,
        membership: crate::control::Membership,
    ) -> Outcome {
        let contexts = match self.contexts.take() {
            Some((of, contexts)) if of == *name => contexts,
            _ => Vec::new(),
        };
        Outcome { negotiated: Negotiated { published, style: self.style, contexts }, membership }
    }

    fn error(&mut self, option: u32, kind: u32, message: &str) {
        tracing::debug!(option, kind, message, "refused an option");
        self.reply(option, kind, message.as_bytes());
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        let raw = RawOptionReply {
            magic: U64::new(OPTION_REPLY_MAGIC),
            option: U32::new(option),
            kind: U32::new(kind),
            length: U32::new(clamp(data.len())),
        };
        self.out.extend_from_slice(raw.as_bytes());
        self.out.extend_from_slice(data);
    }
}

/// Fills the buffer, unless the server ends before the client has sent any of it: then the stream is closed, and false.
async fn read_unless_stopped(stream: &Stream, control: &Control, buffer: &mut [u8]) -> io::Result<bool> {
    let first = loop {
        match stream.try_read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => break count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if control.is_stopped() {
                    return stream.shutdown_write().map(|()| false);
                }
                tokio::select! {
                    ready = stream.readable() => ready?,
                    () = control.stopped() => {}
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    stream.read_exact(buffer.split_at_mut(first).1).await.map(|()| true)
}

/// Lengths of what this server itself sends are far below 32 bits.
fn clamp(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// The export's description, cut to what a string may hold.
fn description(published: &Published) -> String {
    let mut text = published.export.description();
    text.retain(|c| c != '\0');
    let mut end = text.len().min(crate::name::MAX_NAME);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
