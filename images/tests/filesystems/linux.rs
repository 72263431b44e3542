//! File systems that the kernel's own drivers write: XFS, and ext4 taken while it was in use.

use std::fs;
use std::path::Path;
use std::process::Command;

use images::volume::Kind;

use crate::support::{Able, Mounted, UNIX, assert_same, kernel_has, make_tree, noise, open, run, volume};

/// The kernel keeps times to the nanosecond.
const EXACT: Able = Able { time: 1, ..UNIX };

fn mount(image: &Path, dir: &Path) -> Mounted {
    Mounted::new(dir, Command::new("mount").args(["-o", "loop"]).arg(image).arg(dir))
}

/// Writes a tree to a new file system and the same to a folder, and leaves the image to `look` at it.
fn with_tree(size: &str, make: &mut Command, more: impl Fn(&Path), look: impl Fn(&Path, &Path, &Path)) {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image, mounted) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("mount"));
    fs::create_dir(&tree).unwrap();
    make_tree(&tree, UNIX);
    more(&tree);
    run(Command::new("truncate").args(["-s", size]).arg(&image));
    run(make.arg(&image));
    {
        let mounted = mount(&image, &mounted);
        run(Command::new("cp").args(["-a", "--sparse=always", "--no-target-directory"]).arg(&tree).arg(&mounted.0));
        run(Command::new("sync").arg("-f").arg(&mounted.0));
        look(&image, &tree, Path::new("while mounted"));
    }
    look(&image, &tree, Path::new("after unmount"));
}

/// What makes trees of extents, large directories and attributes in blocks.
fn large(tree: &Path) {
    let crumbs = fs::File::create(tree.join("crumbs")).unwrap();
    for at in 0..3000 {
        std::os::unix::fs::FileExt::write_all_at(&crumbs, &noise(at, 100), at * 8192).unwrap();
    }
    fs::create_dir(tree.join("crowd")).unwrap();
    for number in 0..3000 {
        fs::write(tree.join(format!("crowd/a file with a name that is not short {number}")), "").unwrap();
    }
    for number in 0..30 {
        let value: String = std::iter::repeat_n(char::from(b'a' + number % 26), 1 + usize::from(number) * 3).collect();
        let name = format!("user.attribute {number}");
        run(Command::new("setfattr").args(["-n", &name, "-v", &value]).arg(tree.join("one")));
    }
}

#[test]
fn xfs_reads_byte_for_byte() {
    if !kernel_has("xfs") {
        return;
    }
    for options in [&["-m", "bigtime=1"][..], &["-b", "size=1024", "-n", "size=4096", "-i", "size=512"]] {
        with_tree(
            "400M",
            Command::new("mkfs.xfs").args(["-q", "-L", "data"]).args(options),
            large,
            |image, tree, when| {
                if when == Path::new("while mounted") {
                    return;
                }
                let volume = volume(image, "whole");
                assert_eq!((volume.content.kind, volume.content.label.as_deref()), (Kind::Xfs, Some("data")));
                let fs = open(&volume);
                assert_eq!(fs.notices(), [""; 0]);
                assert_same(fs.as_ref(), tree, EXACT, &[]);
            },
        );
    }
}

/// Changes of many kinds to what is there.
fn change(root: &Path) {
    fs::remove_dir_all(root.join("crowd")).unwrap();
    fs::rename(root.join("deep/er"), root.join("etc/moved")).unwrap();
    fs::remove_file(root.join("crumbs")).unwrap();
    fs::remove_file(root.join("etc/hostname")).unwrap();
    fs::write(root.join("etc/hostname"), "renamed\n").unwrap();
    fs::OpenOptions::new().write(true).open(root.join("large")).unwrap().set_len(70_001).unwrap();
    fs::create_dir(root.join("fresh")).unwrap();
    for number in 0..500 {
        fs::write(root.join(format!("fresh/{number}")), noise(number, usize::try_from(number).unwrap() * 7)).unwrap();
    }
    for number in (0..500).step_by(3) {
        fs::remove_file(root.join(format!("fresh/{number}"))).unwrap();
    }
    std::os::unix::fs::symlink("s".repeat(900), root.join("fresh/long link")).unwrap();
    let pieces = fs::File::create(root.join("fresh/pieces")).unwrap();
    for at in (0..400).rev() {
        std::os::unix::fs::FileExt::write_all_at(&pieces, &noise(at, 4096), at * 12_288).unwrap();
    }
    let value = "v".repeat(2500);
    run(Command::new("setfattr").args(["-n", "user.new", "-v", &value]).arg(root.join("block")));
}

