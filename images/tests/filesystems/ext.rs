//! ext2, ext3 and ext4 images made by mke2fs, compared with the trees they were made from.

use std::path::Path;
use std::process::Command;

use crate::support::{UNIX, assert_same, make_tree, open, run, volume};
use images::volume::Kind;

fn make(image: &Path, tree: &Path, options: &[&str]) {
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-L", "rootfs"])
        .args(options)
        .arg("-d")
        .arg(tree)
        .arg(image)
        .arg("96M"));
}

fn same(options: &[&str], name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    std::fs::create_dir(&tree).unwrap();
    make_tree(&tree, UNIX);
    make(&image, &tree, options);
    let volume = volume(&image, "whole");
    assert_eq!((volume.content.kind, volume.content.name.as_str()), (Kind::Ext, name));
    assert_eq!(volume.content.label.as_deref(), Some("rootfs"));
    assert!(volume.content.uuid.as_ref().is_some_and(|uuid| uuid.len() == 36));
    assert_same(open(&volume).as_ref(), &tree, UNIX, &["lost+found"]);
}

#[test]
fn ext4_as_everybody_makes_it_reads_byte_for_byte() {
    same(&["-t", "ext4"], "ext4");
}

#[test]
fn ext4_with_small_blocks_and_many_features_reads_byte_for_byte() {
    same(
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-O",
            "inline_data,64bit,metadata_csum,meta_bg,^resize_inode,sparse_super2,ea_inode",
            "-I",
            "512",
        ],
        "ext4",
    );
}

#[test]
fn ext2_and_ext3_with_block_lists_read_byte_for_byte() {
    same(&["-t", "ext2", "-b", "1024"], "ext2");
    same(&["-t", "ext3", "-I", "256"], "ext3");
}
