//! Files out of recovery points, and out of running recoveries, through the real program.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use lifeboat_tests::{Sandbox, noise, wait_until};

const MIB: u64 = 1 << 20;

fn run(command: &mut Command) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output =
        command.env("PATH", path).output().unwrap_or_else(|error| panic!("{command:?}: {error}; see tests/deps.sh"));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// A tree with something of everything.
fn tree(root: &Path) {
    fs::create_dir_all(root.join("etc/deep/er")).unwrap();
    fs::write(root.join("etc/hostname"), "web01\n").unwrap();
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
    fs::write(root.join("etc/deep/er/noise"), noise(1, 300_000)).unwrap();
    fs::hard_link(root.join("etc/hosts"), root.join("etc/hosts again")).unwrap();
    symlink("../etc/hostname", root.join("etc/link")).unwrap();
    symlink("/etc", root.join("escape")).unwrap();
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.set_len(5 << 30).unwrap();
    sparse.write_all_at(b"far out", 3 << 30).unwrap();
    run(Command::new("mkfifo").arg(root.join("pipe")));
    run(Command::new("setfattr").args(["-n", "user.note", "-v", "kept"]).arg(root.join("etc/hosts")));
    run(Command::new("touch").args(["-d", "2021-03-04 05:06:07 UTC"]).arg(root.join("etc/hostname")));
}

/// A disk of 1 TiB with a GPT: a FAT partition, and ext4 made of `tree`.
fn disk(sandbox: &Sandbox, tree: &Path) -> String {
    let (fat, ext, disk) = (sandbox.path("p1.img"), sandbox.path("p2.img"), sandbox.path("disk.raw"));
    fs::File::create(&fat).unwrap().set_len(64 * MIB).unwrap();
    run(Command::new("mkfs.fat").args(["-F", "32", "-n", "ESP"]).arg(&fat));
    run(Command::new("mcopy").arg("-i").arg(&fat).arg(tree.join("etc/hostname")).arg("::Host Name.txt"));
    let _ = fs::remove_file(&ext);
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-L", "rootfs", "-d"]).arg(tree).arg(&ext).arg("64M"));
    fs::File::create(&disk).unwrap().set_len(1 << 40).unwrap();
    let table = "label: gpt\nstart=2048,size=131072,type=U\nsize=131072,type=L,name=system\n";
    let mut sfdisk = Command::new("/usr/sbin/sfdisk").arg("-q").arg(&disk).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut sfdisk.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    for (image, at) in [(&fat, "1"), (&ext, "65")] {
        run(Command::new("dd").arg(format!("if={}", image.display())).arg(format!("of={}", disk.display())).args([
            "bs=1M",
            &format!("seek={at}"),
            "conv=notrunc,sparse",
            "status=none",
        ]));
    }
    sandbox.name("disk.raw")
}

fn with_point() -> Sandbox {
    let sandbox = Sandbox::with_repository();
    tree(&sandbox.path("tree"));
    let disk = disk(&sandbox, &sandbox.path("tree"));
    sandbox.ok(&["backup", "web01", &disk]);
    sandbox
}

/// `diff` of two trees, links and special files too.
fn assert_same_tree(a: &Path, b: &Path) {
    run(Command::new("diff")
        .args(["-r", "--no-dereference", "-x", "lost+found", "-x", "pipe", "-x", "sparse"])
        .arg(a)
        .arg(b));
}

