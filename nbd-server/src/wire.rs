//! What travels: magic numbers, flags, types and fixed-size headers, in the order of the NBD protocol document and
//! shared by server and client. Nothing here decides anything; `handshake` and `transmission` do.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

// ---- "Newstyle negotiation"

/// First word of every handshake, `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of a newstyle handshake and first of every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First word of every option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Zeroes after the answer to `NBD_OPT_EXPORT_NAME`, unless both sides agreed to leave them out.
pub const EXPORT_NAME_PADDING: usize = 124;
/// The port registered for NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Server greeting, 18 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawGreeting {
    /// [`INIT_MAGIC`].
    pub init_magic: U64,
    /// [`OPTION_MAGIC`].
    pub option_magic: U64,
    /// `handshake_flag` bits.
    pub flags: U16,
}
const _: () = assert!(size_of::<RawGreeting>() == 18);

/// Header of an option, 16 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawOption {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// One of `option`.
    pub option: U32,
    /// Bytes of data that follow.
    pub length: U32,
}
const _: () = assert!(size_of::<RawOption>() == 16);

/// Header of an option reply, 20 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawOptionReply {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option this answers.
    pub option: U32,
    /// One of `option_reply`.
    pub kind: U32,
    /// Bytes of data that follow.
    pub length: U32,
}
const _: () = assert!(size_of::<RawOptionReply>() == 20);

/// Answer to `NBD_OPT_EXPORT_NAME`, 10 bytes, then perhaps [`EXPORT_NAME_PADDING`] zeroes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawExportNameAnswer {
    /// Size of the export.
    pub size: U64,
    /// `transmission_flag` bits.
    pub flags: U16,
}
const _: () = assert!(size_of::<RawExportNameAnswer>() == 10);

// ---- "Request message"

/// First word of a request with compact headers.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

/// Compact request header, 28 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawRequest {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// `command_flag` bits.
    pub flags: U16,
    /// One of `command`.
    pub command: U16,
    /// Chosen by the client, repeated in every reply.
    pub cookie: U64,
    /// Where in the export.
    pub offset: U64,
    /// Length of the effect, and of the payload of a write.
    pub length: U32,
}
const _: () = assert!(size_of::<RawRequest>() == 28);

/// Extended request header, 32 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawExtendedRequest {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// `command_flag` bits.
    pub flags: U16,
    /// One of `command`.
    pub command: U16,
    /// Chosen by the client, repeated in every reply.
    pub cookie: U64,
    /// Where in the export.
    pub offset: U64,
    /// Length of the payload if `PAYLOAD_LEN` is set, else of the effect.
    pub length: U64,
}
const _: () = assert!(size_of::<RawExtendedRequest>() == 32);

/// Start of the payload of a `BLOCK_STATUS` request, 8 bytes, then the numbers of contexts, 32 bits each.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawStatusFilter {
    /// Length of the effect, since the header's is the payload's.
    pub length: U64,
}
const _: () = assert!(size_of::<RawStatusFilter>() == 8);

// ---- "Simple reply message"

/// First word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Simple reply, 16 bytes, then the data of a read that succeeded.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawSimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// 0 or an error number.
    pub error: U32,
    /// Cookie of the request.
    pub cookie: U64,
}
const _: () = assert!(size_of::<RawSimpleReply>() == 16);

// ---- "Structured reply chunk message" and "Extended reply chunk message"

/// First word of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First word of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Header of a structured reply chunk, 20 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawStructuredReply {
    /// [`STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`REPLY_FLAG_DONE`] on the last chunk.
    pub flags: U16,
    /// One of `reply_type`.
    pub kind: U16,
    /// Cookie of the request.
    pub cookie: U64,
    /// Bytes of payload that follow.
    pub length: U32,
}
const _: () = assert!(size_of::<RawStructuredReply>() == 20);

/// Header of an extended reply chunk, 32 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawExtendedReply {
    /// [`EXTENDED_REPLY_MAGIC`].
    pub magic: U32,
    /// [`REPLY_FLAG_DONE`] on the last chunk.
    pub flags: U16,
    /// One of `reply_type`.
    pub kind: U16,
    /// Cookie of the request.
    pub cookie: U64,
    /// Offset of the request.
    pub offset: U64,
    /// Bytes of payload that follow.
    pub length: U64,
}
const _: () = assert!(size_of::<RawExtendedReply>() == 32);

