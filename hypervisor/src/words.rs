//! The words for a machine's parts, as people write them.

use std::fmt;
use std::str::FromStr;

use crate::definition::{Accelerator, Bus, Card, Network};

impl fmt::Display for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Bus::VirtioBlk => "virtio-blk",
            Bus::VirtioScsi => "virtio-scsi",
            Bus::Sata => "sata",
            Bus::Ide => "ide",
            Bus::Nvme => "nvme",
        })
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accelerator::Auto => "auto",
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Network::None => f.write_str("none"),
            Network::User => f.write_str("user"),
            Network::Isolated => f.write_str("isolated"),
            Network::Bridge(bridge) => write!(f, "bridge:{bridge}"),
        }
    }
}

impl FromStr for Accelerator {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Accelerator::Auto),
            "kvm" => Ok(Accelerator::Kvm),
            "tcg" => Ok(Accelerator::Tcg),
            other => Err(format!("unknown accelerator {other:?}; use auto, kvm or tcg")),
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text, text.strip_prefix("bridge:")) {
            ("none", _) => Ok(Network::None),
            ("user", _) => Ok(Network::User),
            ("isolated", _) => Ok(Network::Isolated),
            (_, Some(bridge)) if !bridge.is_empty() => Ok(Network::Bridge(bridge.to_owned())),
            (other, _) => Err(format!("unknown network {other:?}; use none, user, isolated or bridge:NAME")),
        }
    }
}

impl FromStr for Bus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "virtio" | "virtio-blk" => Ok(Bus::VirtioBlk),
            "scsi" | "virtio-scsi" => Ok(Bus::VirtioScsi),
            "sata" => Ok(Bus::Sata),
            "ide" => Ok(Bus::Ide),
            "nvme" => Ok(Bus::Nvme),
            other => Err(format!("unknown bus {other:?}; use virtio-blk, virtio-scsi, sata, nvme or ide")),
        }
    }
}

impl fmt::Display for Card {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Card::Virtio => "virtio",
            Card::E1000e => "e1000e",
            Card::E1000 => "e1000",
            Card::Rtl8139 => "rtl8139",
        })
    }
}

impl FromStr for Card {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "virtio" => Ok(Card::Virtio),
            "e1000e" => Ok(Card::E1000e),
            "e1000" => Ok(Card::E1000),
            "rtl8139" => Ok(Card::Rtl8139),
            other => Err(format!("unknown network card {other:?}; use virtio, e1000e, e1000 or rtl8139")),
        }
    }
}