#[test]
fn volumes_directories_and_versions_are_listed() {
    let sandbox = with_point();
    let disks = sandbox.json(&["ls", "web01"]);
    assert_eq!(disks[0]["table"], "gpt");
    let volumes = disks[0]["volumes"].as_array().unwrap();
    assert_eq!((volumes[0]["name"].as_str(), volumes[0]["type"].as_str()), (Some("p1"), Some("fat32")));
    assert_eq!((volumes[1]["label"].as_str(), volumes[1]["part_label"].as_str()), (Some("rootfs"), Some("system")));
    let files = sandbox.json(&["ls", "web01:disk0:p2", "/etc"]);
    let files = files.as_array().unwrap();
    let named =
        |name: &str| files.iter().find(|file| file["path"] == name).unwrap_or_else(|| panic!("{name} in {files:?}"));
    assert_eq!(named("/etc/link")["target"], "../etc/hostname");
    assert_eq!(named("/etc/hostname")["mtime"], "2021-03-04T05:06:07Z");
    assert_eq!((named("/etc/hosts")["size"].as_u64(), named("/etc/hosts")["links"].as_u64()), (Some(20), Some(2)));
    assert_eq!(
        sandbox.json(&["ls", "web01::p2:/escape/hosts"])[0]["path"],
        "/etc/hosts",
        "links lead on within the disk"
    );
    assert!(sandbox.ok(&["ls", "web01:disk0:p1"]).contains("Host Name.txt"));
    assert!(sandbox.ok(&["find", "web01", "host*"]).contains("disk0:p2:/etc/hosts again"));
    assert_eq!(sandbox.json(&["find", "web01", "/etc/**/no?se"]).as_array().unwrap().len(), 1);

    fs::write(sandbox.path("tree/etc/hostname"), "renamed\n").unwrap();
    let disk = disk(&sandbox, &sandbox.path("tree"));
    sandbox.ok(&["backup", "web01", &disk]);
    let versions = sandbox.json(&["ls", "--versions", "/etc/hostname", "web01"]);
    let sizes: Vec<_> = versions.as_array().unwrap().iter().map(|version| version["size"].as_u64().unwrap()).collect();
    assert_eq!(sizes, [8, 6], "newest first");
    assert!(sandbox.fails(4, &["ls", "--versions", "/etc/nothing", "web01"]).contains("/etc/nothing"));
    assert!(sandbox.fails(4, &["ls", "web01:disk0:p7:/"]).contains("disk0:p2 (ext4)"));
    assert!(sandbox.fails(4, &["ls", "web01:disk0:p2:/no/where"]).contains("/no"));
    assert!(sandbox.fails(2, &["ls", "web01", "/etc"]).contains("several file systems"));
}

#[test]
fn a_tree_is_copied_as_it_is() {
    let sandbox = with_point();
    sandbox.ok(&["cp", "web01:disk0:p2:/", &sandbox.name("out")]);
    let (tree, out) = (sandbox.path("tree"), sandbox.path("out"));
    assert_same_tree(&tree, &out);
    let sparse = out.join("sparse").metadata().unwrap();
    assert_eq!(sparse.len(), 5 << 30);
    assert!(sparse.blocks() * 512 < MIB, "{} bytes are allocated", sparse.blocks() * 512);
    let mut found = [0; 7];
    fs::File::open(out.join("sparse")).unwrap().read_exact_at(&mut found, 3 << 30).unwrap();
    assert_eq!(&found, b"far out");
    let of = |path: &Path| (path.metadata().unwrap().mode(), path.metadata().unwrap().mtime());
    assert_eq!(of(&out.join("etc/hostname")), of(&tree.join("etc/hostname")));
    assert_eq!(of(&out.join("etc/deep")).1, of(&tree.join("etc/deep")).1, "folders keep their times");
    let inode = |name: &str| out.join(name).metadata().unwrap().ino();
    assert_eq!(inode("etc/hosts"), inode("etc/hosts again"));
    assert!(
        run(Command::new("getfattr").args(["-d", "--absolute-names"]).arg(out.join("etc/hosts")))
            .contains("user.note=\"kept\"")
    );

    // Into a folder that exists, by globs, and what exists is kept unless told.
    fs::create_dir(sandbox.path("into")).unwrap();
    sandbox.ok(&["cp", "web01::p2:/etc/host*", &sandbox.name("into")]);
    assert_eq!(fs::read_dir(sandbox.path("into")).unwrap().count(), 3);
    fs::write(sandbox.path("into/hostname"), "mine").unwrap();
    assert!(
        sandbox.fails(5, &["cp", "web01::p2:/etc/hostname", &sandbox.name("into")]).contains("hostname exists already")
    );
    assert_eq!(fs::read(sandbox.path("into/hostname")).unwrap(), b"mine");
    sandbox.ok(&["cp", "--overwrite", "web01::p2:/etc/hostname", &sandbox.name("into")]);
    assert_eq!(fs::read(sandbox.path("into/hostname")).unwrap(), b"web01\n");
    sandbox.ok(&["cp", "web01::p1:/HOST NAME.TXT", &sandbox.name("one")]);
    assert_eq!(fs::read(sandbox.path("one")).unwrap(), b"web01\n");
    assert!(sandbox.fails(4, &["cp", "web01::p2:/etc/*.none", &sandbox.name("into")]).contains("nothing matches"));

    // A link that is in the way leads nowhere.
    fs::create_dir_all(sandbox.path("trap/tree")).unwrap();
    fs::create_dir(sandbox.path("outside")).unwrap();
    symlink(sandbox.path("outside"), sandbox.path("trap/etc")).unwrap();
    sandbox.fails(1, &["cp", "web01::p2:/etc", &sandbox.name("trap")]);
    assert_eq!(fs::read_dir(sandbox.path("outside")).unwrap().count(), 0);
}

