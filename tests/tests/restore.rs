//! Full restores with the real program: in place, taken up again after `kill -9`, read back.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Child, Command};

use lifeboat_tests::{Sandbox, have, noise, tool, wait_until};

const MIB: u64 = 1 << 20;

/// A disk of `size` with noise here and there, backed up.
fn with_disk(size: u64, noisy: u64) -> (Sandbox, Vec<u8>) {
    let sandbox = Sandbox::with_repository();
    let file = File::create(sandbox.path("disk.raw")).unwrap();
    file.set_len(size).unwrap();
    for part in 0..4 {
        let bytes = noise(part, usize::try_from(noisy / 4).unwrap());
        file.write_all_at(&bytes, part * (size / 4) + 4096 * part).unwrap();
    }
    drop(file);
    sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
    let bytes = fs::read(sandbox.path("disk.raw")).unwrap();
    (sandbox, bytes)
}

#[test]
fn a_disk_that_is_nearly_right_is_rewritten_where_it_differs() {
    let (sandbox, disk) = with_disk(32 * MIB + 1000, 8 * MIB);
    let target = sandbox.name("out.raw");
    sandbox.fails(1, &["restore", "web01", "--to", &target, "--in-place"]);
    sandbox.ok(&["restore", "web01", "--to", &target, "--verify"]);
    let restored = sandbox.json(&["restore", "web01", "--to", &target, "--in-place"]);
    assert_eq!(restored["disks"][0]["written"], 0, "{restored}");
    assert_eq!(restored["disks"][0]["unchanged"], 32 * MIB + 1000, "{restored}");

    // A changed sector in data, one in a hole, a longer file.
    let file = File::options().write(true).open(&target).unwrap();
    file.write_all_at(&[0x5a; 512], 5 * 65536).unwrap();
    file.write_all_at(&[0x5a; 512], 30 * MIB).unwrap();
    file.set_len(40 * MIB).unwrap();
    let restored = sandbox.json(&["restore", "web01", "--to", &target, "--in-place", "--verify"]);
    assert_eq!(restored["disks"][0]["written"], 2 * 65536, "{restored}");
    assert_eq!(restored["disks"][0]["verified"], true, "{restored}");
    assert!(fs::read(&target).unwrap() == disk);

    // A file that holds something else altogether, and one that is too short.
    fs::write(&target, noise(9, 4 << 20)).unwrap();
    sandbox.ok(&["restore", "web01", "--to", &target, "--in-place"]);
    assert!(fs::read(&target).unwrap() == disk);
    assert!(fs::metadata(&target).unwrap().blocks() * 512 < 12 * MIB, "what is zero has become holes");
}

#[test]
fn what_cannot_be_gone_on_with_is_refused_and_left_alone() {
    let (sandbox, _) = with_disk(4 * MIB, MIB);
    let qcow2 = sandbox.name("out.qcow2");
    sandbox.ok(&["restore", "web01", "--to", &qcow2, "--verify"]);
    let before = fs::read(&qcow2).unwrap();
    for option in ["--in-place", "--resume"] {
        sandbox.fails(2, &["restore", "web01", "--to", &qcow2, option]);
        assert!(sandbox.fails(2, &["restore", "web01", "--to", &qcow2, option, "--json"]).contains("qcow2"));
    }
    // Its name does not say so, its content does.
    fs::copy(&qcow2, sandbox.path("disk")).unwrap();
    let complaint = sandbox.fails(2, &["restore", "web01", "--to", &sandbox.name("disk"), "--in-place"]);
    assert!(complaint.contains("qcow2"), "{complaint}");
    assert!(fs::read(sandbox.path("disk")).unwrap() == before && fs::read(&qcow2).unwrap() == before);
    sandbox.fails(2, &["restore", "web01", "--to", &qcow2, "--in-place", "--overwrite"]);
    sandbox.fails(5, &["restore", "web01", "--to", &qcow2, "--resume", "--format", "raw"]);
}

#[test]
fn a_restore_that_was_killed_is_taken_up_where_it_stopped() {
    let (sandbox, disk) = with_disk(512 * MIB, 256 * MIB);
    let target = sandbox.name("out.raw");
    let unfinished = || {
        let files = fs::read_dir(sandbox.path("")).unwrap().flatten();
        let mut files = files.filter(|entry| entry.file_name().to_string_lossy().starts_with("out.raw.lifeboat-"));
        files.next().map(|entry| entry.path())
    };
    let mut killed = sandbox.start(&["restore", "web01", "--to", &target, "--resume"]);
    wait_until("it has written something", || {
        let written = unfinished().and_then(|path| fs::metadata(path).ok()).map_or(0, |file| file.blocks() * 512);
        written > 4 * MIB || sandbox.path("out.raw").exists()
    });
    killed.kill();
    let finished = sandbox.path("out.raw").exists(); // it may have been faster than the kill
    if !finished {
        assert!(unfinished().is_some());
        // What a power cut may have left in it: rubbish and zeroes.
        let file = File::options().write(true).open(unfinished().unwrap()).unwrap();
        file.write_all_at(&[0x77; 70_000], MIB).unwrap();
        file.write_all_at(&[0; 70_000], 129 * MIB).unwrap();
        drop(file);
        let resumed = sandbox.json(&["restore", "web01", "--to", &target, "--resume", "--verify"]);
        assert!(resumed["disks"][0]["unchanged"].as_u64().unwrap() > 0, "{resumed}");
    }
    assert!(fs::read(&target).unwrap() == disk);
    assert!(unfinished().is_none());
    sandbox.fails(5, &["restore", "web01", "--to", &target, "--resume"]);
    sandbox.ok(&["verify", "--read-data"]);
}

