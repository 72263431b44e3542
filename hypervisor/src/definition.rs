//! What a machine is made of: a plain value, stored with the recovery it belongs to.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The longest path a Unix socket can have (`sun_path` less its terminating zero).
pub const MAX_SOCKET_PATH: usize = 107;
/// The first port of VNC; a display's number is counted from it.
pub(crate) const VNC_PORT_MIN: u16 = 5900;
/// Disks per machine: what fits on the root bus beside the other devices without bridges.
pub const MAX_DISKS: usize = 20;
const MIB: u64 = 1024 * 1024;
const MAX_CPUS: u32 = 255;
const MAX_NAME: usize = 128;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDefinition {
    /// Shown in process lists and checked when the machine is adopted.
    pub name: String,
    /// Guest memory; rounded up to a whole MiB.
    pub memory_bytes: u64,
    /// Virtual processors.
    pub cpus: u32,
    /// What starts the boot loader.
    pub firmware: Firmware,
    /// `q35`, `pc`, or a versioned type such as `pc-q35-9.2`.
    pub machine_type: String,
    /// A CPU model in QEMU's words. Absent, or `host`: the host's own under KVM, the emulator's best (`max`) under TCG.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// In boot order.
    pub disks: Vec<MachineDisk>,
    /// Where the one network card leads to, if there is one.
    pub network: Network,
    /// What card that is.
    #[serde(default)]
    pub card: Card,
    /// Where its screen is shown.
    #[serde(default)]
    pub display: Display,
    /// KVM, TCG, or whichever works.
    pub accelerator: Accelerator,
    /// Where the machine keeps its sockets and logs.
    pub files: MachineFiles,
    /// What the guest sees when a disk fails.
    #[serde(default)]
    pub errors: ErrorPolicy,
    /// `aa:bb:cc:dd:ee:ff`; derived from the name when absent, so that two machines never share one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac_address: Option<String>,
    /// The QEMU program; `qemu-system-x86_64` from the path when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// The libvirt domain that it is; a QEMU of our own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<Domain>,
}

/// A libvirt domain. Its name, and where the bytes of its disks are, are those of the [`MachineDefinition`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// Which libvirt.
    pub uri: String,
    /// What it is found again by.
    pub uuid: String,
    /// Its description.
    pub xml: String,
    /// What it calls its disks (`vda`), in their order.
    pub targets: Vec<String>,
    /// Whether libvirt keeps it while it is shut off.
    #[serde(default)]
    pub keep: Keep,
    /// What it is known as its recovery's by, if not the folder of its console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// Whether libvirt keeps a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// It is gone when it ends.
    #[default]
    Transient,
    /// Its definition stays until the recovery ends.
    Persistent,
    /// It has left its recovery, and stays when that ends.
    Production,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDisk {
    /// Becomes the serial number the guest sees, shortened to what the bus allows.
    pub name: String,
    /// Where its bytes are.
    pub source: DiskSource,
    /// How the guest reaches it.
    #[serde(default)]
    pub bus: Bus,
}

/// Where the bytes of a disk are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    /// An export of an NBD server on a Unix socket. The machine waits for it when it is away.
    Export {
        /// The server's socket.
        socket: PathBuf,
        /// The export's name on that server.
        export: String,
    },
    /// An export of an NBD server on the network. The machine waits for it when it is away.
    Remote {
        /// Name or address.
        host: String,
        /// Its port.
        port: u16,
        /// The export's name on that server.
        export: String,
        /// With TLS, by the certificates that the hypervisor has; only libvirt can.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        tls: bool,
    },
    /// A raw file.
    Raw(PathBuf),
    /// A qcow2 file without a backing file.
    Qcow2(PathBuf),
    /// A block device of the host.
    Device(PathBuf),
}

