//! Which format an image has, by its first and last bytes. Sources: the formats' specifications as QEMU's
//! `block/*.c` probe functions apply them.

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

/// Raw is what is nothing else, and what is a block device: a guest may have written what stands on it.
pub(crate) fn detect(disk: &Raw, path: &Path) -> Result<Format, OpenError> {
    if disk.is_device() {
        return Ok(Format::Raw);
    }
    let mut head = [0_u8; 512];
    let length = usize::try_from(disk.size().min(512)).unwrap_or(512);
    let part = head.get_mut(..length).unwrap_or_default();
    disk.read_at(0, part).map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
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
    let vhd = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("vhd"));
    let mut foot = [0_u8; 8];
    if vhd && disk.size() >= 512 && disk.read_at(disk.size() - 512, &mut foot).is_ok() && foot == *b"conectix" {
        return Err(unsupported("vpc", "its format"));
    }
    Ok(Format::Raw)
}
