//! What this host's QEMU is and whether KVM really runs guests here.
//!
//! `/dev/kvm` may exist, open and still be useless: nested virtualisation half configured makes QEMU abort, report
//! `internal-error`, or stand still. So KVM counts as working only when it boots SeaBIOS to its end, seen on the BIOS's
//! debug port, within [`KVM_TRIAL`].

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;
use tracing::{info, warn};

use super::qmp::{Client, CommandError, ConnectError, Version};
use crate::definition::Accelerator;

/// How long KVM may take to get through the BIOS; it needs some tenths of a second.
pub const KVM_TRIAL: Duration = Duration::from_secs(2);
const PROBE_DEADLINE: Duration = Duration::from_secs(10);
/// More than any QEMU says before it is ready or dead.
const MAX_OUTPUT: u64 = 64 * 1024;
const KVM_DEVICE: &str = "/dev/kvm";
/// SeaBIOS's last words on a machine without disks.
const BIOS_DONE: &str = "No bootable device";

/// What a QEMU program can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Its release.
    pub version: Version,
    /// Machine types and their aliases.
    pub machine_types: Vec<String>,
    /// Whether KVM support was compiled in.
    pub kvm_built: bool,
}

/// Why a QEMU program could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Not installed, or not where the definition says.
    #[error(
        "{} is not installed (Debian and Ubuntu: qemu-system-x86, Fedora: qemu-system-x86-core, Arch: qemu-system-x86)",
        binary.display()
    )]
    MissingBinary {
        /// The program.
        binary: PathBuf,
    },
    /// It could not be started.
    #[error("cannot run {}", binary.display())]
    Run {
        /// The program.
        binary: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended or does not speak QMP.
    #[error("{} does not answer: {stderr}", binary.display())]
    NoQmp {
        /// The program.
        binary: PathBuf,
        /// What it wrote.
        stderr: String,
        /// What went wrong on the connection.
        source: ConnectError,
    },
    /// It refused a question.
    #[error("{} does not say what it can do", binary.display())]
    Command {
        /// The program.
        binary: PathBuf,
        /// Why.
        source: CommandError,
    },
}

/// The accelerator a machine gets, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acceleration {
    /// KVM, else TCG.
    pub kvm: bool,
    /// For the operator: why not KVM, or how it was chosen.
    pub reason: String,
}

/// Asks a QEMU program what it is, without any machine.
pub async fn probe(binary: &Path) -> Result<Capabilities, ProbeError> {
    let arguments = ["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp", "stdio"];
    let mut child = spawn(binary, &arguments, Stdio::piped()).map_err(|source| run_error(binary, source))?;
    let (Some(reader), Some(writer), Some(stderr)) = (child.stdout.take(), child.stdin.take(), child.stderr.take())
    else {
        return Err(run_error(binary, io::Error::other("its standard streams are missing")));
    };
    let client = match Client::over(reader, writer, PROBE_DEADLINE).await {
        Ok(client) => client,
        Err(source) => {
            drop(child.start_kill());
            let stderr = read_text(stderr).await;
            return Err(ProbeError::NoQmp { binary: binary.to_owned(), stderr: one_line(&stderr), source });
        }
    };
    let ask = async |command| {
        client
            .call(command, Value::Null, PROBE_DEADLINE)
            .await
            .map_err(|source| ProbeError::Command { binary: binary.to_owned(), source })
    };
    let machines = ask("query-machines").await?;
    let kvm = ask("query-kvm").await?;
    let version = client.version();
    drop(client);
    drop(child.start_kill());
    let words = |machine: &Value| {
        ["name", "alias"].map(|key| machine.get(key).and_then(Value::as_str).map(str::to_owned)).into_iter().flatten()
    };
    let machine_types =
        machines.as_array().into_iter().flatten().flat_map(|machine| words(machine).collect::<Vec<_>>());
    Ok(Capabilities {
        version,
        machine_types: machine_types.collect(),
        kvm_built: kvm.get("present").and_then(Value::as_bool).unwrap_or(false),
    })
}