#[test]
fn a_long_stream_of_ntfs_becomes_a_file_beside_its_own() {
    let sandbox = Sandbox::with_repository();
    let (image, short, long) = (sandbox.path("ntfs.raw"), sandbox.path("short"), sandbox.path("long"));
    fs::File::create(&image).unwrap().set_len(8 * MIB).unwrap();
    fs::write(&short, "a report\n").unwrap();
    fs::write(&long, noise(4, 200_000)).unwrap();
    run(Command::new("mkntfs").args(["-q", "-F", "-f"]).arg(&image));
    run(Command::new("ntfscp").arg("-q").arg(&image).arg(&short).arg("report"));
    run(Command::new("ntfscp").args(["-q", "-N", "picture"]).arg(&image).arg(&long).arg("report"));
    sandbox.ok(&["backup", "win", &sandbox.name("ntfs.raw")]);
    sandbox.ok(&["cp", "win:disk0:whole:/", &sandbox.name("out")]);
    assert_eq!(fs::read(sandbox.path("out/report")).unwrap(), b"a report\n");
    assert_eq!(fs::read(sandbox.path("out/report:picture")).unwrap(), noise(4, 200_000));
}

#[test]
fn a_tar_stream_is_read_by_tar() {
    let sandbox = with_point();
    let mut copy = sandbox.command(&["cp", "--tar", "web01:disk0:p2:/etc", "web01:disk0:p2:/sparse"]);
    let mut child = copy.stdout(Stdio::piped()).spawn().unwrap();
    fs::create_dir(sandbox.path("out")).unwrap();
    let stream = child.stdout.take().unwrap();
    run(Command::new("tar").args(["-x", "--xattrs", "-C"]).arg(sandbox.path("out")).stdin(stream));
    assert!(child.wait().unwrap().success());
    assert_same_tree(&sandbox.path("tree/etc"), &sandbox.path("out/etc"));
    run(Command::new("cmp").arg(sandbox.path("tree/sparse")).arg(sandbox.path("out/sparse")));
    assert!(sandbox.path("out/sparse").metadata().unwrap().blocks() * 512 < MIB);
}

#[test]
fn the_present_files_of_a_recovery_are_read() {
    let sandbox = with_point();
    let recovery = sandbox.json(&["recover", "web01", "--on", "none"]);
    let uri = recovery["disks"][0]["nbd_uri"].as_str().unwrap().to_owned();
    assert_eq!(sandbox.json(&["ls", "--from", "web01", "disk0:p2:/etc/hostname"])[0]["size"], 6);
    // The file's only block is the first that says so.
    let image = fs::read(sandbox.path("p2.img")).unwrap();
    let block = image.chunks(1024).position(|block| block.starts_with(b"web01\n")).unwrap();
    let offset = 65 * MIB + 1024 * block as u64;
    run(Command::new("qemu-io").args(["-f", "raw", "-c", &format!("write -P 0x41 {offset} 512"), &uri]));
    sandbox.ok(&["cp", "--from", "web01", "disk0:p2:/etc/hostname", &sandbox.name("now")]);
    sandbox.ok(&["cp", "web01:disk0:p2:/etc/hostname", &sandbox.name("then")]);
    assert_eq!(fs::read(sandbox.path("now")).unwrap(), b"AAAAAA");
    assert_eq!(fs::read(sandbox.path("then")).unwrap(), b"web01\n");
    sandbox.ok(&["discard", "web01"]);
}

