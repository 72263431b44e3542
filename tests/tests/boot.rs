//! The main job on a real guest: booted from a recovery point over NBD, through crashes of Lifeboat and full disks, with
//! nothing lost that it had synced and nothing changed in the backup.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::path::Path;

use lifeboat_tests::{
    Console, Firmware, Guest, Machine, Sandbox, SmallRoom, assert_same_bytes, guest, have, kill, wait_until,
};
use serde_json::Value;

/// A repository with one point of `vm`, the given guest.
fn with_guest(which: Guest) -> Option<Sandbox> {
    if !have(&["qemu-system-x86_64"]) {
        return None;
    }
    let sandbox = Sandbox::with_repository();
    sandbox.ok(&["backup", "vm", &guest(which).display().to_string()]);
    Some(sandbox)
}

fn recover(sandbox: &Sandbox, name: &str) -> (Value, Console) {
    let view = sandbox.json(&["recover", "vm", "--name", name, "--memory", "512M"]);
    assert_eq!(view["state"], "running");
    let console = Console::new(view["console"].as_str().unwrap());
    (view, console)
}

fn vm_state(sandbox: &Sandbox, name: &str) -> String {
    sandbox.json(&["recovery", name])["vm"].as_str().unwrap_or_default().to_owned()
}

fn uri(view: &Value) -> String {
    view["disks"][0]["nbd_uri"].as_str().unwrap().to_owned()
}

#[test]
fn a_guest_boots_from_its_backup_and_the_backup_never_learns_of_it() {
    let Some(sandbox) = with_guest(Guest::Oneshot) else { return };
    let (view, mut console) = recover(&sandbox, "first");
    assert_eq!(console.next_number("up boot="), 1);
    console.wait_for("files ok");
    assert_eq!(console.next_number("record "), 1);
    wait_until("the guest has powered itself off", || vm_state(&sandbox, "first") == "shut-off");
    let after = sandbox.json(&["recovery", "first"]);
    assert_eq!(after["pid"], Value::Null);
    assert!(after["disks"][0]["overlay"].as_u64().unwrap() > 0);
    for time in ["export_ms", "started_ms", "first_read_ms", "first_console_ms"] {
        assert!(view["timings"][time].is_u64(), "{time} is missing in {view}");
    }

    // What it wrote is in its overlay: the next boot of the same export finds the first one's record.
    let mut again = Machine::boot(&sandbox, "again", &uri(&view), Firmware::Bios);
    assert_eq!(again.console.next_number("up boot="), 2);
    assert_eq!(again.console.next_number("records ok "), 1);
    again.wait_for_power_off();

    // A second recovery of the same point knows nothing of it.
    let (_, mut console) = recover(&sandbox, "second");
    assert_eq!(console.next_number("up boot="), 1);
    assert_eq!(console.next_number("records ok "), 0);
    console.wait_for("files ok");

    for name in ["first", "second"] {
        sandbox.ok(&["discard", name]);
        assert!(!sandbox.path("state/recoveries").join(name).exists());
    }
    sandbox.ok(&["verify", "--read-data"]);
    sandbox.ok(&["restore", "vm", "--to", &sandbox.name("out.raw")]);
    assert_same_bytes(&sandbox.path("out.raw"), &guest(Guest::Oneshot));
}

