//! Bringing a machine up.
//!
//! QEMU is started with `-daemonize`: the process we start returns once disks are connected, sockets listen and the
//! pid file is locked, or ends with an error; the machine itself lives on in a session of its own. If we are killed
//! meanwhile it notices at that moment that nobody waits and ends by itself.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::net::UnixStream;
use tokio::process::Command;
use tracing::{info, warn};

use super::command_line::{self, Launch, Lifetime};
use super::firmware::{self, FirmwareError};
use super::probe::{self, Acceleration, ProbeError};
use super::process::Process;
use super::{AdoptError, Qemu};
use crate::definition::{DefinitionError, Firmware, MachineDefinition, Network};
use crate::machine::MachineError;

/// How long a machine may take until its disks are connected. The guest boots after that.
pub const START_DEADLINE: Duration = Duration::from_secs(60);
/// How much of QEMU's log an error quotes.
const MAX_LOG_QUOTED: u64 = 16 * 1024;
/// How often an attached machine that has just been started is asked whether it is there.
const ATTACH_INTERVAL: Duration = Duration::from_millis(10);
const STDERR_GRACE: Duration = Duration::from_secs(1);

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The definition cannot be right.
    #[error("machine {name} cannot be started")]
    Definition {
        /// The machine.
        name: String,
        /// What is wrong.
        source: DefinitionError,
    },
    /// QEMU is missing or does not run.
    #[error("machine {name} cannot be started")]
    Binary {
        /// The machine.
        name: String,
        /// Why.
        source: ProbeError,
    },
    /// A machine with these files runs already.
    #[error("machine {name} runs already, as process {pid}")]
    AlreadyRunning {
        /// The machine.
        name: String,
        /// Its process.
        pid: u32,
    },
    /// This QEMU does not know it.
    #[error("{} does not know machine type {machine_type}; `-machine help` lists what it knows", binary.display())]
    UnknownMachineType {
        /// As given.
        machine_type: String,
        /// The program.
        binary: PathBuf,
    },
    /// The host has no such bridge.
    #[error("there is no bridge {bridge} on this host")]
    MissingBridge {
        /// Its name.
        bridge: String,
    },
    /// No UEFI.
    #[error("machine {name} cannot have UEFI firmware")]
    Firmware {
        /// The machine.
        name: String,
        /// Why.
        source: FirmwareError,
    },
    /// QEMU said no.
    #[error("qemu could not start machine {name} ({status}): {stderr}")]
    Refused {
        /// The machine.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote.
        stderr: String,
    },
    /// QEMU hangs, usually because an export does not answer.
    #[error("machine {name} did not start within {waited:?}: {stderr}")]
    TimedOut {
        /// The machine.
        name: String,
        /// The deadline.
        waited: Duration,
        /// What QEMU wrote so far.
        stderr: String,
    },
    /// A file of the machine.
    #[error("machine {name}: cannot prepare {}", path.display())]
    Io {
        /// The machine.
        name: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It started and could then not be taken hold of.
    #[error("machine {name} was started but is lost: {stderr}")]
    Lost {
        /// The machine.
        name: String,
        /// The end of its log.
        stderr: String,
        /// Why.
        source: Option<Box<AdoptError>>,
    },
    /// libvirt did not do it.
    #[error("domain {name} cannot be started")]
    Libvirt {
        /// The machine.
        name: String,
        /// Why.
        source: crate::libvirt::LibvirtError,
    },
    /// It started but its processors do not run.
    #[error("machine {name} was started but does not run")]
    NotRunning {
        /// The machine.
        name: String,
        /// Why.
        source: MachineError,
    },
}

pub(super) async fn start(machine: &MachineDefinition) -> Result<Qemu, StartError> {
    let (mut launch, acceleration) = prepare(machine, Lifetime::Detached).await?;
    let began = Instant::now();
    match run(machine, &launch).await {
        Err(StartError::Refused { stderr, .. }) if is_about_sandbox(&stderr) => {
            warn!(machine = machine.name, stderr, "this QEMU cannot confine itself, starting it without its sandbox");
            launch.sandbox = false;
            run(machine, &launch).await?;
        }
        other => other?,
    }
    let qemu = take_hold(machine, acceleration).await?;
    info!(machine = machine.name, pid = qemu.process_id(), seconds = began.elapsed().as_secs_f64(), "machine started");
    Ok(qemu)
}