#[test]
fn the_present_files_of_a_recovery_are_shown_in_a_folder() {
    let sandbox = with_point();
    let recovery = sandbox.json(&["recover", "web01", "--on", "none"]);
    let uri = recovery["disks"][0]["nbd_uri"].as_str().unwrap().to_owned();
    let dir = sandbox.path("mount");
    fs::create_dir(&dir).unwrap();
    assert!(sandbox.fails(4, &["mount", "--from", "nobody", &sandbox.name("mount")]).contains("nobody"));
    let mut running = sandbox.start(&["mount", "--from", "web01", &sandbox.name("mount")]);
    assert!(running.line().contains("mounted on"));
    let root = dir.join("disk0/p2");
    assert_same_tree(&sandbox.path("tree"), &root);
    // The whole partition changes below the folder: another file system takes the place of the first.
    let (tree, image) = (sandbox.path("other"), sandbox.path("other.img"));
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/hostname"), "another machine, with a longer name\n").unwrap();
    fs::write(tree.join("etc/fresh"), noise(3, 100_000)).unwrap();
    run(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("64M"));
    let open = fs::File::open(root.join("etc/deep/er/noise")).unwrap();
    let write = "h.connect_uri(uri); data = open(image, 'rb').read(); \
                 [h.pwrite(data[at:at + 1048576], 65 * 1048576 + at) for at in range(0, len(data), 1048576)]; h.flush()";
    let script = format!("uri, image = {uri:?}, {:?}; {write}", sandbox.name("other.img"));
    run(Command::new("/usr/bin/python3").args(["-c", &format!("import nbd; h = nbd.NBD(); {script}")]));
    wait_until("the folder shows what was written", || {
        fs::read(root.join("etc/fresh")).ok() == Some(noise(3, 100_000))
    });
    wait_until("what is gone is not shown", || !root.join("etc/hosts").exists());
    assert_same_tree(&tree, &root);
    assert_eq!(fs::read(sandbox.path("tree/etc/hostname")).unwrap(), b"web01\n");
    drop(open);
    // The point itself is as it was, also while its recovery is looked at.
    sandbox.ok(&["cp", "web01:disk0:p2:/etc/hostname", &sandbox.name("then")]);
    assert_eq!(fs::read(sandbox.path("then")).unwrap(), b"web01\n");
    assert!(running.stop().success());
    assert!(!dir.join("disk0").exists(), "it is unmounted");
    sandbox.ok(&["discard", "web01"]);
}

#[test]
fn the_files_of_a_point_are_shown_in_a_folder_until_interrupted() {
    let sandbox = with_point();
    let dir = sandbox.path("mount");
    fs::create_dir(&dir).unwrap();
    assert!(sandbox.fails(4, &["mount", "web01", &sandbox.name("nowhere")]).contains("nowhere"));
    let mut running = sandbox.start(&["mount", "web01", &sandbox.name("mount")]);
    assert!(running.line().contains("mounted on"));
    let (root, tree) = (dir.join("disk0/p2"), sandbox.path("tree"));
    assert_same_tree(&tree, &root);
    assert_eq!(fs::read(dir.join("disk0/p1/Host Name.txt")).unwrap(), b"web01\n");
    let of = |path: &Path| {
        let meta = path.symlink_metadata().unwrap();
        (meta.mode(), meta.uid(), meta.size(), meta.mtime(), meta.nlink())
    };
    for name in ["etc/hostname", "etc/hosts", "etc/link", "sparse", "pipe"] {
        assert_eq!(of(&root.join(name)), of(&tree.join(name)), "{name}");
    }
    assert!(
        run(Command::new("getfattr").args(["-d", "--absolute-names"]).arg(root.join("etc/hosts")))
            .contains("user.note=\"kept\"")
    );
    assert_eq!(dir.join("disk0.raw").metadata().unwrap().len(), 1 << 40);
    run(Command::new("cmp").args(["-n", "67108864"]).arg(dir.join("disk0.raw")).arg(sandbox.path("disk.raw")));
    assert_eq!(fs::write(root.join("etc/hostname"), "no").unwrap_err().raw_os_error(), Some(30), "it is read-only");
    // Many readers at once, and one that stays when it is unmounted.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(fs::read(root.join("etc/deep/er/noise")).unwrap(), noise(1, 300_000)));
        }
    });
    let busy = fs::File::open(root.join("etc/hostname")).unwrap();
    assert!(running.stop().success());
    assert!(!dir.join("disk0").exists(), "it is unmounted");
    drop(busy);
}
