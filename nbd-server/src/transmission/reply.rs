//! Replies on their way out: a [`Batch`] of headers and payloads for one vectored write, and [`Reply`], which encodes
//! the answer to one request in the negotiated style.

use std::io::IoSlice;

use bytes::Bytes;
use zerocopy::IntoBytes;
use zerocopy::big_endian::{U16, U32, U64};

use super::request::{Fragment, HeaderStyle};
use crate::budget::Permit;
use crate::export::Piece;
use crate::wire::{
    EXTENDED_REPLY_MAGIC, Errno, REPLY_FLAG_DONE, RawDescriptor, RawError, RawExtendedDescriptor, RawExtendedReply,
    RawHole, RawSimpleReply, RawStructuredReply, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, reply_type,
};

/// Zeroes for holes that must be sent as bytes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Slices handed to one system call; more would not make it faster and the array lives on the stack.
const SLICES: usize = 128;

/// Bytes to send, in order. Headers are kept together; payloads stay where they are.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    heads: Vec<u8>,
    parts: Vec<Part>,
    bytes: usize,
    /// Memory budget held until the bytes are gone.
    permits: Option<Permit>,
}

#[derive(Debug)]
struct Part {
    /// Bytes of `heads` that go before the body.
    head: usize,
    body: Bytes,
}

/// How far a batch has been written.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    part: usize,
    /// Bytes of that part already written.
    within: usize,
    /// Where in `heads` that part begins.
    head_at: usize,
}

impl Batch {
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Bytes in it.
    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    pub(crate) fn hold(&mut self, permit: Permit) {
        match &mut self.permits {
            Some(held) => held.merge(permit),
            None => self.permits = Some(permit),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.heads.clear();
        self.parts.clear();
        self.bytes = 0;
        self.permits = None;
    }

    /// Moves everything from `other` to the end; `other` is left empty with what capacity there is.
    pub(crate) fn append(&mut self, other: &mut Batch) {
        if self.is_empty() {
            std::mem::swap(self, other);
            return;
        }
        self.heads.append(&mut other.heads);
        self.parts.append(&mut other.parts);
        self.bytes += std::mem::take(&mut other.bytes);
        if let Some(permit) = other.permits.take() {
            self.hold(permit);
        }
    }

    fn head(&mut self, bytes: &[u8]) {
        self.heads.extend_from_slice(bytes);
        self.bytes += bytes.len();
        match self.parts.last_mut() {
            Some(part) if part.body.is_empty() => part.head += bytes.len(),
            _ => self.parts.push(Part { head: bytes.len(), body: Bytes::new() }),
        }
    }

    fn body(&mut self, body: Bytes) {
        if body.is_empty() {
            return;
        }
        self.bytes += body.len();
        match self.parts.last_mut() {
            Some(part) if part.body.is_empty() => part.body = body,
            _ => self.parts.push(Part { head: 0, body }),
        }
    }

    fn zeroes(&mut self, mut length: u64) {
        while length > 0 {
            let count = usize::try_from(length).unwrap_or(usize::MAX).min(ZEROES.len());
            self.body(Bytes::from_static(ZEROES.split_at(count).0));
            length -= count as u64;
        }
    }

    /// Calls `write` with the next slices; false if there are none.
    pub(crate) fn with_slices<R>(&self, cursor: &Cursor, write: impl FnOnce(&[IoSlice<'_>]) -> R) -> Option<R> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        let mut head_at = cursor.head_at;
        let mut skip = cursor.within;
        for part in self.parts.get(cursor.part..)? {
            let head = self.heads.get(head_at..head_at + part.head)?;
            head_at += part.head;
            for bytes in [head, &part.body[..]] {
                let rest = bytes.get(skip..);
                skip = skip.saturating_sub(bytes.len());
                let Some(rest) = rest.filter(|rest| !rest.is_empty()) else { continue };
                let Some(slot) = slices.get_mut(used) else { break };
                *slot = IoSlice::new(rest);
                used += 1;
            }
            if used == SLICES {
                break;
            }
        }
        let filled = slices.get(..used).filter(|filled| !filled.is_empty())?;
        Some(write(filled))
    }

    /// Notes that `count` more bytes are written.
    pub(crate) fn advance(&self, cursor: &mut Cursor, count: usize) {
        cursor.within += count;
        while let Some(part) = self.parts.get(cursor.part) {
            let length = part.head + part.body.len();
            if cursor.within < length {
                break;
            }
            cursor.within -= length;
            cursor.head_at += part.head;
            cursor.part += 1;
        }
    }

    /// Everything as one piece of memory.
    #[cfg(test)]
    pub(crate) fn flatten(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut cursor = Cursor::default();
        while let Some(count) = self.with_slices(&cursor, |slices| {
            slices.iter().for_each(|slice| out.extend_from_slice(slice));
            slices.iter().map(|slice| slice.len()).sum::<usize>()
        }) {
            self.advance(&mut cursor, count);
        }
        out
    }
}

/// Encodes the answer to one request.
pub(crate) struct Reply<'a> {
    pub(crate) batch: &'a mut Batch,
    pub(crate) style: HeaderStyle,
    pub(crate) cookie: u64,
    /// The request's offset, which extended headers repeat.
    pub(crate) offset: u64,
}

/// Whether a chunk ends the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Position {
    Last,
    MoreFollow,
}

impl Reply<'_> {
    /// Success without data.
    pub(crate) fn done(&mut self) {
        match self.style {
            HeaderStyle::Simple | HeaderStyle::Structured => self.simple(0),
            HeaderStyle::Extended => self.chunk(reply_type::NONE, 0, Position::Last),
        }
    }

