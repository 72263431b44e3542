//! What lies on a disk: partitions, LVM's logical volumes, and what each of them holds.

mod kind;
mod lvm;
mod signature;
mod table;

use std::sync::Arc;

pub use kind::Kind;
pub use table::TableKind;

use crate::mapped::Mapped;
use crate::{Cached, SharedDisk};

/// A disk with what was found on it.
pub struct DiskLayout {
    /// The disk's name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its bytes.
    pub disk: SharedDisk,
    /// Its partition table, if it has one.
    pub table: Option<TableKind>,
    /// What is odd about it: a damaged table, a volume that lacks a disk.
    pub notices: Vec<String>,
    /// Its volumes: partitions in the order of their numbers, then logical volumes; a disk without a table is one volume.
    pub volumes: Vec<Volume>,
}

/// A range of bytes with a name that may hold a file system.
pub struct Volume {
    /// `p1` and so on by the number in the partition table, `VG/LV` for LVM, `whole` where there is no table.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// What the table calls it, if it has names.
    pub part_label: Option<String>,
    /// What it holds.
    pub content: Content,
    /// Its bytes.
    pub disk: SharedDisk,
}

/// What a volume holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// What it is.
    pub kind: Kind,
    /// As people call it; more exact than the kind, `ext4` for one.
    pub name: String,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID or serial number, as Linux writes it.
    pub uuid: Option<String>,
}

/// Looks at the disks of one machine. Logical volumes are found on the disk that holds their beginning, and may reach
/// over others.
pub fn scan(disks: &[(String, SharedDisk)]) -> Vec<DiskLayout> {
    let mut layouts: Vec<DiskLayout> = disks.iter().map(|(name, disk)| scan_disk(name, disk)).collect();
    let holders: Vec<(usize, SharedDisk)> = layouts
        .iter()
        .enumerate()
        .flat_map(|(at, layout)| layout.volumes.iter().map(move |volume| (at, volume)))
        .filter(|(_, volume)| volume.content.kind == Kind::LvmMember)
        .map(|(at, volume)| (at, volume.disk.clone()))
        .collect();
    let found = lvm::assemble(&holders);
    for (at, volume) in found.volumes {
        if let Some(layout) = layouts.get_mut(at) {
            let content = signature::identify(volume.disk.as_ref());
            layout.volumes.push(Volume { content, ..volume });
        }
    }
    for (at, notice) in found.notices {
        if let Some(layout) = layouts.get_mut(at) {
            layout.notices.push(notice);
        }
    }
    layouts
}

fn scan_disk(name: &str, disk: &SharedDisk) -> DiskLayout {
    let size = disk.size();
    let cached: SharedDisk = Arc::new(Cached::new(disk.clone()));
    let whole = signature::identify(cached.as_ref());
    // A file system straight on the disk may leave something like a table in its boot code: FAT and NTFS have the
    // table's signature themselves.
    let table = if whole.kind == Kind::Unknown || whole.kind == Kind::Iso {
        table::read(cached.as_ref())
    } else {
        table::Table::default()
    };
    let mut volumes = Vec::new();
    if table.kind.is_none() || whole.kind == Kind::Iso {
        volumes.push(Volume { name: "whole".to_owned(), size, part_label: None, content: whole, disk: disk.clone() });
    }
    for entry in table.entries {
        let part: SharedDisk = Arc::new(Mapped::slice(disk.clone(), entry.start, entry.length));
        let mut content = signature::identify(&Cached::new(part.clone()));
        if content.kind == Kind::Unknown
            && let Some(name) = entry.hint
        {
            content.name = name.to_owned();
        }
        volumes.push(Volume {
            name: format!("p{}", entry.number),
            size: entry.length,
            part_label: entry.name,
            content,
            disk: part,
        });
    }
    DiskLayout { name: name.to_owned(), size, disk: disk.clone(), table: table.kind, notices: table.notices, volumes }
}
