//! A domain as a machine.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use super::connection::Connection;
use super::error::{LibvirtError, Reason};
use super::ffi::{Fault, Happening};
use super::mirror::{self, Copies};
use crate::definition::{DiskSource, Domain as Definition, MachineDefinition};
use crate::machine::{Exit, IoErrorEvent, Machine, MachineError, MachineEvent, Pending, Status, Subscription};
use crate::qemu::guest_agent::AgentError;

/// How long a call may take that libvirt answers at once when it is well.
pub const CALL_DEADLINE: Duration = Duration::from_secs(15);
/// How long the end of a domain may take: libvirt asks, then kills.
pub(super) const DESTROY_DEADLINE: Duration = Duration::from_secs(60);
/// How often a domain is asked whether it lives, for events that were lost.
const LOOK: Duration = Duration::from_secs(1);
const EVENTS_MAX: usize = 1024;

/// A domain. Dropping it leaves the domain running.
#[derive(Debug)]
pub struct LibvirtMachine {
    name: String,
    uuid: String,
    connection: Arc<Connection>,
    pid: Option<u32>,
    kvm: bool,
    why: String,
    disks: Vec<(String, DiskSource)>,
    copies: Copies,
    events: broadcast::Sender<MachineEvent>,
    forwarding: JoinHandle<()>,
}

impl LibvirtMachine {
    /// Takes hold of a running domain.
    pub(super) fn new(
        connection: Arc<Connection>,
        machine: &MachineDefinition,
        domain: &Definition,
        kvm: bool,
        why: &str,
    ) -> LibvirtMachine {
        let (name, uuid) = (machine.name.as_str(), domain.uuid.as_str());
        let events = broadcast::channel(EVENTS_MAX).0;
        let sources = machine.disks.iter().map(|disk| disk.source.clone());
        let disks: Vec<_> = domain.targets.iter().cloned().zip(sources).collect();
        let copies = Copies::default();
        let passing = Passing { uuid: uuid.to_owned(), targets: domain.targets.clone(), copies: copies.clone() };
        let forwarding = tokio::spawn(forward(connection.events(), passing, events.clone()));
        LibvirtMachine {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            pid: connection.is_local().then(|| process_of(uuid)).flatten(),
            connection,
            kvm,
            why: why.to_owned(),
            disks,
            copies,
            events,
            forwarding,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Targets and sources of its disks, as it was started.
    pub(super) fn disks(&self) -> &[(String, DiskSource)] {
        &self.disks
    }

    pub(super) fn copies(&self) -> &Copies {
        &self.copies
    }

    /// Runs `work` on the domain.
    pub(super) async fn on_domain<T: Send + 'static>(
        &self,
        what: &'static str,
        deadline: Duration,
        work: impl FnOnce(&Domain) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, MachineError> {
        let uuid = self.uuid.clone();
        let called = self.connection.call(what, deadline, move |connect| work(&look_up(connect, &uuid)?)).await;
        called.map_err(|source| match source.reason() {
            Reason::NoDomain => MachineError::Gone { name: self.name.clone() },
            _ => MachineError::Libvirt { name: self.name.clone(), source },
        })
    }

    async fn state(&self) -> Result<Option<Status>, MachineError> {
        let state = self.on_domain("tell a domain's state", CALL_DEADLINE, |domain| Ok(domain.get_state()?)).await;
        match state {
            Ok((state, reason)) => Ok(status(state, reason)),
            Err(MachineError::Gone { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn ask(&self, command: &'static str, deadline: Duration) -> Result<Value, AgentError> {
        let line = json!({ "execute": command }).to_string();
        let seconds = i32::try_from(deadline.as_secs().max(1)).unwrap_or(i32::MAX);
        // libvirt synchronises with the agent first.
        let patience = deadline + CALL_DEADLINE;
        let asked = self
            .on_domain("ask the guest agent", patience, move |domain| Ok(domain.qemu_agent_command(&line, seconds, 0)?))
            .await;
        let answer = asked.map_err(|error| match &error {
            MachineError::Libvirt { source, .. } if source.reason() == Reason::Unsupported => AgentError::Absent,
            _ => AgentError::Machine(Box::new(error)),
        })?;
        let unexpected = || AgentError::Unexpected { command: command.to_owned() };
        let mut answer: Value = serde_json::from_str(&answer).map_err(|_| unexpected())?;
        answer.get_mut("return").map(Value::take).ok_or_else(unexpected)
    }

    async fn destroy(&self, grace: Duration) -> Result<Exit, MachineError> {
        let what = "end a domain";
        let gentle = !grace.is_zero();
        let ended = self
            .on_domain(what, DESTROY_DEADLINE, move |domain| {
                if gentle && domain.destroy_flags(sys::VIR_DOMAIN_DESTROY_GRACEFUL).is_ok() {
                    return Ok(());
                }
                Ok(domain.destroy()?)
            })
            .await;
        match ended {
            Ok(()) | Err(MachineError::Gone { .. }) => {}
            // It ended by itself meanwhile.
            Err(error) => match self.state().await? {
                None => {}
                Some(_) => return Err(error),
            },
        }
        Ok(Exit { by_guest: false, reason: Some("destroyed".to_owned()) })
    }

    async fn wait_gone(&self) -> Exit {
        let mut events = self.events.subscribe();
        loop {
            // It may have ended before anybody listened. A libvirt that cannot be reached says nothing of the domain,
            // which lives without it.
            if let Ok(None) = self.state().await {
                return Exit { by_guest: false, reason: None };
            }
            loop {
                match tokio::time::timeout(LOOK, events.recv()).await {
                    Ok(Ok(MachineEvent::Shutdown { by_guest, reason })) => {
                        return Exit { by_guest, reason: Some(reason) };
                    }
                    Ok(Ok(_)) => {}
                    Ok(Err(broadcast::error::RecvError::Closed)) => {
                        tokio::time::sleep(LOOK).await;
                        break;
                    }
                    Ok(Err(broadcast::error::RecvError::Lagged(_))) | Err(_) => break,
                }
            }
        }
    }
}

impl Drop for LibvirtMachine {
    fn drop(&mut self) {
        self.forwarding.abort();
    }
}

impl Machine for LibvirtMachine {
    fn pid(&self) -> Option<u32> {
        self.pid
    }

    fn accelerator(&self) -> String {
        let name = if self.kvm { "kvm" } else { "tcg" };
        format!("{name} ({})", self.why)
    }

    fn status(&self) -> Pending<'_, Result<Status, MachineError>> {
        Box::pin(async { self.state().await?.ok_or_else(|| MachineError::Gone { name: self.name.clone() }) })
    }

    fn events(&self) -> Subscription {
        Subscription::new(self.events.subscribe())
    }

    fn pause(&self) -> Pending<'_, Result<(), MachineError>> {
        Box::pin(self.on_domain("pause a domain", CALL_DEADLINE, |domain| Ok(domain.suspend().map(drop)?)))
    }

    fn resume(&self) -> Pending<'_, Result<(), MachineError>> {
        Box::pin(self.on_domain("let a domain go on", CALL_DEADLINE, |domain| Ok(domain.resume().map(drop)?)))
    }

    fn ask_agent(&self, command: &'static str, deadline: Duration) -> Pending<'_, Result<Value, AgentError>> {
        Box::pin(self.ask(command, deadline))
    }

    fn power_down(&self) -> Pending<'_, Result<(), MachineError>> {
        let press = |domain: &Domain| Ok(domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN).map(drop)?);
        Box::pin(self.on_domain("press a domain's power button", CALL_DEADLINE, press))
    }

    fn quit(&self, grace: Duration) -> Pending<'_, Result<Exit, MachineError>> {
        Box::pin(self.destroy(grace))
    }

    fn wait_exit(&self) -> Pending<'_, Exit> {
        Box::pin(self.wait_gone())
    }
}

