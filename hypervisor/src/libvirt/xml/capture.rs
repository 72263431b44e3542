//! What a captured domain's disks are.

use std::path::PathBuf;

use super::target_of;
use super::tree::{Element, XmlError};

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedDisk {
    /// What the domain calls it: `vda`.
    pub target: String,
    /// Where its bytes are.
    pub source: CapturedSource,
    /// `raw`, `qcow2`...
    pub format: String,
    /// Its bytes are encrypted below the guest.
    pub encrypted: bool,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// Where the bytes of a domain's disk are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CapturedSource {
    /// An image file or a block device of the host.
    Path(PathBuf),
    /// Anything else, in words.
    Other(String),
}

/// The disks of a domain in their order, without drives for removable media.
pub fn disks(xml: &str) -> Result<Vec<CapturedDisk>, XmlError> {
    let domain = Element::parse(xml, "domain")?;
    let devices = domain.child("devices").ok_or(XmlError::Missing { what: "devices" })?;
    let fixed = devices
        .elements()
        .filter(|device| device.name == "disk" && matches!(device.attribute("device"), None | Some("disk" | "lun")));
    fixed
        .map(|disk| {
            let target = target_of(disk).ok_or(XmlError::Missing { what: "target" })?.to_owned();
            let source = disk.child("source");
            let attribute = |name: &str| source.and_then(|source| source.attribute(name));
            let kind = disk.attribute("type").unwrap_or_default();
            let found = match kind {
                "file" => attribute("file"),
                "block" => attribute("dev"),
                _ => None,
            };
            let found = match found {
                Some(path) => CapturedSource::Path(path.into()),
                None if kind == "network" => {
                    let (protocol, name) = (attribute("protocol"), attribute("name"));
                    CapturedSource::Other(format!("{} {}", protocol.unwrap_or(kind), name.unwrap_or_default()))
                }
                None => CapturedSource::Other(kind.to_owned()),
            };
            Ok(CapturedDisk {
                target,
                source: found,
                format: disk.child("driver").and_then(|driver| driver.attribute("type")).unwrap_or("raw").to_owned(),
                encrypted: disk.child("encryption").is_some()
                    || source.is_some_and(|source| source.child("encryption").is_some()),
                read_only: disk.child("readonly").is_some(),
            })
        })
        .collect()
}

/// What of a domain is understood, for hypervisors other than libvirt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes.
    pub memory: Option<u64>,
    /// Virtual processors.
    pub cpus: Option<u32>,
    /// `pc-q35-8.2`.
    pub machine_type: Option<String>,
    /// Whether it has UEFI firmware.
    pub uefi: bool,
    /// Where its UEFI variables are.
    pub uefi_vars: Option<PathBuf>,
    /// Targets of its disks, and their buses in libvirt's words.
    pub buses: Vec<(String, String)>,
    /// The first network card's model.
    pub card: Option<String>,
    /// Its address.
    pub mac: Option<String>,
}

/// What of a domain is understood.
pub fn summary(xml: &str) -> Result<Summary, XmlError> {
    let domain = Element::parse(xml, "domain")?;
    let size = super::size(xml).ok();
    let os = domain.child("os");
    let loader = os.and_then(|os| os.child("loader"));
    let flash = loader.is_some_and(|loader| loader.attribute("type") == Some("pflash"));
    let devices = domain.child("devices").ok_or(XmlError::Missing { what: "devices" })?;
    let bus = |disk: &Element| {
        let target = disk.child("target")?;
        Some((target.attribute("dev")?.to_owned(), target.attribute("bus")?.to_owned()))
    };
    let card = devices.child("interface");
    let of_card = |child: &str, name: &str| card.and_then(|card| card.child(child)?.attribute(name).map(str::to_owned));
    Ok(Summary {
        memory: size.map(|(memory, _)| memory),
        cpus: size.map(|(_, cpus)| cpus),
        machine_type: os.and_then(|os| os.child("type")?.attribute("machine").map(str::to_owned)),
        uefi: flash || os.is_some_and(|os| os.attribute("firmware") == Some("efi")),
        uefi_vars: os
            .and_then(|os| os.child("nvram"))
            .map(|nvram| nvram.text())
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        buses: devices.elements().filter(|device| device.name == "disk").filter_map(bus).collect(),
        card: of_card("model", "type"),
        mac: of_card("mac", "address"),
    })
}
