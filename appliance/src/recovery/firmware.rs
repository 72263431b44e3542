//! Which firmware a disk boots with, by what stands on it.

use std::io;

/// Firmware that a disk is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boots {
    /// A boot sector with code.
    Bios,
    /// A GUID partition table with an EFI system partition, and no code in the boot sector.
    Uefi,
}

/// EFI system partition (UEFI specification 2.10, table 5.7), as it stands on disk.
const ESP_TYPE: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];
/// Bytes of boot code in a master boot record.
const BOOT_CODE: usize = 440;
/// The partition type of an EFI system partition in a master boot record.
const MBR_ESP_TYPE: u8 = 0xef;

/// Looks at the first sectors of a disk through `read`, which fills a buffer from an offset.
pub fn detect(mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<Boots> {
    let mut head = vec![0_u8; 34 * 512];
    read(0, &mut head)?;
    let boot_code = head.iter().take(BOOT_CODE).any(|byte| *byte != 0);
    if boot_code {
        return Ok(Boots::Bios);
    }
    let gpt = head.get(512..520) == Some(b"EFI PART".as_slice())
        && head.get(1024..).is_some_and(|entries| entries.chunks_exact(128).any(|entry| entry.starts_with(&ESP_TYPE)));
    let mbr = [450, 466, 482, 498].iter().any(|at| head.get(*at) == Some(&MBR_ESP_TYPE));
    Ok(if gpt || mbr { Boots::Uefi } else { Boots::Bios })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boots(change: impl FnOnce(&mut [u8])) -> Boots {
        let mut disk = vec![0_u8; 34 * 512];
        change(&mut disk);
        detect(|_, buf| {
            buf.copy_from_slice(&disk);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn a_system_partition_without_boot_code_means_uefi() {
        let gpt = |disk: &mut [u8]| {
            disk[512..520].copy_from_slice(b"EFI PART");
            disk[1024 + 128..1024 + 144].copy_from_slice(&ESP_TYPE);
        };
        assert_eq!(boots(gpt), Boots::Uefi);
        assert_eq!(boots(|disk| disk[450] = MBR_ESP_TYPE), Boots::Uefi);
        assert_eq!(boots(|_| ()), Boots::Bios);
        let both = |disk: &mut [u8]| {
            gpt(disk);
            disk[0] = 0xeb;
        };
        assert_eq!(boots(both), Boots::Bios);
    }
}