pub(super) async fn start_attached(machine: &MachineDefinition, wrapper: &[OsString]) -> Result<Qemu, StartError> {
    let (mut launch, acceleration) = prepare(machine, Lifetime::Attached).await?;
    match run_attached(machine, &launch, &acceleration, wrapper).await {
        Err(StartError::Refused { stderr, .. }) if is_about_sandbox(&stderr) => {
            warn!(machine = machine.name, stderr, "this QEMU cannot confine itself, starting it without its sandbox");
            launch.sandbox = false;
            run_attached(machine, &launch, &acceleration, wrapper).await
        }
        other => other,
    }
}

/// Checks what can be checked before QEMU runs.
async fn prepare(machine: &MachineDefinition, lifetime: Lifetime) -> Result<(Launch, Acceleration), StartError> {
    let name = || machine.name.clone();
    machine.check().map_err(|source| StartError::Definition { name: name(), source })?;
    if let Some(pid) = running(machine).await {
        return Err(StartError::AlreadyRunning { name: name(), pid });
    }
    if let Network::Bridge(bridge) = &machine.network
        && !Path::new("/sys/class/net").join(bridge).join("bridge").is_dir()
    {
        return Err(StartError::MissingBridge { bridge: bridge.clone() });
    }
    let uefi_code = match machine.firmware {
        Firmware::Bios => None,
        Firmware::Uefi => Some(
            firmware::prepare(&machine.files.uefi_vars)
                .map_err(|source| StartError::Firmware { name: name(), source })?,
        ),
    };
    let acceleration = probe::accelerator(machine.binary(), machine.accelerator).await;
    Ok((Launch { kvm: acceleration.kvm, uefi_code, sandbox: true, lifetime }, acceleration))
}

async fn running(machine: &MachineDefinition) -> Option<u32> {
    match Qemu::adopt(machine).await {
        Ok(None) => None,
        Ok(Some(qemu)) => Some(qemu.process_id()),
        Err(AdoptError::Unreachable { pid, .. } | AdoptError::OtherMachine { pid, .. }) => Some(pid),
        // A pid file nobody can read stops QEMU itself, which then says why.
        Err(AdoptError::Definition { .. } | AdoptError::Io { .. } | AdoptError::Libvirt { .. }) => None,
    }
}

/// Runs QEMU until it is in the background.
async fn run(machine: &MachineDefinition, launch: &Launch) -> Result<(), StartError> {
    let name = || machine.name.clone();
    let failed = |source| StartError::Binary { name: name(), source: probe::run_error(machine.binary(), source) };
    // An old log would be taken for this start's.
    match std::fs::remove_file(&machine.files.log) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(StartError::Io { name: name(), path: machine.files.log.clone(), source: error });
        }
        _ => {}
    }
    let mut child = Command::new(machine.binary())
        .args(command_line::arguments(machine, launch))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let mut reading =
        tokio::spawn(probe::read_text(child.stderr.take().ok_or_else(|| failed(io::ErrorKind::Other.into()))?));
    let ended = tokio::time::timeout(START_DEADLINE, child.wait()).await;
    if ended.is_err() {
        drop(child.kill().await);
        kill_stray(machine).await;
    }
    // The background process gives the pipe up when it is ready; if not, what matters has been written.
    let stderr = match tokio::time::timeout(STDERR_GRACE, &mut reading).await {
        Ok(text) => text.unwrap_or_default(),
        Err(_) => {
            reading.abort();
            String::new()
        }
    };
    let said = || [stderr.clone(), log_tail(&machine.files.log)].join("\n").trim().to_owned();
    match ended {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => {
            let stderr = said();
            if stderr.contains("unsupported machine type") {
                let (machine_type, binary) = (machine.machine_type.clone(), machine.binary().to_owned());
                return Err(StartError::UnknownMachineType { machine_type, binary });
            }
            Err(StartError::Refused { name: name(), status, stderr })
        }
        Ok(Err(source)) => Err(failed(source)),
        Err(_) => Err(StartError::TimedOut { name: name(), waited: START_DEADLINE, stderr: said() }),
    }
}

