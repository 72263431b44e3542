//! Damaged file systems: whatever a byte becomes, the answer is content or an error, never a panic or a walk without end.

use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use images::fs::{FileType, Walk, WalkStep};
use images::volume::{Kind, scan};
use images::{DiskImage, SharedDisk};

use crate::support::{disk, make_small_tree, run};

/// Steps of a walk over a tree of a hundred files; damage may make a file into a directory of others.
const STEPS_MAX: usize = 100_000;

/// A disk that notes where little is read at a time: that is where a file system's own structures are.
struct Noting {
    disk: SharedDisk,
    read: Mutex<Vec<Range<u64>>>,
}

/// A disk of which some bytes are others.
struct Changed {
    disk: SharedDisk,
    bytes: Vec<(u64, u8)>,
}

impl DiskImage for Noting {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read.lock().unwrap().push(offset..offset + buf.len() as u64);
        self.disk.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.disk.next_data(offset)
    }
}

impl DiskImage for Changed {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(offset, buf)?;
        for (at, byte) in &self.bytes {
            if let Some(place) = at.checked_sub(offset).and_then(|at| buf.get_mut(usize::try_from(at).unwrap())) {
                *place = *byte;
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.disk.next_data(offset)
    }
}

/// Reads everything that can be reached. Returns how many objects it found.
fn read_all(kind: Kind, disk: SharedDisk, seed: u64) -> usize {
    let Ok(fs) = images::fs::open(kind, disk) else { return 0 };
    let Ok(root) = fs.node(fs.root()) else { return 0 };
    let mut found = 0;
    for step in Walk::new(fs.as_ref(), root) {
        found += 1;
        assert!(found < STEPS_MAX, "seed {seed}: the walk does not end");
        let WalkStep::Node(_, node) = step else { continue };
        let _ = fs.xattrs(node.id);
        match node.kind {
            FileType::Symlink => drop(fs.read_link(node.id)),
            FileType::File => {
                let Ok(content) = fs.open(node.id) else { continue };
                let length = content.size().min(300_000);
                let _ = content.read_at(0, &mut vec![0; usize::try_from(length).unwrap()]);
                let (mut at, mut pieces) = (0, 0);
                while let Ok(Some(data)) = content.next_data(at) {
                    assert!(data.start >= at && data.end > data.start, "seed {seed}: data at {data:?} from {at}");
                    (at, pieces) = (data.end, pieces + 1);
                    if pieces > 10_000 {
                        break;
                    }
                }
            }
            _ => {}
        }
    }
    found
}

fn survives(kind: Kind, image: &Path) {
    let clean = disk(image);
    let noting = Arc::new(Noting { disk: clean.clone(), read: Mutex::default() });
    let whole = read_all(kind, noting.clone(), 0);
    assert!(whole > 100, "{kind}: {whole} objects");
    let places: Vec<u64> = {
        let read = noting.read.lock().unwrap();
        // Blocks of the cache without anything in them are not worth a change.
        read.iter().flat_map(|range| range.clone().step_by(512)).collect()
    };
    let rounds = if std::env::var_os("LIFEBOAT_NIGHTLY").is_some() { 5000 } else { 150 };
    for seed in 1..=rounds {
        let mut state = u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15);
        let mut next = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut bytes = Vec::new();
        for _ in 0..=next(6) {
            let sector = places[usize::try_from(next(places.len() as u64)).unwrap()];
            let mut old = [0; 512];
            let length = 512.min(clean.size() - sector);
            clean.read_at(sector, &mut old[..usize::try_from(length).unwrap()]).unwrap();
            // Bytes that say something are found where something stands.
            let used: Vec<u64> = (0..512).filter(|at| old[usize::try_from(*at).unwrap()] != 0).collect();
            let at = if used.is_empty() { next(512) } else { used[usize::try_from(next(used.len() as u64)).unwrap()] };
            let byte = match next(4) {
                0 => 0,
                1 => 0xff,
                2 => old[usize::try_from(at).unwrap()] ^ (1 << next(8)),
                _ => u8::try_from(next(256)).unwrap(),
            };
            bytes.push((sector + at, byte));
        }
        let changed: SharedDisk = Arc::new(Changed { disk: clean.clone(), bytes });
        let scanned = scan(&[("disk0".to_owned(), changed.clone())]);
        assert_eq!(scanned.len(), 1);
        read_all(kind, changed, seed);
    }
}

