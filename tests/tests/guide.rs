//! The guide for new users, run word for word in a home of its own.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use lifeboat_tests::{Guest, Sandbox, copy_sparse, guest, have};

const GUIDE: &str = include_str!("../../docs/guide/first-steps.md");

/// What stands between ```sh and ```.
fn script() -> String {
    let blocks = GUIDE.split("```sh\n").skip(1).map(|block| block.split("```").next().unwrap());
    blocks.collect()
}

#[test]
fn the_first_steps_work_as_they_are_written() {
    if !have(&["qemu-system-x86_64", "jq"]) {
        return;
    }
    let sandbox = Sandbox::new();
    copy_sparse(&guest(Guest::Counter), &sandbox.path("web01.raw"));
    let script = script();
    assert!(script.lines().count() > 30, "where is the guide?");
    let program = sandbox.command(&[]).get_program().to_owned();
    let folder = std::path::Path::new(&program).parent().unwrap().display().to_string();
    let path = format!("{folder}:{}", std::env::var("PATH").unwrap());
    let mut bash = Command::new("bash");
    // Nothing of the environment but what every user has.
    bash.env_clear().env("HOME", sandbox.path("")).env("PATH", path).env("LIFEBOAT_ACCEL", "tcg");
    // Job control, as in a shell that somebody types into.
    let output = bash.args(["-em", "-c", &script]).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    for told in [
        "the configuration is good",
        "backup of web01: done",
        "drill of web01: done",
        "passed",
        "is on production storage",
    ] {
        assert!(said.contains(told), "{told}: {said}");
    }
}
