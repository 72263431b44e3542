//! Packs: built by [`builder`], read frame by frame by [`fetch`]. Specification: docs/format/pack.md

pub(crate) mod buffer;
pub(crate) mod builder;
pub(crate) mod damaged;
pub(crate) mod fetch;
