//! NTFS and exFAT images made and filled by their own drivers, which run in user space.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use images::fs::{FileType, find_path};
use images::volume::Kind;

use crate::support::{
    Able, Loop, Mounted, assert_same, contents, is_root, make_tree, noise, open, run, volume, wait_for_end,
};

/// What these file systems hold of what a tree has. Times are to the finest of 10 ms.
const ABLE: Able = Able {
    unix: false,
    links: false,
    hard_links: false,
    special: false,
    holes: false,
    xattrs: false,
    time: 10_000_000,
};

fn copy(tree: &Path, to: &Path) {
    run(Command::new("cp").args(["-r", "--preserve=timestamps", "--no-target-directory"]).arg(tree).arg(to));
}

#[test]
fn ntfs_reads_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image, mount) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("mount"));
    fs::create_dir(&tree).unwrap();
    let mut acls = Vec::new();
    let able = Able { links: true, hard_links: true, holes: true, time: 1000, ..ABLE };
    make_tree(&tree, Able { links: false, ..able });
    run(Command::new("truncate").args(["-s", "96M"]).arg(&image));
    run(Command::new("mkntfs").args(["-q", "-F", "-f", "-L", "Windows C"]).arg(&image));
    {
        let mut driver = Command::new("ntfs-3g");
        let mounted =
            Mounted::new(&mount, driver.args(["-o", "compression,streams_interface=xattr"]).arg(&image).arg(&mount));
        run(Command::new("cp")
            .args(["-r", "--preserve=timestamps,links", "--sparse=always", "--no-target-directory"])
            .arg(&tree)
            .arg(&mounted.0));
        // Files in a compressed folder are compressed.
        fs::create_dir(mount.join("packed")).unwrap();
        run(Command::new("setfattr").args(["-n", "system.ntfs_attrib", "-v", "0x00080000"]).arg(mount.join("packed")));
        let text: Vec<u8> =
            (0..60_000).flat_map(|line| format!("line {} of many\n", line % 977).into_bytes()).collect();
        fs::write(mount.join("packed/text"), &text).unwrap();
        fs::write(mount.join("packed/noise"), noise(9, 200_000)).unwrap();
        fs::write(mount.join("packed/zeroes and a tail"), [vec![0; 300_000], b"tail".to_vec()].concat()).unwrap();
        run(Command::new("setfattr")
            .args(["-n", "user.Zone.Identifier", "-v", "[ZoneTransfer]"])
            .arg(mount.join("one")));
        fs::create_dir(tree.join("packed")).unwrap();
        for name in ["text", "noise", "zeroes and a tail"] {
            run(Command::new("cp")
                .arg("--preserve=timestamps")
                .arg(mount.join("packed").join(name))
                .arg(tree.join("packed")));
        }
        for name in ["one", "etc"] {
            let raw = ["-e", "hex", "--only-values", "-n", "system.ntfs_acl"];
            acls.push(Command::new("getfattr").args(raw).arg(mount.join(name)).output().unwrap().stdout);
        }
        for name in ["", "packed"] {
            run(Command::new("touch").arg("-r").arg(mount.join(name)).arg(tree.join(name)));
        }
    }
    wait_for_end("ntfs-3g", &mount);
    {
        let mut driver = Command::new("ntfs-3g");
        let mounted = Mounted::new(&mount, driver.args(["-o", "streams_interface=windows"]).arg(&image).arg(&mount));
        let times = mounted.0.join("etc/hostname");
        fs::write(mounted.0.join("etc/hostname:a long stream"), noise(10, 300_000)).unwrap();
        run(Command::new("touch").arg("-r").arg(tree.join("etc/hostname")).arg(times));
    }
    wait_for_end("ntfs-3g", &mount);
    let volume = volume(&image, "whole");
    assert_eq!((volume.content.kind, volume.content.label.as_deref()), (Kind::Ntfs, Some("Windows C")));
    assert_eq!(volume.content.uuid.as_ref().map(String::len), Some(16));
    let fs = open(&volume);
    assert_same(fs.as_ref(), &tree, Able { holes: false, ..able }, &[]);
    let (_, one) = find_path(fs.as_ref(), b"/ONE").unwrap();
    assert_eq!(
        fs.xattrs(one.id).unwrap(),
        [
            (b"user.Zone.Identifier".to_vec(), b"[ZoneTransfer]".to_vec()),
            (b"system.ntfs_acl".to_vec(), acls[0].clone())
        ]
    );
    let (_, etc) = find_path(fs.as_ref(), b"/etc").unwrap();
    assert_eq!(fs.xattrs(etc.id).unwrap(), [(b"system.ntfs_acl".to_vec(), acls[1].clone())]);
    assert!(fs.streams(one.id).unwrap().is_empty(), "what is short is an attribute");
    let (_, hostname) = find_path(fs.as_ref(), b"/etc/hostname").unwrap();
    let streams = fs.streams(hostname.id).unwrap();
    assert_eq!((streams.len(), streams[0].0.as_slice(), streams[0].1.size()), (1, &b"a long stream"[..], 300_000));
    let mut content = vec![0; 300_000];
    streams[0].1.read_at(0, &mut content).unwrap();
    assert!(content == noise(10, 300_000), "the stream differs");
    let compressed = run(Command::new("ntfsinfo").args(["-F", "packed/text"]).arg(&image));
    assert!(compressed.contains("COMPRESSED"), "{compressed}");
}

#[test]
fn exfat_reads_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image, mount) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("mount"));
    fs::create_dir(&tree).unwrap();
    make_tree(&tree, ABLE);
    // Small clusters, so that entries of a file lie in two of them.
    run(Command::new("truncate").args(["-s", "64M"]).arg(&image));
    run(Command::new("mkfs.exfat").args(["-L", "stick", "-c", "512"]).arg(&image));
    {
        // Root's driver takes devices alone, and nobody else can make one.
        let device = is_root().then(|| Loop::new(&image));
        let source = device.as_ref().map_or(image.clone(), |device| PathBuf::from(&device.0));
        let mut driver = Command::new("mount.exfat-fuse");
        let mounted = Mounted::new(&mount, driver.arg(source).arg(&mount).env("TZ", "UTC"));
        // A hole in the first free clusters makes later files lie in pieces.
        for name in ["a", "b", "c"] {
            fs::write(mounted.0.join(name), noise(1, 30_000)).unwrap();
        }
        fs::remove_file(mounted.0.join("b")).unwrap();
        copy(&tree, &mounted.0);
        for name in ["a", "c"] {
            fs::remove_file(mounted.0.join(name)).unwrap();
        }
    }
    wait_for_end("exfat-fuse", &mount);
    let volume = volume(&image, "whole");
    assert_eq!((volume.content.kind, volume.content.label.as_deref()), (Kind::ExFat, Some("stick")));
    let fs = open(&volume);
    assert_same(fs.as_ref(), &tree, Able { time: 2_000_000_000, ..ABLE }, &[]);
    assert!(contents(fs.as_ref()).iter().all(|(_, node)| matches!(node.kind, FileType::File | FileType::Directory)));
    assert!(find_path(fs.as_ref(), b"/ETC/HOSTNAME").is_ok());
}
