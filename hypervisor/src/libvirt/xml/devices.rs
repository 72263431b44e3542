//! The devices of a recast domain: what would reach into the host, or collide with the original, is changed or left out.

use super::recast::{Macs, Network, Recast};
use super::tree::{Element, XmlError};
use super::{set_source, target_of};

/// Devices of the host, or shared with others, that a recovery does not touch.
const LEFT_OUT: [(&str, &str); 10] = [
    ("hostdev", "a device of the host"),
    ("filesystem", "a shared folder"),
    ("parallel", "a parallel port"),
    ("smartcard", "a smart card"),
    ("redirdev", "a redirected USB device"),
    ("shmem", "shared memory"),
    ("lease", "a disk lease"),
    ("nvram", "NVRAM of another architecture"),
    ("hub", "a USB hub"),
    ("crypto", "a crypto device"),
];

pub(super) fn recast(devices: &mut Element, how: &Recast<'_>, changes: &mut Vec<String>) -> Result<(), XmlError> {
    devices.retain(|device| {
        let Some((_, what)) = LEFT_OUT.iter().find(|(name, _)| *name == device.name) else { return true };
        changes.push(format!("{what} is left out"));
        false
    });
    if devices.child("emulator").is_some_and(|emulator| !(how.has_program)(&emulator.text())) {
        devices.remove("emulator");
        changes.push("its emulator is not installed here, libvirt's own choice is taken".to_owned());
    }
    disks(devices, how, changes)?;
    interfaces(devices, how, changes);
    consoles(devices, how.console);
    graphics(devices);
    for device in devices.elements_mut() {
        match device.name.as_str() {
            "vsock" => {
                *device = Element::new("vsock").with("model", "virtio").holding(Element::new("cid").with("auto", "yes"))
            }
            "audio" => device.set("type", "none"),
            _ => {}
        }
    }
    devices.retain(|device| {
        let host_backed = |what: &str, changes: &mut Vec<String>| {
            changes.push(format!("{what} is left out"));
            false
        };
        let backend = |name: &str| device.child("backend").and_then(|backend| backend.attribute(name));
        match device.name.as_str() {
            "tpm" if backend("type") == Some("passthrough") => host_backed("the host's TPM", changes),
            "tpm" => {
                changes.push("its TPM begins empty".to_owned());
                true
            }
            "rng" if backend("model") == Some("egd") => host_backed("a source of randomness", changes),
            "memory" if device.child("source").is_some_and(|source| source.child("path").is_some()) => {
                host_backed("persistent memory", changes)
            }
            "input" if device.child("source").is_some() => host_backed("an input device of the host", changes),
            _ => true,
        }
    });
    Ok(())
}

fn disks(devices: &mut Element, how: &Recast<'_>, changes: &mut Vec<String>) -> Result<(), XmlError> {
    let wanted = |disk: &Element| how.disks.iter().find(|(target, _)| target_of(disk) == Some(target.as_str()));
    for disk in devices.elements_mut().filter(|device| device.name == "disk") {
        if !matches!(disk.attribute("device"), Some("cdrom" | "floppy"))
            && let Some((_, source)) = wanted(disk)
        {
            set_source(disk, source);
        }
    }
    devices.retain(|device| {
        let removable = matches!(device.attribute("device"), Some("cdrom" | "floppy"));
        if device.name != "disk" || removable || wanted(device).is_some() {
            return true;
        }
        changes.push(format!(
            "disk {} is left out, the recovery point does not hold it",
            target_of(device).unwrap_or("?")
        ));
        false
    });
    for drive in devices.elements_mut().filter(|device| device.name == "disk") {
        if !matches!(drive.attribute("device"), Some("cdrom" | "floppy")) {
            continue;
        }
        if drive.child("source").is_some() {
            changes.push(format!("the medium in {} is ejected", target_of(drive).unwrap_or("a drive")));
        }
        for gone in ["source", "backingStore", "mirror", "auth", "encryption"] {
            drive.remove(gone);
        }
        drive.set("type", "file");
        drive.replace(Element::new("driver").with("name", "qemu").with("type", "raw"));
    }
    let found =
        |target: &str| devices.elements().any(|device| device.name == "disk" && target_of(device) == Some(target));
    if how.disks.iter().all(|(target, _)| found(target)) { Ok(()) } else { Err(XmlError::Missing { what: "disk" }) }
}

