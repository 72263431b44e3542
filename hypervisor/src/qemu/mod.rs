//! Machines as plain QEMU processes, driven through QMP.
//!
//! A machine is detached: it outlives the process that started it and is found again by its control socket
//! ([`Qemu::adopt`]). Its process is held by pidfd, so a recycled process id is never signalled. Every command has a
//! deadline; a broken control connection is opened again by the next command.

pub mod command_line;
pub mod firmware;
pub mod guest_agent;
mod mirror;
pub mod probe;
mod process;
pub mod qmp;
mod start;

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::sync::{Mutex, broadcast};
use tracing::{debug, info, warn};

use self::guest_agent::{AgentError, GuestAgent};
use self::mirror::Faults;
use self::probe::Acceleration;
use self::process::Process;
use self::qmp::{Client, CommandError, Occurrence};
pub use self::start::{START_DEADLINE, StartError};
use crate::definition::{DefinitionError, MachineDefinition};
use crate::machine::{
    Exit, Hypervisor, IoErrorEvent, Machine, MachineError, MachineEvent, Pending, Status, Subscription,
};

/// The program when a definition names none.
pub const DEFAULT_BINARY: &str = "qemu-system-x86_64";
/// How long a command may take that QEMU answers at once when it is well.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// How long the kernel may take to bury a killed process with much memory.
const KILL_DEADLINE: Duration = Duration::from_secs(30);
/// How long the last words of a machine may take from its socket to us.
const LAST_WORDS: Duration = Duration::from_secs(1);
const EVENTS_MAX: usize = 1024;
/// A resumed machine counts as running when it still does after this: a failing request pauses it within.
const SETTLE: Duration = Duration::from_millis(300);

/// A running QEMU. Dropping it leaves the machine running.
#[derive(Debug)]
pub struct Qemu {
    definition: MachineDefinition,
    process: Process,
    control: Mutex<Arc<Client>>,
    events: broadcast::Sender<MachineEvent>,
    faults: Faults,
    acceleration: Acceleration,
    /// An attached machine's process, which ends with this.
    child: Option<tokio::process::Child>,
}

