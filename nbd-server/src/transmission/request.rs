//! From request headers to [`Request`]s: the one gate between what a client sends and what an export is asked.

use zerocopy::FromBytes;
use zerocopy::big_endian::U32;

use crate::export::{BlockSize, ZeroMode};
use crate::limits::MAX_CONTEXTS;
use crate::wire::{
    self, EXTENDED_REQUEST_MAGIC, Errno, REQUEST_MAGIC, RawExtendedRequest, RawRequest, RawStatusFilter, command,
    command_flag,
};

/// Which headers were negotiated; the better the later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HeaderStyle {
    /// Simple replies only.
    Simple,
    /// Structured replies, 32-bit lengths.
    Structured,
    /// Structured replies, 64-bit lengths.
    Extended,
}

impl HeaderStyle {
    /// Length of a request header.
    pub(crate) fn request_len(self) -> usize {
        match self {
            HeaderStyle::Simple | HeaderStyle::Structured => size_of::<RawRequest>(),
            HeaderStyle::Extended => size_of::<RawExtendedRequest>(),
        }
    }

    pub(crate) fn is_structured(self) -> bool {
        self != HeaderStyle::Simple
    }
}

/// What a connection and its export allow.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) style: HeaderStyle,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) block_size: BlockSize,
    pub(crate) fast_zeroes: bool,
    /// The metadata contexts that the client has selected.
    pub(crate) contexts: ContextSet,
}

/// Metadata contexts by their numbers, which are small and never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContextSet(u32);
const _: () = assert!(MAX_CONTEXTS < 32);

impl ContextSet {
    pub(crate) const ALL: ContextSet = ContextSet(u32::MAX);
    pub(crate) const NONE: ContextSet = ContextSet(0);

    pub(crate) fn contains(self, id: u32) -> bool {
        id < 32 && self.0 & (1 << id) != 0
    }

    /// With one more; `None` if it cannot be the number of a context, or is there already.
    pub(crate) fn with(self, id: u32) -> Option<ContextSet> {
        (id < 32 && !self.contains(id)).then(|| ContextSet(self.0 | 1 << id))
    }
}

/// A request header as sent, both styles; nothing but the magic is known to be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// What a BLOCK_STATUS is about; its payload may name some.
    pub(crate) contexts: ContextSet,
}

/// Longest payload of a BLOCK_STATUS that can make sense.
const FILTER_MAX: u64 = (size_of::<RawStatusFilter>() + MAX_CONTEXTS * size_of::<U32>()) as u64;

/// The magic of a request is wrong: requests can no longer be told from payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("request magic is {0:#010x}")]
pub(crate) struct BadMagic(pub(crate) u32);

/// A request that is in range, allowed on this export and negotiated on this connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// Fits the export; for reads and writes also the payload maximum.
    pub(crate) length: u64,
    pub(crate) command: Command,
    /// Flush before the reply; only on commands that write.
    pub(crate) fua: bool,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Read { fragment: Fragment },
    Write,
    Flush,
    Trim,
    Cache,
    WriteZeroes(ZeroMode),
    BlockStatus { extents: Extents, contexts: ContextSet },
    Disconnect,
}

/// Whether a read's answer may come in several chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fragment {
    Allowed,
    Forbidden,
}

/// How many extents the client wants of each context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extents {
    One,
    Many,
}

/// Why a request does not reach the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("unknown command")]
    UnknownCommand,
    #[error("unknown flag, or one that this command does not take")]
    Flags,
    #[error("the range is not inside the export")]
    OutOfRange,
    #[error("the range to write is not inside the export")]
    WriteOutOfRange,
    #[error("offset or length is not a multiple of the minimum block size")]
    Misaligned,
    #[error("more than the maximum payload")]
    TooLarge,
    #[error("the export is read-only")]
    ReadOnly,
    #[error("no metadata context was selected")]
    NoContext,
    #[error("the payload does not name contexts that were selected, each once")]
    Filter,
    #[error("length is zero")]
    Empty,
    #[error("the export is shutting down")]
    ShuttingDown,
}