/// Runs QEMU as a child, through `wrapper`.
async fn run_attached(
    machine: &MachineDefinition,
    launch: &Launch,
    acceleration: &Acceleration,
    wrapper: &[OsString],
) -> Result<Qemu, StartError> {
    let name = || machine.name.clone();
    let failed = |source| StartError::Binary { name: name(), source: probe::run_error(machine.binary(), source) };
    let log = std::fs::File::create(&machine.files.log);
    let log = log.map_err(|source| StartError::Io { name: name(), path: machine.files.log.clone(), source })?;
    let mut words = wrapper.to_vec();
    words.push(machine.binary().into());
    words.extend(command_line::arguments(machine, launch));
    let Some((program, arguments)) = words.split_first() else { return Err(failed(io::ErrorKind::Other.into())) };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Err(StartError::Refused { name: name(), status, stderr: log_tail(&machine.files.log) });
        }
        match Qemu::adopt_with(machine, Some(acceleration.clone())).await {
            Ok(Some(mut qemu)) => {
                qemu.child = Some(child);
                info!(machine = machine.name, pid = qemu.process_id(), "machine started, to be thrown away");
                return Ok(qemu);
            }
            // Its socket is not there yet, or its pid file is and the socket is not.
            Ok(None) | Err(AdoptError::Unreachable { .. }) if began.elapsed() < START_DEADLINE => {
                tokio::time::sleep(ATTACH_INTERVAL).await;
            }
            Ok(None) | Err(AdoptError::Unreachable { .. }) => {
                let stderr = log_tail(&machine.files.log);
                return Err(StartError::TimedOut { name: name(), waited: START_DEADLINE, stderr });
            }
            Err(error) => {
                let stderr = log_tail(&machine.files.log);
                return Err(StartError::Lost { name: name(), stderr, source: Some(Box::new(error)) });
            }
        }
    }
}

/// The background half of a start that was given up: the process listening on the control socket.
async fn kill_stray(machine: &MachineDefinition) {
    let control = machine.files.control();
    let Ok(stream) = UnixStream::connect(&control).await else { return };
    let Some(pid) = stream.peer_cred().ok().and_then(|credentials| credentials.pid()) else { return };
    if let Ok(Some(process)) = Process::open(pid)
        && process.was_started_with(&control.to_string_lossy())
        && let Err(error) = process.signal(Signal::KILL)
    {
        warn!(machine = machine.name, pid, %error, "cannot end a machine that hangs while starting");
    }
}

async fn take_hold(machine: &MachineDefinition, acceleration: Acceleration) -> Result<Qemu, StartError> {
    let lost = |source: Option<AdoptError>| StartError::Lost {
        name: machine.name.clone(),
        stderr: log_tail(&machine.files.log),
        source: source.map(Box::new),
    };
    let qemu = Qemu::adopt_with(machine, Some(acceleration)).await;
    let qemu = qemu.map_err(|error| lost(Some(error)))?.ok_or_else(|| lost(None))?;
    match qemu.status().await {
        Ok(crate::machine::Status::InternalError) => {
            let stderr = log_tail(&machine.files.log);
            drop(qemu.quit(Duration::ZERO).await);
            Err(StartError::Lost { name: machine.name.clone(), stderr, source: None })
        }
        Ok(_) => Ok(qemu),
        Err(MachineError::Gone { .. }) => Err(lost(None)),
        Err(source) => {
            drop(qemu.quit(Duration::ZERO).await);
            Err(StartError::NotRunning { name: machine.name.clone(), source })
        }
    }
}

fn is_about_sandbox(stderr: &str) -> bool {
    let stderr = stderr.to_ascii_lowercase();
    stderr.contains("seccomp") || stderr.contains("-sandbox")
}

/// The end of QEMU's own log.
pub(super) fn log_tail(path: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG_QUOTED)))?;
        let mut bytes = Vec::new();
        file.take(MAX_LOG_QUOTED).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    read().unwrap_or_default()
}
