//! The virtual machine of a recovery: from what was asked for to what QEMU is started with.

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use blockstore::base::Segment;
use blockstore::overlay::Overlay;
use hypervisor::{Accelerator, Bus, DiskSource, Firmware, MachineDefinition, MachineDisk, MachineFiles, Network};

use super::RecoverRequest;
use super::firmware::{self, Boots};
use super::one::{Definition, Recovery};
use crate::problem::Problem;

/// Least memory a guest is given.
const MEMORY_MIN: u64 = 16 << 20;

/// Most CPUs a guest is given.
const CPUS_MAX: u32 = 255;

/// Refuses a request that no machine can be made of, before anything exists.
pub fn check(request: &RecoverRequest) -> Result<(), Problem> {
    if request.memory < MEMORY_MIN {
        return Err(Problem::usage(format!("{} bytes of memory are too little for a guest", request.memory))
            .hint("give a size such as --memory 2G"));
    }
    if !(1..=CPUS_MAX).contains(&request.cpus) {
        return Err(
            Problem::usage(format!("a guest cannot have {} CPUs", request.cpus)).hint(format!("give 1 to {CPUS_MAX}"))
        );
    }
    parse::<Network>(&request.network)?;
    parse::<Bus>(&request.bus)?;
    parse::<Accelerator>(&request.accel)?;
    match request.firmware.as_str() {
        "auto" | "bios" | "uefi" => Ok(()),
        other => Err(Problem::usage(format!("there is no firmware `{other}`")).hint("use auto, bios or uefi")),
    }
}

/// The machine definition of a recovery.
pub async fn define(
    recovery: &Recovery,
    definition: &Definition,
    first_disk: Option<Arc<Overlay>>,
) -> Result<MachineDefinition, Problem> {
    let request = &definition.request;
    let firmware = match (request.firmware.as_str(), first_disk) {
        ("bios", _) | ("auto", None) => Firmware::Bios,
        ("auto", Some(disk)) => tokio::task::spawn_blocking(move || look(&disk))
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(|error| Problem::failed("cannot look at the first disk", &error))?,
        _ => Firmware::Uefi,
    };
    let bus: Bus = parse(&request.bus)?;
    let disks = definition
        .disks
        .iter()
        .map(|disk| MachineDisk {
            name: disk.name.clone(),
            source: DiskSource::Export { socket: recovery.socket("nbd.sock"), export: disk.name.clone() },
            bus,
        })
        .collect();
    let files = files(recovery.dir(), |name| recovery.socket(name));
    Ok(MachineDefinition {
        memory_bytes: request.memory,
        cpus: request.cpus,
        firmware,
        machine_type: request.machine_type.clone(),
        disks,
        network: parse(&request.network)?,
        accelerator: parse(&request.accel)?,
        ..MachineDefinition::new(definition.name.clone(), files)
    })
}

/// All sockets of the recovery in folder `dir`, which may lie elsewhere.
pub fn sockets(dir: &Path, socket: impl Fn(&str) -> PathBuf) -> [PathBuf; 4] {
    let files = files(dir, &socket);
    [socket("nbd.sock"), files.control(), files.qmp, files.guest_agent]
}

/// Where the machine of the recovery in folder `dir` keeps its files; `socket` tells where a socket lies.
pub fn files(dir: &Path, socket: impl Fn(&str) -> PathBuf) -> MachineFiles {
    MachineFiles {
        console: dir.join("console.log"),
        qmp: socket("qmp.sock"),
        guest_agent: socket("guest-agent.sock"),
        log: dir.join("qemu.log"),
        pid: dir.join("qemu.pid"),
        uefi_vars: dir.join("uefi-vars.fd"),
    }
}

fn look(disk: &Overlay) -> io::Result<Firmware> {
    let boots = firmware::detect(|offset, buf| {
        let length = (buf.len() as u64).min(disk.size().saturating_sub(offset));
        let mut segments = Vec::new();
        disk.read(offset, length, &mut segments).map_err(io::Error::other)?;
        let mut at = 0;
        for segment in segments {
            match segment {
                Segment::Data(bytes) => {
                    if let Some(part) = buf.get_mut(at..at + bytes.len()) {
                        part.copy_from_slice(&bytes);
                    }
                    at += bytes.len();
                }
                Segment::Hole(length) => at += usize::try_from(length).unwrap_or(usize::MAX),
            }
        }
        Ok(())
    })?;
    Ok(match boots {
        Boots::Bios => Firmware::Bios,
        Boots::Uefi => Firmware::Uefi,
    })
}

/// A word of the request as what the driver understands.
fn parse<T: FromStr<Err = String>>(word: &str) -> Result<T, Problem> {
    word.parse().map_err(Problem::usage)
}
