//! Clients that nobody here wrote, on a real export of the real program: nbdinfo, nbdcopy, nbdsh, qemu-img, qemu-io and
//! fio.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};

use lifeboat_tests::{Running, Sandbox, have, noise, tool, tool_output, wait_until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB;

/// A repository with one point of a sparse disk, and that disk.
fn with_point() -> (Sandbox, String) {
    let sandbox = Sandbox::with_repository();
    let disk = sandbox.name("disk.raw");
    let file = File::create(&disk).unwrap();
    file.set_len(SIZE).unwrap();
    for (seed, at) in [0, 10 * MIB, 33 * MIB + 4096, SIZE - 5 * MIB].into_iter().enumerate() {
        file.write_all_at(&noise(seed as u64, 5 << 20), at).unwrap();
    }
    sandbox.ok(&["backup", "web01", &disk]);
    (sandbox, disk)
}

fn exported(args: &[&str]) -> (Sandbox, String, Running, String) {
    let (sandbox, disk) = with_point();
    let (export, uri) = sandbox.export(&[&["web01"], args].concat());
    (sandbox, disk, export, uri)
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    if !have(&["nbdinfo"]) {
        return;
    }
    let (_sandbox, _, _export, uri) = exported(&[]);
    let info: Value = serde_json::from_str(&tool("nbdinfo", &["--json", &uri])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(info["structured"], true);
    assert_eq!(export["export-name"], "disk0");
    assert_eq!(export["export-size"], SIZE);
    for ability in
        ["can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"]
    {
        assert_eq!(export[ability], true, "{ability}");
    }
    assert_eq!(export["is_read_only"], false);
    let listed: Value = serde_json::from_str(&tool("nbdinfo", &["--list", "--json", &uri])).unwrap();
    assert_eq!(listed["exports"].as_array().unwrap().len(), 1);
    let map: Value = serde_json::from_str(&tool("nbdinfo", &["--map", "--json", &uri])).unwrap();
    let data: u64 =
        map.as_array().unwrap().iter().filter(|e| e["type"] == 0).map(|e| e["length"].as_u64().unwrap()).sum();
    assert!((20 * MIB..24 * MIB).contains(&data), "{data} bytes of data");
    let end = map.as_array().unwrap().last().unwrap();
    assert_eq!(end["offset"].as_u64().unwrap() + end["length"].as_u64().unwrap(), SIZE);
}

#[test]
fn a_read_only_export_is_refused_to_writers() {
    if !have(&["nbdinfo", "qemu-io"]) {
        return;
    }
    let (_sandbox, _, _export, uri) = exported(&["--read-only"]);
    let info: Value = serde_json::from_str(&tool("nbdinfo", &["--json", &uri])).unwrap();
    assert_eq!(info["exports"][0]["is_read_only"], true);
    assert!(!tool_output("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]).status.success());
}

#[test]
fn nbdcopy_copies_out_and_in() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let (sandbox, disk, _export, uri) = exported(&[]);
    let out = sandbox.name("out.raw");
    tool("nbdcopy", &[&uri, &out]);
    assert!(fs::read(&out).unwrap() == fs::read(&disk).unwrap());
    assert!(fs::metadata(&out).unwrap().blocks() * 512 < 32 * MIB, "holes were copied as data");
    let other = sandbox.name("other.raw");
    let file = File::create(&other).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&noise(77, 20 << 20), 7 * MIB + 512).unwrap();
    tool("nbdcopy", &["--connections=4", "--requests=16", "--flush", "--destination-is-zero", &other, &uri]);
    // What was data before and is a hole of the source now was left alone: write the zeroes, too.
    tool("nbdcopy", &["--allocated", "--flush", &other, &uri]);
    tool("nbdcopy", &[&uri, &sandbox.name("back.raw")]);
    assert!(fs::read(sandbox.path("back.raw")).unwrap() == fs::read(&other).unwrap());
}

#[test]
fn qemu_img_converts_and_compares() {
    if !have(&["qemu-img"]) {
        return;
    }
    let (sandbox, disk, _export, uri) = exported(&[]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &disk, &uri]);
    let copy = sandbox.name("copy.qcow2");
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-m", "16", "-W", &uri, &copy]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &disk, &copy]);
    let map: Value = serde_json::from_str(&tool("qemu-img", &["map", "--output=json", "-f", "raw", &uri])).unwrap();
    assert!(map.as_array().unwrap().iter().any(|extent| extent["zero"] == true));
    let other = sandbox.name("other.raw");
    fs::write(&other, noise(5, usize::try_from(SIZE).unwrap())).unwrap();
    tool("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &other, &uri]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &other, &uri]);
}

#[test]
fn qemu_io_writes_patterns_of_every_kind() {
    if !have(&["qemu-io"]) {
        return;
    }
    let (sandbox, disk) = with_point();
    let overlay = sandbox.name("overlay");
    let (mut export, uri) = sandbox.export(&["web01", "--overlay", &overlay]);
    let checks = [
        "read -P 1 1M 26k",
        "read -P 2 1050k 3",
        "read -P 1 1050627 1k",
        "read -P 3 33M 2M",
        "read -P 0 35M 64k",
        "read -P 0 40M 20M",
        "read -P 0 11M 512k",
        "read -P 9 100659200 4096",
    ];
    tool(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 1 1M 64k",
            "-c",
            "write -P 2 1050k 3",
            "-c",
            "write -f -P 3 33M 3M",
            "-c",
            "write -z 35M 64k",
            "-c",
            "write -z -u 40M 20M",
            "-c",
            "discard 11M 512k",
            "-c",
            "write -P 9 100659200 4096",
            "-c",
            "flush",
            &uri,
        ],
    );
    let look = |uri: &str| {
        let mut args = vec!["-f", "raw"];
        for check in checks {
            args.extend(["-c", check]);
        }
        args.push(uri);
        let said = tool("qemu-io", &args);
        assert!(!said.contains("Pattern verification failed"), "{said}");
    };
    look(&uri);
    export.kill();
    let (_export, uri) = sandbox.export(&["web01", "--overlay", &overlay]);
    look(&uri);
    // The recovery point is what it was.
    sandbox.ok(&["restore", "web01", "--to", &sandbox.name("out.raw")]);
    assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(&disk).unwrap());
}

