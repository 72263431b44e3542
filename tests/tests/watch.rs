//! Recoveries followed live: every change is told, a restart of the service too, and the end of it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use lifeboat_tests::{Running, Sandbox, noise, wait_until};
use serde_json::Value;

fn published() -> Sandbox {
    let sandbox = Sandbox::with_plain_repository("64K");
    fs::write(sandbox.path("disk.raw"), noise(5, 2 << 20)).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    sandbox.ok(&["recover", "vm", "--on", "none"]);
    sandbox
}

fn line_with(watch: &Running, part: &str) -> String {
    loop {
        let line = watch.line();
        if line.contains(part) {
            return line;
        }
    }
}

fn document_with(watch: &Running, wanted: impl Fn(&Value) -> bool) {
    while !wanted(&serde_json::from_str(&watch.line()).unwrap()) {}
}

#[test]
fn a_recovery_is_followed_through_a_restart_of_the_service_to_its_end() {
    let sandbox = published();
    let mut watch = sandbox.start(&["recovery", "vm", "--watch"]);
    assert!(watch.line().contains("vm running"));
    sandbox.kill_owner();
    line_with(&watch, "the service is away");
    // Whoever asks next has the service started.
    assert_eq!(sandbox.json(&["recovery", "vm"])["state"], "running");
    line_with(&watch, "the service answers again");
    line_with(&watch, "vm running");
    let target = sandbox.name("out.raw");
    sandbox.ok(&["rehydrate", "vm", "--to", &target, "--limit", "64K", "--detach"]);
    let line = line_with(&watch, "rehydrating");
    assert!(line.contains("copied") && line.contains("guest changes") && line.contains("overlay"), "{line}");
    sandbox.ok(&["discard", "vm"]);
    line_with(&watch, "vm discarded");
    assert!(watch.wait().success());
    sandbox.fails(4, &["recovery", "vm", "--watch"]);
}

#[test]
fn who_watches_an_empty_state_folder_keeps_nobody_from_it() {
    let sandbox = Sandbox::with_plain_repository("64K");
    fs::write(sandbox.path("disk.raw"), noise(5, 2 << 20)).unwrap();
    let mut watch = sandbox.start(&["recoveries", "--watch"]);
    line_with(&watch, "no recoveries");
    let socket = sandbox.path("state/lifeboat.sock");
    assert!(!socket.exists(), "it answers for the state folder");
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    // A service can begin and end beside it, as often as it likes.
    for _ in 0..2 {
        let mut service = sandbox.start(&["serve"]);
        wait_until("the service answers", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        sandbox.ok(&["recover", "vm", "--on", "none"]);
        line_with(&watch, "vm running");
        sandbox.ok(&["discard", "vm"]);
        line_with(&watch, "no recoveries");
        assert!(service.stop().success());
    }
    assert!(watch.stop().success());
}

#[test]
fn every_change_is_a_json_document_of_the_form_without_watch() {
    let sandbox = published();
    let mut one = sandbox.start(&["recovery", "vm", "--watch", "--json"]);
    let mut all = sandbox.start(&["recoveries", "--watch", "--json"]);
    document_with(&one, |view| view["state"] == "running" && view["disks"][0]["size"] == 2 << 20);
    document_with(&all, |views| views[0]["name"] == "vm");
    sandbox.ok(&["recover", "vm", "--name", "second", "--on", "none"]);
    document_with(&all, |views| views.as_array().unwrap().len() == 2);
    sandbox.ok(&["discard", "vm"]);
    document_with(&one, |view| view["state"] == "discarded");
    document_with(&all, |views| views.as_array().unwrap().len() == 1);
    assert!(one.wait().success());
    assert!(all.stop().success(), "an interrupt is how it ends");
}

#[test]
fn a_recovery_is_shown_with_all_that_matters_while_it_moves() {
    let sandbox = published();
    let target = sandbox.name("out.raw");
    sandbox.ok(&["rehydrate", "vm", "--to", &target, "--limit", "64K", "--detach"]);
    let shown = sandbox.ok(&["recovery", "vm"]);
    let name = "lifeboat rehydrate vm --pause";
    for part in ["rehydrating", "copied", "/s (at most 64.0 KiB/s)", "changes", "overlay", " free", &target, name] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }
}