/// Writes a tree and then changes it, and takes the disk at once, whose log has then not been written back. What was
/// changed last the kernel would lose, too, so it is synced.
#[test]
fn xfs_in_use_reads_with_its_log() {
    if !kernel_has("xfs") {
        return;
    }
    for (options, ending) in
        [(&["-m", "bigtime=1"][..], "shutdown"), (&["-b", "size=1024", "-n", "size=4096", "-m", "bigtime=0"], "copy")]
    {
        let dir = tempfile::tempdir().unwrap();
        let [tree, image, at, taken] = ["tree", "image", "mount", "taken"].map(|name| dir.path().join(name));
        fs::create_dir(&tree).unwrap();
        make_tree(&tree, UNIX);
        large(&tree);
        run(Command::new("truncate").args(["-s", "400M"]).arg(&image));
        run(Command::new("mkfs.xfs").arg("-q").args(options).arg(&image));
        let mounted = mount(&image, &at);
        run(Command::new("cp").args(["-a", "--sparse=always", "--no-target-directory"]).arg(&tree).arg(&mounted.0));
        for step in ["filled", "changed"] {
            if step == "changed" {
                change(&mounted.0);
                run(Command::new("rm").arg("-rf").arg(&tree));
                run(Command::new("cp")
                    .args(["-a", "--sparse=always", "--no-target-directory"])
                    .arg(&mounted.0)
                    .arg(&tree));
            }
            run(Command::new("sync").arg("-f").arg(&mounted.0));
            if step == "changed" && ending == "shutdown" {
                run(Command::new("xfs_io").args(["-x", "-c", "shutdown -f"]).arg(&mounted.0));
            }
            run(Command::new("cp").args(["--sparse=always"]).arg(&image).arg(&taken));
            let fs = open(&volume(&taken, "whole"));
            assert!(fs.notices()[0].contains("replayed in memory"), "{step}: {:?}", fs.notices());
            assert_same(fs.as_ref(), &tree, EXACT, &[]);
        }
        if ending == "shutdown" {
            // It cannot be synced any more.
            run(Command::new("umount").arg(&mounted.0));
            std::mem::forget(mounted);
        }
    }
}

/// Kernels do not write version 4 any more; its maker can fill it from a description.
#[test]
fn xfs_of_version_4_reads_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image, description) =
        (dir.path().join("tree"), dir.path().join("image"), dir.path().join("description"));
    fs::create_dir_all(tree.join("folder/below")).unwrap();
    let mut text = "/none\n0 0\nd--755 0 0\n".to_owned();
    let mut add = |folder: &str, name: &str, bytes: &[u8]| {
        let path = tree.join(folder).join(name);
        fs::write(&path, bytes).unwrap();
        text.push_str(&format!("{name} ---644 0 0 {}\n", path.display()));
    };
    add("", "large", &noise(1, 700_001));
    add("", "empty", b"");
    for number in 0..300 {
        add("", &format!("file-number-{number}"), format!("{number}").as_bytes());
    }
    text.push_str("link l--777 0 0 folder/below\nfolder d--755 0 0\n");
    std::os::unix::fs::symlink("folder/below", tree.join("link")).unwrap();
    let few = tree.join("folder/few");
    fs::write(&few, b"few").unwrap();
    text.push_str(&format!("few ---644 0 0 {}\nbelow d--755 0 0\n$\n$\n$\n", few.display()));
    fs::write(&description, text).unwrap();
    run(Command::new("truncate").args(["-s", "400M"]).arg(&image));
    run(Command::new("mkfs.xfs").args(["-q", "-m", "crc=0", "-n", "ftype=0", "-p"]).arg(&description).arg(&image));
    let able = Able { unix: false, hard_links: false, holes: false, xattrs: false, special: false, time: 0, ..UNIX };
    assert_same(open(&volume(&image, "whole")).as_ref(), &tree, able, &[]);
}