#[test]
fn fio_verifies_what_it_writes_at_depth_over_several_connections() {
    if !have(&["fio"]) || !fio_speaks_nbd() {
        return;
    }
    let (sandbox, _, _export, uri) = exported(&[]);
    for (rw, block) in [("randwrite", "4k"), ("randrw", "1k-64k"), ("write", "256k")] {
        let args = [
            "--name=verify",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            &format!("--rw={rw}"),
            &format!("--bsrange={}", range(block)),
            "--iodepth=32",
            "--size=24M",
            "--offset_increment=24M",
            "--numjobs=4",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--fsync=64",
            "--randrepeat=1",
            "--group_reporting",
            "--output-format=json",
            &format!("--aux-path={}", sandbox.name("")),
        ];
        let said = tool("fio", &args);
        let report: Value = serde_json::from_str(said.get(said.find('{').unwrap()..).unwrap()).unwrap();
        assert_eq!(report["jobs"][0]["error"], 0, "{rw} {block}");
        assert!(report["jobs"][0]["read"]["io_bytes"].as_u64().unwrap() > 0, "nothing was verified");
    }
}

fn range(block: &str) -> String {
    if block.contains('-') { block.to_owned() } else { format!("{block}-{block}") }
}

fn fio_speaks_nbd() -> bool {
    let here = tool("fio", &["--enghelp"]).contains("nbd");
    assert!(here || std::env::var_os("CI").is_none(), "this fio has no nbd engine");
    here
}