/// Paths of a machine. All must be absolute: QEMU changes its directory when it goes to the background.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFiles {
    /// What the guest writes to its first serial port is appended here.
    pub console: PathBuf,
    /// A QMP socket for people and scripts. Lifeboat itself uses [`MachineFiles::control`].
    pub qmp: PathBuf,
    /// Socket of the guest agent's channel; one client at a time.
    pub guest_agent: PathBuf,
    /// What QEMU itself writes: warnings, and the reason when it dies.
    pub log: PathBuf,
    /// Written and locked by QEMU while it lives.
    pub pid: PathBuf,
    /// The machine's own copy of the UEFI variables.
    pub uefi_vars: PathBuf,
}

impl MachineFiles {
    /// The usual file names in one folder.
    pub fn in_folder(folder: &Path) -> MachineFiles {
        MachineFiles {
            console: folder.join("console.log"),
            qmp: folder.join("qmp.sock"),
            guest_agent: folder.join("agent.sock"),
            log: folder.join("qemu.log"),
            pid: folder.join("qemu.pid"),
            uefi_vars: folder.join("uefi-vars.fd"),
        }
    }

    /// What the firmware of a machine that is thrown away writes, beside the console.
    pub fn firmware_log(&self) -> PathBuf {
        self.console.with_file_name("firmware.log")
    }

    /// The second QMP socket, which only this crate uses: a QMP socket serves one client, and the first is for others.
    pub fn control(&self) -> PathBuf {
        let mut path = self.qmp.clone().into_os_string();
        path.push(".ctl");
        PathBuf::from(path)
    }
}

/// The firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF, without secure boot.
    Uefi,
}

/// The bus a disk hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bus {
    /// Fastest, and the guest waits for ever: the default.
    #[default]
    VirtioBlk,
    /// One virtio controller for all such disks.
    VirtioScsi,
    /// For guests without virtio drivers.
    Sata,
    /// For guests older than SATA; only on machine type `pc`, four disks.
    Ide,
    /// A controller for each disk. The machine cannot be paused when a request fails: the guest is told.
    Nvme,
}

/// The network card's other end.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// No card.
    #[default]
    None,
    /// QEMU's built-in address translation: out, but not in.
    User,
    /// A card and an address, but no way out; ports can be forwarded in. For drills.
    Isolated,
    /// A bridge of the host.
    Bridge(String),
}

/// The model of the network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Card {
    /// Fastest.
    #[default]
    Virtio,
    /// Intel 82574L: for guests without virtio drivers.
    E1000e,
    /// Intel 82540EM: for older ones.
    E1000,
    /// Realtek: for still older ones.
    Rtl8139,
}

/// Where the machine's screen is shown.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Display {
    /// Nowhere. The machine has a graphics card all the same.
    #[default]
    None,
    /// VNC on a Unix socket: whoever may open it sees the screen and types.
    VncSocket(PathBuf),
    /// VNC on a port of the loopback address, from 5900: every user of this host sees the screen and types.
    VncPort(u16),
}

/// What executes the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// KVM if it really runs a guest, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation: works everywhere, many times slower.
    Tcg,
}

/// What happens when an export answers a request with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorPolicy {
    /// The machine pauses (`io-error`); resuming it repeats the request. No guest file system goes read-only.
    #[default]
    Pause,
    /// The guest is told, except when space ran out: that always pauses.
    Report,
}