/// The domain with this UUID.
pub(super) fn look_up(connect: &Connect, uuid: &str) -> Result<Domain, Fault> {
    Ok(Domain::lookup_by_uuid_string(connect, uuid)?)
}

/// What libvirt's numbers mean; `None` if the domain has ended.
fn status(state: sys::virDomainState, reason: i32) -> Option<Status> {
    let paused = |code: u32| u32::try_from(reason) == Ok(code);
    Some(match state {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => Status::Running,
        sys::VIR_DOMAIN_PAUSED if paused(sys::VIR_DOMAIN_PAUSED_IOERROR) => Status::IoError,
        sys::VIR_DOMAIN_PAUSED if paused(sys::VIR_DOMAIN_PAUSED_CRASHED) => Status::GuestPanicked,
        sys::VIR_DOMAIN_PAUSED if paused(sys::VIR_DOMAIN_PAUSED_STARTING_UP) => Status::Prelaunch,
        sys::VIR_DOMAIN_PAUSED => Status::Paused,
        sys::VIR_DOMAIN_SHUTDOWN => Status::Shutdown,
        sys::VIR_DOMAIN_CRASHED => Status::GuestPanicked,
        sys::VIR_DOMAIN_PMSUSPENDED => Status::Suspended,
        sys::VIR_DOMAIN_SHUTOFF | sys::VIR_DOMAIN_NOSTATE => return None,
        other => Status::Other(format!("state {other}")),
    })
}

/// What is passed on.
struct Passing {
    uuid: String,
    targets: Vec<String>,
    copies: Copies,
}

