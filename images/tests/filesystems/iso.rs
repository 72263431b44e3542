//! CD images made by genisoimage and xorriso, compared with the trees they were made from.

use std::fs;
use std::path::Path;
use std::process::Command;

use images::volume::Kind;

use crate::support::{Able, UNIX, assert_same, contents, make_tree, open, run, volume};

fn made(able: Able, tree: &Path, image: &Path, tool: &str, options: &[&str]) {
    fs::create_dir(tree).unwrap();
    make_tree(tree, able);
    run(Command::new(tool).args(options).args(["-quiet", "-V", "INSTALL", "-o"]).arg(image).arg(tree));
}

#[test]
fn rock_ridge_reads_byte_for_byte() {
    let able = Able { hard_links: false, holes: false, xattrs: false, ..UNIX };
    for (tool, options) in
        [("genisoimage", vec!["-R", "-J", "-joliet-long"]), ("xorriso", vec!["-as", "mkisofs", "-R"])]
    {
        let dir = tempfile::tempdir().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        fs::create_dir(&tree).unwrap();
        // Deeper than eight: such directories are moved.
        fs::create_dir_all(tree.join("1/2/3/4/5/6/7/8/9/10")).unwrap();
        fs::write(tree.join("1/2/3/4/5/6/7/8/9/10/deep"), "down here").unwrap();
        make_tree(&tree, able);
        run(Command::new(tool).args(&options).args(["-quiet", "-V", "INSTALL", "-o"]).arg(&image).arg(&tree));
        let volume = volume(&image, "whole");
        assert_eq!((volume.content.kind, volume.content.label.as_deref()), (Kind::Iso, Some("INSTALL")));
        assert_same(open(&volume).as_ref(), &tree, able, &["rr_moved"]);
    }
}

#[test]
fn joliet_and_plain_names_are_read() {
    let able = Able {
        unix: false,
        links: false,
        hard_links: false,
        special: false,
        holes: false,
        xattrs: false,
        time: 1_000_000_000,
    };
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    made(able, &tree, &image, "genisoimage", &["-J", "-joliet-long"]);
    let names: Vec<_> = contents(open(&volume(&image, "whole")).as_ref()).into_iter().map(|(path, _)| path).collect();
    assert!(names.contains(&"etc/\u{fc}ml\u{e4}ut \u{65e5}\u{672c}\u{8a9e}.txt".into()), "{names:?}");
    assert!(names.contains(&"deep/er/and/deeper still/it is".into()));
    run(Command::new("genisoimage").args(["-quiet", "-o"]).arg(&image).arg(tree.join("many")));
    assert_eq!(contents(open(&volume(&image, "whole")).as_ref()).len(), 701);
}
