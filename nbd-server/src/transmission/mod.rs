//! The transmission phase of one connection.
//!
//! ```text
//! socket -> input -> Header::check -> resident read? -> local batch --\
//!                          |                                          +-> outbox -> socket
//!                          \-> dispatcher: Export call -> reply ------/
//! ```
//! One task per connection reads and parses. All requests found in one read of the socket are looked at together:
//! reads the export can answer from memory are answered here and leave in one vectored write; everything else goes to
//! the dispatcher's threads, which answer by themselves and out of order. What a client may have in flight is bounded in
//! number and bytes, and replies it has not taken count: a client that does not read is not read from.

mod connection;
mod execute;
mod outbox;
mod reply;
mod request;
mod shared;
mod stall;

pub(crate) use connection::run;
pub(crate) use request::ContextSet;
pub use request::HeaderStyle;
pub(crate) use shared::{Connection, Shared};
