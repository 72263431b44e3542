//! Clients that are not installed: an older QEMU and the reference client, out of packages that are unpacked into a
//! temporary folder. And nbdkit's nbd plugin, which is. What cannot be had is a skip that is said.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::{Running, name, path, run, succeed};
use nbd_server::{Export, ExportTable, Limits, Listen, MemoryExport, Server};

const MIB: usize = 1 << 20;

fn content() -> Vec<u8> {
    (0..8 * MIB).map(|at| if at % (2 * MIB) < MIB { (at % 241).to_le_bytes()[0] } else { 0 }).collect()
}

/// Unpacks packages into `folder`; each by its name, and the beginning of the version that is wanted.
#[expect(clippy::print_stdout, reason = "a skip is said")]
fn unpack(folder: &Path, packages: &[(&str, &str)]) -> bool {
    for (package, version) in packages {
        let skip = |why: &str| {
            println!("skipped: {package} {version}* {why}");
            false
        };
        let Ok(known) = Command::new("apt-cache").args(["madison", package]).output() else {
            return skip("cannot be looked up: no apt-cache");
        };
        let known = String::from_utf8_lossy(&known.stdout).into_owned();
        let versions = known.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
        let Some(found) = versions.into_iter().find(|found| found.starts_with(version)) else {
            return skip("is in no package source");
        };
        let wanted = format!("{package}={found}");
        let fetched = Command::new("apt-get").args(["download", "-q", &wanted]).current_dir(folder).output();
        if !fetched.is_ok_and(|output| output.status.success()) {
            return skip("cannot be downloaded");
        }
    }
    let archives = std::fs::read_dir(folder).expect("there").flatten().map(|entry| entry.path());
    let archives: Vec<PathBuf> = archives.filter(|path| path.extension().is_some_and(|end| end == "deb")).collect();
    archives.iter().all(|archive| succeed("dpkg", &["-x", path(archive), path(folder)]).is_some())
}

/// Runs a program out of unpacked packages, with their libraries; returns what it printed.
fn unpacked(folder: &Path, program: &str, arguments: &[&str]) -> String {
    let libraries = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|place| folder.join(place));
    let libraries = libraries.map(|place| place.display().to_string()).join(":");
    let output = Command::new(folder.join(program)).args(arguments).env("LD_LIBRARY_PATH", libraries).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}\n{text}");
    text
}

#[test]
#[ignore = "nightly: downloads a package"]
fn qemu_7_2_reads_maps_and_writes() {
    let folder = tempfile::tempdir().expect("a folder");
    if !unpack(folder.path(), &[("qemu-utils", "1:7.2")]) {
        return;
    }
    for resident in [true, false] {
        let disk = MemoryExport::from_bytes(&content());
        let disk = Arc::new(if resident { disk } else { disk.not_resident() });
        let server = Running::start(Arc::clone(&disk) as Arc<dyn Export>);
        let uri = server.uri().to_string();
        let tool = |program: &str, arguments: &[&str]| unpacked(folder.path(), program, arguments);
        assert!(tool("usr/bin/qemu-img", &["--version"]).contains("version 7.2"));
        let map = tool("usr/bin/qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
        assert_eq!(map.matches("\"data\": true").count(), 4, "{map}");
        let copy = folder.path().join("copy");
        tool("usr/bin/qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, path(&copy)]);
        assert!(std::fs::read(&copy).expect("there") == content());
        let steps = ["-c", "write -P 7 1M 1M", "-c", "write -z -u 4M 1M", "-c", "discard 0 1M", "-c", "flush"];
        tool("usr/bin/qemu-io", &[&["-f", "raw", &uri], &steps[..]].concat());
        let mut expected = content();
        expected[MIB..2 * MIB].fill(7);
        expected[4 * MIB..5 * MIB].fill(0);
        expected[..MIB].fill(0);
        assert!(disk.content() == expected);
        let flat = folder.path().join("flat");
        std::fs::write(&flat, content()).expect("written");
        tool("usr/bin/qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", path(&flat), &uri]);
        assert!(disk.content() == content());
    }
}

#[test]
#[ignore = "nightly: downloads packages"]
fn the_reference_client_lists_exports() {
    let folder = tempfile::tempdir().expect("a folder");
    if !unpack(folder.path(), &[("nbd-client", "1:3"), ("libnl-3-200", "3"), ("libnl-genl-3-200", "3")]) {
        return;
    }
    let table = Arc::new(ExportTable::new());
    for export in ["first", "second disk"] {
        table.add(name(export), Arc::new(MemoryExport::new(4096))).expect("free");
    }
    let listen: Listen = "tcp:127.0.0.1:0".parse().expect("an address");
    let server = Running::launch(table, Some(listen), |table| Server::new(table, Limits::default()));
    let Listen::Tcp(address) = &server.local else { panic!("not TCP") };
    let listed = unpacked(folder.path(), "sbin/nbd-client", &["-l", "127.0.0.1", &address.port().to_string()]);
    assert!(listed.contains("first") && listed.contains("second disk"), "{listed}");
}

#[test]
fn the_nbd_plugin_of_nbdkit_serves_on_what_it_is_served() {
    if run("nbdkit", &["--version"]).is_none() || run("nbdcopy", &["--version"]).is_none() {
        return;
    }
    for resident in [true, false] {
        let disk = MemoryExport::from_bytes(&content());
        let disk = Arc::new(if resident { disk } else { disk.not_resident() });
        let server = Running::start(Arc::clone(&disk) as Arc<dyn Export>);
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("relay.sock");
        let mut relay = Command::new("nbdkit")
            .args(["-f", "--exit-with-parent", "-U", path(&socket), "nbd", &format!("uri={}", server.uri())])
            .stdin(Stdio::null())
            .spawn()
            .expect("there a moment ago");
        let began = std::time::Instant::now();
        while !socket.exists() && began.elapsed() < std::time::Duration::from_secs(20) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let uri = format!("nbd+unix:///?socket={}", path(&socket));
        let copy = folder.path().join("copy");
        let read = succeed("nbdcopy", &[&uri, path(&copy)]);
        let inverse: Vec<u8> = content().iter().map(|byte| !byte).collect();
        std::fs::write(folder.path().join("new"), &inverse).expect("written");
        let written = succeed("nbdcopy", &["--flush", path(&folder.path().join("new")), &uri]);
        relay.kill().expect("it runs");
        relay.wait().expect("it ends");
        assert!(read.is_some() && written.is_some());
        assert!(std::fs::read(&copy).expect("there") == content());
        assert!(disk.content() == inverse);
    }
}