#[test]
fn nbdsh_sees_what_was_written_since_the_recovery_point() {
    if !have(&["nbdsh"]) {
        return;
    }
    let (_sandbox, _, _export, uri) = exported(&[]);
    let script = r#"
h.add_meta_context("lifeboat:changed")
h.connect_uri(uri)
h.pwrite(b"x" * 8192, 1048576)
h.trim(65536, 4194304)
h.flush()
found = []
def look(context, offset, entries, error):
    if context == "lifeboat:changed":
        at = offset
        for length, flags in zip(entries[0::2], entries[1::2]):
            if flags & 1:
                found.append((at, length))
            at += length
h.block_status(8 << 20, 0, look)
assert found == [(1048576, 8192), (4194304, 65536)], found
assert h.pread(4, 1048576) == b"xxxx" and h.pread(16, 4194304) == bytes(16)
print("seen")
"#;
    // The distribution's Python has the module; another one may come first in the path.
    let said = tool("/usr/bin/python3", &["-m", "nbd", "-c", &format!("uri = {uri:?}"), "-c", script]);
    assert!(said.contains("seen"), "{said}");
}

#[test]
fn an_nbd_export_and_a_foreign_format_are_sources_like_any_other() {
    if !have(&["qemu-img", "nbdkit", "nbdinfo"]) {
        return;
    }
    let (sandbox, disk, _export, uri) = exported(&["--read-only"]);
    sandbox.ok(&["backup", "copy", &format!("root={uri}")]);
    let points = sandbox.json(&["points", "copy"]);
    assert_eq!(points[0]["disks"][0]["name"], "root");
    assert!(points[0]["stored"].as_u64().unwrap() < 64 << 10, "chunks that are there were stored again");
    for (format, options) in [
        ("qcow2", "compression_type=zstd"),
        ("vmdk", "subformat=streamOptimized"),
        ("vhdx", "subformat=dynamic"),
        ("vdi", "static=off"),
    ] {
        let image = sandbox.name(&format!("disk.{format}"));
        tool("qemu-img", &["convert", "-f", "raw", "-O", format, "-o", options, &disk, &image]);
        sandbox.ok(&["backup", format, &image]);
        let out = sandbox.name(&format!("{format}.raw"));
        sandbox.ok(&["restore", format, "--to", &out]);
        let (before, after) = (fs::read(&disk).unwrap(), fs::read(&out).unwrap());
        // Some formats round the size up.
        assert!(after.len() >= before.len() && after[..before.len()] == before, "{format}");
        assert!(after[before.len()..].iter().all(|byte| *byte == 0), "{format}");
    }
}

#[test]
fn several_disks_are_exported_by_name_over_tcp() {
    if !have(&["nbdinfo", "nbdcopy"]) {
        return;
    }
    let (sandbox, disk) = with_point();
    let data = sandbox.name("data.raw");
    fs::write(&data, noise(9, 3_000_001)).unwrap();
    sandbox.ok(&["backup", "db", &format!("root={disk}"), &format!("data={data}")]);
    let export = sandbox.start(&["export", "db", "--listen", "tcp:127.0.0.1:0"]);
    let (root, second) = (export.line(), export.line());
    assert!(root.ends_with("/root") && second.ends_with("/data"), "{root} {second}");
    let listed: Value =
        serde_json::from_str(&tool("nbdinfo", &["--list", "--json", root.trim_end_matches("root")])).unwrap();
    assert_eq!(listed["exports"].as_array().unwrap().len(), 2);
    tool("nbdcopy", &[&second, &sandbox.name("out.raw")]);
    assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(&data).unwrap());
    let dir = sandbox.name("restored");
    fs::create_dir(&dir).unwrap();
    sandbox.ok(&["restore", "db", "--to", &dir]);
    assert!(fs::read(sandbox.path("restored/db-data.raw")).unwrap() == fs::read(&data).unwrap());
}

/// What a program does that uses libnbd and is to outlive its server: a handle that died is thrown away, another one
/// connects as soon as somebody listens, and what was not answered is asked again.
const REOPENING: &str = r#"
import sys, time
def connect():
    while True:
        handle = nbd.NBD()
        try:
            handle.connect_uri(uri)
            return handle
        except nbd.Error:
            time.sleep(0.01)
