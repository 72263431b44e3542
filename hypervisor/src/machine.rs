//! The face every hypervisor driver shows to a recovery.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::broadcast;

use crate::definition::MachineDefinition;
use crate::mirror::Mirroring;
use crate::qemu::guest_agent::AgentError;
use crate::qemu::{AdoptError, StartError};

/// A future that can cross threads, boxed so that the traits stay usable as objects.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Starts machines and finds the ones it started.
pub trait Hypervisor: Send + Sync {
    /// Starts a machine and returns once its processors run. The machine outlives the caller's process.
    ///
    /// A dropped future leaves no machine behind that nobody could adopt.
    fn start<'a>(&'a self, definition: &'a MachineDefinition) -> Pending<'a, Result<Arc<dyn Machine>, StartError>>;

    /// The machine an earlier process started from this definition, or `None` when it is gone.
    fn adopt<'a>(
        &'a self,
        definition: &'a MachineDefinition,
    ) -> Pending<'a, Result<Option<Arc<dyn Machine>>, AdoptError>>;

    /// Makes what the hypervisor itself keeps of a machine (a persistent domain) agree with the definition, so that the
    /// machine's next start is by it. The machine may run.
    fn redefine<'a>(&'a self, definition: &'a MachineDefinition) -> Pending<'a, Result<(), AdoptError>>;

    /// Removes what the hypervisor itself keeps of a machine that has ended. Fine if there is nothing.
    fn forget<'a>(&'a self, definition: &'a MachineDefinition) -> Pending<'a, Result<(), AdoptError>>;
}

/// A machine that was started. Dropping the value leaves it running.
pub trait Machine: Mirroring + Send + Sync + fmt::Debug {
    /// The process that is the machine, where there is one.
    fn pid(&self) -> Option<u32>;

    /// What executes the guest, and why that, for a person.
    fn accelerator(&self) -> String;

    /// What the machine is doing.
    fn status(&self) -> Pending<'_, Result<Status, MachineError>>;

    /// Everything that happens from now on.
    fn events(&self) -> Subscription;

    /// Stops the processors; requests in flight are finished first.
    fn pause(&self) -> Pending<'_, Result<(), MachineError>>;

    /// Lets them run again; after an I/O error the failed requests are repeated.
    fn resume(&self) -> Pending<'_, Result<(), MachineError>>;

    /// Has the guest's agent run one command, and answers what it answers. The whole has `deadline`.
    fn ask_agent(&self, command: &'static str, deadline: Duration) -> Pending<'_, Result<Value, AgentError>> {
        let _ = (command, deadline);
        Box::pin(async { Err(AgentError::Absent) })
    }

    /// Presses the power button. The guest may ignore it.
    fn power_down(&self) -> Pending<'_, Result<(), MachineError>>;

    /// Ends the machine at once, by force when it has not gone after `grace`. Fine if it is gone already.
    fn quit(&self, grace: Duration) -> Pending<'_, Result<Exit, MachineError>>;

    /// Returns when the machine is gone.
    fn wait_exit(&self) -> Pending<'_, Exit>;
}

/// What a machine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// The guest runs.
    Running,
    /// Paused by a command.
    Paused,
    /// Paused because a disk request failed; see [`Machine::resume`].
    IoError,
    /// The guest has shut down.
    Shutdown,
    /// Started, but its processors were never let go.
    Prelaunch,
    /// The accelerator gave up.
    InternalError,
    /// The guest's kernel panicked and said so.
    GuestPanicked,
    /// Suspended by the guest.
    Suspended,
    /// Any other state, in the hypervisor's words.
    Other(String),
}

impl Status {
    /// From QEMU's `RunState`. An unknown word is kept, not refused.
    pub fn from_qemu(word: &str) -> Status {
        match word {
            "running" => Status::Running,
            "paused" => Status::Paused,
            "io-error" => Status::IoError,
            "shutdown" => Status::Shutdown,
            "prelaunch" => Status::Prelaunch,
            "internal-error" => Status::InternalError,
            "guest-panicked" => Status::GuestPanicked,
            "suspended" => Status::Suspended,
            other => Status::Other(other.to_owned()),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Running => "running",
            Status::Paused => "paused",
            Status::IoError => "io-error",
            Status::Shutdown => "shutdown",
            Status::Prelaunch => "prelaunch",
            Status::InternalError => "internal-error",
            Status::GuestPanicked => "guest-panicked",
            Status::Suspended => "suspended",
            Status::Other(word) => word,
        })
    }
}

