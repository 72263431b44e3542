//! Partition tables: MBR with logical partitions, and GPT with its backup. Sources: UEFI Specification 2.10, chapter 5
//! ("GUID Partition Table (GPT) Disk Layout"), which describes the legacy MBR too; for logical partitions the chain of
//! extended boot records as Linux reads it (`block/partitions/msdos.c`).

use crate::DiskImage;
use crate::bytes::{guid, le, part, size, u8, utf16_le};

/// Logical partitions followed; their chain is a list that a hostile disk can close to a ring.
const LOGICAL_MAX: u32 = 256;
/// Entries of a GPT that are read; Linux reads as many as fit, and 128 is what everybody writes.
const GPT_ENTRIES_MAX: u32 = 1024;
/// Largest entry of a GPT.
const GPT_ENTRY_MAX: u32 = 4096;

/// What kind of table it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// The table of the PC BIOS.
    Mbr,
    /// The table of UEFI.
    Gpt,
}

impl std::fmt::Display for TableKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TableKind::Mbr => "mbr",
            TableKind::Gpt => "gpt",
        })
    }
}

/// What a table says.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub kind: Option<TableKind>,
    pub entries: Vec<Entry>,
    pub notices: Vec<String>,
}

/// A partition; it lies inside the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub number: u32,
    pub start: u64,
    pub length: u64,
    pub name: Option<String>,
    /// What the table says that it holds, for partitions that hold no file system.
    pub hint: Option<&'static str>,
}

/// Reads the disk's table.
pub(super) fn read(disk: &dyn DiskImage) -> Table {
    let mut sector = [0; 512];
    if disk.size() < 1024 || disk.read_at(0, &mut sector).is_err() {
        return Table::default();
    }
    let has_mbr = le::u16(&sector, 510) == 0xaa55;
    let protective = has_mbr && (0..4).any(|at| u8(&sector, 446 + 16 * at + 4) == 0xee);
    // Sectors of 512 bytes first; disks with sectors of 4 KiB are rare in virtual machines.
    for sector_size in [512, 4096] {
        if let Some(table) = gpt(disk, sector_size, protective) {
            return table;
        }
    }
    let mut table = if has_mbr { mbr(disk, &sector) } else { Table::default() };
    if protective {
        table
            .notices
            .push("its GPT cannot be read, neither the primary one nor the backup at the disk's end".to_owned());
    }
    table
}

/// The GPT, from its backup if the primary one is damaged. Without a protective MBR the primary one has to be whole.
fn gpt(disk: &dyn DiskImage, sector: u64, protective: bool) -> Option<Table> {
    let primary = gpt_at(disk, sector, 1);
    if let Ok(entries) = primary {
        return Some(Table { kind: Some(TableKind::Gpt), entries, notices: Vec::new() });
    }
    if !protective {
        return None;
    }
    let last = (disk.size() / sector).checked_sub(1)?;
    let entries = gpt_at(disk, sector, last).ok()?;
    let notice = format!("its GPT is damaged ({}); the backup at the disk's end was used", primary.err()?);
    Some(Table { kind: Some(TableKind::Gpt), entries, notices: vec![notice] })
}

fn gpt_at(disk: &dyn DiskImage, sector: u64, lba: u64) -> Result<Vec<Entry>, &'static str> {
    const UNREADABLE: &str = "it cannot be read";
    let mut header = vec![0; size(sector)];
    let offset = lba.checked_mul(sector).ok_or(UNREADABLE)?;
    disk.read_at(offset, &mut header).map_err(|_| UNREADABLE)?;
    if part(&header, 0, 8) != b"EFI PART" {
        return Err("its header is missing");
    }
    let header_size = size(le::u32(&header, 12).into());
    if !(92..=header.len()).contains(&header_size) {
        return Err("its header's size makes no sense");
    }
    let mut summed = part(&header, 0, header_size).to_vec();
    summed.get_mut(16..20).unwrap_or_default().fill(0);
    if crc32fast::hash(&summed) != le::u32(&header, 16) || le::u64(&header, 24) != lba {
        return Err("its header fails its checksum");
    }
    let (start, count, length) = (le::u64(&header, 72), le::u32(&header, 80), le::u32(&header, 84));
    if count > GPT_ENTRIES_MAX || !(128..=GPT_ENTRY_MAX).contains(&length) {
        return Err("its header has numbers that make no sense");
    }
    let start =
        start.checked_mul(sector).filter(|start| *start < disk.size()).ok_or("its entries lie outside of the disk")?;
    let mut bytes = vec![0; size(u64::from(count) * u64::from(length))];
    disk.read_at(start, &mut bytes).map_err(|_| "its entries cannot be read")?;
    if crc32fast::hash(&bytes) != le::u32(&header, 88) {
        return Err("its entries fail their checksum");
    }
    let entries = (1..).zip(bytes.chunks_exact(size(length.into())));
    Ok(entries.filter_map(|(number, entry)| gpt_entry(disk.size(), sector, number, entry)).collect())
}