#[test]
fn a_uefi_guest_boots_from_its_backup() {
    let Some(sandbox) = with_guest(Guest::Uefi) else { return };
    let (_, mut console) = recover(&sandbox, "vm");
    assert_eq!(console.next_number("up boot="), 1);
    console.wait_for("files ok");
    console.wait_for("record 1 synced");
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_guest_lives_through_kill_minus_nine_of_lifeboat_and_keeps_all_it_synced() {
    let Some(sandbox) = with_guest(Guest::Counter) else { return };
    let (view, mut console) = recover(&sandbox, "vm");
    console.wait_for("seq 10");
    for round in 1..=3 {
        sandbox.kill_owner();
        // Any command that finds recoveries nobody serves has them served again.
        let view = sandbox.json(&["recovery", "vm"]);
        assert_eq!(view["state"], "running");
        assert_eq!(view["pid"], sandbox.json(&["recoveries"])[0]["pid"]);
        let reached = console.last_number("seq ").unwrap();
        console.wait_for(&format!("seq {}", reached + 5 + round));
    }
    assert_eq!(view["pid"], sandbox.json(&["recovery", "vm"])["pid"], "the guest was started anew");
    // The power goes: the machine at once, and Lifeboat with it.
    let pid = u32::try_from(view["pid"].as_u64().unwrap()).unwrap();
    sandbox.kill_owner();
    kill(pid);
    let promised = console.last_number("seq ").unwrap();
    let view = sandbox.json(&["recovery", "vm"]);
    assert_eq!(view["vm"], "shut-off");
    assert!(sandbox.ok(&["recovery", "vm"]).contains("lifeboat start vm"));
    let mut again = Console::new(view["console"].as_str().unwrap());
    assert_eq!(sandbox.json(&["start", "vm"])["vm"], "running");
    assert!(sandbox.fails(5, &["start", "vm"]).contains("has not ended"));
    again.wait_for("up boot=2");
    let kept = again.next_number("log ok last=");
    assert!(kept >= promised, "the guest had synced record {promised}, the disk holds {kept}");
    again.wait_for("slots ok");
    sandbox.ok(&["discard", "vm"]);
    sandbox.ok(&["verify", "--read-data"]);
}

#[test]
fn a_service_that_is_stopped_and_started_takes_its_recoveries_up() {
    let Some(sandbox) = with_guest(Guest::Counter) else { return };
    let mut service = sandbox.start(&["serve"]);
    wait_until("the service answers", || sandbox.path("state/lifeboat.sock").exists());
    let (view, mut console) = recover(&sandbox, "vm");
    console.wait_for("seq 3");
    assert!(service.stop().success());
    let _service = sandbox.start(&["serve"]);
    let reached = console.last_number("seq ").unwrap();
    console.wait_for(&format!("seq {}", reached + 5));
    assert_eq!(sandbox.json(&["recovery", "vm"])["pid"], view["pid"]);
    sandbox.ok(&["discard", "vm"]);
    assert!(sandbox.json(&["recoveries"]).as_array().unwrap().is_empty());
}

#[test]
fn a_recovery_begun_through_another_command_outlives_that_command() {
    let Some(sandbox) = with_guest(Guest::Counter) else { return };
    // The export hosts the API while it runs, so the recovery is begun in its process.
    let (mut export, _) = sandbox.export(&["vm", "--read-only"]);
    let (view, mut console) = recover(&sandbox, "vm");
    console.wait_for("seq 3");
    assert!(export.stop().success());
    let reached = console.last_number("seq ").unwrap();
    console.wait_for(&format!("seq {}", reached + 5));
    assert_eq!(sandbox.json(&["recovery", "vm"])["pid"], view["pid"]);
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_guest_whose_overlay_is_full_waits_and_goes_on_when_there_is_room() {
    let Some(sandbox) = with_guest(Guest::Counter) else { return };
    // A backup has left its catalog there; what matters now is that the folder is empty.
    fs::remove_dir_all(sandbox.path("state")).unwrap();
    let Some(_room) = SmallRoom::new(sandbox.path("state"), "200m") else { return };
    let (_, mut console) = recover(&sandbox, "vm");
    console.wait_for("seq 2");
    let filler = sandbox.path("state/filler");
    let mut file = fs::File::create(&filler).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    wait_until("the guest is stopped by its full disk", || vm_state(&sandbox, "vm") == "io-error");
    let stopped_at = console.last_number("seq ").unwrap();
    fs::remove_file(&filler).unwrap();
    drop(file);
    console.wait_for(&format!("seq {}", stopped_at + 5));
    wait_until("the guest is seen to run", || vm_state(&sandbox, "vm") == "running");
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_vm_that_cannot_start_leaves_nothing_behind() {
    let Some(sandbox) = with_guest(Guest::Oneshot) else { return };
    let complaint = sandbox.fails(1, &["recover", "vm", "--machine-type", "abacus"]);
    assert!(complaint.contains("abacus"), "{complaint}");
    let complaint = sandbox.fails(1, &["recover", "vm", "--network", "bridge:nobridge"]);
    assert!(complaint.contains("nobridge") || complaint.contains("bridge"), "{complaint}");
    for (option, value) in [
        ("--network", "carrier"),
        ("--accel", "steam"),
        ("--bus", "omni"),
        ("--firmware", "x"),
        ("--on", "xen"),
        ("--memory", "1k"),
        ("--cpus", "0"),
        ("--name", "../x"),
    ] {
        let complaint = sandbox.fails(2, &["recover", "vm", option, value]);
        assert!(complaint.len() > 10, "{option} {value}: {complaint}");
    }
    assert!(sandbox.json(&["recoveries"]).as_array().unwrap().is_empty());
    assert_eq!(fs::read_dir(sandbox.path("state/recoveries")).unwrap().count(), 0);
    let published = sandbox.json(&["recover", "vm", "--on", "none"]);
    assert_eq!(published["hypervisor"], "none");
    assert!(sandbox.fails(5, &["recover", "vm", "--on", "none"]).contains("exists already"));
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_recovery_whose_journal_is_damaged_is_listed_and_can_be_ended() {
    let Some(sandbox) = with_guest(Guest::Counter) else { return };
    let (view, mut console) = recover(&sandbox, "vm");
    console.wait_for("seq 1");
    sandbox.kill_owner();
    let journal = sandbox.path("state/recoveries/vm/journal");
    let mut bytes = fs::read(&journal).unwrap();
    bytes[20] ^= 1;
    fs::write(&journal, bytes).unwrap();
    let listed = sandbox.json(&["recoveries"]);
    assert_eq!(listed[0]["name"], "vm");
    assert_eq!(listed[0]["state"], "failed");
    assert!(listed[0]["problem"].as_str().unwrap().contains("line 1"), "{listed}");
    assert!(sandbox.fails(3, &["recover", "vm", "--name", "vm"]).contains("damaged"));
    sandbox.ok(&["discard", "vm"]);
    assert!(!sandbox.path("state/recoveries/vm").exists());
    let pid = view["pid"].as_u64().unwrap();
    wait_until("its machine is gone", || {
        !Path::new(&format!("/proc/{pid}/cmdline")).exists()
            || fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty()
    });
}