#[test]
fn ext4_in_use_reads_with_its_journal() {
    if !kernel_has("ext4") {
        return;
    }
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-O", "inline_data", "-I", "512", "-E", "lazy_itable_init=0"]);
    with_tree(
        "200M",
        &mut make,
        |_| {},
        |image, tree, when| {
            let fs = open(&volume(image, "whole"));
            let in_use = when == Path::new("while mounted");
            assert_eq!(
                fs.notices().iter().any(|notice| notice.contains("replayed")),
                in_use,
                "{when:?}: {:?}",
                fs.notices()
            );
            assert_same(fs.as_ref(), tree, EXACT, &["lost+found"]);
        },
    );
}

#[test]
fn btrfs_reads_byte_for_byte() {
    if !kernel_has("btrfs") {
        return;
    }
    for compression in ["zlib", "lzo", "zstd", "no"] {
        let dir = tempfile::tempdir().unwrap();
        let (tree, image, at) = (dir.path().join("tree"), dir.path().join("image"), dir.path().join("mount"));
        fs::create_dir(&tree).unwrap();
        make_tree(&tree, UNIX);
        let text: Vec<u8> =
            (0..60_000).flat_map(|line| format!("line {} of many\n", line % 977).into_bytes()).collect();
        fs::write(tree.join("text"), &text).unwrap();
        fs::create_dir(tree.join("within")).unwrap();
        fs::write(tree.join("within/file"), "in a subvolume of its own").unwrap();
        run(Command::new("truncate").args(["-s", "256M"]).arg(&image));
        run(Command::new("mkfs.btrfs").args(["-q", "-L", "pool"]).arg(&image));
        {
            fs::create_dir(&at).unwrap();
            let option =
                if compression == "no" { "loop".to_owned() } else { format!("loop,compress-force={compression}") };
            let mounted = Mounted::new(&at, Command::new("mount").args(["-o", &option]).arg(&image).arg(&at));
            run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(mounted.0.join("within")));
            run(Command::new("cp").args(["-a", "--sparse=always", "--no-target-directory"]).arg(&tree).arg(&mounted.0));
        }
        let volume = volume(&image, "whole");
        assert_eq!((volume.content.kind, volume.content.label.as_deref()), (Kind::Btrfs, Some("pool")));
        let fs = open(&volume);
        assert_eq!(fs.notices(), [""; 0]);
        let able = Able { holes: compression == "no", ..EXACT };
        assert_same(fs.as_ref(), &tree, able, &[]);
    }
}

/// Opens a file or folder and syncs it alone, which is what logs of single files are for.
fn sync(path: &Path) {
    fs::File::open(path).unwrap().sync_all().unwrap();
}

/// Changes of many kinds, each synced by itself.
fn change_and_sync(root: &Path) {
    let at = |name: &str| root.join(name);
    let write_at = |name: &str, offset: u64, bytes: &[u8]| {
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(at(name)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, bytes, offset).unwrap();
        file.sync_all().unwrap();
    };
    write_at("new", 0, b"new");
    write_at("large", 1_000_000, &noise(11, 100_000));
    write_at("large", 3_000_001, &noise(12, 5000));
    write_at("one", 1, &noise(13, 20_000));
    write_at("sparse", 5 << 20, &noise(14, 9000));
    fs::OpenOptions::new().write(true).open(at("blocks")).unwrap().set_len(50_001).unwrap();
    sync(&at("blocks"));
    write_at("blocks", 90_000, &noise(15, 100));
    run(Command::new("fallocate").args(["--punch-hole", "-o", "20480", "-l", "40960"]).arg(at("large")));
    sync(&at("large"));
    fs::rename(at("many/file number 1"), at("many/first")).unwrap();
    sync(&at("many/first"));
    fs::rename(at("many/file number 2"), at("etc/second")).unwrap();
    sync(&at("etc/second"));
    fs::rename(at("many/file number 3"), at("many/file number 4")).unwrap();
    sync(&at("many/file number 4"));
    for number in 20..40 {
        fs::remove_file(at(&format!("many/file number {number}"))).unwrap();
    }
    sync(&at("many"));
    fs::hard_link(at("new"), at("etc/new again")).unwrap();
    sync(&at("new"));
    fs::hard_link(at("many/file number 5"), at("many/fifth")).unwrap();
    fs::remove_file(at("many/file number 5")).unwrap();
    sync(&at("many/fifth"));
    fs::remove_file(at("etc/blocks again")).unwrap();
    sync(&at("blocks"));
    fs::create_dir_all(at("fresh/folder")).unwrap();
    for number in 0..30 {
        write_at(&format!("fresh/folder/{number}"), 0, &noise(number, usize::try_from(number * 300).unwrap()));
    }
    std::os::unix::fs::symlink("etc/hostname", at("fresh/link")).unwrap();
    sync(&at("fresh"));
    run(Command::new("setfattr").args(["-n", "user.new", "-v", "value"]).arg(at("block")));
    run(Command::new("setfattr").args(["-x", "user.small"]).arg(at("block")));
    sync(&at("block"));
    fs::rename(at("deep/er"), at("deep/renamed")).unwrap();
    sync(&at("deep"));
    write_at("within/file", 0, b"IN a subvolume");
}

