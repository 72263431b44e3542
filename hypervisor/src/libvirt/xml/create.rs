//! A domain made from a machine definition, for recovery points that hold no captured one.

use super::tree::Element;
use super::{Node, set_source};
use crate::definition::{Bus, Display, Firmware, MachineDefinition, Network};

/// The target of the disk at `index` of a created domain: `vda`, `sdb`...
pub fn target(bus: Bus, index: usize) -> String {
    let prefix = match bus {
        Bus::VirtioBlk => "vd",
        // NVMe came to libvirt late; what boots from it knows SATA.
        Bus::VirtioScsi | Bus::Sata | Bus::Nvme => "sd",
        Bus::Ide => "hd",
    };
    // Like columns of a spreadsheet: a to z, then aa.
    let mut letters = Vec::new();
    let mut left = index + 1;
    while left > 0 {
        letters.push(char::from(b'a' + u8::try_from((left - 1) % 26).unwrap_or_default()));
        left = (left - 1) / 26;
    }
    prefix.chars().chain(letters.into_iter().rev()).collect()
}

/// The description of the domain. Its disks' targets are those of [`target`], in order.
pub fn create(machine: &MachineDefinition, uuid: &str, uefi_vars: Option<&str>) -> String {
    let text = |name: &str, words: String| Element::new(name).saying(words);
    let kind = Element::new("type").with("arch", "x86_64").with("machine", machine.machine_type.as_str()).saying("hvm");
    let mut os = Element::new("os").holding(kind);
    if machine.firmware == Firmware::Uefi {
        os.set("firmware", "efi");
        let off = |name: &str| Element::new("feature").with("enabled", "no").with("name", name);
        os.children
            .push(Node::Element(Element::new("firmware").holding(off("secure-boot")).holding(off("enrolled-keys"))));
        if let Some(path) = uefi_vars {
            os.children.push(Node::Element(text("nvram", path.to_owned())));
        }
    }
    let cpu = match machine.cpu_model.as_deref().and_then(|model| model.split(',').next()) {
        None | Some("host") => Element::new("cpu").with("mode", "host-passthrough"),
        Some("max") => Element::new("cpu").with("mode", "maximum"),
        Some(model) => {
            Element::new("cpu").with("mode", "custom").with("match", "exact").holding(text("model", model.to_owned()))
        }
    };
    Element::new("domain")
        .with("type", "kvm")
        .holding(text("name", machine.name.clone()))
        .holding(text("uuid", uuid.to_owned()))
        .holding(Element::new("memory").with("unit", "MiB").saying(machine.memory_mib().to_string()))
        .holding(text("vcpu", machine.cpus.to_string()))
        .holding(os)
        .holding(Element::new("features").holding(Element::new("acpi")).holding(Element::new("apic")))
        .holding(cpu)
        .holding(Element::new("clock").with("offset", "utc"))
        .holding(devices(machine))
        .to_xml()
}

fn devices(machine: &MachineDefinition) -> Element {
    let mut devices = Element::new("devices");
    if let Some(binary) = machine.binary.as_deref().filter(|binary| binary.is_absolute()) {
        devices = devices.holding(Element::new("emulator").saying(binary.to_string_lossy()));
    }
    let mut scsi = false;
    for (index, disk) in machine.disks.iter().enumerate() {
        let bus = match disk.bus {
            Bus::VirtioBlk => "virtio",
            Bus::VirtioScsi => "scsi",
            Bus::Sata | Bus::Nvme => "sata",
            Bus::Ide => "ide",
        };
        if disk.bus == Bus::VirtioScsi && !scsi {
            scsi = true;
            devices = devices.holding(
                Element::new("controller").with("type", "scsi").with("index", "0").with("model", "virtio-scsi"),
            );
        }
        let mut element = Element::new("disk")
            .holding(Element::new("target").with("dev", target(disk.bus, index)).with("bus", bus))
            .holding(Element::new("serial").saying(crate::qemu::command_line::serial(&disk.name)))
            .holding(Element::new("boot").with("order", (index + 1).to_string()));
        set_source(&mut element, &disk.source);
        devices = devices.holding(element);
    }
    let card = |kind: &str| {
        Element::new("interface")
            .with("type", kind)
            .holding(Element::new("mac").with("address", machine.mac()))
            .holding(Element::new("model").with("type", machine.card.to_string()))
    };
    devices = match &machine.network {
        Network::None => devices,
        Network::User => devices.holding(card("user")),
        // libvirt cannot close QEMU's address translation; a card whose cable is out is as isolated.
        Network::Isolated => devices.holding(card("user").holding(Element::new("link").with("state", "down"))),
        Network::Bridge(bridge) => {
            devices.holding(card("bridge").holding(Element::new("source").with("bridge", bridge.as_str())))
        }
    };
    let console = Element::new("source").with("path", machine.files.console.to_string_lossy()).with("append", "on");
    let agent = Element::new("target").with("type", "virtio").with("name", "org.qemu.guest_agent.0");
    let random = Element::new("backend").with("model", "random").saying("/dev/urandom");
    let listen = |kind: &str| Element::new("listen").with("type", kind);
    let screen = Element::new("graphics").with("type", "vnc");
    devices = match &machine.display {
        Display::None => devices,
        Display::VncSocket(path) => {
            devices.holding(screen.holding(listen("socket").with("socket", path.to_string_lossy())))
        }
        Display::VncPort(port) => devices.holding(
            screen
                .with("port", port.to_string())
                .with("autoport", "no")
                .holding(listen("address").with("address", "127.0.0.1")),
        ),
    };
    devices
        .holding(Element::new("serial").with("type", "file").holding(console))
        .holding(Element::new("channel").with("type", "unix").holding(agent))
        .holding(Element::new("rng").with("model", "virtio").holding(random))
        .holding(Element::new("video").holding(Element::new("model").with("type", "vga")))
        .holding(Element::new("memballoon").with("model", "none"))
}