#[test]
fn a_disk_is_written_in_the_formats_of_other_hypervisors() {
    if !have(&["qemu-img", "qemu-nbd"]) {
        return;
    }
    let (sandbox, mut disk) = with_disk(32 * MIB + 1000, 4 * MIB);
    disk.resize(disk.len().next_multiple_of(512), 0);
    for (ending, format) in [("vmdk", "vmdk"), ("vhdx", "vhdx"), ("vhd", "vpc"), ("vdi", "vdi")] {
        let image = sandbox.name(&format!("out.{ending}"));
        let restored = sandbox.json(&["restore", "web01", "--to", &image, "--verify"]);
        assert_eq!(restored["disks"][0]["target"], *image, "{restored}");
        let raw = sandbox.name("back.raw");
        tool("qemu-img", &["convert", "-f", format, "-O", "raw", &image, &raw]);
        let back = fs::read(&raw).unwrap();
        assert!(back[..disk.len()] == disk && back[disk.len()..].iter().all(|byte| *byte == 0), "{ending}");
        assert!(fs::metadata(&image).unwrap().blocks() * 512 < 24 * MIB, "{ending} is not sparse");

        // What is there stays unless told otherwise, and what fails leaves nothing.
        assert!(sandbox.fails(5, &["restore", "web01", "--to", &image]).contains("--overwrite"));
        sandbox.ok(&["restore", "web01", "--to", &image, "--overwrite"]);
        sandbox.fails(2, &["restore", "web01", "--to", &image, "--in-place"]);
    }
    let left = fs::read_dir(sandbox.path("")).unwrap().flatten().map(|entry| entry.file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains(".lifeboat-")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(sandbox.fails(2, &["restore", "web01", "--to", &sandbox.name("x.ova")]).contains("vmdk"));
}

/// An nbdkit that serves until it is dropped.
struct Nbdkit(Child);

impl Nbdkit {
    fn start(sandbox: &Sandbox, socket: &str, args: &[&str]) -> (Nbdkit, String) {
        let socket = sandbox.path(socket);
        let child = Command::new("nbdkit").args(["--foreground", "--unix"]).arg(&socket).args(args).spawn().unwrap();
        let server = Nbdkit(child);
        wait_until("nbdkit listens", || socket.exists());
        (server, format!("nbd+unix:///?socket={}", socket.display()))
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_disk_is_restored_to_an_export() {
    if !have(&["nbdkit"]) {
        return;
    }
    let (sandbox, disk) = with_disk(16 * MIB + 512, 4 * MIB);
    // Larger than the disk, full of something else, and one server that cannot be asked for zeroes.
    fs::write(sandbox.path("there"), noise(7, 20 << 20)).unwrap();
    let there = sandbox.name("there");
    let (_plain, uri) = Nbdkit::start(&sandbox, "plain.sock", &["file", &there]);
    sandbox.ok(&["restore", "web01", "--to", &uri, "--verify"]);
    assert!(fs::read(&there).unwrap().starts_with(&disk));
    fs::write(&there, noise(8, 20 << 20)).unwrap();
    let (_poor, poor) =
        Nbdkit::start(&sandbox, "poor.sock", &["--filter=nozero", "--filter=noextents", "file", &there]);
    sandbox.ok(&["restore", "web01", "--to", &format!("disk0={poor}")]);
    assert!(fs::read(&there).unwrap().starts_with(&disk));

    File::options().write(true).open(&there).unwrap().write_all_at(&[0x5a; 512], 5 * 65536).unwrap();
    let restored = sandbox.json(&["restore", "web01", "--to", &uri, "--in-place", "--verify"]);
    assert_eq!(restored["disks"][0]["written"], 65536, "{restored}");
    assert!(fs::read(&there).unwrap().starts_with(&disk));

    // Too small, read-only, not an export, a format that an export does not have.
    fs::write(sandbox.path("small"), noise(9, 1 << 20)).unwrap();
    let small = sandbox.name("small");
    let (_small, small) = Nbdkit::start(&sandbox, "small.sock", &["file", &small]);
    assert!(sandbox.fails(5, &["restore", "web01", "--to", &small]).contains("1048576"));
    let (_closed, closed) = Nbdkit::start(&sandbox, "closed.sock", &["--readonly", "file", &there]);
    assert!(sandbox.fails(1, &["restore", "web01", "--to", &closed]).contains("read-only"));
    sandbox.fails(1, &["restore", "web01", "--to", "nbd+unix:///?socket=/nowhere"]);
    sandbox.fails(2, &["restore", "web01", "--to", &uri, "--format", "qcow2"]);
}