handles = [connect(), connect()]
died = 0
def again(which, call):
    global died
    while True:
        try:
            return call(handles[which])
        except nbd.Error:
            died += 1
            handles[which] = connect()
def block(number):
    return number.to_bytes(4, "big") * 1024
number = 0
for line in sys.stdin:
    for _ in range(50):
        number += 1
        again(number % 2, lambda h: h.pwrite(block(number), number * 4096, nbd.CMD_FLAG_FUA))
        assert again((number + 1) % 2, lambda h: h.pread(4096, number * 4096)) == block(number)
    print("written", number, died, flush=True)
for n in range(1, number + 1):
    assert again(n % 2, lambda h: h.pread(4096, n * 4096)) == block(n), n
assert again(0, lambda h: h.pread(4096, (number + 1) * 4096)) == base
print("all there", died, flush=True)
"#;

#[test]
fn libnbd_comes_back_to_a_server_that_was_killed_and_finds_all_it_was_told_is_written() {
    if !have(&["nbdsh"]) {
        return;
    }
    let (sandbox, disk) = with_point();
    let (kept, rounds) = (sandbox.name("overlay"), 6);
    let start = || sandbox.export(&["web01", "--overlay", &kept]);
    let (mut export, uri) = start();
    let after = fs::read(&disk).unwrap()[(rounds * 50 + 1) * 4096..][..4096].to_vec();
    let variables = format!("uri = {uri:?}; base = bytes({after:?})");
    let mut script = Command::new("/usr/bin/python3")
        .args(["-c", &format!("import nbd\n{variables}\n{REOPENING}")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut orders = script.stdin.take().unwrap();
    let mut said = BufReader::new(script.stdout.take().unwrap()).lines();
    for round in 1..=rounds {
        orders.write_all(b"on\n").unwrap();
        if round % 2 == 1 {
            // While it writes; nothing is lost if it was faster.
            std::thread::sleep(std::time::Duration::from_millis(3 * round as u64));
            export.kill();
            (export, _) = start();
        }
        let line = said.next().unwrap().unwrap();
        assert!(line.starts_with(&format!("written {} ", round * 50)), "{line}");
        if round % 2 == 0 {
            // In between, in order: the next request finds the connection closed.
            assert_eq!(export.stop().code(), Some(0));
            (export, _) = start();
        }
    }
    drop(orders);
    let line = said.next().unwrap().unwrap();
    let died: u32 = line.strip_prefix("all there ").unwrap().parse().unwrap();
    assert!(died >= 3, "both handles were closed three times in order: {died}");
    assert!(script.wait().unwrap().success());
}

#[test]
fn nbdcopy_starts_over_after_its_server_was_killed() {
    if !have(&["nbdcopy"]) {
        return;
    }
    let (sandbox, _) = with_point();
    let kept = sandbox.name("overlay");
    let (mut export, uri) = sandbox.export(&["web01", "--overlay", &kept]);
    let new: Vec<u8> = noise(9, usize::try_from(SIZE).unwrap());
    fs::write(sandbox.path("new.raw"), &new).unwrap();
    let copy = ["--synchronous", "--request-size=4096", "--flush", &sandbox.name("new.raw"), &uri];
    let mut first = Command::new("nbdcopy").args(copy).stderr(Stdio::null()).spawn().unwrap();
    wait_until("something is written", || {
        let written = || fs::metadata(sandbox.path("overlay/disk0.data")).map(|data| data.blocks());
        first.try_wait().unwrap().is_some() || written().is_ok_and(|blocks| blocks > 2048)
    });
    export.kill();
    let _ = first.wait().unwrap(); // it failed, or was faster
    let (mut export, _) = sandbox.export(&["web01", "--overlay", &kept]);
    tool("nbdcopy", &["--flush", &sandbox.name("new.raw"), &uri]);
    export.kill();
    let (_export, _) = sandbox.export(&["web01", "--overlay", &kept]);
    tool("nbdcopy", &["--connections=4", &uri, &sandbox.name("back.raw")]);
    assert!(fs::read(sandbox.path("back.raw")).unwrap() == new);
}