fn with_tree(test: impl FnOnce(&Path, &Path)) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    fs::create_dir(&tree).unwrap();
    make_small_tree(&tree);
    test(&tree, &image);
}

#[test]
fn a_damaged_ext4_is_an_error_and_nothing_worse() {
    for options in [&["-t", "ext4", "-O", "inline_data", "-I", "256"][..], &["-t", "ext2", "-b", "1024"]] {
        with_tree(|tree, image| {
            run(Command::new("mke2fs").args(["-q", "-F"]).args(options).arg("-d").arg(tree).arg(image).arg("16M"));
            survives(Kind::Ext, image);
        });
    }
}

#[test]
fn a_damaged_fat_is_an_error_and_nothing_worse() {
    for bits in ["12", "16", "32"] {
        with_tree(|tree, image| {
            run(Command::new("truncate").args(["-s", if bits == "12" { "8M" } else { "40M" }]).arg(image));
            run(Command::new("mkfs.fat").args(["-F", bits]).arg(image));
            let mut copy = Command::new("mcopy");
            copy.env("LC_ALL", "C.UTF-8")
                .args(["-s", "-Q", "-i"])
                .arg(image)
                .args([tree.join("etc"), tree.join("many")]);
            run(copy.arg("::"));
            survives(Kind::Fat, image);
        });
    }
}

#[test]
fn a_damaged_ntfs_is_an_error_and_nothing_worse() {
    with_tree(|tree, image| {
        run(Command::new("truncate").args(["-s", "8M"]).arg(image));
        run(Command::new("mkntfs").args(["-q", "-F", "-f"]).arg(image));
        for entry in fs::read_dir(tree.join("many")).unwrap() {
            let path = entry.unwrap().path();
            run(Command::new("ntfscp").arg("-f").arg(image).arg(&path).arg(path.file_name().unwrap()));
        }
        survives(Kind::Ntfs, image);
    });
}

#[test]
fn a_damaged_iso_is_an_error_and_nothing_worse() {
    with_tree(|tree, image| {
        run(Command::new("genisoimage").args(["-quiet", "-R", "-J", "-o"]).arg(image).arg(tree));
        survives(Kind::Iso, image);
    });
}

#[test]
fn a_damaged_xfs_is_an_error_and_nothing_worse() {
    with_tree(|tree, image| {
        let description = tree.with_extension("description");
        let mut text = "/none\n0 0\nd--755 0 0\n".to_owned();
        for entry in fs::read_dir(tree.join("many")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().replace(' ', "-");
            let source = tree.join(&name);
            fs::copy(&path, &source).unwrap();
            text.push_str(&format!("{name} ---644 0 0 {}\n", source.display()));
        }
        text.push_str("link l--777 0 0 somewhere\nfolder d--755 0 0\n$\n$\n");
        fs::write(&description, text).unwrap();
        run(Command::new("truncate").args(["-s", "320M"]).arg(image));
        run(Command::new("mkfs.xfs").args(["-q", "-p"]).arg(&description).arg(image));
        survives(Kind::Xfs, image);
    });
}

#[test]
fn a_damaged_btrfs_is_an_error_and_nothing_worse() {
    with_tree(|tree, image| {
        run(Command::new("truncate").args(["-s", "120M"]).arg(image));
        run(Command::new("mkfs.btrfs").arg("-q").arg("--rootdir").arg(tree).arg(image));
        survives(Kind::Btrfs, image);
    });
}
