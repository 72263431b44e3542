//! [`Hardware`]: what a recovery point says of its machine beside the disks. Specification: docs/format/machine.md
//!
//! The same value is what a command line says of a machine: [`Hardware::over`] puts one over the other.

mod variables;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use hypervisor::{Bus, Card};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::problem::Problem;
pub use variables::{VARIABLES_MAX, Variables};

/// Least memory a guest is given.
const MEMORY_MIN: u64 = 16 << 20;
/// Most CPUs a guest is given.
const CPUS_MAX: u32 = 255;
/// A domain's XML is some kilobytes.
const DOMAIN_XML_MAX: usize = 1 << 20;
/// Longer words are no models or machine types.
const WORD_MAX: usize = 1024;
/// `firmware`: look at the first disk. Only on a command line.
const AUTO: &str = "auto";
const BIOS: &str = "bios";
const UEFI: &str = "uefi";

/// Who described the machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Lifeboat: there is nothing else.
    #[default]
    LifeboatMachine,
    /// libvirt: the domain's XML is the machine, the other fields are what of it was understood.
    LibvirtXml,
}

/// A machine's definition. What is absent is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Hardware {
    /// Who described it.
    pub kind: Kind,
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Virtual CPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// CPU model in QEMU's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// QEMU's machine type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    /// `bios`, `uefi`; on a command line `auto` too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
    /// The UEFI variable store.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub uefi_vars: Option<Variables>,
    /// How disks are attached that `disks` does not name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// How single disks are attached.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Attached>,
    /// The network card.
    #[serde(skip_serializing_if = "Nic::is_unknown")]
    pub nic: Nic,
    /// With [`Kind::LibvirtXml`]: the domain as libvirt gave it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_xml: Option<String>,
}

/// How a disk is attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Attached {
    /// The disk's name in the recovery point.
    pub name: String,
    /// `virtio-blk`, `virtio-scsi`, `sata`, `nvme` or `ide`.
    pub bus: String,
}

/// A network card.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Nic {
    /// `virtio`, `e1000e`, `e1000` or `rtl8139`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// `52:54:00:12:34:56`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

impl Nic {
    fn is_unknown(&self) -> bool {
        *self == Nic::default()
    }
}

impl Hardware {
    /// What a recovery point's `hardware` says; the default where it says nothing.
    pub fn read(value: &Value) -> Result<Hardware, Unreadable> {
        if value.is_null() {
            return Ok(Hardware::default());
        }
        let hardware: Hardware =
            serde_json::from_value(value.clone()).map_err(|error| Unreadable(error.to_string()))?;
        match &hardware.domain_xml {
            Some(xml) if xml.len() > DOMAIN_XML_MAX => {
                Err(Unreadable("its domain_xml is longer than 1 MiB".to_owned()))
            }
            _ => Ok(hardware),
        }
    }

    /// As a recovery point keeps it: null where nothing is known.
    pub fn to_value(&self) -> Value {
        let mut kept = self.clone();
        kept.firmware = kept.firmware.filter(|firmware| firmware != AUTO);
        if kept == Hardware::default() { Value::Null } else { serde_json::to_value(&kept).unwrap_or(Value::Null) }
    }

    /// This, and `base` where this says nothing.
    #[must_use]
    pub fn over(self, base: Hardware) -> Hardware {
        let mut disks: BTreeMap<String, Attached> = BTreeMap::new();
        let mut order = Vec::new();
        // Whoever says how disks are attached says it of all.
        let below = if self.bus.is_some() { Vec::new() } else { base.disks };
        for disk in below.into_iter().chain(self.disks) {
            if disks.insert(disk.name.clone(), disk.clone()).is_none() {
                order.push(disk.name);
            }
        }
        let firmware = match (&self.firmware, &self.uefi_vars) {
            (None, Some(_)) => Some(UEFI.to_owned()),
            _ => self.firmware.or(base.firmware),
        };
        let (kind, domain_xml) = match self.domain_xml {
            Some(xml) => (self.kind, Some(xml)),
            None => (base.kind, base.domain_xml),
        };
        Hardware {
            kind,
            memory: self.memory.or(base.memory),
            cpus: self.cpus.or(base.cpus),
            cpu: self.cpu.or(base.cpu),
            machine_type: self.machine_type.or(base.machine_type),
            uefi_vars: self.uefi_vars.or(base.uefi_vars).filter(|_| firmware.as_deref() != Some(BIOS)),
            firmware,
            bus: self.bus.or(base.bus),
            disks: order.iter().filter_map(|name| disks.remove(name)).collect(),
            nic: Nic { model: self.nic.model.or(base.nic.model), mac: self.nic.mac.or(base.nic.mac) },
            domain_xml,
        }
    }