/// Passes on what happens to one domain.
async fn forward(
    mut happenings: broadcast::Receiver<(String, Happening)>,
    passing: Passing,
    events: broadcast::Sender<MachineEvent>,
) {
    loop {
        let event = match happenings.recv().await {
            Ok((uuid, happening)) if uuid == passing.uuid => event(happening, &passing),
            Ok(_) => None,
            Err(broadcast::error::RecvError::Lagged(count)) => Some(MachineEvent::Missed(count)),
            Err(broadcast::error::RecvError::Closed) => return,
        };
        if let Some(event) = event {
            // An error only says that nobody listens at the moment.
            drop(events.send(event));
        }
    }
}

fn event(happening: Happening, passing: &Passing) -> Option<MachineEvent> {
    Some(match happening {
        Happening::Lifecycle(event, detail) => {
            let detail = u32::try_from(detail).unwrap_or_default();
            match u32::try_from(event).unwrap_or_default() {
                sys::VIR_DOMAIN_EVENT_SUSPENDED => MachineEvent::Stopped,
                sys::VIR_DOMAIN_EVENT_RESUMED => MachineEvent::Resumed,
                sys::VIR_DOMAIN_EVENT_CRASHED => MachineEvent::GuestPanicked,
                sys::VIR_DOMAIN_EVENT_STOPPED => MachineEvent::Shutdown {
                    by_guest: detail == sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN,
                    reason: stopped(detail).to_owned(),
                },
                _ => return None,
            }
        }
        Happening::Reboot => MachineEvent::Reset { by_guest: true },
        Happening::IoError { alias, paused, reason } => {
            let no_space = reason == "enospc";
            // libvirt does not say which it was, and only a write runs out of space.
            MachineEvent::IoError(IoErrorEvent { disk: alias, write: no_space, no_space, paused, reason })
        }
        Happening::BlockJob { disk, status } => {
            let disk = passing.targets.iter().position(|target| *target == disk)?;
            mirror::note(&passing.copies, disk, status);
            MachineEvent::Mirror { disk }
        }
        Happening::Agent { connected } => MachineEvent::GuestAgent { connected },
        Happening::Copy { event, data } => {
            mirror::note_fault(&passing.copies, &passing.targets, &event, &data);
            return None;
        }
    })
}

fn stopped(detail: u32) -> &'static str {
    match detail {
        sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => "shutdown",
        sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => "destroyed",
        sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => "crashed",
        sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED => "migrated",
        sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => "saved",
        sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => "failed",
        _ => "stopped",
    }
}

/// The QEMU of a domain on this host, which libvirt starts with the domain's UUID.
fn process_of(uuid: &str) -> Option<u32> {
    let is_it = |pid: u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.any(|word| word == b"-uuid")
            && words.next().is_some_and(|word| word.eq_ignore_ascii_case(uuid.as_bytes()))
    };
    let entries = std::fs::read_dir("/proc").ok()?.flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid| is_it(*pid))
}

/// What a fault means for a domain that was looked for.
pub(super) fn gone(error: &LibvirtError) -> bool {
    error.reason() == Reason::NoDomain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paused_domain_says_why() {
        let paused = sys::VIR_DOMAIN_PAUSED;
        let reason = |code: u32| i32::try_from(code).unwrap_or_default();
        assert_eq!(status(paused, reason(sys::VIR_DOMAIN_PAUSED_IOERROR)), Some(Status::IoError));
        assert_eq!(status(paused, reason(sys::VIR_DOMAIN_PAUSED_USER)), Some(Status::Paused));
        assert_eq!(status(sys::VIR_DOMAIN_RUNNING, 1), Some(Status::Running));
        assert_eq!(status(sys::VIR_DOMAIN_SHUTOFF, 1), None);
        assert_eq!(status(99, -1), Some(Status::Other("state 99".to_owned())));
    }

    #[tokio::test]
    async fn only_what_happens_to_the_domain_itself_is_passed_on() {
        let (sender, receiver) = broadcast::channel(8);
        let events = broadcast::channel(8).0;
        let mut heard = events.subscribe();
        let passing = Passing {
            uuid: "a".to_owned(),
            targets: vec!["vda".to_owned(), "vdb".to_owned()],
            copies: Copies::default(),
        };
        let forwarding = tokio::spawn(forward(receiver, passing, events));
        for (uuid, detail) in [("b", 0), ("a", 1)] {
            sender.send((uuid.to_owned(), Happening::Lifecycle(5, detail))).expect("somebody listens");
        }
        let first = heard.recv().await.expect("it is passed on");
        assert_eq!(first, MachineEvent::Shutdown { by_guest: false, reason: "destroyed".to_owned() });
        for disk in ["vdx", "vdb"] {
            let happening = Happening::BlockJob { disk: disk.to_owned(), status: 3 };
            sender.send(("a".to_owned(), happening)).expect("somebody listens");
        }
        assert_eq!(heard.recv().await.expect("it is passed on"), MachineEvent::Mirror { disk: 1 });
        drop(sender);
        forwarding.await.expect("it ends with its source");
    }
}