/// Why a definition is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DefinitionError {
    /// The machine's name.
    #[error("machine name {name:?} must be 1 to 128 printable characters")]
    Name {
        /// As given.
        name: String,
    },
    /// Too little memory.
    #[error("a machine needs at least 1 MiB of memory, not {bytes} bytes")]
    Memory {
        /// As given.
        bytes: u64,
    },
    /// None, or too many.
    #[error("a machine has 1 to 255 processors, not {cpus}")]
    Cpus {
        /// As given.
        cpus: u32,
    },
    /// Not a word QEMU could know.
    #[error("{machine_type:?} is not a machine type; usual ones are q35 and pc")]
    MachineType {
        /// As given.
        machine_type: String,
    },
    /// More disks than the machine has places.
    #[error("{count} disks on {bus} are too many: {max} fit")]
    TooManyDisks {
        /// Disks in the definition.
        count: usize,
        /// The bus.
        bus: Bus,
        /// What fits.
        max: usize,
    },
    /// IDE on a machine without it.
    #[error("machine type {machine_type} has no IDE bus; use pc, or the SATA bus")]
    NoIde {
        /// The machine type.
        machine_type: String,
    },
    /// QEMU would look for it in another directory.
    #[error("path {} must be absolute", path.display())]
    RelativePath {
        /// As given.
        path: PathBuf,
    },
    /// The kernel's limit.
    #[error("socket path {} has {length} bytes; a Unix socket's path can have {MAX_SOCKET_PATH}", path.display())]
    SocketPathTooLong {
        /// As given.
        path: PathBuf,
        /// Its bytes.
        length: usize,
    },
    /// QEMU takes paths as UTF-8 text.
    #[error("path {} is not UTF-8 or has a control character", path.display())]
    UnprintablePath {
        /// As given.
        path: PathBuf,
    },
    /// Longer than the NBD protocol allows, or with a zero byte.
    #[error("{export:?} cannot be an export's name")]
    Export {
        /// As given.
        export: String,
    },
    /// Not an interface name.
    #[error("{bridge:?} is not the name of a bridge")]
    Bridge {
        /// As given.
        bridge: String,
    },
    /// Not a word QEMU could know.
    #[error("{cpu_model:?} is not a CPU model; `qemu-system-x86_64 -cpu help` lists them")]
    CpuModel {
        /// As given.
        cpu_model: String,
    },
    /// VNC counts its ports from 5900.
    #[error("VNC cannot be on port {port}; use one from 5900 on")]
    VncPort {
        /// As given.
        port: u16,
    },
    /// Not a unicast address.
    #[error("{mac:?} is not a unicast MAC address such as 52:54:00:12:34:56")]
    Mac {
        /// As given.
        mac: String,
    },
}

impl MachineDefinition {
    /// A machine with 1 GiB, one processor and no disks yet; everything else as [`Default`] says.
    pub fn new(name: impl Into<String>, files: MachineFiles) -> MachineDefinition {
        MachineDefinition {
            name: name.into(),
            memory_bytes: 1024 * MIB,
            cpus: 1,
            firmware: Firmware::default(),
            machine_type: "q35".to_owned(),
            cpu_model: None,
            disks: Vec::new(),
            network: Network::default(),
            card: Card::default(),
            display: Display::default(),
            accelerator: Accelerator::default(),
            files,
            errors: ErrorPolicy::default(),
            mac_address: None,
            binary: None,
            domain: None,
        }
    }

    /// The QEMU program to run.
    pub fn binary(&self) -> &Path {
        self.binary.as_deref().unwrap_or(Path::new(crate::qemu::DEFAULT_BINARY))
    }

    /// Memory in whole MiB, rounded up.
    pub fn memory_mib(&self) -> u64 {
        self.memory_bytes.div_ceil(MIB)
    }

    /// The card's address: the given one, else a locally administered one made from the name.
    pub fn mac(&self) -> String {
        if let Some(mac) = &self.mac_address {
            return mac.to_ascii_lowercase();
        }
        // FNV-1a: stable across versions, which std's hasher does not promise.
        let hash = self
            .name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        let [a, b, c, ..] = hash.to_be_bytes();
        format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
    }

    /// Whether the machine type is of the old PC family, which has IDE and no PCI Express.
    pub fn is_i440fx(&self) -> bool {
        self.machine_type == "pc" || self.machine_type.starts_with("pc-i440fx")
    }