/// Why a machine could not be found again.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The definition cannot be right.
    #[error("machine {name} cannot be adopted")]
    Definition {
        /// The machine.
        name: String,
        /// What is wrong.
        source: DefinitionError,
    },
    /// Its process lives, but its control socket is dead or held by another Lifeboat.
    #[error("machine {name} lives as process {pid} but cannot be reached")]
    Unreachable {
        /// The machine.
        name: String,
        /// Its process.
        pid: u32,
        /// Why.
        source: Box<MachineError>,
    },
    /// The socket belongs to something else.
    #[error("the control socket of machine {name} belongs to machine {found:?}, process {pid}")]
    OtherMachine {
        /// The machine asked for.
        name: String,
        /// The machine found.
        found: String,
        /// Its process.
        pid: u32,
    },
    /// libvirt did not do it.
    #[error("domain {name} cannot be found again")]
    Libvirt {
        /// The machine.
        name: String,
        /// Why.
        source: crate::libvirt::LibvirtError,
    },
    /// A file of the machine.
    #[error("machine {name}: cannot read {}", path.display())]
    Io {
        /// The machine.
        name: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Qemu {
    /// Starts a machine and returns once its processors run; the machine outlives this process.
    pub async fn start(definition: &MachineDefinition) -> Result<Qemu, StartError> {
        start::start(definition).await
    }

    /// Starts a machine that is thrown away: a child of ours, which ends when the value is dropped. `wrapper` is a command
    /// that replaces itself with the one that follows it, such as `nice -n 10` or `setpriv --pdeathsig KILL`; the latter
    /// ends the machine with the thread that polls this.
    pub async fn start_attached(definition: &MachineDefinition, wrapper: &[OsString]) -> Result<Qemu, StartError> {
        start::start_attached(definition, wrapper).await
    }

    /// Takes hold of the machine an earlier process started; `None` when it is gone.
    pub async fn adopt(definition: &MachineDefinition) -> Result<Option<Qemu>, AdoptError> {
        Qemu::adopt_with(definition, None).await
    }

    async fn adopt_with(
        definition: &MachineDefinition,
        acceleration: Option<Acceleration>,
    ) -> Result<Option<Qemu>, AdoptError> {
        let name = || definition.name.clone();
        definition.check().map_err(|source| AdoptError::Definition { name: name(), source })?;
        let control = definition.files.control();
        let client = match Client::connect(&control, COMMAND_DEADLINE).await {
            Ok(client) => client,
            Err(source) => {
                return match process_by_pid_file(definition)? {
                    Some(process) => {
                        let pid = process.pid();
                        let source = Box::new(MachineError::Unreachable { name: name(), pid, source });
                        Err(AdoptError::Unreachable { name: name(), pid, source })
                    }
                    None => Ok(None),
                };
            }
        };
        let opened = client.peer_pid().map_or(Ok(None), Process::open);
        let opened = opened.map_err(|source| AdoptError::Io { name: name(), path: "/proc".into(), source })?;
        let Some(process) = opened else { return Ok(None) };
        let pid = process.pid();
        let ask = async |command| client.call(command, Value::Null, COMMAND_DEADLINE).await;
        let (found, kvm) = match (ask("query-name").await, ask("query-kvm").await) {
            (Ok(found), Ok(kvm)) => (found, kvm),
            (Err(_), _) | (_, Err(_)) if !process.is_alive() => return Ok(None),
            (Err(source), _) | (_, Err(source)) => {
                let source = Box::new(MachineError::Command { name: name(), source });
                return Err(AdoptError::Unreachable { name: name(), pid, source });
            }
        };
        let found = found.get("name").and_then(Value::as_str).unwrap_or_default();
        if found != definition.name {
            return Err(AdoptError::OtherMachine { name: name(), found: found.to_owned(), pid });
        }
        let acceleration = acceleration.unwrap_or_else(|| Acceleration {
            kvm: kvm.get("enabled").and_then(Value::as_bool).unwrap_or(false),
            reason: "chosen when the machine was started".to_owned(),
        });
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let client = Arc::new(client);
        let faults = Faults::default();
        forward(&client, events.clone(), faults.clone());
        let (definition, control) = (definition.clone(), Mutex::new(client));
        Ok(Some(Qemu { definition, process, control, events, faults, acceleration, child: None }))
    }

    /// The definition it was started from.
    pub fn definition(&self) -> &MachineDefinition {
        &self.definition
    }

    /// What executes the guest, and why that.
    pub fn acceleration(&self) -> &Acceleration {
        &self.acceleration
    }

    /// Its process id. Signals go through [`Qemu::quit`], which holds the process itself.
    pub fn process_id(&self) -> u32 {
        self.process.pid()
    }

    /// What the machine is doing.
    pub async fn status(&self) -> Result<Status, MachineError> {
        let answer = self.call("query-status", Value::Null).await?;
        Ok(Status::from_qemu(answer.get("status").and_then(Value::as_str).unwrap_or("unknown")))
    }

    /// Everything that happens from now on.
    pub fn events(&self) -> Subscription {
        Subscription::new(self.events.subscribe())
    }

    /// Stops the processors. Waits for requests in flight, so it can time out while an export is away.
    pub async fn pause(&self) -> Result<(), MachineError> {
        self.call("stop", Value::Null).await.map(drop)
    }

    /// Lets them run again; requests that failed are repeated.
    pub async fn resume(&self) -> Result<(), MachineError> {
        self.call("cont", Value::Null).await.map(drop)
    }

    /// Resumes again and again until the machine keeps running: after an export was away longer than its patience,
    /// QEMU looks for it only every 16 seconds, and a machine resumed in between pauses once more.
    pub async fn resume_until_running(&self, limit: Duration) -> Result<(), MachineError> {
        let began = Instant::now();
        loop {
            self.resume().await?;
            tokio::time::sleep(SETTLE).await;
            let status = self.status().await?;
            match status {
                Status::Running => return Ok(()),
                status if began.elapsed() >= limit => {
                    return Err(MachineError::NotRunning { name: self.definition.name.clone(), status, waited: limit });
                }
                _ => tokio::time::sleep(SETTLE).await,
            }
        }
    }

    /// Presses the power button. The guest may ignore it.
    pub async fn power_down(&self) -> Result<(), MachineError> {
        self.call("system_powerdown", Value::Null).await.map(drop)
    }

    /// Ends the machine: asks QEMU (by signal where its socket is dead), and kills it when it has not gone after
    /// `grace`. Without data loss for what the guest had flushed, as with a power cut.
    pub async fn quit(&self, grace: Duration) -> Result<Exit, MachineError> {
        let (name, pid) = (self.definition.name.clone(), self.process.pid());
        let signal = |signal| {
            self.process.signal(signal).map_err(|source| MachineError::Signal { name: name.clone(), pid, source })
        };
        if self.process.is_alive() && !grace.is_zero() {
            let asked = tokio::time::timeout(grace.min(COMMAND_DEADLINE), self.call("quit", Value::Null)).await;
            match asked {
                Ok(Ok(_) | Err(MachineError::Gone { .. })) => {}
                Ok(Err(error)) => {
                    debug!(machine = name, %error, "asking by signal");
                    signal(Signal::TERM)?;
                }
                Err(_) => signal(Signal::TERM)?,
            }
            if tokio::time::timeout(grace, self.process.wait()).await.is_ok() {
                return Ok(self.exit().await);
            }
        }
        if self.process.is_alive() {
            warn!(machine = name, pid, "killing the machine, it did not end by itself");
            signal(Signal::KILL)?;
            if tokio::time::timeout(KILL_DEADLINE, self.process.wait()).await.is_err() {
                return Err(MachineError::Immortal { name, pid });
            }
        }
        Ok(self.exit().await)
    }

    /// Returns when the machine is gone.
    pub async fn wait_exit(&self) -> Exit {
        self.process.wait().await;
        self.exit().await
    }

    /// Runs a typed QMP command; see [`Qemu::call`].
    pub async fn execute<C: qapi::Command>(&self, command: &C, deadline: Duration) -> Result<C::Ok, MachineError> {
        let client = self.client().await?;
        match client.execute(command, deadline).await {
            Ok(answer) => Ok(answer),
            Err(source) => Err(self.failed(source).await),
        }
    }

    /// Runs any QMP command within [`COMMAND_DEADLINE`], over a new connection if the old one broke.
    pub async fn call(&self, command: &str, arguments: Value) -> Result<Value, MachineError> {
        let client = self.client().await?;
        match client.call(command, arguments, COMMAND_DEADLINE).await {
            Ok(answer) => Ok(answer),
            Err(source) => Err(self.failed(source).await),
        }
    }

    /// Writes what the guest's screen shows to a PNG file, which must have an absolute path.
    pub async fn screenshot(&self, path: &Path) -> Result<(), MachineError> {
        self.call("screendump", json!({ "filename": path, "format": "png" })).await.map(drop)
    }

    /// Writes the pixels of what the guest's screen shows to a PPM file, which must have an absolute path.
    pub async fn screen_pixels(&self, path: &Path) -> Result<(), MachineError> {
        self.call("screendump", json!({ "filename": path, "format": "ppm" })).await.map(drop)
    }

    /// Whether the guest has accepted a connection through the port that [`Qemu::forward_port`] returned. That the
    /// connection could be made says nothing: QEMU answers before it has asked the guest.
    pub async fn has_accepted(&self, port: u16) -> Result<bool, MachineError> {
        let answer = self.call("human-monitor-command", json!({ "command-line": "info usernet" })).await?;
        Ok(accepted(answer.as_str().unwrap_or_default(), port))
    }

    /// Forwards a free port of the loopback interface to a port of the guest, which needs the network `User` or
    /// `Isolated`. Returns the port on this side.
    pub async fn forward_port(&self, guest_port: u16) -> Result<u16, MachineError> {
        let mut refusal = String::new();
        // Between finding a free port and QEMU taking it somebody else may; then another one is tried.
        for _ in 0..5 {
            let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
            let port = match free {
                Ok(address) => address.port(),
                Err(error) => {
                    refusal = format!("no free port: {error}");
                    continue;
                }
            };
            let line = format!("hostfwd_add net0 tcp:127.0.0.1:{port}-:{guest_port}");
            let answer = self.call("human-monitor-command", json!({ "command-line": line })).await?;
            refusal = answer.as_str().unwrap_or_default().trim().to_owned();
            if refusal.is_empty() {
                return Ok(port);
            }
        }
        let source = CommandError::Refused {
            command: "hostfwd_add".to_owned(),
            class: "GenericError".to_owned(),
            message: refusal,
        };
        Err(MachineError::Command { name: self.definition.name.clone(), source })
    }

    /// The live control connection, opened again if it broke.
    async fn client(&self) -> Result<Arc<Client>, MachineError> {
        let mut control = self.control.lock().await;
        let name = || self.definition.name.clone();
        if !control.is_closed() {
            return Ok(Arc::clone(&control));
        }
        if !self.process.is_alive() {
            return Err(MachineError::Gone { name: name() });
        }
        let client = match Client::connect(&self.definition.files.control(), COMMAND_DEADLINE).await {
            Ok(client) => client,
            Err(_) if !self.process.is_alive() => return Err(MachineError::Gone { name: name() }),
            Err(source) => return Err(MachineError::Unreachable { name: name(), pid: self.process.pid(), source }),
        };
        if client.peer_pid().and_then(|pid| u32::try_from(pid).ok()) != Some(self.process.pid()) {
            // Our machine is gone and another one has its place.
            return Err(MachineError::Gone { name: name() });
        }
        info!(machine = self.definition.name, "control connection opened again");
        let client = Arc::new(client);
        forward(&client, self.events.clone(), self.faults.clone());
        *control = Arc::clone(&client);
        Ok(client)
    }

    async fn failed(&self, source: CommandError) -> MachineError {
        let name = self.definition.name.clone();
        // A socket closes a little before its process is gone.
        let closed = matches!(source, CommandError::Closed { .. });
        if closed && tokio::time::timeout(LAST_WORDS, self.process.wait()).await.is_ok() {
            return MachineError::Gone { name };
        }
        MachineError::Command { name, source }
    }

    async fn exit(&self) -> Exit {
        let client = Arc::clone(&*self.control.lock().await);
        // What QEMU said last may still be on its way; the connection ends after it.
        drop(tokio::time::timeout(LAST_WORDS, client.closed()).await);
        match client.shutdown_notice() {
            Some((by_guest, reason)) => Exit { by_guest, reason: Some(reason) },
            None => Exit { by_guest: false, reason: None },
        }
    }
}

/// Whether a table of connections, as `info usernet` gives it, has an open one through this port of the host:
/// `TCP[ESTABLISHED] 20 127.0.0.1 40123 10.0.2.15 22 0 0`. The guest may have closed its side already.
fn accepted(table: &str, port: u16) -> bool {
    table.lines().any(|line| {
        let mut words = line.split_whitespace();
        let open = matches!(words.next(), Some("TCP[ESTABLISHED]" | "TCP[CLOSE_WAIT]"));
        open && words.nth(2).and_then(|word| word.parse().ok()) == Some(port)
    })
}

/// Ends what is left of a machine whose starter was killed, by its pid file: whether there was such a process. Blocks
/// until it is gone.
pub fn kill_left_over(files: &crate::MachineFiles) -> io::Result<bool> {
    let Ok(text) = fs::read_to_string(&files.pid) else { return Ok(false) };
    let Ok(pid) = text.trim().parse() else { return Ok(false) };
    process::kill_if_started_with(pid, &files.control().to_string_lossy().replace(',', ",,"), KILL_DEADLINE)
}

/// The machine's process by its pid file, for a machine whose socket does not answer.
fn process_by_pid_file(definition: &MachineDefinition) -> Result<Option<Process>, AdoptError> {
    let failed = |path: &Path, source| AdoptError::Io { name: definition.name.clone(), path: path.to_owned(), source };
    let path = &definition.files.pid;
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(path, source)),
    };
    let Ok(pid) = text.trim().parse() else { return Ok(None) };
    let process = Process::open(pid).map_err(|source| failed(Path::new("/proc"), source))?;
    let control = definition.files.control().to_string_lossy().replace(',', ",,");
    Ok(process.filter(|process| process.was_started_with(&control)))
}

