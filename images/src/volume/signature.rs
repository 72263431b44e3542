//! What a volume holds, by the signatures of its format, with label and UUID as `blkid` shows them.
//!
//! The order matters: containers come before what they may contain traces of, and FAT, whose signature is the weakest,
//! comes last.

use super::{Content, Kind};
use crate::DiskImage;
use crate::bytes::{be, label, le, part, size, u8, utf16, utf16_le, uuid};

/// What is read of the beginning: enough for every signature but Btrfs's, which lies at 64 KiB.
const HEAD: u64 = 72 << 10;

/// Signatures of what is recognised and not read: offset, bytes, kind, name.
const OTHERS: [(usize, &[u8], Kind, &str); 24] = [
    (3, b"-FVE-FS-", Kind::BitLocker, "BitLocker"),
    (4096, b"\xfc\x4e\x2b\xa9", Kind::MdRaid, "Linux RAID 1.2"),
    (0, b"\xfc\x4e\x2b\xa9", Kind::MdRaid, "Linux RAID 1.1"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", Kind::Bcache, "bcache"),
    (4086, b"SWAPSPACE2", Kind::Swap, "swap"),
    (4086, b"SWAP-SPACE", Kind::Swap, "swap"),
    (8182, b"SWAPSPACE2", Kind::Swap, "swap"),
    (65526, b"SWAPSPACE2", Kind::Swap, "swap"),
    (3, b"ReFS\0\0\0\0", Kind::Refs, "ReFS"),
    (1024, b"H+\0\x04", Kind::HfsPlus, "HFS+"),
    (1024, b"HX\0\x05", Kind::HfsPlus, "HFSX"),
    (1024, b"BD", Kind::HfsPlus, "HFS"),
    (32, b"NXSB", Kind::Apfs, "APFS"),
    (0, b"hsqs", Kind::OtherLinux, "SquashFS"),
    (1024, b"\x10\x20\xf5\xf2", Kind::OtherLinux, "F2FS"),
    (1024, b"\xe2\xe1\xf5\xe0", Kind::OtherLinux, "EROFS"),
    (0x10034, b"ReIsErFs", Kind::OtherLinux, "ReiserFS"),
    (0x10034, b"ReIsEr2Fs", Kind::OtherLinux, "ReiserFS"),
    (0x10034, b"ReIsEr3Fs", Kind::OtherLinux, "ReiserFS"),
    (0x8000, b"JFS1", Kind::OtherLinux, "JFS"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", Kind::OtherLinux, "bcachefs"),
    (8192 + 1372, b"\x19\x01\x54\x19", Kind::Ufs, "UFS2"),
    (0x1482c, b"\x01\xe7\xf0", Kind::Vmfs, "VMFS"),
    (0, b"PRIVHEAD", Kind::WindowsManaged, "dynamic disk"),
];

/// What the volume holds. A volume that cannot be read is of unknown content.
pub(super) fn identify(disk: &dyn DiskImage) -> Content {
    let mut head = vec![0; size(HEAD.min(disk.size()))];
    if disk.read_at(0, &mut head).is_err() {
        // A damaged chunk must not hide what the first sectors say.
        head.truncate(4096);
        if disk.read_at(0, &mut head).is_err() {
            return content(Kind::Unknown, "unreadable", None, None);
        }
    }
    luks(&head)
        .or_else(|| lvm(&head))
        .or_else(|| others(&head))
        .or_else(|| raid_at_the_end(disk))
        .or_else(|| zfs(disk, &head))
        .or_else(|| xfs(&head))
        .or_else(|| btrfs(&head))
        .or_else(|| ext(&head))
        .or_else(|| iso(&head))
        .or_else(|| ntfs(disk, &head))
        .or_else(|| exfat(disk, &head))
        .or_else(|| fat(disk, &head))
        .unwrap_or_else(|| {
            if head.iter().all(|byte| *byte == 0) {
                content(Kind::Empty, "empty", None, None)
            } else {
                content(Kind::Unknown, "unknown", None, None)
            }
        })
}

fn content(kind: Kind, name: &str, label: Option<String>, uuid: Option<String>) -> Content {
    Content { kind, name: name.to_owned(), label, uuid }
}

fn luks(head: &[u8]) -> Option<Content> {
    if part(head, 0, 6) != b"LUKS\xba\xbe" {
        return None;
    }
    let version = be::u16(head, 6);
    let name = if version == 2 { label(part(head, 24, 48)) } else { None };
    Some(content(Kind::Luks, &format!("LUKS{version}"), name, label(part(head, 168, 40))))
}

fn lvm(head: &[u8]) -> Option<Content> {
    (0..4)
        .map(|sector| part(head, sector * 512, 512))
        .find(|sector| part(sector, 0, 8) == b"LABELONE" && part(sector, 24, 8) == b"LVM2 001")?;
    Some(content(Kind::LvmMember, "LVM2", None, None))
}

fn others(head: &[u8]) -> Option<Content> {
    let (_, _, kind, name) = OTHERS.iter().find(|(at, bytes, ..)| part(head, *at, bytes.len()) == *bytes)?;
    let (label, uuid) = match *kind {
        Kind::Swap => (label(part(head, 1052, 16)), uuid(part(head, 1036, 16))),
        Kind::MdRaid => {
            let at = if name.ends_with("1.2") { 4096 } else { 0 };
            (label(part(head, at + 32, 32)), uuid(part(head, at + 16, 16)))
        }
        _ => (None, None),
    };
    Some(content(*kind, name, label, uuid))
}

/// Linux RAID 0.90 and 1.0, and the RAID of Intel's firmware, have their signature at the volume's end.
fn raid_at_the_end(disk: &dyn DiskImage) -> Option<Content> {
    let at = |offset: u64, bytes: &[u8]| {
        let mut found = [0; 32];
        let found = found.get_mut(..bytes.len())?;
        disk.read_at(offset, found).ok()?;
        (found == bytes).then_some(())
    };
    let sectors = disk.size() / 512;
    let old = (disk.size() & !0xffff).checked_sub(64 << 10);
    let new = sectors.checked_sub(16).map(|sector| (sector & !7) * 512);
    let intel = disk.size().checked_sub(1024);
    if old.is_some_and(|offset| at(offset, b"\xfc\x4e\x2b\xa9").is_some()) {
        return Some(content(Kind::MdRaid, "Linux RAID 0.90", None, None));
    }
    if new.is_some_and(|offset| at(offset, b"\xfc\x4e\x2b\xa9").is_some()) {
        return Some(content(Kind::MdRaid, "Linux RAID 1.0", None, None));
    }
    intel
        .filter(|offset| at(*offset, b"Intel Raid ISM Cfg Sig. ").is_some())
        .map(|_| content(Kind::FirmwareRaid, "Intel RAID", None, None))
}

/// A vdev label's uberblocks begin at 128 KiB, 1 KiB or more apart; one of the first that is whole is enough.
fn zfs(disk: &dyn DiskImage, head: &[u8]) -> Option<Content> {
    const MAGIC: u64 = 0x00ba_b10c;
    // ZFS leaves the beginning free; what begins with something else that is known is not ZFS any more.
    if ext(head).is_some() {
        return None;
    }
    let mut ring = vec![0; 128 << 10];
    disk.read_at(128 << 10, &mut ring).ok()?;
    let found = ring.chunks_exact(1024).any(|block| le::u64(block, 0) == MAGIC || be::u64(block, 0) == MAGIC);
    found.then(|| content(Kind::Zfs, "ZFS", None, None))
}

fn xfs(head: &[u8]) -> Option<Content> {
    (part(head, 0, 4) == b"XFSB")
        .then(|| content(Kind::Xfs, "xfs", label(part(head, 108, 12)), uuid(part(head, 32, 16))))
}

fn btrfs(head: &[u8]) -> Option<Content> {
    let sb = part(head, 64 << 10, 4096);
    (part(sb, 64, 8) == b"_BHRfS_M")
        .then(|| content(Kind::Btrfs, "btrfs", label(part(sb, 299, 256)), uuid(part(sb, 32, 16))))
}

fn ext(head: &[u8]) -> Option<Content> {
    let sb = part(head, 1024, 1024);
    if le::u16(sb, 0x38) != 0xef53 || le::u32(sb, 0x18) > 6 {
        return None;
    }
    let (compat, incompat, ro) = (le::u32(sb, 0x5c), le::u32(sb, 0x60), le::u32(sb, 0x64));
    let name = match () {
        () if incompat & 8 != 0 => {
            return Some(content(Kind::OtherLinux, "ext journal", None, uuid(part(sb, 0x68, 16))));
        }
        // What ext3 does not know.
        () if incompat & !0x16 != 0 || ro & !0x7 != 0 => "ext4",
        () if compat & 4 != 0 => "ext3",
        () => "ext2",
    };
    Some(content(Kind::Ext, name, label(part(sb, 0x78, 16)), uuid(part(sb, 0x68, 16))))
}

fn iso(head: &[u8]) -> Option<Content> {
    let pvd = part(head, 0x8000, 2048);
    if part(pvd, 1, 5) != b"CD001" {
        return None;
    }
    let date = part(pvd, 813, 16);
    let date = if date.iter().all(u8::is_ascii_digit) && date.first().is_some_and(|d| *d != b'0') {
        date
    } else {
        part(pvd, 830, 16)
    };
    let date = String::from_utf8_lossy(date);
    let uuid = (date.len() == 16 && date.bytes().all(|b| b.is_ascii_digit())).then(|| {
        let cut = |from: usize, to: usize| date.get(from..to).unwrap_or_default().to_owned();
        [cut(0, 4), cut(4, 6), cut(6, 8), cut(8, 10), cut(10, 12), cut(12, 14), cut(14, 16)].join("-")
    });
    Some(content(Kind::Iso, "iso9660", label(part(pvd, 40, 32)), uuid))
}

fn ntfs(disk: &dyn DiskImage, head: &[u8]) -> Option<Content> {
    if part(head, 3, 8) != b"NTFS    " {
        return None;
    }
    let serial = le::u64(head, 0x48);
    let uuid = (serial != 0).then(|| format!("{serial:016X}"));
    Some(content(Kind::Ntfs, "ntfs", ntfs_label(disk, head), uuid))
}

/// The label is in the attribute $VOLUME_NAME (0x60) of file record 3, always resident.
fn ntfs_label(disk: &dyn DiskImage, head: &[u8]) -> Option<String> {
    let per_cluster = match u8(head, 13) {
        exponent @ 0xf4..=0xff => 1_u64 << (256 - u64::from(exponent)),
        sectors => sectors.into(),
    };
    let cluster = u64::from(le::u16(head, 11)) * per_cluster;
    let record = match u8(head, 64) {
        exponent @ 0x80..=0xff => 1_u64.checked_shl(256 - u32::from(exponent))?,
        clusters => cluster * u64::from(clusters),
    };
    if !(512..=8192).contains(&record) {
        return None;
    }
    let offset = le::u64(head, 48).checked_mul(cluster)?.checked_add(3 * record)?;
    let mut bytes = vec![0; size(record)];
    disk.read_at(offset, &mut bytes).ok()?;
    let mut at = usize::from(le::u16(&bytes, 20));
    while part(&bytes, at, 4).len() == 4 && le::u32(&bytes, at) != u32::MAX {
        let length = size(le::u32(&bytes, at + 4).into());
        if le::u32(&bytes, at) == 0x60 {
            let (start, length) = (usize::from(le::u16(&bytes, at + 20)), size(le::u32(&bytes, at + 16).into()));
            let name = utf16_le(part(&bytes, at + start, length.min(256)));
            return (!name.is_empty()).then_some(name);
        }
        if length < 8 {
            return None;
        }
        at += length;
    }
    None
}

fn exfat(disk: &dyn DiskImage, head: &[u8]) -> Option<Content> {
    if part(head, 3, 8) != b"EXFAT   " {
        return None;
    }
    let serial = le::u32(head, 100);
    let uuid = format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff);
    // The label is an entry of type 0x83, in practice in the root directory's first cluster.
    let (sector, cluster) = (u32::from(u8(head, 108)), u32::from(u8(head, 109)));
    let name = || {
        let heap = u64::from(le::u32(head, 88)).checked_shl(sector)?;
        let first = u64::from(le::u32(head, 96)).checked_sub(2)?.checked_shl(sector.checked_add(cluster)?)?;
        let mut entries = vec![0; 4096];
        disk.read_at(heap.checked_add(first)?, &mut entries).ok()?;
        let entry = entries.chunks_exact(32).find(|entry| u8(entry, 0) == 0x83)?;
        let units: Vec<u16> = part(entry, 2, 2 * usize::from(u8(entry, 1).min(11)))
            .chunks_exact(2)
            .map(|unit| le::u16(unit, 0))
            .collect();
        Some(utf16(&units)).filter(|name| !name.is_empty())
    };
    Some(content(Kind::ExFat, "exfat", name(), Some(uuid)))
}

fn fat(disk: &dyn DiskImage, head: &[u8]) -> Option<Content> {
    let geometry = crate::fs::FatGeometry::decode(head)?;
    let (serial_at, name_at) = if geometry.bits == 32 { (67, 71) } else { (39, 43) };
    let serial = le::u32(head, serial_at);
    let extended = matches!(u8(head, serial_at - 1), 0x28 | 0x29);
    let uuid = extended.then(|| format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff));
    let in_root = geometry.label(disk);
    let in_head = extended.then(|| label(part(head, name_at, 11))).flatten().filter(|name| name != "NO NAME");
    Some(content(Kind::Fat, &format!("fat{}", geometry.bits), in_root.or(in_head), uuid))
}
