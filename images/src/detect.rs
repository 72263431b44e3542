//! Which format an image has, by its name and its first and last bytes. Sources of the signatures: the formats'
//! specifications as QEMU's `block/*.c` probe functions apply them.
//!
//! What stands in a raw disk its guest may have written: a qcow2 header there with `/etc/passwd` as its backing file would
//! bring that file into the next backup. So the content alone decides only where being wrong hurts nobody but the guest:
//!
//! 1. a block device is raw, and so is a file whose name ends in `.raw`, whatever they hold;
//! 2. content that looks like an image of the qcow family (qcow, qcow2, QED) and names no other file is such an image;
//! 3. if it names a backing file or an external data file, it is such an image only if the file's name says so, too, by
//!    ending in `.qcow2`, `.qcow3`, `.qcow` or `.qed`; otherwise the format is uncertain, and the caller has to decide;
//! 4. content that looks like VMDK, which may name any number of files, is VMDK only if the file's name ends in `.vmdk`;
//!    content that looks like another known format is an image of that format;
//! 5. everything else is raw.
//!
//! Upper and lower case are the same in names. A backing file has the format its image gives it; where the image gives
//! none, its content alone decides, as in QEMU.

use std::path::Path;

use crate::raw::Raw;
use crate::{DiskImage, Format, OpenError};

/// Signatures at fixed places: offset, bytes, QEMU's name.
const SIGNATURES: [(u64, &[u8], &str); 8] = [
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
];
/// First bytes of a qcow2 image.
pub(crate) const QCOW_MAGIC: [u8; 4] = *b"QFI\xfb";
/// First line of a VMDK descriptor file.
const VMDK_DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";

/// Name endings that say that a file is an image of the qcow family.
const QCOW_ENDINGS: [&str; 4] = ["qcow2", "qcow3", "qcow", "qed"];
/// QED's feature bit for an image that has a backing file.
const QED_BACKING: u8 = 1;
/// The bit of qcow2's incompatible features for an image whose data is in another file.
const QCOW2_DATA_FILE: u8 = 1 << 2;

/// The format of an image somebody named, by the rules above.
pub(crate) fn detect(disk: &Raw, path: &Path) -> Result<Format, OpenError> {
    if disk.is_device() || ends_in(path, &["raw"]) {
        return Ok(Format::Raw);
    }
    let head = head(disk, path)?;
    // A VMDK may name the files that hold its data, in a descriptor that stands anywhere in it.
    let vmdk =
        !ends_in(path, &["vmdk"]) && [VMDK_DESCRIPTOR, b"KDMV", b"COWD"].iter().any(|magic| head.starts_with(magic));
    let other = if vmdk { Some(("vmdk", "other files")) } else { names_a_file(&head).filter(|_| !says_qcow(path)) };
    if let Some((format, names)) = other {
        return Err(OpenError::Uncertain { path: path.to_owned(), format, names });
    }
    by_content(&head, disk, path)
}

/// The format of a backing file whose image does not tell it.
pub(crate) fn probe(disk: &Raw, path: &Path) -> Result<Format, OpenError> {
    if disk.is_device() {
        return Ok(Format::Raw);
    }
    by_content(&head(disk, path)?, disk, path)
}

/// Whether a file's name says that it is an image of the qcow family.
pub(crate) fn says_qcow(path: &Path) -> bool {
    ends_in(path, &QCOW_ENDINGS)
}

fn ends_in(path: &Path, endings: &[&str]) -> bool {
    path.extension().is_some_and(|is| endings.iter().any(|ending| is.eq_ignore_ascii_case(ending)))
}

/// The first sector; zeroes follow the end of a shorter file.
fn head(disk: &Raw, path: &Path) -> Result<[u8; 512], OpenError> {
    let mut head = [0_u8; 512];
    let length = usize::try_from(disk.size().min(512)).unwrap_or(512);
    let part = head.get_mut(..length).unwrap_or_default();
    disk.read_at(0, part).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
    Ok(head)
}

/// The qcow format that this would be and the kind of file that it names, if it names one.
fn names_a_file(head: &[u8; 512]) -> Option<(&'static str, &'static str)> {
    if head.starts_with(b"QED\0") {
        return (head[16] & QED_BACKING != 0).then_some(("qed", "a backing file"));
    }
    if !head.starts_with(&QCOW_MAGIC) {
        return None;
    }
    // The first version has the backing file's place where the later ones have it, and none has features before 3.
    let (format, has_features) = match head[4..8] {
        [0, 0, 0, 1] => ("qcow", false),
        [0, 0, 0, 2] => ("qcow2", false),
        _ => ("qcow2", true),
    };
    match () {
        () if head[8..16] != [0; 8] => Some((format, "a backing file")),
        () if has_features && head[79] & QCOW2_DATA_FILE != 0 => Some((format, "an external data file")),
        () => None,
    }
}

fn by_content(head: &[u8; 512], disk: &Raw, path: &Path) -> Result<Format, OpenError> {
    let unsupported = |format: &str, reason: &str| OpenError::Unsupported {
        path: path.to_owned(),
        format: format.to_owned(),
        reason: reason.to_owned(),
    };
    if head.starts_with(&QCOW_MAGIC) {
        return match head.get(4..8) {
            Some([0, 0, 0, 1]) => Err(unsupported("qcow", "its first version")),
            _ => Ok(Format::Qcow2),
        };
    }
    for (offset, signature, format) in SIGNATURES {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        if head.get(at..).is_some_and(|rest| rest.starts_with(signature)) {
            return Err(unsupported(format, "its format"));
        }
    }
    if head.starts_with(VMDK_DESCRIPTOR) {
        return Err(unsupported("vmdk", "its format"));
    }
    // A fixed-size VHD is a raw disk with a footer; QEMU knows it by name only, and so it is taken here.
    let vhd = ends_in(path, &["vhd"]);
    let mut foot = [0_u8; 8];
    if vhd && disk.size() >= 512 && disk.read_at(disk.size() - 512, &mut foot).is_ok() && foot == *b"conectix" {
        return Err(unsupported("vpc", "its format"));
    }
    Ok(Format::Raw)
}
