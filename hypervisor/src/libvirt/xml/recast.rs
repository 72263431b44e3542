//! A captured domain made into one that can run beside the original, on a recovery's exports.

use super::devices;
use super::tree::{Element, XmlError};
use crate::definition::DiskSource;

/// What UUID a recovered domain has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uuid {
    /// A new one.
    Fresh,
    /// The original's, beside which it then cannot run.
    Keep,
}

/// What addresses its network cards have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Macs {
    /// New ones.
    Fresh,
    /// The original's, with which it then cannot be in one network.
    Keep,
    /// This for the first card, new ones for others.
    First(String),
}

/// What becomes of the network cards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// They are taken out.
    None,
    /// They stay, where they were.
    Original,
    /// The first is kept, behind QEMU's own address translation.
    User,
    /// The first is kept, on this bridge.
    Bridge(String),
}

/// How a domain is recast.
#[derive(Debug, Clone)]
pub struct Recast<'a> {
    /// Its new name.
    pub name: &'a str,
    /// Its UUID.
    pub uuid: Uuid,
    /// The addresses of its network cards.
    pub macs: Macs,
    /// Where new ones come from.
    pub random: fn() -> [u8; 16],
    /// Where the disks are that the recovery point holds, by their targets (`vda`).
    pub disks: &'a [(String, DiskSource)],
    /// The network.
    pub network: Network,
    /// The file that gets what the guest writes to its first serial port.
    pub console: &'a str,
    /// The file that keeps its UEFI variables; `None` lets libvirt choose a place.
    pub uefi_vars: Option<&'a str>,
    /// Memory in bytes, if other than the original's.
    pub memory: Option<u64>,
    /// Processors, if other than the original's.
    pub cpus: Option<u32>,
    /// Whether the host has a program of this path.
    pub has_program: fn(&str) -> bool,
}

/// A domain that can run beside the original.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recasting {
    /// Its description.
    pub xml: String,
    /// Its UUID.
    pub uuid: String,
    /// What is not as it was, for a person.
    pub changes: Vec<String>,
}

/// Makes the domain of a recovery from a captured one.
pub fn recast(captured: &str, how: &Recast<'_>) -> Result<Recasting, XmlError> {
    let mut domain = Element::parse(captured, "domain")?;
    let mut changes = Vec::new();
    let old = domain.child("uuid").map(Element::text);
    let uuid = match (how.uuid, old) {
        (Uuid::Keep, Some(uuid)) if is_uuid(&uuid) => uuid.to_ascii_lowercase(),
        (Uuid::Keep, _) => return Err(XmlError::Missing { what: "uuid" }),
        (Uuid::Fresh, _) => random_uuid((how.random)()),
    };
    domain.attributes.retain(|(name, _)| name != "id");
    // In front, where people look for them.
    for name in ["uuid", "name"] {
        domain.remove(name);
    }
    let named = [Element::new("uuid").saying(uuid.as_str()), Element::new("name").saying(how.name)];
    for element in named {
        domain.children.insert(0, super::Node::Element(element));
    }
    if let Some(generation) = domain.child_mut("genid") {
        // A guest that looks at it is to see that it was put back in time.
        *generation = Element::new("genid").saying(random_uuid((how.random)()));
    }
    outside_of_devices(&mut domain, how, &mut changes);
    let devices = domain.child_mut("devices").ok_or(XmlError::Missing { what: "devices" })?;
    devices::recast(devices, how, &mut changes)?;
    Ok(Recasting { xml: domain.to_xml(), uuid, changes })
}

fn outside_of_devices(domain: &mut Element, how: &Recast<'_>, changes: &mut Vec<String>) {
    domain.remove("resource");
    domain.remove("bootloader");
    for (name, what) in [
        ("cputune", "processors are not pinned or throttled"),
        ("numatune", "memory is not bound to NUMA nodes"),
        ("blkiotune", "disks are not throttled by the host"),
        ("qemu:commandline", "arguments passed to QEMU are left out"),
    ] {
        if domain.remove(name) {
            changes.push(what.to_owned());
        }
    }
    if let Some(backing) = domain.child_mut("memoryBacking")
        && backing.remove("hugepages")
    {
        changes.push("memory is not in huge pages".to_owned());
    }
    let labelled = domain.elements().any(|label| label.name == "seclabel" && label.attribute("type") == Some("static"));
    if domain.remove("seclabel") && labelled {
        changes.push("its fixed security label is replaced by one that libvirt chooses".to_owned());
    }
    if let Some(system) = domain.child_mut("sysinfo").and_then(|info| info.child_mut("system")) {
        // libvirt insists on it being the domain's own.
        system.retain(|entry| entry.attribute("name") != Some("uuid"));
    }
    let firmware = domain.at(&["os"]).and_then(|os| os.attribute("firmware")).map(str::to_owned);
    if let Some(os) = domain.child_mut("os") {
        let flash = os.child("loader").is_some_and(|loader| loader.attribute("type") == Some("pflash"));
        let template = os.child("nvram").and_then(|nvram| nvram.attribute("template")).map(str::to_owned);
        let had = os.remove("nvram");
        if had || flash || firmware.as_deref() == Some("efi") {
            let mut nvram = Element::new("nvram");
            if let Some(template) = template {
                nvram.set("template", template);
            }
            match how.uefi_vars {
                Some(path) => os.replace(nvram.saying(path)),
                None if nvram.attributes.is_empty() => {}
                None => os.replace(nvram),
            }
        }
    }
    if let Some(bytes) = how.memory {
        domain.remove("currentMemory");
        domain.remove("maxMemory");
        domain.replace(Element::new("memory").with("unit", "KiB").saying(bytes.div_ceil(1024).to_string()));
    }
    if let Some(cpus) = how.cpus {
        domain.remove("vcpus");
        domain.replace(Element::new("vcpu").saying(cpus.to_string()));
        if let Some(cpu) = domain.child_mut("cpu") {
            cpu.retain(|element| !matches!(element.name.as_str(), "topology" | "numa"));
        }
    }
}

/// A UUID of version 4.
pub fn random_uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut rest = hex.as_str();
    let mut parts = Vec::new();
    for length in [8, 4, 4, 4, 12] {
        let (part, after) = rest.split_at(length);
        parts.push(part);
        rest = after;
    }
    parts.join("-")
}

fn is_uuid(text: &str) -> bool {
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    lengths == [8, 4, 4, 4, 12] && text.chars().all(|c| c == '-' || c.is_ascii_hexdigit())
}
