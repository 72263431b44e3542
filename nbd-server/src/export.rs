//! What a server serves: [`Export`], implemented by whoever owns the bytes.
//!
//! All methods but [`Export::read_resident`] and [`Export::write_resident`] may block; the server calls them on its blocking threads, several at
//! once and in no order, and has checked before that the range lies inside the export and that a read-only export
//! is not written to.

use bytes::Bytes;

/// A part of a read's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes as they are.
    Data(Bytes),
    /// This many zero bytes that take no space.
    Hole(u64),
}

impl Piece {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Piece::Data(bytes) => bytes.len() as u64,
            Piece::Hole(len) => *len,
        }
    }

    /// Whether the piece covers nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a range holds, for block status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub length: u64,
    /// Whether it takes space and what it reads as.
    pub kind: ExtentKind,
}

/// `base:allocation` states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated data.
    Data,
    /// A hole that reads as zeroes.
    Hole,
    /// Allocated, and known to read as zeroes.
    AllocatedZero,
}

/// What a range holds in a metadata context of the export's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextExtent {
    /// Length in bytes, never 0.
    pub length: u64,
    /// What the context says of it; only the context's author knows the meaning.
    pub flags: u32,
}

/// How zeroes may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroMode {
    /// Space may be given back.
    MayPunch,
    /// The range must stay, or become, allocated (`NBD_CMD_FLAG_NO_HOLE`).
    KeepAllocated,
}

/// Block size constraints in bytes, each a power of two (the maximum: a multiple of the minimum).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Requests must be aligned to it; 1 when any request is served.
    pub minimum: u32,
    /// Requests of this size and alignment are the cheapest.
    pub preferred: u32,
    /// Largest payload of one request.
    pub maximum: u32,
}

/// Why an operation failed, as the NBD protocol can say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// The backing storage failed, or what it holds is damaged.
    #[error("input/output error")]
    Io,
    /// The backing storage is full.
    #[error("no space left")]
    NoSpace,
    /// The export does not allow writing.
    #[error("the export is read-only")]
    ReadOnly,
    /// The request makes no sense for this export.
    #[error("invalid request")]
    Invalid,
    /// The operation is not offered.
    #[error("not supported")]
    NotSupported,
    /// The export is going away.
    #[error("the export is shutting down")]
    ShuttingDown,
}

/// A disk served over NBD.
pub trait Export: Send + Sync + 'static {
    /// Size in bytes; never changes.
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// One line for a person; may be empty.
    fn description(&self) -> String;

    /// Block size constraints.
    fn block_size(&self) -> BlockSize;

    /// Answers a read from memory if that takes neither I/O nor waiting: appends pieces that cover exactly
    /// `length` bytes to `pieces` and returns true, or leaves `pieces` as it was and returns false.
    fn read_resident(&self, offset: u64, length: u32, pieces: &mut Vec<Piece>) -> bool {
        let _ = (offset, length, pieces);
        false
    }

    /// Appends pieces that cover exactly `length` bytes from `offset`, in order.
    fn read(&self, offset: u64, length: u32, pieces: &mut Vec<Piece>) -> Result<(), ExportError>;

    /// Writes `data` at `offset`. Durable after the next [`Export::flush`] that starts after this returned.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ExportError>;

    /// [`Export::write`] if that takes no longer than a copy into memory (the host's page cache is memory enough):
    /// waits for no device and no other request. `None` if not: nothing is written, and the server calls
    /// [`Export::write`] instead.
    fn write_resident(&self, offset: u64, data: &[u8]) -> Option<Result<(), ExportError>> {
        let _ = (offset, data);
        None
    }

    /// Makes `length` bytes at `offset` read as zeroes.
    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), ExportError>;

    /// The client no longer needs these bytes; they may read as anything afterwards (Lifeboat: zeroes).
    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError>;

    /// Returns once every write that returned before this call is durable.
    fn flush(&self) -> Result<(), ExportError>;

    /// Brings a range into the cache.
    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError>;

    /// Whether [`Export::write_zeroes`] never takes longer than writing the same bytes would; the server then offers
    /// `NBD_CMD_FLAG_FAST_ZERO`, which clients use to zero a whole disk before copying.
    fn fast_zeroes(&self) -> bool {
        false
    }

    /// What the range holds: consecutive extents from `offset`, at most `limit` of them, together covering at
    /// least one byte and not more than `length`.
    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError>;

    /// Names of metadata contexts this export offers besides `base:allocation`, as `namespace:leaf`; asked once, when
    /// the export is added to a table.
    fn contexts(&self) -> Vec<String> {
        Vec::new()
    }

    /// What one of [`Export::contexts`] says of the range, under the rules of [`Export::extents`].
    fn context_extents(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<ContextExtent>, ExportError> {
        let _ = (context, offset, length, limit);
        Err(ExportError::NotSupported)
    }
}
