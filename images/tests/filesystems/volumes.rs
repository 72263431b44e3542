//! Partition tables and logical volumes, made by the systems' own tools.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use images::volume::{DiskLayout, Kind, TableKind, scan};

use crate::support::{Loop, disk, find_names, is_root, noise, run, volume};

fn sfdisk(image: &Path, table: &str) {
    let mut child = Command::new("/usr/sbin/sfdisk").arg("-q").arg(image).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

fn layout(image: &Path) -> DiskLayout {
    scan(&[("disk0".to_owned(), disk(image))]).pop().unwrap()
}

fn names(layout: &DiskLayout) -> Vec<(String, u64)> {
    layout.volumes.iter().map(|volume| (volume.name.clone(), volume.size >> 20)).collect()
}

#[test]
fn logical_partitions_of_an_mbr_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(100 << 20).unwrap();
    sfdisk(&image, "label: dos\n1: size=10M\n2: size=60M,type=5\n5: size=10M\n6: size=15M\n");
    let found = layout(&image);
    assert_eq!(found.table, Some(TableKind::Mbr));
    assert_eq!(names(&found), [("p1".to_owned(), 10), ("p5".to_owned(), 10), ("p6".to_owned(), 15)]);
    // What cannot be a partition is no table.
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[0xff; 64], 446).unwrap();
    assert_eq!(layout(&image).table, None);
}

#[test]
fn the_backup_of_a_damaged_gpt_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    sfdisk(&image, "label: gpt\nsize=10M,name=first\nsize=20M,name=second\n");
    let whole = layout(&image);
    assert_eq!(names(&whole), [("p1".to_owned(), 10), ("p2".to_owned(), 20)]);
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&noise(1, 512), 512).unwrap();
    let damaged = layout(&image);
    assert_eq!(names(&damaged), names(&whole));
    assert_eq!(damaged.volumes[1].part_label.as_deref(), Some("second"));
    assert!(damaged.notices[0].contains("backup"), "{:?}", damaged.notices);
    file.write_all_at(&noise(2, 512), (64 << 20) - 512).unwrap();
    assert!(layout(&image).notices[0].contains("cannot be read"));
}

#[test]
fn linear_and_striped_logical_volumes_are_read() {
    if !is_root() {
        eprintln!("passed over: only root can make logical volumes");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images = [dir.path().join("a"), dir.path().join("b")];
    let group = format!("lifeboat{}", std::process::id());
    let config =
        "devices { use_devicesfile=0 filter=[\"a|/dev/loop.*|\",\"r|.*|\"] } activation { udev_sync=0 udev_rules=0 }";
    let lvm = |arguments: &[&str]| {
        run(Command::new(arguments[0]).args(["--config", config, "-q", "--driverloaded", "n"]).args(&arguments[1..]))
    };
    {
        for image in &images {
            fs::File::create(image).unwrap().set_len(100 << 20).unwrap();
        }
        let (a, b) = (Loop::new(&images[0]), Loop::new(&images[1]));
        lvm(&["pvcreate", &a.0, &b.0]);
        lvm(&["vgcreate", &group, &a.0, &b.0]);
        lvm(&["lvcreate", "-an", "-Zn", "-Wn", "-L", "48M", "-n", "root", &group, &a.0]);
        lvm(&["lvcreate", "-an", "-Zn", "-Wn", "-L", "32M", "-i", "2", "-I", "64k", "-n", "fast", &group]);
    }
    // The first extents of the first disk are the linear volume's.
    let (tree, ext) = (dir.path().join("tree"), dir.path().join("ext"));
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("found"), "it").unwrap();
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&ext).arg("48M"));
    let target = fs::OpenOptions::new().write(true).open(&images[0]).unwrap();
    target.write_all_at(&fs::read(&ext).unwrap(), 1 << 20).unwrap();
    // The striped one goes on behind it, and from the second disk's beginning, in turns of 64 KiB.
    let second = fs::OpenOptions::new().write(true).open(&images[1]).unwrap();
    let content = noise(7, 32 << 20);
    for (at, stripe) in content.chunks(64 << 10).enumerate() {
        let within = (at as u64 / 2) * (64 << 10);
        let (file, begin) = if at % 2 == 0 { (&target, 49 << 20) } else { (&second, 1 << 20) };
        file.write_all_at(stripe, begin + within).unwrap();
    }
    let found = scan(&[("a".to_owned(), disk(&images[0])), ("b".to_owned(), disk(&images[1]))]);
    assert_eq!(found[0].volumes[0].content.kind, Kind::LvmMember);
    let of = |name: &str| found[0].volumes.iter().find(|volume| volume.name == format!("{group}/{name}")).unwrap();
    assert_eq!(of("root").content.kind, Kind::Ext);
    assert!(find_names(of("root")).contains(&"found".to_owned()));
    let mut striped = vec![0; content.len()];
    of("fast").disk.read_at(0, &mut striped).unwrap();
    assert!(striped == content, "the striped volume differs");
    let alone = scan(&[("a".to_owned(), disk(&images[0]))]);
    assert!(alone[0].notices.iter().any(|notice| notice.contains("fast")), "{:?}", alone[0].notices);
    assert_eq!(volume(&images[1], "whole").content.kind, Kind::LvmMember);
}
