//! Packs: built by [`builder`], read frame by frame by [`fetch`], many frames at once by [`bulk`]. Specification: docs/format/pack.md

pub(crate) mod buffer;
pub(crate) mod builder;
pub(crate) mod bulk;
pub(crate) mod damaged;
pub(crate) mod fetch;
pub(crate) mod verified;
