//! QEMU's command line, from a checked definition. Pure.
//!
//! What the choices mean for a guest whose disks are served by a process that may be restarted:
//!
//! - `reconnect-delay`: when the NBD connection breaks, requests wait that many seconds while QEMU tries again (after
//!   1, 2, 4, 8 and then every 16 seconds); only then do they fail. QEMU takes up to 2^32-1; the price of a large value is that
//!   commands which drain a disk (`stop`, `quit`) hang as long, so it is a day and not for ever, and [`super::Qemu::quit`] ends
//!   in SIGKILL. Guests give up on SATA and IDE requests by themselves (Linux after 30 s), so there the machine is
//!   paused before: its clock stands still and it never notices.
//! - `werror`, `rerror`: with [`ErrorPolicy::Pause`] a failed request pauses the machine and `cont` repeats it.
//!   `enospc` does so only when space ran out. QEMU's NVMe controller has neither: the guest is told of every error. Its
//!   requests wait as long as virtio's all the same: a Linux guest that loses patience (after 30 s) resets the controller,
//!   QEMU answers that only when the requests are done, and nothing is lost.
//! - `discard=unmap`, `detect-zeroes=unmap`: what the guest trims or fills with zeroes takes no room in the overlay.

use std::ffi::OsString;
use std::path::Path;

use serde_json::{Value, json};

use crate::definition::{Bus, Card, DiskSource, Display, ErrorPolicy, MachineDefinition, Network, VNC_PORT_MIN};

/// Seconds a virtio request waits for the export to come back.
pub const RECONNECT_DELAY_VIRTIO: u32 = 86_400;
/// Seconds a SATA or IDE request waits: less than the 30 after which a Linux guest aborts it.
pub const RECONNECT_DELAY_ATA: u32 = 20;
const AHCI_PORTS: usize = 6;
/// `VIRTIO_BLK_ID_BYTES`; SATA has the same limit, SCSI a larger one.
const MAX_SERIAL: usize = 20;

/// What was found out about the host before the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// KVM, else TCG.
    pub kvm: bool,
    /// The firmware's code, for a UEFI machine.
    pub uefi_code: Option<std::path::PathBuf>,
    /// Install QEMU's system call filter.
    pub sandbox: bool,
    /// Whether the machine outlives us.
    pub lifetime: Lifetime,
}

/// How long a machine lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// In the background, in a session of its own.
    Detached,
    /// As a child that ends with the thread that started it.
    Attached,
}

/// The arguments, without the program.
pub fn arguments(machine: &MachineDefinition, launch: &Launch) -> Vec<OsString> {
    let mut line = Line::default();
    line.add("-name", format!("guest={},debug-threads=on", escape(&machine.name)));
    line.flags(&["-no-user-config", "-nodefaults"]);
    line.add("-display", "none");
    match &machine.display {
        Display::None => {}
        Display::VncSocket(path) => line.add("-vnc", format!("unix:{}", escape(&text(path)))),
        Display::VncPort(port) => line.add("-vnc", format!("127.0.0.1:{}", port.saturating_sub(VNC_PORT_MIN))),
    }
    if launch.sandbox {
        // Going to the background needs fork and setsid, which spawn=deny and elevateprivileges=deny forbid.
        let more = match launch.lifetime {
            Lifetime::Detached => "",
            Lifetime::Attached => ",spawn=deny,elevateprivileges=deny",
        };
        line.add("-sandbox", format!("on,obsolete=deny,resourcecontrol=deny{more}"));
    }
    let flash = if launch.uefi_code.is_some() { ",pflash0=uefi-code,pflash1=uefi-vars" } else { "" };
    line.add("-machine", format!("{}{flash}", machine.machine_type));
    if launch.kvm {
        line.add("-accel", "kvm");
    } else {
        line.add("-accel", "tcg,thread=multi");
    }
    let best = if launch.kvm { "host" } else { "max" };
    // Only KVM has the host's processor.
    let model = machine.cpu_model.as_deref().filter(|model| *model != "host");
    line.add("-cpu", model.unwrap_or(best));
    line.add("-smp", machine.cpus.to_string());
    line.add("-m", format!("{}M", machine.memory_mib()));
    line.add("-rtc", "base=utc");
    line.add("-boot", "strict=on");
    channels(machine, &mut line);
    if let Some(code) = &launch.uefi_code {
        flash_drives(code, &machine.files.uefi_vars, &mut line);
    }
    disks(machine, &mut line);
    network(machine, &mut line);
    line.add("-object", "rng-random,id=rng0,filename=/dev/urandom");
    line.add("-device", "virtio-rng-pci,rng=rng0");
    line.add("-device", "VGA,id=video0");
    line.add("-msg", "timestamp=on");
    if launch.lifetime == Lifetime::Detached {
        // In the background QEMU keeps its error output only while some log item is on; this one never logs by itself.
        line.add("-d", "strace");
        line.add("-D", text(&machine.files.log));
    }
    if launch.lifetime == Lifetime::Attached {
        // Where SeaBIOS says what it does; and a guest that powers itself off leaves its screen to be looked at.
        let path = escape(&text(&machine.files.firmware_log()));
        line.add("-chardev", format!("file,id=firmware0,path={path}"));
        line.add("-device", "isa-debugcon,iobase=0x402,chardev=firmware0");
        line.flags(&["-no-shutdown"]);
    }
    line.add("-pidfile", text(&machine.files.pid));
    if launch.lifetime == Lifetime::Detached {
        line.flags(&["-daemonize"]);
    }
    line.arguments
}