/// How a machine ended, as far as it could still say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Whether the guest did it (power-off or a reboot that ends the machine).
    pub by_guest: bool,
    /// `guest-shutdown`, `host-qmp-quit`, `host-signal` and so on; `None` when it went without a word (killed, crashed).
    pub reason: Option<String>,
}

/// Something that happened to a machine.
#[derive(Debug, Clone, PartialEq)]
pub enum MachineEvent {
    /// The machine is about to end.
    Shutdown {
        /// Whether the guest asked for it.
        by_guest: bool,
        /// In QEMU's words.
        reason: String,
    },
    /// The guest rebooted.
    Reset {
        /// Whether the guest asked for it.
        by_guest: bool,
    },
    /// The processors stopped, for whatever reason.
    Stopped,
    /// They run again.
    Resumed,
    /// The power button was pressed.
    PowerButton,
    /// A disk request failed.
    IoError(IoErrorEvent),
    /// The mirror of a disk has come to another state: see [`Mirroring::mirror_state`].
    Mirror {
        /// The position in the definition.
        disk: usize,
    },
    /// The guest's kernel panicked.
    GuestPanicked,
    /// The guest agent's channel was opened or closed from inside.
    GuestAgent {
        /// Opened.
        connected: bool,
    },
    /// This subscriber was too slow and that many events are lost to it: ask for the state again.
    Missed(u64),
    /// Any other event, as QEMU sent it.
    Other {
        /// Its name.
        name: String,
        /// Its data.
        data: serde_json::Value,
    },
}

/// A failed disk request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoErrorEvent {
    /// `disk0`, `disk1`...: the position in the definition.
    pub disk: String,
    /// A write, else a read.
    pub write: bool,
    /// The export had no space left.
    pub no_space: bool,
    /// The machine was paused; otherwise the guest was told.
    pub paused: bool,
    /// In QEMU's words.
    pub reason: String,
}

/// The events of a machine, in order, from the moment of subscription.
#[derive(Debug)]
pub struct Subscription {
    receiver: broadcast::Receiver<MachineEvent>,
}

impl Subscription {
    pub(crate) fn new(receiver: broadcast::Receiver<MachineEvent>) -> Subscription {
        Subscription { receiver }
    }

    /// The next event; `None` once the machine's handle is gone. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<MachineEvent> {
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(count)) => Some(MachineEvent::Missed(count)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Why something could not be done to a running machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The machine has ended.
    #[error("machine {name} has ended")]
    Gone {
        /// Its name.
        name: String,
    },
    /// Its control socket cannot be reached although the process lives.
    #[error("cannot reach machine {name} (process {pid})")]
    Unreachable {
        /// Its name.
        name: String,
        /// Its process.
        pid: u32,
        /// Why.
        source: crate::qemu::qmp::ConnectError,
    },
    /// A command failed.
    #[error("machine {name}")]
    Command {
        /// Its name.
        name: String,
        /// Which and why.
        source: crate::qemu::qmp::CommandError,
    },
    /// libvirt did not do it.
    #[error("machine {name}")]
    Libvirt {
        /// Its name.
        name: String,
        /// Why.
        source: crate::libvirt::LibvirtError,
    },
    /// It runs on although it was killed.
    #[error("process {pid} of machine {name} does not go away")]
    Immortal {
        /// Its name.
        name: String,
        /// Its process.
        pid: u32,
    },
    /// The kernel refused a signal.
    #[error("cannot signal process {pid} of machine {name}")]
    Signal {
        /// Its name.
        name: String,
        /// Its process.
        pid: u32,
        /// Why.
        source: std::io::Error,
    },
    /// The machine did not run again in time.
    #[error("machine {name} is still {status} after {waited:?}")]
    NotRunning {
        /// Its name.
        name: String,
        /// What it is instead.
        status: Status,
        /// How long it was tried.
        waited: Duration,
    },
}

impl MachineError {
    /// Whether nobody could be asked at the moment: the machine may live.
    pub fn is_unreachable(&self) -> bool {
        match self {
            MachineError::Unreachable { .. } => true,
            MachineError::Libvirt { source, .. } => source.is_unreachable(),
            _ => false,
        }
    }
}
