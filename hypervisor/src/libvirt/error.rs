//! Why libvirt did not do it.

use std::time::Duration;

use super::xml::XmlError;

/// What libvirt's own error says, as far as callers tell errors apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// There is no such domain.
    NoDomain,
    /// Name or UUID is taken.
    Exists,
    /// Not possible in the domain's state: it does not run, or runs already.
    State,
    /// This libvirt or QEMU cannot do it.
    Unsupported,
    /// The guest agent is missing or does not answer.
    NoAgent,
    /// The connection broke meanwhile.
    Connection,
    /// Anything else.
    Other,
}

/// Why libvirt did not do it.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// Not a URI that libvirt could know.
    #[error("`{uri}` is not a libvirt URI such as qemu:///system or qemu+ssh://host/system")]
    Uri {
        /// As given.
        uri: String,
    },
    /// No connection.
    #[error("cannot connect to libvirt at {uri}: {message}")]
    Connect {
        /// Where.
        uri: String,
        /// In libvirt's words.
        message: String,
    },
    /// It does not answer.
    #[error("libvirt at {uri} did not {what} within {waited:?}")]
    Silent {
        /// Where.
        uri: String,
        /// What was asked.
        what: &'static str,
        /// The deadline.
        waited: Duration,
    },
    /// Too many calls hang already.
    #[error("libvirt at {uri} hangs: {calls} calls wait for it")]
    Busy {
        /// Where.
        uri: String,
        /// How many.
        calls: usize,
    },
    /// It said no.
    #[error("libvirt could not {what}: {message}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// What kind of no.
        reason: Reason,
        /// In libvirt's words.
        message: String,
    },
    /// There is no such domain.
    #[error("there is no domain {domain} at {uri}")]
    NoDomain {
        /// Its name.
        domain: String,
        /// Where.
        uri: String,
    },
    /// The name belongs to another.
    #[error("there is a domain {domain} at {uri} already")]
    NameTaken {
        /// The name.
        domain: String,
        /// Where.
        uri: String,
    },
    /// The UUID belongs to a domain that is not of this recovery.
    #[error("domain {domain}, which has the UUID {uuid} too, is not of this recovery")]
    NotOurs {
        /// The UUID.
        uuid: String,
        /// The domain.
        domain: String,
    },
    /// A description that cannot be used.
    #[error("cannot use the description of domain {domain}")]
    Xml {
        /// The domain.
        domain: String,
        /// Why.
        source: XmlError,
    },
    /// A copy or backup job failed.
    #[error("libvirt's job on disk {disk} of domain {domain} {outcome}")]
    Job {
        /// The domain.
        domain: String,
        /// The disk's target.
        disk: String,
        /// How it ended.
        outcome: String,
    },
    /// A definition without a domain.
    #[error("machine {name} is no libvirt domain")]
    NoDefinition {
        /// The machine.
        name: String,
    },
}

impl LibvirtError {
    /// Whether libvirt could not be asked at the moment.
    pub fn is_unreachable(&self) -> bool {
        match self {
            LibvirtError::Connect { .. } | LibvirtError::Silent { .. } | LibvirtError::Busy { .. } => true,
            other => other.reason() == Reason::Connection,
        }
    }

    /// What kind of refusal it is.
    pub fn reason(&self) -> Reason {
        match self {
            LibvirtError::Refused { reason, .. } => *reason,
            LibvirtError::NoDomain { .. } => Reason::NoDomain,
            LibvirtError::NameTaken { .. } | LibvirtError::NotOurs { .. } => Reason::Exists,
            _ => Reason::Other,
        }
    }
}
