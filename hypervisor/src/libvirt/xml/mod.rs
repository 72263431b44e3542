//! Domain descriptions: pure functions from XML to XML. What is kept, changed and dropped: docs/design/libvirt.md

mod capture;
mod create;
mod devices;
mod recast;
mod tree;

pub use self::capture::{CapturedDisk, CapturedSource, Summary, disks, summary};
pub use self::create::{create, target};
pub use self::recast::{Macs, Network, Recast, Recasting, Uuid, random_uuid, recast};
pub use self::tree::{Element, MAX_LENGTH, Node, XmlError};

use crate::definition::{DiskSource, Keep};
use crate::qemu::command_line::{RECONNECT_DELAY_ATA, RECONNECT_DELAY_VIRTIO};

/// The attributes of a disk's `<driver>` that say how the guest drives it, not where its bytes are.
const DRIVER_KEPT: [&str; 6] = ["iothread", "queues", "queue_size", "iommu", "ats", "packed"];

/// Puts other sources under a domain's disks, named by their targets (`vda`). Everything else stays.
pub fn with_sources<'a>(
    xml: &str,
    sources: impl IntoIterator<Item = (&'a str, &'a DiskSource)>,
) -> Result<String, XmlError> {
    let mut domain = Element::parse(xml, "domain")?;
    let devices = domain.child_mut("devices").ok_or(XmlError::Missing { what: "devices" })?;
    for (target, source) in sources {
        let disk = devices.elements_mut().find(|element| element.name == "disk" && target_of(element) == Some(target));
        set_source(disk.ok_or(XmlError::Missing { what: "disk" })?, source);
    }
    Ok(domain.to_xml())
}

/// A disk of a running domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDisk {
    /// It is on the source it was started on.
    pub on_source: bool,
    /// It is being copied, and the copy follows what the guest writes.
    pub copy_ready: bool,
    /// What libvirt calls the copy.
    pub copy_index: Option<u32>,
}

/// How a disk of a running domain, which was started on `source`, stands.
pub fn live_disk(xml: &str, target: &str, source: &DiskSource) -> Result<LiveDisk, XmlError> {
    let domain = Element::parse(xml, "domain")?;
    let devices = domain.child("devices").ok_or(XmlError::Missing { what: "devices" })?;
    let disk = devices.elements().find(|element| element.name == "disk" && target_of(element) == Some(target));
    let disk = disk.ok_or(XmlError::Missing { what: "disk" })?;
    let copy = disk.child("mirror").filter(|mirror| mirror.attribute("job") == Some("copy"));
    let index = copy.and_then(|copy| copy.child("source")).and_then(|source| source.attribute("index"));
    Ok(LiveDisk {
        on_source: is_source(disk, source),
        copy_ready: copy.is_some_and(|copy| copy.attribute("ready") == Some("yes")),
        copy_index: index.and_then(|index| index.parse().ok()),
    })
}

/// Whether a disk has this source.
fn is_source(disk: &Element, wanted: &DiskSource) -> bool {
    let (kind, _, wanted) = source_element(wanted, None);
    let Some(found) = disk.child("source") else { return false };
    let has = |found: &Element, wanted: &Element| {
        wanted.attributes.iter().all(|(name, value)| found.attribute(name) == Some(value.as_str()))
    };
    let host = match (found.child("host"), wanted.child("host")) {
        (Some(found), Some(wanted)) => has(found, wanted),
        (_, None) => true,
        (None, Some(_)) => false,
    };
    disk.attribute("type") == Some(kind) && has(found, &wanted) && host
}

/// What a disk of `size` bytes is copied to, as a block copy takes it.
pub fn copy_target(target: &DiskSource, size: u64) -> String {
    let (kind, format, mut source) = source_element(target, None);
    if !matches!(target, DiskSource::Raw(_) | DiskSource::Qcow2(_)) {
        // It may be larger, and the guest's disk must not grow when it moves.
        let slice = Element::new("slice").with("type", "storage").with("offset", "0").with("size", size.to_string());
        source = source.holding(Element::new("slices").holding(slice));
    }
    let driver = Element::new("driver").with("name", "qemu").with("type", format);
    Element::new("disk").with("type", kind).holding(source).holding(driver).to_xml()
}