impl Refusal {
    /// The one map to the wire.
    pub(crate) fn errno(self) -> Errno {
        match self {
            Refusal::UnknownCommand
            | Refusal::Flags
            | Refusal::OutOfRange
            | Refusal::Misaligned
            | Refusal::TooLarge
            | Refusal::NoContext
            | Refusal::Filter
            | Refusal::Empty => Errno::Inval,
            Refusal::WriteOutOfRange => Errno::NoSpc,
            Refusal::ReadOnly => Errno::Perm,
            Refusal::ShuttingDown => Errno::Shutdown,
        }
    }
}

impl Header {
    /// Reads a header from the first bytes of `bytes`; `None` while they are too few.
    pub(crate) fn parse(bytes: &[u8], style: HeaderStyle) -> Option<Result<Header, BadMagic>> {
        match style {
            HeaderStyle::Simple | HeaderStyle::Structured => {
                let (raw, _) = RawRequest::ref_from_prefix(bytes).ok()?;
                Some(Header::compact(raw))
            }
            HeaderStyle::Extended => {
                let (raw, _) = RawExtendedRequest::ref_from_prefix(bytes).ok()?;
                Some(Header::extended(raw))
            }
        }
    }

    fn compact(raw: &RawRequest) -> Result<Header, BadMagic> {
        if raw.magic.get() != REQUEST_MAGIC {
            return Err(BadMagic(raw.magic.get()));
        }
        Ok(Header {
            flags: raw.flags.get(),
            command: raw.command.get(),
            cookie: raw.cookie.get(),
            offset: raw.offset.get(),
            length: u64::from(raw.length.get()),
            contexts: ContextSet::ALL,
        })
    }

    fn extended(raw: &RawExtendedRequest) -> Result<Header, BadMagic> {
        if raw.magic.get() != EXTENDED_REQUEST_MAGIC {
            return Err(BadMagic(raw.magic.get()));
        }
        Ok(Header {
            flags: raw.flags.get(),
            command: raw.command.get(),
            cookie: raw.cookie.get(),
            offset: raw.offset.get(),
            length: raw.length.get(),
            contexts: ContextSet::ALL,
        })
    }

    /// Bytes that follow the header. With extended headers any command may carry a payload and says so by a flag; a
    /// write has one even if its client forgot the flag.
    pub(crate) fn payload_len(&self, style: HeaderStyle) -> u64 {
        let announced = style == HeaderStyle::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        if self.command == command::WRITE || announced { self.length } else { 0 }
    }

    /// Length of the payload that says what a BLOCK_STATUS is about, if one follows that can make sense: it is looked at
    /// together with the header.
    pub(crate) fn filter_len(&self, style: HeaderStyle) -> Option<usize> {
        let announced = style == HeaderStyle::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        let follows = announced && self.command == command::BLOCK_STATUS && self.length <= FILTER_MAX;
        usize::try_from(self.length).ok().filter(|_| follows)
    }

    /// The header of a BLOCK_STATUS with what its payload says: the length of the effect and some of the contexts that
    /// the client has selected.
    pub(crate) fn filtered(&self, payload: &[u8], terms: &Terms) -> Result<Header, Refusal> {
        let (raw, rest) = RawStatusFilter::ref_from_prefix(payload).map_err(|_| Refusal::Filter)?;
        let ids = <[U32]>::ref_from_bytes(rest).map_err(|_| Refusal::Filter)?;
        let mut contexts = ContextSet::NONE;
        for id in ids {
            let id = Some(id.get()).filter(|id| terms.contexts.contains(*id)).ok_or(Refusal::Filter)?;
            contexts = contexts.with(id).ok_or(Refusal::Filter)?;
        }
        Ok(Header { length: raw.length.get(), flags: self.flags & !command_flag::PAYLOAD_LEN, contexts, ..*self })
    }