#[test]
fn ext4_in_use_reads_with_its_fast_commits() {
    if !kernel_has("ext4") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let [tree, image, at, taken] = ["tree", "image", "mount", "taken"].map(|name| dir.path().join(name));
    fs::create_dir(&tree).unwrap();
    make_tree(&tree, UNIX);
    fs::create_dir(tree.join("within")).unwrap();
    run(Command::new("truncate").args(["-s", "200M"]).arg(&image));
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-O", "fast_commit", "-J", "size=16"]).arg(&image));
    fs::create_dir(&at).unwrap();
    {
        let mounted = Mounted::new(&at, Command::new("mount").args(["-o", "loop,commit=300"]).arg(&image).arg(&at));
        run(Command::new("cp").args(["-a", "--sparse=always", "--no-target-directory"]).arg(&tree).arg(&mounted.0));
        run(Command::new("sync").arg("-f").arg(&mounted.0));
        change_and_sync(&mounted.0);
        fs::write(mounted.0.join("block"), noise(21, 30_000)).unwrap();
        sync(&mounted.0.join("block"));
        fs::rename(mounted.0.join("new"), mounted.0.join("etc/newest")).unwrap();
        sync(&mounted.0.join("etc/newest"));
        run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&taken));
    }
    let ours = open(&volume(&taken, "whole"));
    assert!(ours.notices()[0].contains("fast commit"), "{:?}", ours.notices());
    let mounted = Mounted::new(&at, Command::new("mount").args(["-o", "loop"]).arg(&taken).arg(&at));
    // The kernel gives directories that it replays names into the time of that.
    assert_same(ours.as_ref(), &mounted.0, Able { time: 600_000_000_000, ..EXACT }, &[]);
}

#[test]
fn btrfs_in_use_reads_with_its_log() {
    if !kernel_has("btrfs") {
        return;
    }
    for options in ["loop,commit=300", "loop,commit=300,compress-force=zstd"] {
        let dir = tempfile::tempdir().unwrap();
        let [tree, image, at, taken] = ["tree", "image", "mount", "taken"].map(|name| dir.path().join(name));
        fs::create_dir(&tree).unwrap();
        make_tree(&tree, UNIX);
        run(Command::new("truncate").args(["-s", "256M"]).arg(&image));
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        fs::create_dir(&at).unwrap();
        {
            let mounted = Mounted::new(&at, Command::new("mount").args(["-o", options]).arg(&image).arg(&at));
            run(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(mounted.0.join("within")));
            fs::write(mounted.0.join("within/file"), "in a subvolume of its own").unwrap();
            run(Command::new("cp").args(["-a", "--sparse=always", "--no-target-directory"]).arg(&tree).arg(&mounted.0));
            run(Command::new("sync").arg("-f").arg(&mounted.0));
            change_and_sync(&mounted.0);
            run(Command::new("cp").arg("--sparse=always").arg(&image).arg(&taken));
        }
        let ours = open(&volume(&taken, "whole"));
        assert!(ours.notices()[0].contains("replayed in memory"), "{:?}", ours.notices());
        // The kernel replays it, too, once it is mounted.
        let copy = dir.path().join("copy");
        run(Command::new("cp").arg("--sparse=always").arg(&taken).arg(&copy));
        let mounted = Mounted::new(&at, Command::new("mount").args(["-o", "loop"]).arg(&copy).arg(&at));
        assert_eq!(fs::read(at.join("new")).unwrap(), b"new");
        let able = Able { holes: !options.contains("compress"), ..EXACT };
        assert_same(ours.as_ref(), &mounted.0, able, &[]);
    }
}