fn channels(machine: &MachineDefinition, line: &mut Line) {
    let files = &machine.files;
    for (id, path) in [("control0", files.control()), ("qmp0", files.qmp.clone())] {
        line.add("-chardev", format!("socket,id={id},path={},server=on,wait=off", escape(&text(&path))));
        line.add("-mon", format!("chardev={id},mode=control"));
    }
    line.add("-chardev", format!("file,id=console0,path={},append=on", escape(&text(&files.console))));
    line.add("-device", "isa-serial,chardev=console0");
    line.add("-chardev", format!("socket,id=agent0,path={},server=on,wait=off", escape(&text(&files.guest_agent))));
    line.add("-device", "virtio-serial-pci,id=channels0");
    line.add("-device", "virtserialport,bus=channels0.0,chardev=agent0,name=org.qemu.guest_agent.0");
}

fn flash_drives(code: &Path, variables: &Path, line: &mut Line) {
    for (node, path, read_only) in [("uefi-code", code, true), ("uefi-vars", variables, false)] {
        let file = json!({ "driver": "file", "filename": text(path) });
        let drive = json!({ "driver": "raw", "node-name": node, "read-only": read_only, "file": file });
        line.add("-blockdev", drive.to_string());
    }
}

/// The block node of a disk, as `-blockdev` and `blockdev-add` take it. `reconnect` is how many seconds requests wait for
/// an export that is away.
pub(super) fn block_node(name: &str, source: &DiskSource, reconnect: u32) -> Value {
    let mut node = match source {
        DiskSource::Export { socket, export } => json!({
            "driver": "nbd", "server": { "type": "unix", "path": text(socket) }, "export": export,
            "reconnect-delay": reconnect,
        }),
        DiskSource::Remote { host, port, export, .. } => json!({
            "driver": "nbd", "server": { "type": "inet", "host": host, "port": port.to_string() }, "export": export,
            "reconnect-delay": reconnect,
        }),
        DiskSource::Raw(path) => json!({ "driver": "raw", "file": file("file", path) }),
        DiskSource::Device(path) => json!({ "driver": "raw", "file": file("host_device", path) }),
        DiskSource::Qcow2(path) => json!({ "driver": "qcow2", "file": file("file", path) }),
    };
    for (key, value) in [("node-name", name), ("discard", "unmap"), ("detect-zeroes", "unmap")] {
        node[key] = json!(value);
    }
    node
}

/// Whether a disk is reached through an NBD server.
pub(super) fn is_network(source: &DiskSource) -> bool {
    match source {
        DiskSource::Export { .. } | DiskSource::Remote { .. } => true,
        DiskSource::Raw(_) | DiskSource::Device(_) | DiskSource::Qcow2(_) => false,
    }
}

fn file(driver: &str, path: &Path) -> Value {
    json!({ "driver": driver, "filename": text(path), "discard": "unmap" })
}

