//! The handshake phase, server side: fixed newstyle negotiation, from the greeting to the export a client gets.
//!
//! Refuses: clients that do not speak newstyle, options too large to drain, and more options than any client sends;
//! these close the connection. Everything else a client may get wrong is answered with an error and haggling goes on.

mod options;
mod server;

pub(crate) use server::negotiate;

use std::sync::Arc;

use crate::control::Membership;
use crate::table::Published;
use crate::transmission::{ContextSet, HeaderStyle};

/// What a handshake led to.
pub(crate) struct Negotiated {
    pub(crate) published: Arc<Published>,
    pub(crate) style: HeaderStyle,
    pub(crate) contexts: Vec<Context>,
}

impl Negotiated {
    /// The contexts by their numbers.
    pub(crate) fn context_set(&self) -> ContextSet {
        let ids = self.contexts.iter().map(|context| context.id);
        ids.fold(ContextSet::NONE, |set, id| set.with(id).unwrap_or(set))
    }
}

/// The outcome of a handshake that reached transmission.
pub(crate) struct Outcome {
    pub(crate) negotiated: Negotiated,
    /// Keeps the export's removal waiting while operations run.
    pub(crate) membership: Membership,
}

/// A metadata context a client has selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Context {
    /// The number replies use.
    pub(crate) id: u32,
    pub(crate) source: ContextSource,
}

/// Who answers for a context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ContextSource {
    /// `base:allocation`.
    BaseAllocation,
    /// One of the export's own.
    Own(String),
}