/// Passes a connection's events on, until it ends.
fn forward(client: &Client, events: broadcast::Sender<MachineEvent>, faults: Faults) {
    let mut occurrences = client.events_from_start();
    tokio::spawn(async move {
        loop {
            let event = match occurrences.recv().await {
                Ok(occurrence) => {
                    mirror::note_fault(&faults, &occurrence);
                    machine_event(occurrence)
                }
                Err(broadcast::error::RecvError::Lagged(count)) => MachineEvent::Missed(count),
                Err(broadcast::error::RecvError::Closed) => return,
            };
            // An error only says that nobody listens at the moment.
            drop(events.send(event));
        }
    });
}

/// Reads the fields from the raw data, so that a newer QEMU's additional words do not hide an event.
fn machine_event(Occurrence { name, data, .. }: Occurrence) -> MachineEvent {
    let flag = |key| data.get(key).and_then(Value::as_bool).unwrap_or(false);
    let text = |key| data.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    match name.as_str() {
        "SHUTDOWN" => MachineEvent::Shutdown { by_guest: flag("guest"), reason: text("reason") },
        "RESET" => MachineEvent::Reset { by_guest: flag("guest") },
        "STOP" => MachineEvent::Stopped,
        "RESUME" => MachineEvent::Resumed,
        "POWERDOWN" => MachineEvent::PowerButton,
        "GUEST_PANICKED" => MachineEvent::GuestPanicked,
        "BLOCK_IO_ERROR" => MachineEvent::IoError(IoErrorEvent {
            disk: mirror::disk_of_node(&text("node-name")).to_owned(),
            write: text("operation") == "write",
            no_space: flag("nospace"),
            paused: text("action") == "stop",
            reason: text("reason"),
        }),
        "VSERPORT_CHANGE" => MachineEvent::GuestAgent { connected: flag("open") },
        "JOB_STATUS_CHANGE" | "BLOCK_JOB_ERROR" => {
            let job = if name == "BLOCK_JOB_ERROR" { text("device") } else { text("id") };
            match mirror::disk_of_job(&job) {
                Some(disk) => MachineEvent::Mirror { disk },
                None => MachineEvent::Other { name, data },
            }
        }
        _ => MachineEvent::Other { name, data },
    }
}

