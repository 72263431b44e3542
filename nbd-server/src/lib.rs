//! NBD protocol.

pub mod export;
