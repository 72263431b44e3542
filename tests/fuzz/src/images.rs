//! Disk images of strangers.

use std::path::Path;
use std::sync::OnceLock;

use images::{BackingFiles, Format, OpenOptions};
use tempfile::TempDir;

/// A folder in memory where there is one: files are written for every input.
pub(crate) fn memory_dir(name: &str) -> TempDir {
    let shared = Path::new("/dev/shm");
    let parent = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
    let dir = tempfile::Builder::new().prefix(&format!("fuzz-{name}-")).tempdir_in(parent);
    dir.unwrap_or_else(|error| panic!("no folder for {name}: {error}"))
}

/// The names decide what is guessed from the content.
const NAMES: [&str; 4] = ["disk.qcow2", "disk.img", "disk.vmdk", "disk.vhd"];

pub(crate) fn run(data: &[u8]) {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    let Some((kind, bytes)) = data.split_first() else { return };
    let place = std::thread::current().id();
    let name = format!("{place:?}-{}", NAMES[usize::from(*kind) % NAMES.len()]);
    let path = DIR.get_or_init(|| memory_dir("image")).path().join(name);
    std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    // The file of a stranger must not name files of this host.
    let backing_files = BackingFiles::Refuse;
    let forced = (kind & 0x80 != 0).then_some(Format::Qcow2);
    if let Ok(image) = images::open(&path, &OpenOptions { format: forced, backing_files }) {
        let size = image.size();
        let mut buffer = vec![0; 70_000];
        let mut at = 0;
        for _ in 0..64 {
            let Ok(Some(range)) = image.next_data(at) else { break };
            assert!(
                range.start >= at && range.start < range.end && range.end <= size,
                "{range:?} of {size}, from {at}"
            );
            let length = (range.end - range.start).min(buffer.len() as u64);
            let part = usize::try_from(length).unwrap_or(0);
            let _ = image.read_at(range.start, &mut buffer[..part]);
            at = range.end;
        }
        for offset in [0, size / 2, size.saturating_sub(1000)] {
            let length = usize::try_from((size - offset).min(buffer.len() as u64)).unwrap_or(0);
            let _ = image.read_at(offset, &mut buffer[..length]);
        }
        let _ = (image.current_size(), image.describe());
    }
}

/// An OVA: a tar file of strangers with a description in XML.
pub(crate) fn ova(data: &[u8]) {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    let path = DIR.get_or_init(|| memory_dir("ova")).path().join(format!("{:?}.ova", std::thread::current().id()));
    std::fs::write(&path, data).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    for image in lifeboat::capture::ova::images(&path).unwrap_or_default() {
        let end = image.offset.checked_add(image.size);
        assert!(end.is_some_and(|end| end <= data.len() as u64), "{image:?} in {} bytes", data.len());
    }
}

pub(crate) fn ova_seeds() -> Vec<Vec<u8>> {
    let description = "<Envelope xmlns='http://schemas.dmtf.org/ovf/envelope/1' \
        xmlns:ovf='http://schemas.dmtf.org/ovf/envelope/1'><References><File ovf:href='a.vmdk' ovf:id='f'/></References>\
        <DiskSection><Disk ovf:diskId='d' ovf:fileRef='f'/></DiskSection></Envelope>";
    let mut image = vec![0; 1024];
    image[..4].copy_from_slice(b"KDMV");
    image[12] = 1;
    let mut seed = Vec::new();
    for (name, bytes) in [("vm.ovf", description.as_bytes()), ("a.vmdk", &image[..])] {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", bytes.len()).as_bytes());
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        seed.extend(header);
        seed.extend(bytes);
        seed.resize(seed.len().next_multiple_of(512), 0);
    }
    seed.resize(seed.len() + 1024, 0);
    vec![seed]
}

/// A small qcow2 of the given version with clusters of 512 bytes: a piece of data, one that is compressed or zero, and a
/// hole.
fn qcow2(version: u32) -> Vec<u8> {
    let mut bytes = vec![0; 9 * 512];
    let mut word = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    for (at, value) in [(0, 0x5146_49fb), (4, version), (20, 9), (36, 1), (56, 1)] {
        word(at, value);
    }
    if version == 3 {
        word(96, 4);
        word(100, 104);
    }
    let mut long = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    let copied = 1 << 63;
    long(24, 64 * 512); // size of the disk
    long(40, 512); // level 1 table
    long(48, 1024); // reference counts
    long(512, 1536 | copied); // level 2 table
    long(1024, 2048); // reference count block
    long(1536, 2560 | copied); // data
    long(1536 + 8, 3072 | copied);
    long(1536 + 16, u64::from(version == 3)); // zero
    long(1536 + 24, (1 << 62) | 3584); // compressed, and no good
    for cluster in 0..9 {
        bytes[2048 + 2 * cluster + 1] = 1;
    }
    bytes[2560..3584].fill(0x77);
    bytes
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let signatures: [&[u8]; 6] =
        [b"KDMV\x01\0\0\0", b"# Disk DescriptorFile\nversion=1\n", b"vhdxfile", b"conectix", b"QED\0", b"raw disk"];
    let mut seeds: Vec<Vec<u8>> = signatures.iter().map(|bytes| [&[1], *bytes].concat()).collect();
    for kind in [0, 1, 0x80] {
        seeds.extend([2, 3].map(|version| [&[kind], &qcow2(version)[..]].concat()));
    }
    seeds
}