/// Plain QEMU processes on this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct QemuHypervisor;

impl Hypervisor for QemuHypervisor {
    fn start<'a>(&'a self, definition: &'a MachineDefinition) -> Pending<'a, Result<Arc<dyn Machine>, StartError>> {
        Box::pin(async move { Ok(Arc::new(Qemu::start(definition).await?) as Arc<dyn Machine>) })
    }

    fn adopt<'a>(
        &'a self,
        definition: &'a MachineDefinition,
    ) -> Pending<'a, Result<Option<Arc<dyn Machine>>, AdoptError>> {
        Box::pin(async move { Ok(Qemu::adopt(definition).await?.map(|qemu| Arc::new(qemu) as Arc<dyn Machine>)) })
    }

    fn redefine<'a>(&'a self, _definition: &'a MachineDefinition) -> Pending<'a, Result<(), AdoptError>> {
        Box::pin(async { Ok(()) })
    }

    fn forget<'a>(&'a self, _definition: &'a MachineDefinition) -> Pending<'a, Result<(), AdoptError>> {
        Box::pin(async { Ok(()) })
    }
}

impl Machine for Qemu {
    fn pid(&self) -> Option<u32> {
        Some(self.process_id())
    }

    fn accelerator(&self) -> String {
        let name = if self.acceleration.kvm { "kvm" } else { "tcg" };
        // QEMU's own words can be many; its first sentence says it.
        let why = self.acceleration.reason.split([';', '\n']).next().unwrap_or_default();
        format!("{name} ({why})")
    }