fn disks(machine: &MachineDefinition, line: &mut Line) {
    let (stop_write, stop_read) = match machine.errors {
        ErrorPolicy::Pause => ("stop", "stop"),
        ErrorPolicy::Report => ("enospc", "report"),
    };
    if machine.disks.iter().any(|disk| disk.bus == Bus::VirtioScsi) {
        line.add("-device", "virtio-scsi-pci,id=scsi0");
    }
    let (mut scsi, mut sata, mut ide) = (0, 0, 0);
    for (index, disk) in machine.disks.iter().enumerate() {
        let reconnect = match disk.bus {
            Bus::VirtioBlk | Bus::VirtioScsi | Bus::Nvme => RECONNECT_DELAY_VIRTIO,
            Bus::Sata | Bus::Ide => RECONNECT_DELAY_ATA,
        };
        let drive = block_node(&format!("disk{index}"), &disk.source, reconnect);
        line.add("-blockdev", drive.to_string());
        let device = match disk.bus {
            Bus::VirtioBlk => "virtio-blk-pci".to_owned(),
            Bus::VirtioScsi => {
                scsi += 1;
                format!("scsi-hd,bus=scsi0.0,scsi-id={}", scsi - 1)
            }
            Bus::Sata => {
                let (controller, port) = (sata / AHCI_PORTS, sata % AHCI_PORTS);
                if port == 0 {
                    line.add("-device", format!("ich9-ahci,id=sata{controller}"));
                }
                sata += 1;
                format!("ide-hd,bus=sata{controller}.{port}")
            }
            Bus::Ide => {
                ide += 1;
                format!("ide-hd,bus=ide.{},unit={}", (ide - 1) / 2, (ide - 1) % 2)
            }
            Bus::Nvme => "nvme".to_owned(),
        };
        let serial = match (serial(&disk.name), disk.bus) {
            // A controller does not start without one.
            (none, Bus::Nvme) if none.is_empty() => format!(",serial=disk{index}"),
            (none, _) if none.is_empty() => none,
            (serial, _) => format!(",serial={serial}"),
        };
        let errors = match disk.bus {
            Bus::Nvme => String::new(),
            _ => format!(",werror={stop_write},rerror={stop_read}"),
        };
        let boot = index + 1;
        line.add("-device", format!("{device},id=device{index},drive=disk{index},bootindex={boot}{serial}{errors}"));
    }
}

fn network(machine: &MachineDefinition, line: &mut Line) {
    let backend = match &machine.network {
        Network::None => return,
        Network::User => "user,id=net0".to_owned(),
        Network::Isolated => "user,id=net0,restrict=on".to_owned(),
        Network::Bridge(bridge) => format!("bridge,id=net0,br={}", escape(bridge)),
    };
    line.add("-netdev", backend);
    // No boot code from the card: a recovery boots from its disks.
    let card = match machine.card {
        Card::Virtio => "virtio-net-pci",
        Card::E1000e => "e1000e",
        Card::E1000 => "e1000",
        Card::Rtl8139 => "rtl8139",
    };
    line.add("-device", format!("{card},netdev=net0,mac={},romfile=", machine.mac()));
}

/// What of a disk's name can be a serial number everywhere.
pub(crate) fn serial(name: &str) -> String {
    name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')).take(MAX_SERIAL).collect()
}

/// A comma ends a value in QEMU's option syntax unless it is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// Paths were checked to be UTF-8; anything else would have been refused before.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[derive(Default)]
struct Line {
    arguments: Vec<OsString>,
}

