//! A host that is full says so before anything exists, and who waits is let in in turn or gives up.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use lifeboat_tests::{Sandbox, have, kill, noise, wait_until};

fn backed_up() -> Sandbox {
    let sandbox = Sandbox::with_plain_repository("64K");
    fs::write(sandbox.path("disk.raw"), noise(5, 1 << 20)).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    sandbox
}

#[test]
fn a_vm_that_does_not_fit_is_refused_before_anything_exists() {
    let sandbox = backed_up();
    for waits in [&[][..], &["--queue"]] {
        let said = sandbox.fails(5, &[&["recover", "vm", "--memory", "900G"], waits].concat());
        for part in ["921664 MiB", "this host has", "--memory", "--force"] {
            assert!(said.contains(part), "no {part:?} in {said}");
        }
    }
    assert!(sandbox.json(&["recoveries"]).as_array().unwrap().is_empty());
    assert!(!sandbox.path("state/recoveries/vm").exists());
    // Its disks alone need no memory.
    sandbox.ok(&["recover", "vm", "--memory", "900G", "--on", "none"]);
    assert!(sandbox.ok(&["recoveries"]).contains("this host can carry"));
}

#[test]
fn force_starts_what_does_not_fit() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = backed_up();
    // What fails now is QEMU.
    let args = ["recover", "vm", "--memory", "900G", "--machine-type", "abacus"];
    assert!(sandbox.fails(1, &[&args[..], &["--force"]].concat()).contains("abacus"));
    sandbox.fails(5, &args);
}

#[test]
fn who_waits_for_memory_is_shown_is_not_overtaken_and_can_give_up() {
    let sandbox = backed_up();
    sandbox.ok(&["recover", "vm", "--name", "disks", "--on", "none"]);
    let status = sandbox.json(&["status"]);
    let number = |name: &str| status[name].as_u64().unwrap();
    // Just as much as the host could give if nothing else ran.
    let most = (number("memory_total") - number("reserve") - (64 << 20)).to_string();
    let mut waiter = sandbox.start(&["recover", "vm", "--name", "large", "--memory", &most, "--queue"]);
    wait_until("it waits", || sandbox.json(&["status"])["waiting"][0]["name"] == "large");
    assert!(!sandbox.path("state/recoveries/large").exists());
    assert!(sandbox.ok(&["recoveries"]).contains("large waits for"));
    assert!(
        sandbox.fails(5, &["recover", "vm", "--name", "small", "--memory", "64M"]).contains("wait for memory before")
    );
    assert!(
        sandbox.fails(5, &["recover", "vm", "--name", "large", "--memory", "64M"]).contains("waits for memory already")
    );
    assert_eq!(waiter.stop().code(), Some(5));
    wait_until("nobody waits", || sandbox.json(&["status"])["waiting"].as_array().unwrap().is_empty());
    let mut killed = sandbox.start(&["recover", "vm", "--name", "large", "--memory", &most, "--queue"]);
    wait_until("it waits", || sandbox.json(&["status"])["waiting"][0]["name"] == "large");
    killed.kill();
    wait_until("nobody waits", || sandbox.json(&["status"])["waiting"].as_array().unwrap().is_empty());
    // Ended by somebody else.
    let mut ended = sandbox.start(&["recover", "vm", "--name", "large", "--memory", &most, "--queue"]);
    wait_until("it waits", || sandbox.json(&["status"])["waiting"][0]["name"] == "large");
    assert!(sandbox.fails(4, &["recovery", "large"]).contains("waits for memory"));
    assert!(sandbox.ok(&["discard", "large"]).contains("large is gone"));
    assert_eq!(ended.wait().code(), Some(5));
    assert!(sandbox.json(&["status"])["waiting"].as_array().unwrap().is_empty());
    assert!(sandbox.fails(4, &["discard", "large"]).contains("no recovery"));
    assert!(!sandbox.path("state/recoveries/large").exists());
}

#[test]
fn who_waits_for_memory_is_let_in_when_another_vm_ends() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = backed_up();
    sandbox.ok(&["recover", "vm", "--name", "disks", "--on", "none"]);
    // More than half of what there is: one has room, two have not. No guest touches it, the disk does not boot.
    let room = sandbox.json(&["status"])["room"].as_u64().unwrap();
    let memory = format!("{}M", (room * 6 / 10) >> 20);
    let recover = |name: &str, more: &[&str]| {
        sandbox.start(&[&["recover", "vm", "--name", name, "--memory", &memory, "--wait", "0"], more].concat())
    };
    let waits = |name: &str| wait_until("it waits", || sandbox.json(&["status"])["waiting"][0]["name"] == name);
    assert!(recover("first", &[]).wait().success());
    let mut second = recover("second", &["--queue"]);
    waits("second");
    assert!(!sandbox.path("state/recoveries/second").exists());
    sandbox.ok(&["discard", "first"]);
    assert!(second.wait().success());
    let view = sandbox.json(&["recovery", "second"]);
    assert_eq!((&view["state"], &view["vm"]), (&"running".into(), &"running".into()));
    // Its VM ends, another takes the room, and it waits until that has gone.
    kill(u32::try_from(view["pid"].as_u64().unwrap()).unwrap());
    wait_until("the VM is off", || sandbox.json(&["recovery", "second"])["vm"] == "shut-off");
    assert!(recover("third", &[]).wait().success());
    assert!(sandbox.fails(5, &["start", "second"]).contains("--queue"));
    let mut again = sandbox.start(&["start", "second", "--queue"]);
    waits("second");
    sandbox.ok(&["discard", "third"]);
    assert!(again.wait().success());
    assert_eq!(sandbox.json(&["recovery", "second"])["vm"], "running");
    sandbox.ok(&["discard", "second"]);
}
