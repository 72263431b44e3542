//! Recoveries: running uses of a recovery point. [`state`] is the pure core, [`journal`] its durable record,
//! `one` drives a single recovery, [`manager`] knows them all.

mod broken;
mod commit;
mod cutover;
pub mod domain;
pub mod firmware;
mod machine;
pub mod manager;
mod mirroring;
mod moving;
mod one;
mod quiet;
mod record;
mod remote;
mod schedule;
mod serving;
pub mod state;
mod streaming;
mod view;
mod vm;
mod watch;

use hypervisor::Keep;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::admission::Ask;
use crate::hardware::Hardware;
use crate::journal;
use crate::rehydrate::Mode;
use crate::statistics::Served;

pub use commit::{Commit, CommitRequest, Unchanged, Wish};
pub(crate) use machine::{
    check as check_machine, define as define_machine, files as machine_files, keep_variables,
    sockets as machine_sockets,
};
pub use manager::Recoveries;
pub use moving::Order;
pub use one::Context;
pub use remote::ServeOn;
pub use schedule::{CommitsView, Schedule, ScheduleRequest};
pub use state::State;

/// What to run a recovery point on: `qemu`, `libvirt:URI` or `none`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum HypervisorKind {
    /// A QEMU of our own.
    Qemu,
    /// A domain of the libvirt at this URI.
    Libvirt(String),
    /// Nothing: the exports are all that is asked for.
    None,
}

/// What to recover, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RecoverRequest {
    /// The recovery point, as [`crate::catalog::spec`] takes it.
    pub point: String,
    /// The recovery's name; the machine's when not given.
    #[serde(default)]
    pub name: Option<String>,
    /// What to run it on.
    pub on: HypervisorKind,
    /// `none`, `user`, `isolated` or `bridge:NAME`.
    pub network: String,
    /// `auto`, `kvm` or `tcg`.
    pub accel: String,
    /// Where the screen is shown: `none`, `vnc` (a Unix socket) or `vnc:PORT` (on loopback).
    #[serde(default = "no_display")]
    pub display: String,
    /// The network card's address: `keep` takes the machine's, else a new one is made from the recovery's name.
    #[serde(default)]
    pub mac: Option<String>,
    /// How often it is to be committed, from the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commits: Option<Schedule>,
    /// What the machine is made of, where it is not what the recovery point says. A recovery that exists has it all.
    #[serde(flatten)]
    pub hardware: Hardware,
    /// Of a libvirt domain: whether its definition stays when it ends.
    #[serde(default)]
    #[schemars(schema_with = "keeps")]
    pub keep: Keep,
    /// Of a libvirt domain: whether it is told from the original.
    #[serde(default)]
    pub identity: Identity,
    /// Where the disks of a domain on another host are served to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serve_on: Option<ServeOn>,
    /// The user that libvirt's QEMU runs as, if other than ours; found out when the recovery begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runs_as: Option<u32>,
}

/// Whether a recovered domain is told from the original.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Identity {
    /// It gets a new UUID, and its network cards new addresses.
    #[default]
    Fresh,
    /// It has the original's, beside which it then cannot run.
    Keep,
}

fn no_display() -> String {
    "none".to_owned()
}

impl RecoverRequest {
    /// What its VM takes of the host.
    pub fn ask(&self) -> Ask {
        match (&self.on, &self.serve_on) {
            (HypervisorKind::Qemu | HypervisorKind::Libvirt(_), None) => {
                Ask { memory: self.hardware.memory(), cpus: self.hardware.cpus() }
            }
            (HypervisorKind::None, _) | (_, Some(_)) => Ask { memory: 0, cpus: 0 },
        }
    }
}

/// A recovery as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RecoveryView {
    /// Its name.
    pub name: String,
    /// The recovery point it runs from.
    pub point: String,
    /// The machine that the point is of.
    pub machine: String,
    /// Where it stands.
    pub state: state::State,
    /// Why it failed, if it did.
    pub problem: Option<String>,
    /// `qemu`, `libvirt:URI` or `none`.
    pub hypervisor: HypervisorKind,
    /// The libvirt domain that the VM is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<DomainView>,
    /// `kvm` or `tcg`, and why if it was chosen.
    pub accelerator: Option<String>,
    /// What the VM does: `running`, `paused`, `io-error`, `shut-off`, ...; absent without a VM.
    pub vm: Option<String>,
    /// QEMU's process id while it lives.
    pub pid: Option<u32>,
    /// The serial console's file.
    pub console: Option<String>,
    /// The QMP socket.
    pub qmp: Option<String>,
    /// The guest agent's socket.
    pub guest_agent: Option<String>,
    /// Where the screen is shown: `vnc+unix:///PATH` or `vnc://127.0.0.1:PORT`.
    #[serde(default)]
    pub display: Option<String>,
    /// Its disks.
    pub disks: Vec<DiskView>,
    /// How the move to production storage stands, while there is one.
    #[serde(default)]
    pub rehydration: Option<RehydrationView>,
    /// Its commits, if there were any or are to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commits: Option<CommitsView>,
    /// The commands that make sense now.
    #[serde(default)]
    pub next: Vec<String>,
    /// How long things took.
    pub timings: Timings,
    /// What was odd about the host when the VM was started, in the answer to that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A recovery's libvirt domain as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DomainView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// `transient` or `persistent`.
    #[schemars(schema_with = "keeps")]
    pub keep: Keep,
}

/// A rehydration as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RehydrationView {
    /// `mirror` or `stream`.
    pub mode: Mode,
    /// `copying`, `comparing`, `ready`, `retrying` or `held`.
    pub phase: String,
    /// Bytes a second at most.
    pub limit: Option<u64>,
    /// Bytes copied a second.
    pub rate: u64,
    /// Bytes still to copy.
    pub left: u64,
    /// Seconds until everything is copied, if the rate stays.
    pub seconds_left: Option<u64>,
    /// Bytes the guest changes a second.
    pub dirty_rate: u64,
    /// Mean time of the guest's requests, in microseconds.
    pub latency_us: Option<u64>,
}

/// A recovery's disk as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskView {
    /// As given at backup.
    pub name: String,
    /// Where it is served, while it is.
    pub nbd_uri: Option<String>,
    /// In bytes.
    pub size: u64,
    /// Bytes that are on production storage already.
    pub hydrated: u64,
    /// The production storage it moves to.
    pub target: Option<String>,
    /// Bytes that the guest has written and the overlay holds.
    pub overlay: u64,
    /// Bytes that the overlay's file system has left, where the overlay is open.
    #[serde(default)]
    pub free: Option<u64>,
    /// Whether that is little, and less than the guest could still write.
    #[serde(default)]
    pub space_short: bool,
    /// What NBD clients have asked for since this process serves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served: Option<Served>,
}

/// Milliseconds since the recovery was asked for; absent while it has not happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// Until the exports served.
    pub export_ms: Option<u64>,
    /// Until QEMU ran.
    pub started_ms: Option<u64>,
    /// Until the first read of a disk.
    pub first_read_ms: Option<u64>,
    /// Until the first byte on the serial console.
    pub first_console_ms: Option<u64>,
    /// How long the guest's disks were held by the cutover.
    #[serde(default)]
    pub cutover_pause_ms: Option<u64>,
}

fn keeps(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "enum": [Keep::Transient, Keep::Persistent, Keep::Production] })
}
