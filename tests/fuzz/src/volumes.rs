//! Disks of strangers from the inside: partition tables, LVM, file systems.
//!
//! An input is a row of sectors: number (2 bytes), 512 bytes; all others are zero.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use images::fs::{FileType, Walk, WalkStep};
use images::{DiskImage, SharedDisk, volume};

use crate::Input;
use crate::images::memory_dir;

const SECTOR: u64 = 512;
const SIZE: u64 = SECTOR << 16;

struct Sparse(BTreeMap<u64, [u8; 512]>);

impl DiskImage for Sparse {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= SIZE);
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        for (at, byte) in (offset..).zip(buf) {
            let place = usize::try_from(at % SECTOR).map_err(io::Error::other)?;
            *byte = self.0.get(&(at / SECTOR)).map_or(0, |sector| sector[place]);
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.0.range(offset / SECTOR..).next();
        Ok(next.map(|(number, _)| (number * SECTOR).max(offset)..(number + 1) * SECTOR))
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(SIZE)
    }

    fn describe(&self) -> String {
        "sectors".to_owned()
    }
}

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut sectors = BTreeMap::new();
    while !input.is_empty() {
        let number = input.number(2);
        let bytes = input.bytes(512);
        let mut sector = [0; 512];
        sector.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        sectors.insert(number, sector);
    }
    look_at_disk(Arc::new(Sparse(sectors)));
}

/// Reads all that a disk has to tell, of which there may be much.
pub(crate) fn look_at_disk(disk: SharedDisk) {
    for layout in volume::scan(&[("disk0".to_owned(), disk)]) {
        for volume in layout.volumes.into_iter().take(8) {
            if volume.content.kind.is_readable() {
                look_at(volume);
            }
        }
    }
}

fn look_at(volume: volume::Volume) {
    let Ok(fs) = images::fs::open(volume.content.kind, volume.disk) else { return };
    let _ = fs.notices();
    let Ok(root) = fs.node(fs.root()) else { return };
    let _ = fs.lookup(fs.root(), b"Etc");
    let mut buffer = vec![0; 20_000];
    for step in Walk::new(fs.as_ref(), root).take(100) {
        let WalkStep::Node(_, node) = step else { continue };
        let _ = fs.xattrs(node.id);
        match node.kind {
            FileType::Symlink => drop(fs.read_link(node.id)),
            FileType::File => {
                let Ok(file) = fs.open(node.id) else { continue };
                let part = usize::try_from(file.size().min(20_000)).unwrap_or(0);
                let _ = file.read_at(0, &mut buffer[..part]);
                let _ = file.read_at(file.size() - part as u64, &mut buffer[..part]);
                if let Ok(Some(range)) = file.next_data(0) {
                    assert!(range.start < range.end && range.end <= file.size(), "{range:?} of {}", file.size());
                }
            }
            _ => {}
        }
    }
}

/// The sectors of a disk that are not zero, as many as fit.
fn sectors_of(bytes: &[u8], first: u64) -> Vec<u8> {
    let mut seed = Vec::new();
    for (number, sector) in (first..).zip(bytes.chunks(512)) {
        if sector.iter().any(|byte| *byte != 0) && seed.len() < 60_000 {
            seed.extend(&number.to_le_bytes()[..2]);
            seed.extend(sector);
            seed.resize(seed.len() + 512 - sector.len(), 0);
        }
    }
    seed
}

/// Small file systems of the usual tools, where they are installed, bare and behind a partition table.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let dir = memory_dir("volumes");
    let tree = dir.path().join("tree");
    let made = std::fs::create_dir_all(tree.join("etc/deep"))
        .and_then(|()| std::fs::write(tree.join("etc/passwd"), "root:x:0:0\n"))
        .and_then(|()| std::fs::write(tree.join("etc/deep/a long name with spaces.txt"), vec![b'x'; 3000]))
        .and_then(|()| std::os::unix::fs::symlink("etc/passwd", tree.join("link")));
    made.unwrap_or_else(|error| panic!("no files for the seeds: {error}"));
    let tree = tree.display().to_string();
    let table = partition_table();
    let mut seeds = vec![sectors_of(&table, 0)];
    let ext = [
        "mke2fs",
        "-q",
        "-F",
        "-b",
        "1024",
        "-N",
        "24",
        "-O",
        "^has_journal,^metadata_csum,^resize_inode",
        "-d",
        &tree,
    ];
    for (number, tool) in [
        [&ext[..], &["-t", "ext4"]].concat(),
        [&ext[..], &["-t", "ext2"]].concat(),
        vec!["mkfs.vfat", "-F", "12", "-s", "1"],
        vec!["mkfs.vfat", "-F", "16", "-s", "1"],
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("volume{number}"));
        let size = if number == 3 { 8 << 20 } else { 512 << 10 };
        if let Some(bytes) = make(&tool, &path, size) {
            seeds.push(sectors_of(&bytes, 0));
            seeds.push([sectors_of(&table, 0), sectors_of(&bytes, 64)].concat());
        }
    }
    seeds
}

fn make(tool: &[&str], path: &Path, size: u64) -> Option<Vec<u8>> {
    std::fs::File::create(path).and_then(|file| file.set_len(size)).ok()?;
    let [program, args @ ..] = tool else { return None };
    let program =
        ["/usr/sbin", "/sbin", "/usr/bin"].iter().map(|dir| Path::new(dir).join(program)).find(|path| path.exists())?;
    let output = Command::new(program).args(args).arg(path).output().ok()?;
    output.status.success().then(|| std::fs::read(path).ok()).flatten()
}

/// An MBR with one partition from sector 64 on.
fn partition_table() -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[446 + 4] = 0x83;
    bytes[446 + 8..446 + 12].copy_from_slice(&64_u32.to_le_bytes());
    bytes[446 + 12..446 + 16].copy_from_slice(&20_000_u32.to_le_bytes());
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    bytes
}