    /// Refuses what QEMU could not do or would misread. [`crate::Qemu::start`] calls it.
    pub fn check(&self) -> Result<(), DefinitionError> {
        if self.name.is_empty() || self.name.len() > MAX_NAME || self.name.chars().any(char::is_control) {
            return Err(DefinitionError::Name { name: self.name.clone() });
        }
        if self.memory_bytes < MIB {
            return Err(DefinitionError::Memory { bytes: self.memory_bytes });
        }
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return Err(DefinitionError::Cpus { cpus: self.cpus });
        }
        let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
        if self.machine_type.is_empty() || !self.machine_type.chars().all(word) {
            return Err(DefinitionError::MachineType { machine_type: self.machine_type.clone() });
        }
        if let Some(cpu_model) = &self.cpu_model {
            // A model may be followed by features: `Skylake-Client,-hle,+avx`.
            let word = |c: char| word(c) || matches!(c, ',' | '=');
            if cpu_model.is_empty() || !cpu_model.starts_with(char::is_alphanumeric) || !cpu_model.chars().all(word) {
                return Err(DefinitionError::CpuModel { cpu_model: cpu_model.clone() });
            }
        }
        match &self.display {
            Display::VncPort(port) if *port < VNC_PORT_MIN => return Err(DefinitionError::VncPort { port: *port }),
            Display::VncSocket(path) => check_socket(path)?,
            Display::None | Display::VncPort(_) => {}
        }
        self.check_disks()?;
        self.check_network()?;
        let files = &self.files;
        for path in [&files.console, &files.log, &files.pid, &files.uefi_vars] {
            check_path(path)?;
        }
        for path in [&files.qmp, &files.control(), &files.guest_agent] {
            check_socket(path)?;
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), DefinitionError> {
        if self.disks.len() > MAX_DISKS {
            return Err(DefinitionError::TooManyDisks { count: self.disks.len(), bus: Bus::VirtioBlk, max: MAX_DISKS });
        }
        let on_ide = self.disks.iter().filter(|disk| disk.bus == Bus::Ide).count();
        if on_ide > 0 && !self.is_i440fx() {
            return Err(DefinitionError::NoIde { machine_type: self.machine_type.clone() });
        }
        if on_ide > 4 {
            return Err(DefinitionError::TooManyDisks { count: on_ide, bus: Bus::Ide, max: 4 });
        }
        for disk in &self.disks {
            match &disk.source {
                DiskSource::Export { socket, export } => {
                    check_socket(socket)?;
                    check_export(export)?;
                }
                DiskSource::Remote { export, .. } => check_export(export)?,
                DiskSource::Raw(path) | DiskSource::Qcow2(path) | DiskSource::Device(path) => check_path(path)?,
            }
        }
        Ok(())
    }

    fn check_network(&self) -> Result<(), DefinitionError> {
        if let Network::Bridge(bridge) = &self.network {
            // Linux: an interface's name has at most 15 bytes, no slash, no space, and is not a dot directory.
            let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
            if bridge.is_empty() || bridge.len() > 15 || bridge.starts_with('.') || bridge.chars().any(bad) {
                return Err(DefinitionError::Bridge { bridge: bridge.clone() });
            }
        }
        if let Some(mac) = &self.mac_address {
            let bytes: Option<Vec<u8>> = mac
                .split(':')
                .map(|part| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+')))
                .collect();
            if !bytes.is_some_and(|bytes| bytes.len() == 6 && bytes.first().is_some_and(|first| first & 1 == 0)) {
                return Err(DefinitionError::Mac { mac: mac.clone() });
            }
        }
        Ok(())
    }
}

fn check_export(export: &str) -> Result<(), DefinitionError> {
    if export.len() > 4096 || export.contains('\0') {
        return Err(DefinitionError::Export { export: export.to_owned() });
    }
    Ok(())
}

fn check_path(path: &Path) -> Result<(), DefinitionError> {
    if !path.is_absolute() {
        return Err(DefinitionError::RelativePath { path: path.to_owned() });
    }
    match path.to_str() {
        Some(text) if !text.chars().any(char::is_control) => Ok(()),
        _ => Err(DefinitionError::UnprintablePath { path: path.to_owned() }),
    }
}

fn check_socket(path: &Path) -> Result<(), DefinitionError> {
    check_path(path)?;
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return Err(DefinitionError::SocketPathTooLong { path: path.to_owned(), length });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
