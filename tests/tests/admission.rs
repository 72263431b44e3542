//! A host that is full says so before anything exists, and who waits is let in in turn or gives up.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use lifeboat_tests::{Sandbox, have, noise, wait_until};

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
}