fn interfaces(devices: &mut Element, how: &Recast<'_>, changes: &mut Vec<String>) {
    let mut cards = 0;
    devices.retain(|device| {
        if device.name != "interface" {
            return true;
        }
        cards += 1;
        let kind = device.attribute("type").unwrap_or_default();
        let why = match how.network {
            Network::None => "as no network was asked for",
            Network::User | Network::Bridge(_) if cards > 1 => "only the first is kept",
            Network::User | Network::Bridge(_) => return true,
            // These take hold of a device of the host, or of an address that the original has.
            Network::Original
                if matches!(
                    kind,
                    "direct" | "hostdev" | "vhostuser" | "vdpa" | "server" | "client" | "mcast" | "udp"
                ) =>
            {
                "as it takes hold of the host's own"
            }
            Network::Original => return true,
        };
        changes.push(format!("network card {cards} ({kind}) is left out, {why}"));
        false
    });
    let mut first = true;
    for card in devices.elements_mut().filter(|device| device.name == "interface") {
        for gone in ["target", "guest", "portForward"] {
            card.remove(gone);
        }
        let address = match &how.macs {
            Macs::Keep => None,
            Macs::First(address) if first => Some(address.clone()),
            Macs::Fresh | Macs::First(_) => {
                let [a, b, c, ..] = (how.random)();
                Some(format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"))
            }
        };
        first = false;
        if let Some(address) = address {
            card.replace(Element::new("mac").with("address", address));
        }
        let (kind, source) = match &how.network {
            Network::User => ("user", None),
            Network::Bridge(bridge) => ("bridge", Some(Element::new("source").with("bridge", bridge))),
            Network::None | Network::Original => {
                if let Some(source) = card.child_mut("source") {
                    // Given out by libvirt while the original ran.
                    source.attributes.retain(|(name, _)| !matches!(name.as_str(), "portid" | "actualtype"));
                }
                continue;
            }
        };
        for gone in ["source", "virtualport", "vlan", "filterref", "bandwidth", "backend", "ip", "route", "script"] {
            card.remove(gone);
        }
        if let Some(driver) = card.child_mut("driver") {
            driver.attributes.retain(|(name, _)| name != "name" && name != "queues");
        }
        card.set("type", kind);
        if let Some(source) = source {
            card.replace(source);
        }
    }
}

fn consoles(devices: &mut Element, console: &str) {
    // The console of the first serial port is the port itself, and libvirt adds it.
    devices.retain(|device| {
        let target = device.child("target").and_then(|target| target.attribute("type"));
        device.name != "console" || !matches!(target, None | Some("serial"))
    });
    let mut first = true;
    for device in devices.elements_mut() {
        match device.name.as_str() {
            "serial" if first => {
                first = false;
                make_pty(device);
                device.set("type", "file");
                device.replace(Element::new("source").with("path", console).with("append", "on"));
            }
            "serial" | "console" => make_pty(device),
            "channel" if device.attribute("type") != Some("spicevmc") => {
                for gone in ["source", "protocol", "log"] {
                    device.remove(gone);
                }
                device.set("type", "unix");
                if let Some(target) = device.child_mut("target") {
                    target.attributes.retain(|(name, _)| name != "state");
                }
            }
            _ => {}
        }
    }
    if first {
        let source = Element::new("source").with("path", console).with("append", "on");
        devices.children.push(super::Node::Element(Element::new("serial").with("type", "file").holding(source)));
    }
}

/// A character device that ends in a terminal, which needs nothing of the host.
pub(super) fn make_pty(device: &mut Element) {
    for gone in ["source", "protocol", "log"] {
        device.remove(gone);
    }
    device.attributes.retain(|(name, _)| name != "tty");
    device.set("type", "pty");
}

/// Screens are shown on this host alone, on a free port, without the original's password.
fn graphics(devices: &mut Element) {
    for screen in devices.elements_mut().filter(|device| device.name == "graphics") {
        screen.attributes.retain(|(name, _)| matches!(name.as_str(), "type" | "keymap"));
        screen.remove("listen");
        if matches!(screen.attribute("type"), Some("vnc" | "spice" | "rdp")) {
            screen.set("port", "-1");
            screen.set("autoport", "yes");
            screen.set("listen", "127.0.0.1");
            screen.children.push(super::Node::Element(
                Element::new("listen").with("type", "address").with("address", "127.0.0.1"),
            ));
        }
        screen.remove("gl");
    }
    devices.retain(|device| device.name != "graphics" || matches!(device.attribute("type"), Some("vnc" | "spice")));
    if !devices.elements().any(|device| device.name == "graphics" && device.attribute("type") == Some("spice")) {
        devices.retain(|device| device.name != "channel" || device.attribute("type") != Some("spicevmc"));
    }
}