fn gpt_entry(disk_size: u64, sector: u64, number: u32, entry: &[u8]) -> Option<Entry> {
    let kind = guid(part(entry, 0, 16))?;
    let (first, last) = (le::u64(entry, 32), le::u64(entry, 40));
    let start = first.checked_mul(sector).filter(|start| *start < disk_size)?;
    let length = last.checked_sub(first)?.checked_add(1)?.checked_mul(sector)?.min(disk_size - start);
    let name = utf16_le(part(entry, 56, 72));
    let name = name.split('\0').next().unwrap_or_default().to_owned();
    let hint = match kind.as_str() {
        "21686148-6449-6e6f-744e-656564454649" => Some("BIOS boot"),
        "e3c9e316-0b5c-4db8-817d-f92df00215ae" => Some("Microsoft reserved"),
        "5808c8aa-7e8f-42e0-85d2-e1e90434cfb3" => Some("dynamic disk database"),
        "af9b60a0-1431-4f62-bc68-3311714a69ad" => Some("dynamic disk"),
        "e75caf8f-f680-4cee-afa3-b001e56efc2d" => Some("Storage Spaces"),
        "9e1a2d38-c612-4316-aa26-8b49521e5a8b" => Some("PReP boot"),
        _ => None,
    };
    Some(Entry { number, start, length, name: (!name.is_empty()).then_some(name), hint })
}

/// The four primary partitions and the chain of logical ones, which are numbered from 5.
fn mbr(disk: &dyn DiskImage, sector: &[u8]) -> Table {
    let mut table = Table { kind: Some(TableKind::Mbr), ..Table::default() };
    // Boot code without a table has the signature too: what is not 0x00 or 0x80 is no partition's first byte.
    let entries: Vec<&[u8]> = (0..4).map(|at| part(sector, 446 + 16 * at, 16)).collect();
    if entries.iter().any(|entry| !matches!(u8(entry, 0), 0 | 0x80)) || entries.iter().all(|entry| u8(entry, 4) == 0) {
        return Table::default();
    }
    let mut extended = None;
    for (number, entry) in (1..).zip(entries) {
        let Some(found) = mbr_entry(disk.size(), number, entry, 0) else {
            if u8(entry, 4) != 0 {
                table.notices.push(format!("partition p{number} lies outside of the disk"));
            }
            continue;
        };
        if matches!(u8(entry, 4), 0x05 | 0x0f | 0x85) {
            extended.get_or_insert((found.start, found.length));
        } else {
            table.entries.push(found);
        }
    }
    if let Some((start, length)) = extended {
        logical(disk, start, length, &mut table);
    }
    table
}

fn mbr_entry(disk_size: u64, number: u32, entry: &[u8], base: u64) -> Option<Entry> {
    let (kind, first, count) = (u8(entry, 4), u64::from(le::u32(entry, 8)), u64::from(le::u32(entry, 12)));
    let start = base.checked_add(first * 512).filter(|start| *start < disk_size && first > 0)?;
    let length = (count * 512).min(disk_size - start);
    (kind != 0 && length > 0).then_some(Entry { number, start, length, name: None, hint: None })
}

/// Each extended boot record has one logical partition, relative to itself, and the place of the next record, relative
/// to the extended partition.
fn logical(disk: &dyn DiskImage, base: u64, length: u64, table: &mut Table) {
    let mut at = base;
    for number in 5..5 + LOGICAL_MAX {
        let mut sector = [0; 512];
        if disk.read_at(at, &mut sector).is_err() || le::u16(&sector, 510) != 0xaa55 {
            if number > 5 {
                table.notices.push(format!("the chain of logical partitions breaks off before p{number}"));
            }
            return;
        }
        if let Some(entry) = mbr_entry(disk.size(), number, part(&sector, 446, 16), at) {
            table.entries.push(entry);
        }
        let next = part(&sector, 462, 16);
        if !matches!(u8(next, 4), 0x05 | 0x0f | 0x85) {
            return;
        }
        let offset = u64::from(le::u32(next, 8)) * 512;
        if offset == 0 || offset >= length {
            table.notices.push(format!("the chain of logical partitions leads out of its partition behind p{number}"));
            return;
        }
        at = base + offset;
    }
    table.notices.push(format!("the chain of logical partitions has more than {LOGICAL_MAX}; the rest is left out"));
}
