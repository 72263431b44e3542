//! Virtual machines for a recovery: started on NBD exports, watched, stopped, and found again after a restart.
//!
//! [`Hypervisor`] and [`Machine`] are the small face a recovery needs; [`qemu`] implements it with plain QEMU
//! processes, [`libvirt`] with domains. What a machine looks like is a [`MachineDefinition`], a value that can be stored beside the recovery, so
//! that a later process can adopt the machine an earlier one started.
//!
//! The crate never prints, never reads the environment and starts no process but QEMU. It refuses definitions QEMU
//! would misread (relative or over-long socket paths, names with control characters) before anything is started.
#![deny(unsafe_code)]

mod definition;
pub mod libvirt;
mod machine;
mod mirror;
pub mod qemu;
mod words;

pub use definition::{
    Accelerator, Bus, Card, DefinitionError, DiskSource, Display, Domain, ErrorPolicy, Firmware, Keep, MAX_DISKS,
    MAX_SOCKET_PATH, MachineDefinition, MachineDisk, MachineFiles, Network,
};
pub use machine::{Exit, Hypervisor, IoErrorEvent, Machine, MachineError, MachineEvent, Pending, Status, Subscription};
pub use mirror::{Cause, Copying, DiskLoad, MirrorError, MirrorProgress, MirrorState, Mirroring, Side};
pub use qemu::{AdoptError, Qemu, QemuHypervisor, StartError};

/// The message types of the QEMU machine protocol and of the guest agent, for callers of
/// [`qemu::qmp::Client::execute`] and [`qemu::guest_agent::GuestAgent::execute`].
pub use qapi;
