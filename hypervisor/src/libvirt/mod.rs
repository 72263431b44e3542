//! Machines as libvirt domains.
//!
//! [`xml`] turns descriptions into descriptions and is pure. The rest, behind the feature `libvirt`, speaks with the
//! daemon: a domain is found again by its UUID, outlives us, and is never one that we did not define.

mod error;
pub mod xml;

#[cfg(feature = "libvirt")]
mod backup;
#[cfg(feature = "libvirt")]
mod connection;
#[cfg(feature = "libvirt")]
mod domains;
#[cfg(feature = "libvirt")]
mod ffi;
#[cfg(feature = "libvirt")]
mod machine;
#[cfg(feature = "libvirt")]
mod mirror;
#[cfg(feature = "libvirt")]
mod start;

pub use self::error::{LibvirtError, Reason};

#[cfg(feature = "libvirt")]
pub use self::backup::{Backup, Freeze};
#[cfg(feature = "libvirt")]
pub use self::connection::Connection;
#[cfg(feature = "libvirt")]
pub use self::domains::{Domains, FoundDomain};
#[cfg(feature = "libvirt")]
pub use self::machine::LibvirtMachine;
#[cfg(feature = "libvirt")]
pub use self::start::LibvirtHypervisor;

/// Random bytes for UUIDs and addresses.
pub fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the kernel's randomness does not fail once the system is up");
    bytes
}
