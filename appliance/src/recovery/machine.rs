//! The virtual machine of a recovery: from what was asked for to what QEMU is started with.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blockstore::base::Segment;
use blockstore::overlay::Overlay;
use hypervisor::{Accelerator, DiskSource, Display, Firmware, MachineDefinition, MachineDisk, MachineFiles, Network};

use super::firmware::{self, Boots};
use super::one::NBD_SOCKET;
use super::{HypervisorKind, RecoverRequest};
use crate::catalog::DiskSummary;
use crate::hardware::{self, Attached, Hardware, Variables, parse};
use crate::problem::Problem;

/// The file of a recovery's UEFI variables.
const UEFI_VARS: &str = "uefi-vars.fd";
/// The socket on which a screen is shown.
pub const VNC_SOCKET: &str = "vnc.sock";
/// The first port of VNC.
const VNC_PORT_MIN: u16 = 5900;

/// Refuses a request that no machine can be made of, before anything exists.
pub fn check(request: &RecoverRequest, disks: &[DiskSummary]) -> Result<(), Problem> {
    request.hardware.check(disks.iter().map(|disk| disk.name.as_str()))?;
    network(request)?;
    parse::<Accelerator>(&request.accel)?;
    display(&request.display, Path::new("vnc.sock"))?;
    mac(request).map(drop)
}

/// Where the network card leads to.
fn network(request: &RecoverRequest) -> Result<Network, Problem> {
    if request.network != super::domain::ORIGINAL {
        return parse(&request.network);
    }
    match (&request.on, &request.hardware.domain_xml) {
        // The domain knows.
        (HypervisorKind::Libvirt(_), Some(_)) => Ok(Network::None),
        _ => Err(Problem::usage("only a domain that was backed up from libvirt has networks of its own to go back to")
            .hint("use --network none, user, isolated or bridge:NAME")),
    }
}

/// The network card's address; `None` where a new one is to be made.
fn mac(request: &RecoverRequest) -> Result<Option<String>, Problem> {
    match request.mac.as_deref() {
        None => Ok(None),
        Some("keep") => match &request.hardware.nic.mac {
            Some(mac) => Ok(Some(mac.clone())),
            None => Err(Problem::usage("the recovery point does not say which MAC address the machine had")
                .hint("give it: --mac 52:54:00:12:34:56")),
        },
        Some(mac) => hardware::check_mac(mac).map(|()| Some(mac.to_owned())),
    }
}

/// Where the screen is shown, with its socket at `socket` if it is on one.
fn display(word: &str, socket: &Path) -> Result<Display, Problem> {
    let port = |text: &str| text.parse().ok().filter(|port| *port >= VNC_PORT_MIN);
    match (word, word.strip_prefix("vnc:").map(port)) {
        ("none", _) => Ok(Display::None),
        ("vnc", _) => Ok(Display::VncSocket(socket.to_owned())),
        (_, Some(Some(port))) => Ok(Display::VncPort(port)),
        _ => Err(Problem::usage(format!("a screen cannot be shown on `{word}`"))
            .hint(format!("use none, vnc (a Unix socket) or vnc:PORT with a port from {VNC_PORT_MIN} on"))),
    }
}