impl Line {
    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.arguments.push(option.into());
        self.arguments.push(value.into());
    }

    fn flags(&mut self, flags: &[&str]) {
        self.arguments.extend(flags.iter().map(OsString::from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::definition::{MachineDisk, MachineFiles};

    fn machine(buses: &[Bus]) -> MachineDefinition {
        let mut machine = MachineDefinition::new("web,01", MachineFiles::in_folder(Path::new("/run/lb/web,01")));
        machine.memory_bytes = 2 << 30;
        machine.cpus = 2;
        machine.mac_address = Some("52:54:00:00:00:01".to_owned());
        machine.disks = buses
            .iter()
            .enumerate()
            .map(|(index, bus)| MachineDisk {
                name: format!("root disk/{index}"),
                source: DiskSource::Export {
                    socket: "/run/lb/nbd.sock".into(),
                    export: format!("web01/\"disk\"{index}"),
                },
                bus: *bus,
            })
            .collect();
        machine
    }

    fn line(machine: &MachineDefinition, launch: &Launch) -> String {
        let mut text = String::new();
        for argument in arguments(machine, launch) {
            let argument = argument.to_string_lossy();
            let separator = if argument.starts_with('-') && !text.is_empty() { "\n" } else { " " };
            text.push_str(if text.is_empty() { "" } else { separator });
            text.push_str(&argument);
        }
        text
    }

    const TCG: Launch = Launch { kvm: false, uefi_code: None, sandbox: true, lifetime: Lifetime::Detached };

    #[test]
    fn the_whole_line_of_a_usual_machine() {
        let expected = r#"-name guest=web,,01,debug-threads=on
-no-user-config
-nodefaults
-display none
-sandbox on,obsolete=deny,resourcecontrol=deny
-machine q35
-accel tcg,thread=multi
-cpu max
-smp 2
-m 2048M
-rtc base=utc
-boot strict=on
-chardev socket,id=control0,path=/run/lb/web,,01/qmp.sock.ctl,server=on,wait=off
-mon chardev=control0,mode=control
-chardev socket,id=qmp0,path=/run/lb/web,,01/qmp.sock,server=on,wait=off
-mon chardev=qmp0,mode=control
-chardev file,id=console0,path=/run/lb/web,,01/console.log,append=on
-device isa-serial,chardev=console0
-chardev socket,id=agent0,path=/run/lb/web,,01/agent.sock,server=on,wait=off
-device virtio-serial-pci,id=channels0
-device virtserialport,bus=channels0.0,chardev=agent0,name=org.qemu.guest_agent.0
-blockdev {"detect-zeroes":"unmap","discard":"unmap","driver":"nbd","export":"web01/\"disk\"0","node-name":"disk0","reconnect-delay":86400,"server":{"path":"/run/lb/nbd.sock","type":"unix"}}
-device virtio-blk-pci,id=device0,drive=disk0,bootindex=1,serial=rootdisk0,werror=stop,rerror=stop
-object rng-random,id=rng0,filename=/dev/urandom
-device virtio-rng-pci,rng=rng0
-device VGA,id=video0
-msg timestamp=on
-d strace
-D /run/lb/web,01/qemu.log
-pidfile /run/lb/web,01/qemu.pid
-daemonize"#;
        assert_eq!(line(&machine(&[Bus::VirtioBlk]), &TCG), expected);
    }

    #[test]
    fn an_attached_machine_stays_in_the_foreground_and_starts_nothing() {
        let text = line(&machine(&[]), &Launch { lifetime: Lifetime::Attached, ..TCG });
        assert!(text.contains("resourcecontrol=deny,spawn=deny,elevateprivileges=deny\n"), "{text}");
        assert!(text.contains("\n-chardev file,id=firmware0,path=/run/lb/web,,01/firmware.log\n"), "{text}");
        assert!(text.ends_with("-pidfile /run/lb/web,01/qemu.pid"), "{text}");
    }

    #[test]
    fn kvm_uses_the_host_processor() {
        let text = line(&machine(&[]), &Launch { kvm: true, ..TCG });
        assert!(text.contains("-accel kvm\n-cpu host\n"), "{text}");
    }

    #[test]
    fn a_uefi_machine_has_two_flash_drives() {
        let mut machine = machine(&[Bus::VirtioBlk]);
        machine.files.uefi_vars = "/v/vars.fd".into();
        let text = line(&machine, &Launch { uefi_code: Some("/f/CODE.fd".into()), ..TCG });
        assert!(text.contains("-machine q35,pflash0=uefi-code,pflash1=uefi-vars\n"), "{text}");
        assert!(text.contains(r#"{"driver":"raw","file":{"driver":"file","filename":"/f/CODE.fd"},"node-name":"uefi-code","read-only":true}"#), "{text}");
        assert!(text.contains(r#""filename":"/v/vars.fd"},"node-name":"uefi-vars","read-only":false}"#), "{text}");
    }

    #[test]
    fn every_bus_gets_its_controller_and_its_patience() {
        let mut buses = vec![Bus::Ide, Bus::Ide, Bus::Ide, Bus::VirtioScsi, Bus::VirtioScsi];
        buses.extend([Bus::Sata; 7]);
        let mut machine = machine(&buses);
        machine.machine_type = "pc".to_owned();
        machine.check().expect("the old machine has all these");
        let text = line(&machine, &TCG);
        for part in [
            "-device ide-hd,bus=ide.0,unit=1,id=device1,drive=disk1,bootindex=2,",
            "-device ide-hd,bus=ide.1,unit=0,id=device2,",
            "-device scsi-hd,bus=scsi0.0,scsi-id=1,id=device4,",
            "-device ide-hd,bus=sata0.5,id=device10,",
            "-device ich9-ahci,id=sata1\n-device ide-hd,bus=sata1.0,id=device11,",
            r#""node-name":"disk0","reconnect-delay":20,"#,
            r#""node-name":"disk3","reconnect-delay":86400,"#,
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert_eq!(text.matches("virtio-scsi-pci").count(), 1);
    }

    #[test]
    fn an_nvme_disk_has_a_serial_number_and_no_error_policy() {
        let mut machine = machine(&[Bus::Nvme, Bus::Nvme]);
        machine.disks[1].name = "/".to_owned();
        let text = line(&machine, &TCG);
        assert!(text.contains("-device nvme,id=device0,drive=disk0,bootindex=1,serial=rootdisk0\n"), "{text}");
        assert!(text.contains("-device nvme,id=device1,drive=disk1,bootindex=2,serial=disk1\n"), "{text}");
        assert!(text.contains(r#""node-name":"disk1","reconnect-delay":86400,"#), "{text}");
    }

    #[test]
    fn a_named_processor_is_taken_and_the_hosts_only_with_kvm() {
        let mut machine = machine(&[]);
        let kvm = Launch { kvm: true, ..TCG };
        for (model, launch, expected) in [
            ("host", &TCG, "-cpu max\n"),
            ("host", &kvm, "-cpu host\n"),
            ("Haswell-v4,+avx", &TCG, "-cpu Haswell-v4,+avx\n"),
            ("Haswell-v4,+avx", &kvm, "-cpu Haswell-v4,+avx\n"),
        ] {
            machine.cpu_model = Some(model.to_owned());
            machine.check().expect("a model");
            assert!(line(&machine, launch).contains(expected), "{model}");
        }
    }

    #[test]
    fn a_screen_is_shown_on_a_socket_or_on_loopback_only() {
        let mut machine = machine(&[]);
        machine.display = Display::VncSocket("/run/lb/web,01/vnc.sock".into());
        assert!(line(&machine, &TCG).contains("-vnc unix:/run/lb/web,,01/vnc.sock\n"));
        machine.display = Display::VncPort(5907);
        assert!(line(&machine, &TCG).contains("-vnc 127.0.0.1:7\n"));
        machine.display = Display::VncPort(80);
        assert!(machine.check().is_err());
    }

    #[test]
    fn without_pause_the_guest_hears_of_errors_but_not_of_missing_space() {
        let mut machine = machine(&[Bus::VirtioBlk]);
        machine.errors = ErrorPolicy::Report;
        assert!(line(&machine, &TCG).contains("werror=enospc,rerror=report"));
    }

    #[test]
    fn networks_become_a_backend_and_a_card() {
        let mut machine = machine(&[]);
        for (network, backend) in [
            (Network::User, "-netdev user,id=net0\n"),
            (Network::Isolated, "-netdev user,id=net0,restrict=on\n"),
            (Network::Bridge("br,0".into()), "-netdev bridge,id=net0,br=br,,0\n"),
        ] {
            machine.network = network;
            let text = line(&machine, &TCG);
            assert!(text.contains(backend), "{text}");
            assert!(text.contains("-device virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01,romfile=\n"), "{text}");
        }
        machine.network = Network::None;
        assert!(!line(&machine, &TCG).contains("net"));
    }

    #[test]
    fn a_serial_number_keeps_only_what_every_bus_takes() {
        assert_eq!(serial("a b,c=d/é\n_.-"), "abcd_.-");
        assert_eq!(serial(&"x".repeat(50)).len(), MAX_SERIAL);
    }
}
