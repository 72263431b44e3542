//! [`Limits`]: how much a server gives to its clients, each number with its reason.

use std::time::Duration;

/// Largest payload of a read or write: what QEMU and libnbd assume when nothing is negotiated.
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// Largest data of an option that is looked at: a name and a few dozen context queries. What is longer is drained
/// and refused.
pub const MAX_OPTION: u32 = 64 << 10;

/// Largest data of an option that is drained: beyond it the client is not speaking NBD and is disconnected.
pub const MAX_OPTION_DRAINED: u32 = 1 << 20;

/// Options one handshake may send: a client needs about six, a scripted one a few dozen.
pub const MAX_OPTIONS: u32 = 1024;

/// Metadata contexts one connection may select; each costs a query per block status.
pub const MAX_CONTEXTS: usize = 16;

/// Descriptors in one block-status chunk: a reply stays below 64 KiB (128 KiB with extended headers).
pub const MAX_EXTENTS: usize = 8000;

/// Bounds of a server. The defaults suit a host with some dozens of machines.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once, so that a leak in a client cannot use up file descriptors. One more takes the place of the
    /// oldest that is still in its handshake, or is closed at once.
    pub connections: usize,
    /// Requests in flight on one connection. QEMU keeps 16, libnbd 64; beyond, the socket is the queue.
    pub requests_per_connection: usize,
    /// Payload in flight on one connection, in bytes: replies not yet taken by the client count. At least one
    /// request of [`MAX_PAYLOAD`] always fits.
    pub bytes_per_connection: usize,
    /// Payload in flight over all connections, in bytes, at least [`MAX_PAYLOAD`]. An export gets no more of it than it
    /// leaves to others, so one alone has half.
    pub bytes: usize,
    /// Export operations that block at the same time, over all connections: threads. An export gets no more of them
    /// than it leaves to others, so one alone has half.
    pub operations: usize,
    /// From accept to the first request: a half-open handshake must not hold a place.
    pub handshake: Duration,
    /// How long a client may leave its replies lying while others wait for memory before it is disconnected.
    pub stall: Duration,
    /// How long the end of a server or of an export waits for a client to take its last replies.
    pub goodbye: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 2048,
            requests_per_connection: 128,
            bytes_per_connection: 64 << 20,
            bytes: 512 << 20,
            operations: 128,
            handshake: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            goodbye: Duration::from_secs(5),
        }
    }
}