/// Takes the console from the recovery's file, so that the domain needs nothing of the recovery any more.
pub fn without_console_file(xml: &str) -> Result<String, XmlError> {
    let mut domain = Element::parse(xml, "domain")?;
    let devices = domain.child_mut("devices").ok_or(XmlError::Missing { what: "devices" })?;
    for serial in devices.elements_mut().filter(|element| element.name == "serial") {
        devices::make_pty(serial);
    }
    devices.retain(|element| {
        element.name != "console"
            || element.child("target").and_then(|target| target.attribute("type")) != Some("serial")
    });
    Ok(domain.to_xml())
}

/// The namespace of what we note in a domain.
const NAMESPACE: &str = "urn:lifeboat:recovery";

/// Notes in the domain which recovery it is of, by the recovery's folder.
pub fn with_owner(xml: &str, folder: &str, keep: Keep) -> Result<String, XmlError> {
    let mut domain = Element::parse(xml, "domain")?;
    let mut metadata = domain.child("metadata").cloned().unwrap_or_else(|| Element::new("metadata"));
    metadata.retain(|element| element.attribute("xmlns:lifeboat") != Some(NAMESPACE));
    let mut note = Element::new("lifeboat:recovery").with("xmlns:lifeboat", NAMESPACE).with("folder", folder);
    if keep == Keep::Production {
        note.set("production", "yes");
    }
    domain.replace(metadata.holding(note));
    Ok(domain.to_xml())
}

/// The folder of the recovery that a domain is of; `None` for all that we did not make.
pub fn owner(xml: &str) -> Option<String> {
    note(xml)?.attribute("folder").map(str::to_owned)
}

/// Whether a domain has left its recovery.
pub fn is_in_production(xml: &str) -> bool {
    note(xml).is_some_and(|note| note.attribute("production") == Some("yes"))
}

fn note(xml: &str) -> Option<Element> {
    let domain = Element::parse(xml, "domain").ok()?;
    let notes = domain.child("metadata")?.elements().find(|note| {
        note.name.rsplit(':').next() == Some("recovery")
            && note.attributes.iter().any(|(name, value)| name.starts_with("xmlns") && value == NAMESPACE)
    })?;
    Some(notes.clone())
}

/// The user that QEMU runs as, from the capabilities of a libvirt that gives it one.
pub fn qemu_user(capabilities: &str) -> Option<u32> {
    let capabilities = Element::parse(capabilities, "capabilities").ok()?;
    let host = capabilities.child("host")?;
    let is_dac = |model: &&Element| model.child("model").is_some_and(|name| name.text() == "dac");
    let dac = host.elements().filter(|element| element.name == "secmodel").find(is_dac)?;
    dac.child("baselabel")?.text().split(':').next()?.trim_start_matches('+').parse().ok()
}

/// Lets KVM execute the guest, or not. What only KVM can do is dropped with it.
pub fn with_accelerator(xml: &str, kvm: bool) -> Result<String, XmlError> {
    let mut domain = Element::parse(xml, "domain")?;
    let was = domain.attribute("type").map(str::to_owned);
    domain.set("type", if kvm { "kvm" } else { "qemu" });
    if !kvm && was.as_deref() != Some("qemu") {
        if let Some(features) = domain.child_mut("features") {
            features.retain(|feature| !matches!(feature.name.as_str(), "hyperv" | "kvm" | "pvspinlock"));
        }
        if let Some(clock) = domain.child_mut("clock") {
            let only_kvm =
                |timer: &Element| matches!(timer.attribute("name"), Some("kvmclock" | "hypervclock" | "tsc"));
            clock.retain(|timer| !only_kvm(timer));
        }
        domain.replace(Element::new("cpu").with("mode", "maximum"));
    }
    Ok(domain.to_xml())
}