    fn status(&self) -> Pending<'_, Result<Status, MachineError>> {
        Box::pin(Qemu::status(self))
    }

    fn events(&self) -> Subscription {
        Qemu::events(self)
    }

    fn pause(&self) -> Pending<'_, Result<(), MachineError>> {
        Box::pin(Qemu::pause(self))
    }

    fn resume(&self) -> Pending<'_, Result<(), MachineError>> {
        Box::pin(Qemu::resume(self))
    }

    fn ask_agent(&self, command: &'static str, deadline: Duration) -> Pending<'_, Result<Value, AgentError>> {
        Box::pin(async move {
            let until = Instant::now() + deadline;
            let mut agent = GuestAgent::connect(&self.definition.files.guest_agent, deadline).await?;
            agent.call(command, Value::Null, until.saturating_duration_since(Instant::now())).await
        })
    }

    fn power_down(&self) -> Pending<'_, Result<(), MachineError>> {
        Box::pin(Qemu::power_down(self))
    }

    fn quit(&self, grace: Duration) -> Pending<'_, Result<Exit, MachineError>> {
        Box::pin(Qemu::quit(self, grace))
    }

    fn wait_exit(&self) -> Pending<'_, Exit> {
        Box::pin(Qemu::wait_exit(self))
    }
}