    /// Leaves out what it says of disks that a point does not have.
    pub fn keep_disks<'a>(&mut self, names: impl Iterator<Item = &'a str> + Clone) {
        self.disks.retain(|disk| names.clone().any(|name| name == disk.name));
    }

    /// Refuses what no machine can be made of. `names` are those of the machine's disks.
    pub fn check<'a>(&self, names: impl Iterator<Item = &'a str> + Clone) -> Result<(), Problem> {
        if let Some(memory) = self.memory.filter(|memory| *memory < MEMORY_MIN) {
            return Err(Problem::usage(format!("{memory} bytes of memory are too little for a guest"))
                .hint("give a size such as --memory 2G"));
        }
        if let Some(cpus) = self.cpus.filter(|cpus| !(1..=CPUS_MAX).contains(cpus)) {
            return Err(
                Problem::usage(format!("a guest cannot have {cpus} CPUs")).hint(format!("give 1 to {CPUS_MAX}"))
            );
        }
        match self.firmware.as_deref() {
            None | Some(AUTO | BIOS | UEFI) => {}
            Some(other) => {
                return Err(Problem::usage(format!("there is no firmware `{other}`")).hint("use auto, bios or uefi"));
            }
        }
        if self.uefi_vars.is_some() && self.firmware.as_deref() == Some(BIOS) {
            return Err(Problem::usage("a machine with BIOS firmware has no UEFI variables")
                .hint("leave out --uefi-vars, or choose --firmware uefi"));
        }
        for word in [&self.cpu, &self.machine_type].into_iter().flatten() {
            let good = |c: char| c.is_ascii_alphanumeric() || "-_.+,=".contains(c);
            if word.is_empty() || word.len() > WORD_MAX || !word.chars().all(good) {
                return Err(Problem::usage(format!("{word:?} is neither a CPU model nor a machine type"))
                    .hint("`qemu-system-x86_64 -cpu help` and `-machine help` list them"));
            }
        }
        for bus in self.bus.iter().chain(self.disks.iter().map(|disk| &disk.bus)) {
            parse::<Bus>(bus)?;
        }
        if let Some(disk) = self.disks.iter().find(|disk| names.clone().all(|name| name != disk.name)) {
            let names: Vec<&str> = names.collect();
            return Err(Problem::usage(format!("there is no disk {}", disk.name))
                .hint(format!("the machine has {}", names.join(", "))));
        }
        if let Some(model) = &self.nic.model {
            parse::<Card>(model)?;
        }
        self.nic.mac.as_deref().map_or(Ok(()), check_mac)
    }

    /// The guest's memory.
    pub fn memory(&self) -> u64 {
        self.memory.unwrap_or(2 << 30)
    }

    /// The guest's CPUs.
    pub fn cpus(&self) -> u32 {
        self.cpus.unwrap_or(2)
    }

    /// The machine type.
    pub fn machine_type(&self) -> &str {
        self.machine_type.as_deref().unwrap_or("q35")
    }

    /// How a disk is attached.
    pub fn bus_of(&self, disk: &str) -> Result<Bus, Problem> {
        let named = self.disks.iter().find(|attached| attached.name == disk).map(|attached| &attached.bus);
        named.or(self.bus.as_ref()).map_or(Ok(Bus::default()), |bus| parse(bus))
    }

    /// The network card's model.
    pub fn card(&self) -> Result<Card, Problem> {
        self.nic.model.as_deref().map_or(Ok(Card::default()), parse)
    }

    /// Whether the firmware is UEFI; `None` if the first disk has to be looked at.
    pub fn is_uefi(&self) -> Option<bool> {
        match self.firmware.as_deref() {
            Some(UEFI) => Some(true),
            Some(BIOS) => Some(false),
            _ => self.uefi_vars.is_some().then_some(true),
        }
    }
}

/// Refuses what is not the address of one card.
pub fn check_mac(mac: &str) -> Result<(), Problem> {
    let byte = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| part.len() == 2 && !part.starts_with('+'));
    let bytes: Option<Vec<u8>> = mac.split(':').map(byte).collect();
    match bytes.as_deref() {
        Some([first, _, _, _, _, _]) if first & 1 == 0 => Ok(()),
        _ => Err(Problem::usage(format!("{mac:?} is not a MAC address")).hint("write it as 52:54:00:12:34:56")),
    }
}

/// A word as what the driver understands.
pub fn parse<T: FromStr<Err = String>>(word: &str) -> Result<T, Problem> {
    word.parse().map_err(Problem::usage)
}

/// A definition that this version does not understand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreadable(String);

impl Unreadable {
    /// Why.
    pub fn reason(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the machine's definition in the recovery point is not understood: {}", self.0)
    }
}

/// In a few words, for people.
impl fmt::Display for Hardware {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.memory.map(|memory| format!("{} MiB", memory.div_ceil(1 << 20))));
        parts.extend(self.cpus.map(|cpus| if cpus == 1 { "1 CPU".to_owned() } else { format!("{cpus} CPUs") }));
        parts.extend(self.cpu.as_ref().map(|cpu| format!("CPU {cpu}")));
        parts.extend(self.machine_type.clone());
        parts.extend(self.firmware.clone());
        parts.extend(self.uefi_vars.as_ref().map(|vars| format!("UEFI variables ({} KiB)", vars.0.len() / 1024)));
        parts.extend(self.bus.clone());
        parts.extend(self.disks.iter().map(|disk| format!("{} on {}", disk.name, disk.bus)));
        parts.extend(self.nic.model.as_ref().map(|model| format!("network card {model}")));
        parts.extend(self.nic.mac.clone());
        parts.extend(self.domain_xml.as_ref().map(|_| "libvirt domain".to_owned()));
        f.write_str(if parts.is_empty() { "not known" } else { "" })?;
        f.write_str(&parts.join(", "))
    }
}

#[cfg(test)]
mod tests;
