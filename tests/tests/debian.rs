//! A real Debian goes the whole way: systemd, journald, its own kernel and initramfs, GPT, UEFI and the guest agent.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use lifeboat_tests::{Console, Firmware, Guest, Machine, Sandbox, guest, have, kill, wait_until};

/// Unpacks the root file system of `point` and compares it with what was built. Returns the files that differ.
fn different_files(sandbox: &Sandbox, point: &str, dest: &str) -> Vec<String> {
    let dest = sandbox.path(dest);
    fs::create_dir(&dest).unwrap();
    let mut tar = Command::new("tar").args(["-x", "-C"]).arg(&dest).stdin(Stdio::piped()).spawn().unwrap();
    let place = format!("{point}:disk0:p2:/");
    let read = sandbox.command(&["cp", "--tar", &place]).stdout(tar.stdin.take().unwrap()).status().unwrap();
    assert!(read.success() && tar.wait().unwrap().success(), "{place} cannot be read as a whole");
    let sums = fs::read_to_string(guest(Guest::Debian).with_extension("sha256")).unwrap();
    let count = sums.lines().count();
    assert!(count > 3000, "only {count} files");
    let mut check = Command::new("sha256sum")
        .args(["--check", "--quiet"])
        .current_dir(&dest)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = check.stdin.take().unwrap();
    std::thread::spawn(move || stdin.write_all(sums.as_bytes()));
    let said = check.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    said.lines().filter_map(|line| Some(line.rsplit_once(": ")?.0.to_owned())).collect()
}

#[test]
fn a_debian_goes_from_its_backup_to_production_storage_and_loses_nothing() {
    if !have(&["qemu-system-x86_64", "mmdebstrap", "tar", "sha256sum"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let image = guest(Guest::Debian).display().to_string();
    sandbox.ok(&["backup", "vm", &image, "--memory", "768M", "--firmware", "uefi", "--nic", "virtio"]);
    assert_eq!(different_files(&sandbox, "vm", "built"), Vec::<String>::new());

    let view = sandbox.json(&["recover", "vm", "--network", "user", "--wait", "0"]);
    let mut console = Console::new(view["console"].as_str().unwrap());
    assert_eq!(console.next_number("up boot="), 1);
    console.wait_for("seq 5");
    wait_until("the agent answers", || sandbox.json(&["commit", "vm"])["consistency"] == "application");
    let before = console.last_number("seq ").unwrap();
    let point = sandbox.json(&["commit", "vm", "--consistency", "application"])["point"].as_str().unwrap().to_owned();
    console.wait_for(&format!("seq {}", before + 5));
    let kept = sandbox.json(&["show", &point, "--hardware"]);
    assert!(kept["firmware"] == "uefi" && kept["uefi_vars"].is_string(), "{kept}");

    // What it has written since it began, and what is only in its journal, is read without booting it.
    let differ = different_files(&sandbox, &point, "running");
    assert!(differ.iter().all(|file| file.starts_with("./var/") || file.starts_with("./etc/")), "{differ:?}");
    let counter = fs::read_to_string(sandbox.path("running/var/log/counter")).unwrap();
    assert!(counter.lines().count() as u64 >= before, "the counter's log ends before {before}");

    let target = sandbox.name("production.raw");
    sandbox.ok(&["rehydrate", "vm", "--to", &target]);
    sandbox.ok(&["cutover", "vm"]);
    let reached = console.last_number("seq ").unwrap();
    console.wait_for(&format!("seq {}", reached + 5));
    let promised = console.last_number("seq ").unwrap();
    kill(u32::try_from(sandbox.json(&["recovery", "vm"])["pid"].as_u64().unwrap()).unwrap());
    wait_until("the power is off", || sandbox.json(&["recovery", "vm"])["vm"] == "shut-off");
    let last = console.last_number("seq ").unwrap().max(promised);
    sandbox.ok(&["discard", "vm"]);

    // From production storage alone, without Lifeboat.
    let mut machine = Machine::boot(&sandbox, "alone", &target, Firmware::Uefi);
    assert_eq!(machine.console.next_number("up boot="), 2);
    machine.console.wait_for("files ok");
    assert!(machine.console.next_number("log ok last=") >= last);
    machine.console.wait_for("slots ok");
    machine.kill();

    // And from what was committed.
    let view = sandbox.json(&["recover", &point, "--name", "again", "--wait", "0"]);
    let mut console = Console::new(view["console"].as_str().unwrap());
    console.wait_for("files ok");
    assert!(console.next_number("log ok last=") >= before);
    console.wait_for("slots ok");
    sandbox.ok(&["discard", "again"]);
    assert!(Path::new(&target).exists());
}