/// Resolves [`Accelerator::Auto`]. The trial runs once per program and process; its result is kept.
pub async fn accelerator(binary: &Path, wanted: Accelerator) -> Acceleration {
    match wanted {
        Accelerator::Kvm => Acceleration { kvm: true, reason: "kvm was asked for".to_owned() },
        Accelerator::Tcg => Acceleration { kvm: false, reason: "tcg was asked for".to_owned() },
        Accelerator::Auto => {
            let cell = trial_of(binary);
            cell.get_or_init(|| try_kvm(binary)).await.clone()
        }
    }
}

type Trials = Mutex<HashMap<PathBuf, Arc<OnceCell<Acceleration>>>>;

fn trial_of(binary: &Path) -> Arc<OnceCell<Acceleration>> {
    static TRIALS: std::sync::OnceLock<Trials> = std::sync::OnceLock::new();
    let mut trials = TRIALS.get_or_init(Trials::default).lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(trials.entry(binary.to_owned()).or_default())
}

async fn try_kvm(binary: &Path) -> Acceleration {
    let device = std::fs::File::options().read(true).write(true).open(KVM_DEVICE);
    let acceleration = match device {
        Err(error) => Acceleration { kvm: false, reason: format!("cannot open {KVM_DEVICE}: {error}") },
        Ok(_) => match trial(binary, "kvm", "host", KVM_TRIAL).await {
            Ok(()) => Acceleration { kvm: true, reason: "kvm ran a guest".to_owned() },
            Err(why) => Acceleration { kvm: false, reason: format!("kvm does not run a guest here: {why}") },
        },
    };
    if acceleration.kvm {
        info!(reason = acceleration.reason, "using kvm");
    } else {
        warn!(reason = acceleration.reason, "using tcg, which is many times slower");
    }
    acceleration
}

/// Boots the BIOS and nothing else.
async fn trial(binary: &Path, accelerator: &str, cpu: &str, limit: Duration) -> Result<(), String> {
    let arguments = [
        "-machine",
        "pc",
        "-accel",
        accelerator,
        "-cpu",
        cpu,
        "-m",
        "32M",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-chardev",
        "stdio,id=bios,signal=off",
        "-device",
        "isa-debugcon,iobase=0x402,chardev=bios",
    ];
    let mut child = spawn(binary, &arguments, Stdio::null()).map_err(|error| error.to_string())?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err("its standard streams are missing".to_owned());
    };
    let reading = tokio::spawn(read_text(stderr));
    let outcome = match tokio::time::timeout(limit, wait_for(stdout, BIOS_DONE)).await {
        Ok(true) => Ok(()),
        Ok(false) => Err("ended"),
        Err(_) => Err("no progress"),
    };
    drop(child.start_kill());
    drop(child.wait().await);
    // Nothing inherits the pipe, so it ends with the process.
    let stderr = reading.await.unwrap_or_default();
    outcome.map_err(|what| match one_line(&stderr) {
        text if text.is_empty() => format!("{what} within {limit:?}"),
        text => format!("{what}: {text}"),
    })
}

/// Whether the text comes before the stream ends. Keeps only as much as the text is long.
async fn wait_for(mut stream: impl AsyncRead + Unpin, text: &str) -> bool {
    let mut tail = Vec::new();
    let mut buffer = [0; 512];
    loop {
        let count = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return false,
            Ok(count) => count,
        };
        tail.extend_from_slice(buffer.get(..count).unwrap_or_default());
        if tail.windows(text.len()).any(|window| window == text.as_bytes()) {
            return true;
        }
        let surplus = tail.len().saturating_sub(text.len());
        tail.drain(..surplus);
    }
}

fn spawn(binary: &Path, arguments: &[&str], stdin: Stdio) -> io::Result<Child> {
    Command::new(binary)
        .args(arguments)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
}

/// What starting a program failed with.
pub(super) fn run_error(binary: &Path, source: io::Error) -> ProbeError {
    let binary = binary.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => ProbeError::MissingBinary { binary },
        _ => ProbeError::Run { binary, source },
    }
}

/// Reads to the end, keeps the beginning.
pub(super) async fn read_text(mut stream: impl AsyncRead + Unpin) -> String {
    let mut kept = Vec::new();
    // What cannot be read any more only shortens an error message.
    drop((&mut stream).take(MAX_OUTPUT).read_to_end(&mut kept).await);
    drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
    String::from_utf8_lossy(&kept).trim().to_owned()
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests;