    /// The one gate.
    pub(crate) fn check(&self, terms: &Terms) -> Result<Request, Refusal> {
        let command = self.command(terms)?;
        let request = Request {
            cookie: self.cookie,
            offset: self.offset,
            length: self.length,
            command,
            fua: self.flags & command_flag::FUA != 0 && command.writes(),
        };
        match command {
            Command::Disconnect | Command::Flush => Ok(Request { offset: 0, length: 0, ..request }),
            Command::Read { .. } => {
                self.in_payload(terms)?;
                self.in_range(terms, Refusal::OutOfRange)?;
                Ok(request)
            }
            Command::Write => {
                writable(terms)?;
                self.in_payload(terms)?;
                self.in_range(terms, Refusal::WriteOutOfRange)?;
                Ok(request)
            }
            Command::WriteZeroes(_) => {
                writable(terms)?;
                self.in_range(terms, Refusal::WriteOutOfRange)?;
                Ok(request)
            }
            Command::Trim => {
                writable(terms)?;
                self.in_range(terms, Refusal::OutOfRange)?;
                Ok(request)
            }
            Command::Cache => {
                self.in_range(terms, Refusal::OutOfRange)?;
                Ok(request)
            }
            Command::BlockStatus { .. } => {
                if terms.contexts == ContextSet::NONE || self.contexts == ContextSet::NONE {
                    return Err(Refusal::NoContext);
                }
                if self.length == 0 {
                    return Err(Refusal::Empty);
                }
                self.in_range(terms, Refusal::OutOfRange)?;
                Ok(request)
            }
        }
    }

    /// Command and flags. FUA is good on every command; other flags only where the protocol names them.
    fn command(&self, terms: &Terms) -> Result<Command, Refusal> {
        let has = |flag| self.flags & flag != 0;
        let (command, allowed) = match self.command {
            command::READ => {
                let fragment = if has(command_flag::DF) { Fragment::Forbidden } else { Fragment::Allowed };
                (Command::Read { fragment }, if terms.style.is_structured() { command_flag::DF } else { 0 })
            }
            command::WRITE => {
                (Command::Write, if terms.style == HeaderStyle::Extended { command_flag::PAYLOAD_LEN } else { 0 })
            }
            command::DISC => (Command::Disconnect, u16::MAX),
            command::FLUSH => (Command::Flush, 0),
            command::TRIM => (Command::Trim, 0),
            command::CACHE => (Command::Cache, 0),
            command::WRITE_ZEROES => {
                let mode = if has(command_flag::NO_HOLE) { ZeroMode::KeepAllocated } else { ZeroMode::MayPunch };
                let fast = if terms.fast_zeroes { command_flag::FAST_ZERO } else { 0 };
                (Command::WriteZeroes(mode), command_flag::NO_HOLE | fast)
            }
            command::BLOCK_STATUS => {
                let extents = if has(command_flag::REQ_ONE) { Extents::One } else { Extents::Many };
                (Command::BlockStatus { extents, contexts: self.contexts }, command_flag::REQ_ONE)
            }
            _ => return Err(Refusal::UnknownCommand),
        };
        if self.flags & !(allowed | wire::command_flag::FUA) != 0 {
            return Err(Refusal::Flags);
        }
        Ok(command)
    }

    fn in_range(&self, terms: &Terms, outside: Refusal) -> Result<(), Refusal> {
        let end = self.offset.checked_add(self.length).ok_or(outside)?;
        if end > terms.size {
            return Err(outside);
        }
        let mask = u64::from(terms.block_size.minimum) - 1; // a power of two, checked when the export was added
        if (self.offset | self.length) & mask != 0 { Err(Refusal::Misaligned) } else { Ok(()) }
    }

    fn in_payload(&self, terms: &Terms) -> Result<(), Refusal> {
        if self.length > u64::from(terms.block_size.maximum) { Err(Refusal::TooLarge) } else { Ok(()) }
    }
}

fn writable(terms: &Terms) -> Result<(), Refusal> {
    if terms.read_only { Err(Refusal::ReadOnly) } else { Ok(()) }
}

impl Command {
    /// Whether it changes the export, so that FUA has something to make durable.
    fn writes(self) -> bool {
        match self {
            Command::Write | Command::Trim | Command::WriteZeroes(_) => true,
            Command::Read { .. }
            | Command::Flush
            | Command::Cache
            | Command::BlockStatus { .. }
            | Command::Disconnect => false,
        }
    }
}
