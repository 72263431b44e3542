//! What backups store and what they leave alone: increments, several disks, formats, devices, memory.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use lifeboat_tests::{Sandbox, assert_same_bytes, have, noise, tool, tool_output};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const CHUNK: u64 = 64 << 10;

/// Bytes on disk of all files below a folder of the repository.
fn stored(sandbox: &Sandbox) -> u64 {
    fn sum(dir: &std::path::Path) -> u64 {
        let entries = fs::read_dir(dir).unwrap().flatten();
        entries
            .map(|entry| if entry.path().is_dir() { sum(&entry.path()) } else { entry.metadata().unwrap().len() })
            .sum()
    }
    sum(&sandbox.path("repo"))
}

/// Writes `length` bytes of noise at `offset`, a MiB at a time.
fn fill(file: &File, seed: u64, offset: u64, length: u64) {
    let mut at = 0;
    while at < length {
        let step = MIB.min(length - at);
        file.write_all_at(&noise(seed + at, usize::try_from(step).unwrap()), offset + at).unwrap();
        at += step;
    }
}

#[test]
fn an_unchanged_disk_of_three_gib_costs_nothing_and_a_changed_one_its_changes() {
    let sandbox = Sandbox::with_repository();
    let path = sandbox.path("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(3 * GIB).unwrap();
    // Data all over the disk, and holes between.
    for part in 0..48 {
        fill(&file, part * GIB, part * 64 * MIB, 16 * MIB);
    }
    let disk = sandbox.name("disk.raw");
    let first = sandbox.json(&["backup", "web01", &disk]);
    assert_eq!(first["read"], 48 * 16 * MIB, "holes were read");
    let before = stored(&sandbox);

    let second = sandbox.json(&["backup", "web01", &disk]);
    assert_eq!(second["new"], 0);
    let cost = stored(&sandbox) - before;
    assert!(cost < MIB, "an unchanged disk cost {cost} bytes");

    // 2 % of the disk's blocks, scattered over all of it.
    let chunks = 3 * GIB / CHUNK;
    let changed = chunks / 50;
    for number in 0..changed {
        let chunk = (number * 7919) % chunks;
        file.write_all_at(&noise(number ^ 0xfeed, 4096), chunk * CHUNK + 8192).unwrap();
    }
    let before = stored(&sandbox);
    let third = sandbox.json(&["backup", "web01", &disk]);
    assert_eq!(third["new"], changed * CHUNK);
    let leaves = (3 * GIB / CHUNK).div_ceil(512) + 2;
    let limit = changed * (CHUNK + 256) + leaves * (16 << 10) + 64 * 1024;
    let cost = stored(&sandbox) - before;
    assert!(cost < limit, "{changed} changed chunks cost {cost} bytes, more than {limit}");

    sandbox.ok(&["restore", "web01", "--to", &sandbox.name("out.raw")]);
    assert_same_bytes(&sandbox.path("out.raw"), &path);
    assert!(
        fs::metadata(sandbox.path("out.raw")).unwrap().blocks() * 512 < GIB + 200 * MIB,
        "holes were restored as data"
    );
}

#[test]
fn memory_stays_bounded_however_large_the_disk() {
    let sandbox = Sandbox::with_repository();
    let file = File::create(sandbox.path("disk.raw")).unwrap();
    file.set_len(4 << 40).unwrap();
    for part in 0..20 {
        fill(&file, part, part * 200 * GIB, 8 * MIB);
    }
    let mut command = Command::new("/usr/bin/env");
    // The shell's own children are what it accounts for.
    let program = sandbox.command(&[]).get_program().to_owned();
    command.args(["python3", "-c", "import os, resource, sys\nassert os.spawnvp(os.P_WAIT, sys.argv[1], sys.argv[1:]) == 0\nprint(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"]);
    command.arg(program).args(["backup", "big", &sandbox.name("disk.raw")]);
    command.envs(sandbox.command(&[]).get_envs().filter_map(|(key, value)| Some((key, value?))));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let peak: u64 = said.lines().last().unwrap().trim().parse().unwrap();
    assert!(peak < 700 << 10, "the backup of a 4 TiB disk took {peak} KiB of memory");
    let (_export, uri) = sandbox.export(&["big"]);
    assert!(uri.starts_with("nbd+unix"));
}

#[test]
fn several_disks_of_odd_sizes_and_formats_are_one_point() {
    if !have(&["qemu-img"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    for (name, size, seed) in [("a.raw", 10 * MIB + 1, 1), ("b.raw", 65_535, 2), ("c.raw", 7 * MIB + 512, 3)] {
        let file = File::create(sandbox.path(name)).unwrap();
        fill(&file, seed, 0, size);
    }
    tool("qemu-img", &["convert", "-c", "-O", "qcow2", &sandbox.name("c.raw"), &sandbox.name("c.qcow2")]);
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", &sandbox.name("c.qcow2"), "-F", "qcow2", &sandbox.name("d.qcow2")],
    );
    tool("qemu-io", &["-c", "write -P 9 3M 64k", &sandbox.name("d.qcow2")]);
    let result = sandbox.json(&[
        "backup",
        "db",
        &sandbox.name("a.raw"),
        &format!("small={}", sandbox.name("b.raw")),
        &format!("top={}", sandbox.name("d.qcow2")),
        "--label",
        "why=test",
        "--label",
        "who=me=you",
    ]);
    let shown = sandbox.json(&["show", "db"]);
    assert_eq!(shown["id"], result["point"]);
    assert_eq!(shown["labels"]["who"], "me=you");
    let names: Vec<&str> =
        shown["disks"].as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["disk0", "small", "top"]);
    let to = ["disk0", "small"].map(|disk| format!("{disk}={}", sandbox.name(&format!("out-{disk}"))));
    sandbox.ok(&["restore", "db", "--to", &to[0], &to[1], &format!("top={}", sandbox.name("out.qcow2"))]);
    assert_same_bytes(&sandbox.path("out-disk0"), &sandbox.path("a.raw"));
    assert_same_bytes(&sandbox.path("out-small"), &sandbox.path("b.raw"));
    tool("qemu-img", &["check", &sandbox.name("out.qcow2")]);
    tool("qemu-img", &["compare", &sandbox.name("out.qcow2"), &sandbox.name("d.qcow2")]);
    assert!(sandbox.fails(2, &["restore", "db", "--to", &sandbox.name("one.raw")]).contains("disk0, small, top"));
    assert!(sandbox.fails(2, &["backup", "db", &sandbox.name("a.raw"), "--label", "novalue"]).contains("novalue"));
}

#[test]
fn an_ova_is_backed_up_with_all_its_disks() {
    if !have(&["qemu-img", "qemu-nbd", "tar"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    for (name, seed) in [("one", 1), ("two", 2)] {
        let raw = sandbox.name(&format!("{name}.raw"));
        fill(&File::create(&raw).unwrap(), seed, 0, 5 * MIB);
        let image = sandbox.name(&format!("{name}.vmdk"));
        tool("qemu-img", &["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", &raw, &image]);
    }
    let description = "<Envelope xmlns='http://schemas.dmtf.org/ovf/envelope/1' \
        xmlns:ovf='http://schemas.dmtf.org/ovf/envelope/1'><References><File ovf:href='one.vmdk' ovf:id='f1'/>\
        <File ovf:href='two.vmdk' ovf:id='f2'/></References><DiskSection><Disk ovf:diskId='d2' ovf:fileRef='f2'/>\
        <Disk ovf:diskId='d1' ovf:fileRef='f1'/></DiskSection></Envelope>";
    std::fs::write(sandbox.path("m.ovf"), description).unwrap();
    let dir = sandbox.name("");
    let ova = sandbox.name("m.ova");
    tool("tar", &["-C", &dir, "--format=ustar", "-cf", &ova, "m.ovf", "one.vmdk", "two.vmdk"]);
    sandbox.ok(&["backup", "appliance", &ova]);
    sandbox.ok(&["restore", "appliance", "--to", &format!("disk0={dir}/a"), &format!("disk1={dir}/b")]);
    assert_same_bytes(&sandbox.path("a"), &sandbox.path("two.raw"));
    assert_same_bytes(&sandbox.path("b"), &sandbox.path("one.raw"));

    // Cut off, no tar at all, beside another disk.
    let whole = std::fs::read(&ova).unwrap();
    for (bytes, why) in [(&whole[..whole.len() / 2], "cut off"), (&whole[600..], "tar"), (&[][..], "no .ovf")] {
        std::fs::write(sandbox.path("bad.ova"), bytes).unwrap();
        let complaint = sandbox.fails(2, &["backup", "bad", &sandbox.name("bad.ova")]);
        assert!(complaint.contains(why), "{complaint}");
    }
    sandbox.fails(2, &["backup", "bad", &ova, &sandbox.name("one.raw")]);
    sandbox.fails(4, &["points", "bad"]);
}

#[test]
fn a_block_device_is_backed_up_and_restored_to() {
    if !have(&["losetup"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let file = File::create(sandbox.path("disk.raw")).unwrap();
    fill(&file, 4, 0, 20 * MIB);
    let target = File::create(sandbox.path("target.raw")).unwrap();
    fill(&target, 5, 0, 24 * MIB);
    let (Some(source), Some(target)) = (Loop::new(&sandbox, "disk.raw"), Loop::new(&sandbox, "target.raw")) else {
        return;
    };
    sandbox.ok(&["backup", "web01", &source.0]);
    assert!(sandbox.fails(5, &["restore", "web01", "--to", &target.0]).contains("--overwrite"));
    sandbox.ok(&["restore", "web01", "--to", &target.0, "--overwrite"]);
    drop(target);
    let (mut expected, mut found) = (vec![0; 20 << 20], vec![0; 20 << 20]);
    file_at(&sandbox, "disk.raw", &mut expected);
    file_at(&sandbox, "target.raw", &mut found);
    assert!(expected == found);
    let small = File::create(sandbox.path("small.raw")).unwrap();
    small.set_len(MIB).unwrap();
    let Some(small) = Loop::new(&sandbox, "small.raw") else { return };
    assert!(sandbox.fails(5, &["restore", "web01", "--to", &small.0, "--overwrite"]).contains("bytes"));
}

fn file_at(sandbox: &Sandbox, name: &str, into: &mut [u8]) {
    File::open(sandbox.path(name)).unwrap().read_exact_at(into, 0).unwrap();
}

/// A loop device, given back when dropped.
struct Loop(String);

impl Loop {
    fn new(sandbox: &Sandbox, file: &str) -> Option<Loop> {
        let output = tool_output("losetup", &["--find", "--show", &sandbox.name(file)]);
        // Containers often have none.
        if !output.status.success() {
            assert!(
                std::env::var_os("CI").is_none(),
                "no loop device in CI: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            return None;
        }
        Some(Loop(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        tool_output("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn a_killed_backup_leaves_no_point_and_the_next_one_finds_what_it_stored() {
    let sandbox = Sandbox::with_repository();
    let file = File::create(sandbox.path("disk.raw")).unwrap();
    fill(&file, 6, 0, 400 * MIB);
    let disk = sandbox.name("disk.raw");
    for millis in [50, 200, 400, 700] {
        let mut backup = sandbox.start(&["backup", "web01", &disk]);
        std::thread::sleep(std::time::Duration::from_millis(millis));
        backup.kill();
        sandbox.ok(&["verify", "--read-data"]);
    }
    sandbox.ok(&["backup", "web01", &disk]);
    sandbox.ok(&["verify", "--read-data"]);
    sandbox.ok(&["restore", "web01", "--to", &sandbox.name("out.raw")]);
    assert_same_bytes(&sandbox.path("out.raw"), &sandbox.path("disk.raw"));
}

#[test]
fn an_interrupted_backup_says_so_and_leaves_no_point() {
    let sandbox = Sandbox::with_repository();
    let file = File::create(sandbox.path("disk.raw")).unwrap();
    fill(&file, 7, 0, 800 * MIB);
    let mut backup = sandbox.start(&["backup", "web01", &sandbox.name("disk.raw")]);
    lifeboat_tests::wait_until("the backup stores", || {
        fs::read_dir(sandbox.path("repo/packs")).is_ok_and(|packs| packs.count() > 0)
    });
    let status = backup.stop();
    assert_eq!(status.code(), Some(1));
    assert!(sandbox.json(&["points"]).as_array().unwrap().is_empty());
    sandbox.ok(&["verify", "--read-data"]);
}

#[test]
fn without_encryption_and_with_any_chunk_size_it_is_the_same() {
    let sandbox = Sandbox::new();
    let file = File::create(sandbox.path("disk.raw")).unwrap();
    fill(&file, 8, 0, 9 * MIB + 4096);
    for size in ["16K", "4M"] {
        let repo = sandbox.name(&format!("repo-{size}"));
        let state = sandbox.name(&format!("state-{size}"));
        let run = |args: &[&str]| {
            let mut command = sandbox.command(args);
            command.env("LIFEBOAT_REPO", &repo).env("LIFEBOAT_STATE", &state).env_remove("LIFEBOAT_PASSPHRASE");
            let output = command.output().unwrap();
            assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        run(&["init", "--no-encryption", "--chunk-size", size]);
        run(&["backup", "web01", &sandbox.name("disk.raw")]);
        run(&["verify", "--read-data"]);
        run(&["restore", "web01", "--to", &sandbox.name(&format!("out-{size}"))]);
        assert_same_bytes(&sandbox.path(&format!("out-{size}")), &sandbox.path("disk.raw"));
    }
}

#[test]
fn backups_of_several_processes_at_once_are_all_whole() {
    let sandbox = Sandbox::with_repository();
    let mut running = Vec::new();
    // Two machines, each backed up twice at once, from disks that have most in common.
    for number in 0..4u64 {
        let name = format!("disk{number}.raw");
        let file = File::create(sandbox.path(&name)).unwrap();
        fill(&file, 1, 0, 24 * MIB);
        fill(&file, 100 + number, 24 * MIB, 4 * MIB);
        let machine = format!("web0{}", number % 2);
        let label = format!("disk={number}");
        let mut command = sandbox.command(&["backup", &machine, &sandbox.name(&name), "--label", &label, "--json"]);
        command.env("LIFEBOAT_STATE", sandbox.path(&format!("state{number}")));
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        running.push(command.spawn().unwrap());
    }
    for (number, child) in running.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let point = result["point"].as_str().unwrap().to_owned();
        let target = sandbox.name(&format!("restored{number}.raw"));
        sandbox.ok(&["restore", &point, "--to", &target]);
        assert_same_bytes(target.as_ref(), &sandbox.path(&format!("disk{number}.raw")));
    }
    assert_eq!(sandbox.json(&["points"]).as_array().unwrap().len(), 4);
    assert_eq!(sandbox.json(&["verify", "--read-data"])["ok"], true);
}

#[test]
fn show_tells_from_how_many_packs_a_disk_is_read() {
    let sandbox = Sandbox::with_repository();
    let file = File::create(sandbox.path("disk.raw")).unwrap();
    fill(&file, 1, 0, 20 * MIB);
    sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
    let shown = sandbox.json(&["show", "web01"]);
    let locality = &shown["disks_detail"][0]["locality"];
    assert_eq!(
        (&locality["packs"], &locality["sampled"], &locality["chunks"]),
        (&1.into(), &false.into(), &320.into())
    );
    assert!(locality["read_amplification"].as_f64().unwrap() < 1.1, "{locality}");
    assert!(shown["compared"].as_u64().unwrap() >= 64, "{shown}");
    let said = sandbox.ok(&["show", "web01"]);
    assert!(said.contains("1 pack, 1.0"), "{said}");
}