    /// Failure, with a sentence for a person where the style has room for one.
    pub(crate) fn error(&mut self, errno: Errno, message: &str) {
        match self.style {
            HeaderStyle::Simple => self.simple(errno.number()),
            HeaderStyle::Structured | HeaderStyle::Extended => {
                let message_length = u16::try_from(message.len()).unwrap_or(0);
                let message = if message_length == 0 { "" } else { message };
                let raw = RawError { error: U32::new(errno.number()), message_length: U16::new(message_length) };
                self.chunk(reply_type::ERROR, (size_of::<RawError>() + message.len()) as u64, Position::Last);
                self.batch.head(raw.as_bytes());
                self.batch.head(message.as_bytes());
            }
        }
    }

    /// The data of a read. The caller has checked that the pieces cover the request exactly. Takes the pieces out.
    pub(crate) fn read(&mut self, pieces: &mut Vec<Piece>, length: u64, fragment: Fragment) {
        match self.style {
            HeaderStyle::Simple => {
                self.simple(0);
                self.bytes_of(pieces.drain(..));
            }
            HeaderStyle::Structured | HeaderStyle::Extended => match (pieces.as_slice(), fragment) {
                ([], _) => self.chunk(reply_type::NONE, 0, Position::Last),
                ([Piece::Data(_)], _) | (_, Fragment::Forbidden) => {
                    self.data_chunk(self.offset, length, Position::Last);
                    self.bytes_of(pieces.drain(..));
                }
                _ => self.chunks(pieces),
            },
        }
    }

    /// One chunk for each run of data and each run of holes.
    fn chunks(&mut self, pieces: &mut Vec<Piece>) {
        let mut offset = self.offset;
        let mut rest = pieces.as_slice();
        while let Some(first) = rest.first() {
            let is_data = matches!(first, Piece::Data(_));
            let count = rest.iter().take_while(|piece| matches!(piece, Piece::Data(_)) == is_data).count();
            let (run, later) = rest.split_at(count);
            rest = later;
            let length: u64 = run.iter().map(Piece::len).sum();
            let position = if rest.is_empty() { Position::Last } else { Position::MoreFollow };
            // A payload is at most MAX_PAYLOAD, so a run fits 32 bits.
            match u32::try_from(length) {
                Ok(length) if !is_data => {
                    self.chunk(reply_type::OFFSET_HOLE, size_of::<RawHole>() as u64, position);
                    let hole = RawHole { offset: U64::new(offset), length: U32::new(length) };
                    self.batch.head(hole.as_bytes());
                }
                _ => {
                    self.data_chunk(offset, length, position);
                    self.bytes_of(run.iter().cloned());
                }
            }
            offset += length;
        }
        pieces.clear();
    }