/// Payload of an `OFFSET_HOLE` chunk, 12 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHole {
    /// Where the hole starts.
    pub offset: U64,
    /// Its length, not 0.
    pub length: U32,
}
const _: () = assert!(size_of::<RawHole>() == 12);

/// Start of an error chunk's payload, 6 bytes, then the message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawError {
    /// Error number, not 0.
    pub error: U32,
    /// Bytes of message that follow.
    pub message_length: U16,
}
const _: () = assert!(size_of::<RawError>() == 6);

/// Descriptor of a `BLOCK_STATUS` chunk, 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawDescriptor {
    /// Length, not 0.
    pub length: U32,
    /// What the context says of it.
    pub flags: U32,
}
const _: () = assert!(size_of::<RawDescriptor>() == 8);

/// Descriptor of a `BLOCK_STATUS_EXT` chunk, 16 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawExtendedDescriptor {
    /// Length, not 0.
    pub length: U64,
    /// What the context says of it.
    pub flags: U64,
}
const _: () = assert!(size_of::<RawExtendedDescriptor>() == 16);

// ---- "Values": "Handshake phase"

/// "Handshake flags", sent by the server.
pub mod handshake_flag {
    /// Fixed newstyle: options may be refused without ending the connection.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The server can leave out the padding.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// "Client flags".
pub mod client_flag {
    /// The client knows fixed newstyle.
    pub const FIXED_NEWSTYLE: u32 = 1;
    /// The client wants no padding.
    pub const NO_ZEROES: u32 = 1 << 1;
}

/// "Transmission flags", what an export offers.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is served.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is honoured.
    pub const SEND_FUA: u16 = 1 << 3;
    /// A rotating medium.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is served.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is served.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// A read may ask for one chunk only.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all of them.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is served.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is honoured.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS may carry a payload that names the contexts it is about.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// "Option types".
pub mod option {
    /// Choose an export, old form, cannot be refused.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Change to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use 64-bit headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// "Option reply types".
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// Known, but forbidden here.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// Malformed.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// The client must ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR + 8;
    /// Too large to process.
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    /// Extended headers have been, or must be, negotiated.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Information types of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// One line for a person.
    pub const DESCRIPTION: u16 = 2;
    /// Block size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Name of the metadata context the protocol itself defines.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// States of `base:allocation`.
pub mod state {
    /// Takes no space.
    pub const HOLE: u32 = 1;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

// ---- "Values": "Transmission phase"

/// "Command flags".
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// Keep the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One content chunk only.
    pub const DF: u16 = 1 << 2;
    /// One extent per context.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than zero slowly.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: the length is the payload's.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// "Structured reply flags": the last chunk of a reply.
pub const REPLY_FLAG_DONE: u16 = 1;

/// "Structured reply types".
pub mod reply_type {
    /// Nothing more to say.
    pub const NONE: u16 = 0;
    /// Bytes.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Descriptors of one context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Descriptors of one context, 64 bits.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error chunk.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// The request failed.
    pub const ERROR: u16 = ERROR_BIT + 1;
    /// The request failed at an offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// "Request types".
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Make completed writes durable.
    pub const FLUSH: u16 = 3;
    /// Give up the content of a range.
    pub const TRIM: u16 = 4;
    /// Bring a range into the cache.
    pub const CACHE: u16 = 5;
    /// Write zeroes without a payload.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask what a range holds.
    pub const BLOCK_STATUS: u16 = 7;
}

/// "Error values".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Errno {
    /// `NBD_EPERM`
    Perm = 1,
    /// `NBD_EIO`
    Io = 5,
    /// `NBD_ENOMEM`
    NoMem = 12,
    /// `NBD_EINVAL`
    Inval = 22,
    /// `NBD_ENOSPC`
    NoSpc = 28,
    /// `NBD_EOVERFLOW`
    Overflow = 75,
    /// `NBD_ENOTSUP`
    NotSup = 95,
    /// `NBD_ESHUTDOWN`
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// From the wire; as the protocol says, what is unknown counts as `EINVAL`.
    pub fn from_number(number: u32) -> Errno {
        match number {
            1 => Errno::Perm,
            5 => Errno::Io,
            12 => Errno::NoMem,
            28 => Errno::NoSpc,
            75 => Errno::Overflow,
            95 => Errno::NotSup,
            108 => Errno::Shutdown,
            _ => Errno::Inval,
        }
    }
}