/// Whether KVM executes it.
pub fn uses_kvm(xml: &str) -> bool {
    Element::parse(xml, "domain").is_ok_and(|domain| domain.attribute("type") == Some("kvm"))
}

/// Memory in bytes and processors of a domain.
pub fn size(xml: &str) -> Result<(u64, u32), XmlError> {
    let domain = Element::parse(xml, "domain")?;
    let memory = domain.child("memory").ok_or(XmlError::Missing { what: "memory" })?;
    let unit: u64 = match memory.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => 1 << 10,
    };
    let memory = memory.text().parse::<u64>().ok().and_then(|count| count.checked_mul(unit));
    let cpus = domain.child("vcpu").and_then(|cpus| cpus.text().parse().ok());
    Ok((memory.ok_or(XmlError::Missing { what: "memory" })?, cpus.unwrap_or(1)))
}

/// The target a disk is known by inside its domain.
fn target_of(disk: &Element) -> Option<&str> {
    disk.child("target")?.attribute("dev")
}

fn set_source(disk: &mut Element, source: &DiskSource) {
    let virtio = disk.child("target").and_then(|target| target.attribute("bus")).is_none_or(|bus| bus == "virtio");
    let scsi = disk.child("target").and_then(|target| target.attribute("bus")) == Some("scsi");
    let reconnect = if virtio || scsi { RECONNECT_DELAY_VIRTIO } else { RECONNECT_DELAY_ATA };
    let (kind, format, element) = source_element(source, Some(reconnect));
    let mut driver = Element::new("driver").with("name", "qemu").with("type", format);
    for (name, value) in disk.child("driver").map(|driver| driver.attributes.clone()).unwrap_or_default() {
        if DRIVER_KEPT.contains(&name.as_str()) {
            driver.set(&name, value);
        }
    }
    // An export that is away must not fail the guest's requests for good; see the QEMU driver.
    for (name, value) in
        [("error_policy", "stop"), ("rerror_policy", "stop"), ("discard", "unmap"), ("detect_zeroes", "unmap")]
    {
        driver.set(name, value);
    }
    for gone in ["source", "backingStore", "mirror", "auth", "encryption", "shareable", "transient"] {
        disk.remove(gone);
    }
    disk.attributes.retain(|(name, _)| !matches!(name.as_str(), "rawio" | "sgio" | "snapshot"));
    disk.set("type", kind);
    disk.set("device", "disk");
    disk.replace(driver);
    disk.replace(element);
}

/// The disk's type, its format, and its `<source>`.
fn source_element(source: &DiskSource, reconnect: Option<u32>) -> (&'static str, &'static str, Element) {
    let empty = Element::new("source");
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let nbd = |export: &str, host: Element| {
        let source = Element::new("source").with("protocol", "nbd").with("name", export).holding(host);
        match reconnect {
            // Releases of libvirt before 9.1 do not know it and pass over it; then the guest is stopped while the
            // export is away, and let go on afterwards.
            Some(seconds) => source.holding(Element::new("reconnect").with("delay", seconds.to_string())),
            None => source,
        }
    };
    match source {
        DiskSource::Export { socket, export } => {
            let host = Element::new("host").with("transport", "unix").with("socket", text(socket));
            ("network", "raw", nbd(export, host))
        }
        DiskSource::Remote { host, port, export, tls } => {
            let host = Element::new("host").with("name", host).with("port", port.to_string());
            let mut source = nbd(export, host);
            if *tls {
                source.set("tls", "yes");
            }
            ("network", "raw", source)
        }
        DiskSource::Raw(path) => ("file", "raw", empty.with("file", text(path))),
        DiskSource::Qcow2(path) => ("file", "qcow2", empty.with("file", text(path))),
        DiskSource::Device(path) => ("block", "raw", empty.with("dev", text(path))),
    }
}

#[cfg(test)]
mod tests;
