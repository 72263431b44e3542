//! Disks of strangers from the inside: partition tables, volumes and each file system by itself.
//!
//! A file system is too large to be an input. An input changes one that is kept in `tests/fuzz/disks`, clean or taken
//! while it was in use: which disk (1 byte), then changes: which of its sectors that are not zero (2 bytes), where in it
//! (2 bytes), how many bytes (1 byte), and those.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use images::{DiskImage, SharedDisk};

use crate::{Input, volumes};

const SECTOR: u64 = 512;
/// Unpacked, a kept disk is smaller.
const UNPACKED_MAX: usize = 16 << 20;

type Sector = [u8; 512];

/// A kept disk: its size, and its sectors that are not zero by number.
struct Kept {
    size: u64,
    numbers: Vec<u64>,
    sectors: HashMap<u64, Sector>,
}

impl Kept {
    fn unpack(packed: &[u8]) -> Kept {
        let bytes = zstd::bulk::decompress(packed, UNPACKED_MAX);
        let bytes = bytes.unwrap_or_else(|error| panic!("a kept disk cannot be unpacked: {error}"));
        let mut input = Input::new(&bytes);
        let mut kept = Kept { size: input.number(8), numbers: Vec::new(), sectors: HashMap::new() };
        while !input.is_empty() {
            let number = input.number(4);
            let mut sector = [0; 512];
            sector.copy_from_slice(input.bytes(512));
            kept.numbers.push(number);
            kept.sectors.insert(number, sector);
        }
        kept
    }
}

/// A kept disk with an input's changes.
struct Changed {
    kept: &'static Kept,
    changes: HashMap<u64, Sector>,
}

impl DiskImage for Changed {
    fn size(&self) -> u64 {
        self.kept.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.kept.size);
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let within = usize::try_from(at % SECTOR).map_err(io::Error::other)?;
            let length = (512 - within).min(rest.len());
            let (out, left) = rest.split_at_mut(length);
            let number = at / SECTOR;
            match self.changes.get(&number).or_else(|| self.kept.sectors.get(&number)) {
                Some(sector) => out.copy_from_slice(&sector[within..within + length]),
                None => out.fill(0),
            }
            at += length as u64;
            rest = left;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.kept.numbers.partition_point(|number| (number + 1) * SECTOR <= offset);
        let range = self.kept.numbers.get(next).map(|number| number * SECTOR..(number + 1) * SECTOR);
        Ok(range.map(|range| range.start.max(offset)..range.end.min(self.kept.size)))
    }
}

fn run(disks: &'static [Kept], data: &[u8]) {
    let mut input = Input::new(data);
    let kept = &disks[input.length(1) % disks.len()];
    let mut changes: HashMap<u64, Sector> = HashMap::new();
    while !input.is_empty() {
        let number = kept.numbers[input.length(2) % kept.numbers.len()];
        let (at, length) = (input.length(2) % 512, input.length(1));
        let sector = changes.entry(number).or_insert_with(|| kept.sectors[&number]);
        sector[at..].iter_mut().zip(input.bytes(length)).for_each(|(to, from)| *to = *from);
    }
    let disk: SharedDisk = Arc::new(Changed { kept, changes });
    volumes::look_at_disk(disk);
}

/// One input for each disk, without changes.
fn seeds(disks: &[Kept]) -> Vec<Vec<u8>> {
    (0..disks.len()).map(|number| number.to_le_bytes()[..1].to_vec()).collect()
}

macro_rules! targets {
    ($($target:ident: $($disk:literal)+;)+) => {
        $(
            pub(crate) mod $target {
                use super::{Kept, OnceLock};

                fn disks() -> &'static [Kept] {
                    static DISKS: OnceLock<Vec<Kept>> = OnceLock::new();
                    DISKS.get_or_init(|| {
                        vec![$(Kept::unpack(include_bytes!(concat!("../disks/", $disk, ".zst")))),+]
                    })
                }

                pub(crate) fn run(data: &[u8]) {
                    super::run(disks(), data);
                }

                pub(crate) fn seeds() -> Vec<Vec<u8>> {
                    super::seeds(disks())
                }
            }
        )+
    };
}

targets! {
    tables: "mbr" "gpt" "gpt-damaged";
    lvm: "lvm";
    ext: "ext2" "ext4" "ext4-in-use" "ext4-fast-commit";
    fat: "fat12" "fat16" "fat32";
    exfat: "exfat";
    ntfs: "ntfs";
    iso: "iso";
    xfs: "xfs" "xfs-small-blocks" "xfs-v4" "xfs-in-use";
    btrfs: "btrfs" "btrfs-lzo" "btrfs-zstd" "btrfs-in-use";
}
