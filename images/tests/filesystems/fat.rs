//! FAT images made by mkfs.fat and filled by mtools, compared with the trees they were made from.

use std::process::Command;

use crate::support::{Able, assert_same, make_tree, open, run, volume};
use images::volume::Kind;

const ABLE: Able =
    Able { unix: false, links: false, hard_links: false, special: false, holes: false, xattrs: false, time: 0 };

fn same(options: &[&str], size: &str, name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    std::fs::create_dir(&tree).unwrap();
    make_tree(&tree, ABLE);
    run(Command::new("truncate").args(["-s", size]).arg(&image));
    run(Command::new("mkfs.fat").args(["-n", "EFI PART", "-i", "1234abcd"]).args(options).arg(&image));
    let mut copy = Command::new("mcopy");
    copy.env("LC_ALL", "C.UTF-8").env("TZ", "UTC").args(["-s", "-m", "-Q", "-i"]).arg(&image);
    for entry in std::fs::read_dir(&tree).unwrap() {
        copy.arg(entry.unwrap().path());
    }
    run(copy.arg("::"));
    let volume = volume(&image, "whole");
    assert_eq!((volume.content.kind, volume.content.name.as_str()), (Kind::Fat, name));
    assert_eq!(volume.content.label.as_deref(), Some("EFI PART"));
    assert_eq!(volume.content.uuid.as_deref(), Some("1234-ABCD"));
    let fs = open(&volume);
    assert_same(fs.as_ref(), &tree, ABLE, &[]);
    let (_, node) = images::fs::find_path(fs.as_ref(), b"/ETC/HostName").unwrap();
    assert_eq!(
        (node.modified.seconds, node.size),
        (1_582_977_602, 6),
        "names are found in any case, and have their times"
    );
}

#[test]
fn fat_of_every_width_reads_byte_for_byte() {
    same(&["-F", "12", "-s", "8", "-r", "512"], "15M", "fat12");
    same(&["-F", "16"], "64M", "fat16");
    same(&["-F", "32", "-s", "1"], "64M", "fat32");
}