    /// Descriptors of one metadata context.
    pub(crate) fn block_status(&mut self, context: u32, extents: &[(u64, u32)], position: Position) {
        match self.style {
            HeaderStyle::Simple | HeaderStyle::Structured => {
                let length = size_of::<U32>() + extents.len() * size_of::<RawDescriptor>();
                self.chunk(reply_type::BLOCK_STATUS, length as u64, position);
                self.batch.head(U32::new(context).as_bytes());
                for &(length, flags) in extents {
                    // The request's length has 32 bits here, and extents are clipped to it.
                    let length = U32::new(u32::try_from(length).unwrap_or(u32::MAX));
                    self.batch.head(RawDescriptor { length, flags: U32::new(flags) }.as_bytes());
                }
            }
            HeaderStyle::Extended => {
                let length = 2 * size_of::<U32>() + extents.len() * size_of::<RawExtendedDescriptor>();
                self.chunk(reply_type::BLOCK_STATUS_EXT, length as u64, position);
                self.batch.head(U32::new(context).as_bytes());
                self.batch.head(U32::new(u32::try_from(extents.len()).unwrap_or(u32::MAX)).as_bytes());
                for &(length, flags) in extents {
                    let raw = RawExtendedDescriptor { length: U64::new(length), flags: U64::new(u64::from(flags)) };
                    self.batch.head(raw.as_bytes());
                }
            }
        }
    }

    fn bytes_of(&mut self, pieces: impl Iterator<Item = Piece>) {
        for piece in pieces {
            match piece {
                Piece::Data(bytes) => self.batch.body(bytes),
                Piece::Hole(length) => self.batch.zeroes(length),
            }
        }
    }

    fn simple(&mut self, error: u32) {
        let raw = RawSimpleReply {
            magic: U32::new(SIMPLE_REPLY_MAGIC),
            error: U32::new(error),
            cookie: U64::new(self.cookie),
        };
        self.batch.head(raw.as_bytes());
    }

    fn data_chunk(&mut self, offset: u64, length: u64, position: Position) {
        self.chunk(reply_type::OFFSET_DATA, size_of::<U64>() as u64 + length, position);
        self.batch.head(U64::new(offset).as_bytes());
    }