/// The machine of `name`, whose files are in folder `dir`; `socket` tells where a socket lies.
pub async fn define(
    request: &RecoverRequest,
    name: &str,
    disks: &[DiskSummary],
    first_disk: Option<Arc<Overlay>>,
    dir: &Path,
    socket: impl Fn(&str) -> PathBuf,
) -> Result<MachineDefinition, Problem> {
    let firmware = match (request.hardware.is_uefi(), first_disk) {
        (Some(false), _) | (None, None) => Firmware::Bios,
        (None, Some(disk)) => tokio::task::spawn_blocking(move || look(&disk))
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(|error| Problem::failed("cannot look at the first disk", &error))?,
        (Some(true), _) => Firmware::Uefi,
    };
    let disk = |disk: &DiskSummary| {
        Ok(MachineDisk {
            name: disk.name.clone(),
            source: DiskSource::Export { socket: socket(NBD_SOCKET), export: disk.name.clone() },
            bus: request.hardware.bus_of(&disk.name)?,
        })
    };
    let disks = disks.iter().map(disk).collect::<Result<Vec<_>, Problem>>()?;
    Ok(MachineDefinition {
        memory_bytes: request.hardware.memory(),
        cpus: request.hardware.cpus(),
        cpu_model: request.hardware.cpu.clone(),
        firmware,
        machine_type: request.hardware.machine_type().to_owned(),
        disks,
        network: network(request)?,
        card: request.hardware.card()?,
        mac_address: mac(request)?,
        display: display(&request.display, &socket(VNC_SOCKET))?,
        accelerator: parse(&request.accel)?,
        ..MachineDefinition::new(name, files(dir, socket))
    })
}

/// All sockets of the recovery in folder `dir`, which may lie elsewhere.
pub fn sockets(dir: &Path, socket: impl Fn(&str) -> PathBuf) -> [PathBuf; 5] {
    let files = files(dir, &socket);
    [socket(NBD_SOCKET), files.control(), files.qmp, files.guest_agent, socket(VNC_SOCKET)]
}

/// Where the screen of a recovery is shown, as people are told.
pub fn display_uri(request: &RecoverRequest, socket: &Path) -> Option<String> {
    match display(&request.display, socket).ok()? {
        Display::None => None,
        Display::VncSocket(path) => Some(format!("vnc+unix://{}", path.display())),
        Display::VncPort(port) => Some(format!("vnc://127.0.0.1:{port}")),
    }
}

/// Puts a machine's UEFI variables into the folder of its recovery, before anything says that it exists.
pub fn keep_variables(dir: &Path, variables: &Variables) -> io::Result<()> {
    let mut file = File::create_new(dir.join(UEFI_VARS))?;
    file.write_all(&variables.0)?;
    file.sync_all()
}

/// The definition of a machine as it runs, for a recovery point: what it was asked to be and has become, with the
/// variables as its firmware has written them. A card's address stays the one that the machine had before.
pub fn as_it_is(dir: &Path, request: &RecoverRequest, machine: Option<&MachineDefinition>) -> io::Result<Hardware> {
    let mut hardware = request.hardware.clone();
    if let Some(machine) = machine {
        hardware.memory = Some(machine.memory_bytes);
        hardware.cpus = Some(machine.cpus);
        hardware.machine_type = Some(machine.machine_type.clone());
        let firmware = match machine.firmware {
            Firmware::Bios => "bios",
            Firmware::Uefi => "uefi",
        };
        hardware.firmware = Some(firmware.to_owned());
        let attached = |disk: &MachineDisk| Attached { name: disk.name.clone(), bus: disk.bus.to_string() };
        (hardware.bus, hardware.disks) = (None, machine.disks.iter().map(attached).collect());
        if machine.network != Network::None {
            hardware.nic.model = Some(machine.card.to_string());
            hardware.nic.mac = hardware.nic.mac.or_else(|| Some(machine.mac()));
        }
    }
    if hardware.firmware.as_deref() != Some("bios") {
        hardware.uefi_vars = match std::fs::read(dir.join(UEFI_VARS)) {
            Ok(bytes) => Some(Variables(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
    }
    Ok(hardware)
}

/// Where the machine of the recovery in folder `dir` keeps its files; `socket` tells where a socket lies.
pub fn files(dir: &Path, socket: impl Fn(&str) -> PathBuf) -> MachineFiles {
    MachineFiles {
        console: dir.join("console.log"),
        qmp: socket("qmp.sock"),
        guest_agent: socket("guest-agent.sock"),
        log: dir.join("qemu.log"),
        pid: dir.join("qemu.pid"),
        uefi_vars: dir.join(UEFI_VARS),
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
