//! LVM2: linear and striped logical volumes. Layout as in LVM2's `lib/format_text/layout.h` and `lib/label/label.h`: a
//! label in one of the first four sectors, which names data and metadata areas; a metadata area is a ring that holds
//! the volume group's description as text.

mod text;
mod volume;

use std::collections::HashMap;

use self::text::Section;
use self::volume::LogicalVolume;
use super::{Content, Kind, Volume};
use crate::bytes::{le, part, size};
use crate::{DiskImage, SharedDisk};

/// Longest description read; LVM's own default area holds 1 MiB.
const TEXT_MAX: u64 = 16 << 20;
/// Areas that a label may name.
const AREAS_MAX: usize = 16;
/// Logical volumes and segments that are looked at.
const VOLUMES_MAX: usize = 4096;
/// First bytes of a metadata area behind its checksum.
const AREA_MAGIC: &[u8; 16] = b" LVM2 x[5A%r0N*>";

/// What was found: each with the index of the disk that it belongs to.
#[derive(Default)]
pub(super) struct Found {
    pub volumes: Vec<(usize, Volume)>,
    pub notices: Vec<(usize, String)>,
}

/// A physical volume.
struct Physical {
    id: String,
    disk: SharedDisk,
    /// The disk of the machine that it lies on.
    on: usize,
}

/// Puts the logical volumes of these physical volumes together.
pub(super) fn assemble(holders: &[(usize, SharedDisk)]) -> Found {
    let mut found = Found::default();
    let mut physical = Vec::new();
    // The newest description of each group, by its id.
    let mut groups: HashMap<String, (u64, usize, Section)> = HashMap::new();
    for (on, disk) in holders {
        match read_label(disk.as_ref()) {
            Ok((id, areas)) => {
                for (offset, length) in areas {
                    match read_area(disk.as_ref(), offset, length) {
                        Ok(None) => {}
                        Ok(Some(section)) => {
                            let seqno = section.number("seqno").unwrap_or(0);
                            let key = section.text("id").unwrap_or_default().to_owned();
                            if groups.get(&key).is_none_or(|(known, ..)| *known < seqno) {
                                groups.insert(key, (seqno, *on, section));
                            }
                        }
                        Err(reason) => found.notices.push((*on, format!("its LVM2 metadata is damaged: {reason}"))),
                    }
                }
                physical.push(Physical { id, disk: disk.clone(), on: *on });
            }
            Err(reason) => found.notices.push((*on, format!("its LVM2 label is damaged: {reason}"))),
        }
    }
    let mut groups: Vec<_> = groups.into_values().collect();
    groups.sort_by(|a, b| (a.1, &a.2.name).cmp(&(b.1, &b.2.name)));
    for (_, on, group) in groups {
        volumes_of(&group, on, &physical, &mut found);
    }
    found
}

/// Offset and length of a metadata area.
type Area = (u64, u64);

/// The physical volume's id and its metadata areas.
fn read_label(disk: &dyn DiskImage) -> Result<(String, Vec<Area>), &'static str> {
    const UNREADABLE: &str = "it cannot be read";
    let mut head = vec![0; size(2048.min(disk.size()))];
    disk.read_at(0, &mut head).map_err(|_| UNREADABLE)?;
    let sector = (0..4).map(|at| part(&head, at * 512, 512)).find(|sector| part(sector, 0, 8) == b"LABELONE");
    let sector = sector.ok_or(UNREADABLE)?;
    let header = size(le::u32(sector, 20).into());
    if !(32..=400).contains(&header) {
        return Err("its header lies outside of its sector");
    }
    let id = String::from_utf8_lossy(part(sector, header, 32)).into_owned();
    // Two lists of offset and size, each ended by zeroes: data areas, then metadata areas.
    let mut areas = part(sector, header + 40, 512).chunks_exact(16).map(|area| (le::u64(area, 0), le::u64(area, 8)));
    areas.by_ref().take_while(|area| area.0 != 0).take(AREAS_MAX).for_each(drop);
    Ok((id, areas.take_while(|area| area.0 != 0).take(AREAS_MAX).collect()))
}

/// The group's description in a metadata area, unless the area holds none.
fn read_area(disk: &dyn DiskImage, offset: u64, length: u64) -> Result<Option<Section>, &'static str> {
    const UNREADABLE: &str = "an area cannot be read";
    let mut header = vec![0; 512];
    disk.read_at(offset, &mut header).map_err(|_| UNREADABLE)?;
    if part(&header, 4, 16) != AREA_MAGIC {
        return Err("an area has no signature");
    }
    let (at, bytes) = (le::u64(&header, 40), le::u64(&header, 48));
    if at == 0 || bytes == 0 {
        return Ok(None);
    }
    if bytes > TEXT_MAX || length <= 512 || bytes > length - 512 || !(512..length).contains(&at) {
        return Err("its description lies outside of its area");
    }
    let mut text = vec![0; size(bytes)];
    // The area is a ring behind its header.
    let first = bytes.min(length - at);
    let (head, tail) = text.split_at_mut(size(first));
    disk.read_at(offset.checked_add(at).ok_or(UNREADABLE)?, head).map_err(|_| UNREADABLE)?;
    if !tail.is_empty() {
        disk.read_at(offset.checked_add(512).ok_or(UNREADABLE)?, tail).map_err(|_| UNREADABLE)?;
    }
    let text = String::from_utf8_lossy(&text);
    let root = text::parse(text.trim_end_matches('\0'))?;
    root.sections
        .into_iter()
        .find(|section| section.number("extent_size").is_some())
        .map(Some)
        .ok_or("it names no volume group")
}

fn volumes_of(group: &Section, on: usize, physical: &[Physical], found: &mut Found) {
    let extent = group.number("extent_size").and_then(|sectors| sectors.checked_mul(512)).unwrap_or(0);
    let (Some(volumes), Some(members)) = (group.section("logical_volumes"), group.section("physical_volumes")) else {
        return;
    };
    for volume in volumes.sections.iter().take(VOLUMES_MAX) {
        if !volume.list("status").iter().any(|flag| flag == "VISIBLE") {
            continue;
        }
        let name = format!("{}/{}", group.name, volume.name);
        match LogicalVolume::new(volume, extent, |member| locate(members, member, physical)) {
            Ok(disk) => {
                let first = disk.first_disk().unwrap_or(on);
                let unknown = Content { kind: Kind::Unknown, name: String::new(), label: None, uuid: None };
                let disk: SharedDisk = std::sync::Arc::new(disk);
                let (size, part_label) = (disk.size(), None);
                found.volumes.push((first, Volume { name, size, part_label, content: unknown, disk }));
            }
            Err(reason) => found.notices.push((on, format!("logical volume {name} cannot be read: {reason}"))),
        }
    }
}

/// A physical volume of the group: its bytes, the disk it is on, and where its extents begin.
fn locate(members: &Section, name: &str, physical: &[Physical]) -> Result<(SharedDisk, usize, u64), String> {
    let member = members.section(name).ok_or_else(|| format!("its group does not know {name}"))?;
    let id: String = member.text("id").unwrap_or_default().chars().filter(|c| *c != '-').collect();
    let start = member.number("pe_start").and_then(|sectors| sectors.checked_mul(512)).unwrap_or(0);
    let there = physical.iter().find(|volume| volume.id == id);
    let there = there.ok_or_else(|| format!("the physical volume {name} ({id}) is on none of the disks"))?;
    Ok((there.disk.clone(), there.on, start))
}
