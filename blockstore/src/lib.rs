//! The store of Lifeboat: a repository of deduplicated, compressed, encrypted chunks, and the durable overlay that
//! takes a running guest's writes.

pub mod base;
pub mod disk;
pub mod error;
pub mod overlay;
pub mod sim;