    fn chunk(&mut self, kind: u16, length: u64, position: Position) {
        let flags = U16::new(if position == Position::Last { REPLY_FLAG_DONE } else { 0 });
        let (kind, cookie) = (U16::new(kind), U64::new(self.cookie));
        if self.style == HeaderStyle::Extended {
            let (offset, length) = (U64::new(self.offset), U64::new(length));
            let magic = U32::new(EXTENDED_REPLY_MAGIC);
            self.batch.head(RawExtendedReply { magic, flags, kind, cookie, offset, length }.as_bytes());
        } else {
            // At most MAX_PAYLOAD and a header, or MAX_EXTENTS descriptors.
            let length = U32::new(u32::try_from(length).unwrap_or(u32::MAX));
            let magic = U32::new(STRUCTURED_REPLY_MAGIC);
            self.batch.head(RawStructuredReply { magic, flags, kind, cookie, length }.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(style: HeaderStyle, encode: impl FnOnce(&mut Reply<'_>)) -> Vec<u8> {
        let mut batch = Batch::default();
        encode(&mut Reply { batch: &mut batch, style, cookie: 0x0102_0304_0506_0708, offset: 0x1000 });
        let bytes = batch.flatten();
        assert_eq!(bytes.len(), batch.len());
        bytes
    }

    const COOKIE: &[u8] = b"\x01\x02\x03\x04\x05\x06\x07\x08";

    fn pieces() -> Vec<Piece> {
        vec![
            Piece::Data(Bytes::from_static(b"ab")),
            Piece::Data(Bytes::from_static(b"c")),
            Piece::Hole(2),
            Piece::Hole(1),
            Piece::Data(Bytes::from_static(b"d")),
        ]
    }

    #[test]
    fn simple_replies_have_the_bytes_of_the_protocol_document() {
        let done = encode(HeaderStyle::Simple, |reply| reply.done());
        assert_eq!(done, [b"\x67\x44\x66\x98\0\0\0\0", COOKIE].concat());
        let error = encode(HeaderStyle::Simple, |reply| reply.error(Errno::NoSpc, "full"));
        assert_eq!(error, [b"\x67\x44\x66\x98\0\0\0\x1c", COOKIE].concat());
        let read = encode(HeaderStyle::Simple, |reply| reply.read(&mut pieces(), 7, Fragment::Allowed));
        assert_eq!(read, [b"\x67\x44\x66\x98\0\0\0\0", COOKIE, b"abc\0\0\0d"].concat());
    }

    #[test]
    fn structured_reads_join_neighbours_and_obey_the_ban_on_fragments() {
        let head = |flags: u8, kind: u8, length: u8| {
            [b"\x66\x8e\x33\xef\0", &[flags, 0, kind][..], COOKIE, &[0, 0, 0, length]].concat()
        };
        let at = |low: u8| [0, 0, 0, 0, 0, 0, 0x10, low];
        let read = encode(HeaderStyle::Structured, |reply| reply.read(&mut pieces(), 7, Fragment::Allowed));
        let expected = [
            [&head(0, 1, 11)[..], &at(0), b"abc"].concat(),
            [&head(0, 2, 12)[..], &at(3), &[0, 0, 0, 3]].concat(),
            [&head(1, 1, 9)[..], &at(6), b"d"].concat(),
        ]
        .concat();
        assert_eq!(read, expected);
        let whole = encode(HeaderStyle::Structured, |reply| reply.read(&mut pieces(), 7, Fragment::Forbidden));
        assert_eq!(whole, [&head(1, 1, 15)[..], &at(0), b"abc\0\0\0d"].concat());
        let status = encode(HeaderStyle::Structured, |reply| reply.block_status(5, &[(9, 3)], Position::Last));
        assert_eq!(status, [&head(1, 5, 12)[..], &[0, 0, 0, 5, 0, 0, 0, 9, 0, 0, 0, 3]].concat());
    }

    #[test]
    fn extended_replies_repeat_the_offset_and_count_in_64_bits() {
        let head = |kind: u16, length: u8| {
            let kind = kind.to_be_bytes();
            [b"\x6e\x8a\x27\x8c\0\x01", &kind[..], COOKIE, &[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, length]]
                .concat()
        };
        assert_eq!(encode(HeaderStyle::Extended, |reply| reply.done()), head(0, 0));
        let error = encode(HeaderStyle::Extended, |reply| reply.error(Errno::Io, "no"));
        assert_eq!(error, [&head(0x8001, 8)[..], &[0, 0, 0, 5, 0, 2], b"no"].concat());
        let status = encode(HeaderStyle::Extended, |reply| reply.block_status(1, &[(9, 3)], Position::Last));
        let descriptor = [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 3];
        assert_eq!(status, [&head(6, 24)[..], &descriptor].concat());
    }

    #[test]
    fn a_batch_written_in_pieces_of_any_size_arrives_whole() {
        let mut batch = Batch::default();
        for cookie in 0..300 {
            let reply = &mut Reply { batch: &mut batch, style: HeaderStyle::Structured, cookie, offset: cookie };
            reply.read(&mut pieces(), 7, Fragment::Allowed);
            reply.done();
        }
        let whole = batch.flatten();
        for step in [1, 3, 16, 29, 1000] {
            let (mut cursor, mut out) = (Cursor::default(), Vec::new());
            while let Some(count) = batch.with_slices(&cursor, |slices| {
                let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(step).collect();
                out.extend_from_slice(&all);
                all.len()
            }) {
                batch.advance(&mut cursor, count);
            }
            assert_eq!(out, whole, "step {step}");
        }
    }
}
