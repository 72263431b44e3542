//! Drills of real guests: they pass, fail at the right stage, leave nothing behind, and what they found is kept.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use lifeboat_tests::{Guest, Sandbox, assert_same_bytes, copy_sparse, guest, have, kill, tool, wait_until};
use nbd_server::{BlockingClient, ClientOptions};
use serde_json::Value;

fn sandbox() -> Option<Sandbox> {
    have(&["qemu-system-x86_64"]).then(|| Sandbox::with_key_file("key", "64K"))
}

/// Drills, which may fail; the reports.
fn drill(sandbox: &Sandbox, status: i32, args: &[&str]) -> Value {
    let args = [&["drill", "--json", "--memory", "512M"], args].concat();
    let output = sandbox.run(&args);
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {said}{complained}");
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error} in {said:?}"))
}

/// Nothing of a drill is there but what it is meant to leave.
fn assert_nothing_is_left(sandbox: &Sandbox) {
    let left: Vec<_> = fs::read_dir(sandbox.path("state/drilling")).into_iter().flatten().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(sandbox.processes().is_empty(), "{:?}", sandbox.processes());
}

fn is_png(path: &Value) -> bool {
    fs::read(path.as_str().unwrap()).unwrap().starts_with(b"\x89PNG")
}

#[test]
fn a_good_guest_passes_every_kind_of_check_and_what_was_found_stays_with_its_point() {
    let Some(sandbox) = sandbox() else { return };
    let counter = guest(Guest::Counter);
    let point = sandbox.json(&["backup", "web01", &counter.display().to_string()])["point"].clone();
    assert_eq!(sandbox.json(&["points"])[0]["drill"], Value::Null);
    let checks = ["--expect", "^LIFEBOAT-GUEST: seq 3$", "--agent", "--port", "80", "--screenshot"];
    let command = ["--command", "cat /srv/http/index.html; exit 0", "--timeout", "150"];
    let report = drill(&sandbox, 0, &[&["web01"], &checks[..], &command].concat());
    assert_eq!((&report["result"], &report["stage"], &report["point"]), (&"passed".into(), &"ready".into(), &point));
    let passed: Vec<&Value> = report["checks"].as_array().unwrap().iter().map(|check| &check["passed"]).collect();
    assert_eq!(passed, [true; 5], "{report}");
    let detail = report["checks"][4]["detail"].as_str().unwrap();
    assert!(detail.contains("LIFEBOAT-GUEST: serving"), "{detail}");
    let times = &report["times"];
    let time = |name: &str| times[name].as_u64().unwrap_or_else(|| panic!("no {name} in {report}"));
    assert!(time("first_block_ms") <= time("kernel_ms") && time("kernel_ms") <= time("ready_ms"), "{times}");
    assert_eq!(report["rto_ms"], times["ready_ms"]);
    assert!(report["bytes_read"].as_u64() > Some(1 << 20) && report["chunks_read"].as_u64() > Some(16), "{report}");
    assert!(fs::read_to_string(report["console"].as_str().unwrap()).unwrap().contains("LIFEBOAT-GUEST: seq 3"));
    assert!(is_png(&report["screenshot"]));
    assert_nothing_is_left(&sandbox);

    // It is known of the point, by any process.
    let listed = &sandbox.json(&["points"])[0]["drill"];
    assert_eq!((&listed["result"], &listed["rto_ms"]), (&"passed".into(), &report["rto_ms"]));
    assert!(sandbox.ok(&["show", "web01"]).contains("passed"));
    let drills = sandbox.json(&["drills", "web01"]);
    assert_eq!((drills.as_array().unwrap().len(), &drills[0]["id"]), (1, &report["id"]));

    // The point is as it was, to the last bit, and all that was written is whole.
    sandbox.ok(&["restore", "web01", "--to", &sandbox.name("out.raw")]);
    assert_same_bytes(&sandbox.path("out.raw"), &counter);
    sandbox.ok(&["verify", "--read-data"]);

    a_later_point_is_fetched_ahead(&sandbox, &report, &counter);

    // A damaged result is named, hides nothing else, and does not keep anybody from anything.
    let stored = sandbox.path("repo/drills").join(report["id"].as_str().unwrap());
    let file = OpenOptions::new().write(true).open(&stored).unwrap();
    file.write_all_at(b"x", fs::metadata(&stored).unwrap().len() - 1).unwrap();
    let told = sandbox.run(&["verify"]);
    assert_eq!(told.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&told.stdout).contains("drill drills/"), "{told:?}");
    sandbox.ok(&["forget", "web01", "--newest"]);
    assert!(sandbox.json(&["drills"]).as_array().unwrap().is_empty() && !stored.exists());
}

/// The trace of a drill serves a later point of its machine: what the guest will read is in the cache before it asks.
fn a_later_point_is_fetched_ahead(sandbox: &Sandbox, report: &Value, disk: &Path) {
    sandbox.ok(&["backup", "web01", &disk.display().to_string()]);
    sandbox.ok(&["recover", "web01", "--on", "none", "--name", "later"]);
    let api = |path: &str| {
        let socket = sandbox.name("state/lifeboat.sock");
        let url = format!("http://lifeboat/api/v1/drills/{}{path}", report["id"].as_str().unwrap());
        tool("curl", &["--silent", "--fail", "--unix-socket", &socket, &url])
    };
    assert!(api("/console").contains("LIFEBOAT-GUEST: seq 3"));
    let trace: Value = serde_json::from_str(&api("/trace")).unwrap();
    let chunks: Vec<u64> = trace[0]["chunks"].as_array().unwrap().iter().map(|chunk| chunk.as_u64().unwrap()).collect();
    assert_eq!(chunks.len() as u64, report["chunks_read"].as_u64().unwrap());
    wait_until("the trace is fetched", || {
        fs::read_to_string(sandbox.path("state/service.log")).is_ok_and(|log| log.contains("boot trace fetched"))
    });
    let served = || sandbox.json(&["recovery", "later"])["disks"][0]["served"].clone();
    let uri = sandbox.json(&["recovery", "later"])["disks"][0]["nbd_uri"].clone();
    let client = BlockingClient::connect(&uri.as_str().unwrap().parse().unwrap(), &ClientOptions::default()).unwrap();
    let mut chunk = vec![0; 65536];
    chunks.iter().for_each(|number| client.read(number * 65536, &mut chunk).unwrap());
    let served = served();
    assert_eq!((&served["reads"], &served["reads_from_memory"]), (&chunks.len().into(), &chunks.len().into()));
    drop(client);
    sandbox.ok(&["discard", "later"]);
    sandbox.ok(&["forget", "web01", "--newest"]);
}

/// A copy of the oneshot guest, changed at some places.
fn damaged(sandbox: &Sandbox, name: &str, changes: &[(u64, &[u8])]) -> String {
    let path = sandbox.path(name);
    copy_sparse(&guest(Guest::Oneshot), &path);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    changes.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
    path.display().to_string()
}

#[test]
fn damaged_guests_fail_at_their_stage_and_show_their_console_and_screen() {
    let Some(sandbox) = sandbox() else { return };
    // The boot code is gone, and the mark that says that there is any.
    let unbootable = damaged(&sandbox, "unbootable.raw", &[(0, &[0; 440]), (510, &[0; 2])]);
    // The boot loader finds its kernel, and the kernel no file system with the label that it looks for.
    let rootless = damaged(&sandbox, "rootless.raw", &[((1 << 20) + 1024 + 0x78, b"somebody-elses\0\0")]);
    // The boot loader finds no file system at all.
    let empty = damaged(&sandbox, "empty.raw", &[((1 << 20) + 1024, &[0; 1024])]);
    for (machine, disk) in [("unbootable", unbootable), ("rootless", rootless), ("empty", empty)] {
        sandbox.ok(&["backup", machine, &disk]);
    }
    // All at once; none of them is waited for longer than it takes to know.
    let machines = ["unbootable", "rootless", "empty", "--parallel", "3", "--timeout", "150"];
    let reports = drill(&sandbox, 1, &machines);
    let reports = reports.as_array().unwrap();
    let stages: Vec<&str> = reports.iter().map(|report| report["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, ["boot-loader", "kernel", "boot-loader"], "{reports:?}");
    for report in reports {
        assert_eq!((&report["result"], &report["rto_ms"]), (&"failed".into(), &Value::Null));
        assert!(is_png(&report["screenshot"]), "{report}");
    }
    let why = |at: usize| reports[at]["reason"].as_str().unwrap();
    assert!(why(0).contains("the firmware found nothing to boot"), "{}", why(0));
    assert!(why(1).contains("powered itself off"), "{}", why(1));
    assert!(why(2).contains("the boot loader stopped at its prompt"), "{}", why(2));
    let tail = reports[1]["console_tail"].to_string();
    assert!(tail.contains("no root file system found"), "{tail}");
    let listed = sandbox.ok(&["points"]);
    assert_eq!(listed.matches("failed").count(), 3, "{listed}");
    assert_nothing_is_left(&sandbox);
}

#[test]
fn a_drill_that_is_killed_leaves_no_machine_and_the_next_command_takes_the_rest_away() {
    let Some(sandbox) = sandbox() else { return };
    sandbox.ok(&["backup", "vm", &guest(Guest::Counter).display().to_string()]);
    let mut running = sandbox.start(&["drill", "vm", "--memory", "512M", "--expect", "never seen", "--json"]);
    let console = sandbox.path("state/drilling/0/console.log");
    wait_until("the guest writes to its console", || fs::metadata(&console).is_ok_and(|file| file.len() > 0));
    let machine: u32 = fs::read_to_string(sandbox.path("state/drilling/0/qemu.pid")).unwrap().trim().parse().unwrap();
    assert!(sandbox.processes().contains(&machine));
    // Another one is refused or waits for nothing: the state folder has an owner, which answers.
    assert_eq!(sandbox.json(&["drills"]).as_array().unwrap().len(), 0);
    running.kill();
    wait_until("its machine is gone", || !sandbox.processes().contains(&machine));
    assert!(console.exists(), "nobody has had a look yet");
    sandbox.ok(&["points"]);
    assert_nothing_is_left(&sandbox);
    assert!(sandbox.json(&["drills"]).as_array().unwrap().is_empty(), "a drill without a verdict is no drill");
    // An interrupt ends a drill, too, and says so.
    let mut running = sandbox.start(&["drill", "vm", "--memory", "512M", "--expect", "never seen"]);
    wait_until("the guest writes to its console", || fs::metadata(&console).is_ok_and(|file| file.len() > 0));
    assert_eq!(running.stop().code(), Some(1));
    assert_nothing_is_left(&sandbox);
    sandbox.ok(&["verify"]);
}

/// What `clean_up` is for: a machine that lives although its starter was killed.
#[test]
fn a_machine_that_a_dead_lifeboat_left_is_ended_by_the_next_and_no_other_process_is() {
    if !have(&["sleep"]) {
        return;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    let folder = sandbox.path("state/drilling/7");
    fs::create_dir_all(&folder).unwrap();
    let control = folder.join("qmp.sock.ctl");
    let stand_in = |arg: &Path| {
        let script = format!("exec -a '{}' sleep 300", arg.display());
        std::process::Command::new("bash").args(["-c", &script]).spawn().unwrap()
    };
    let mut machine = stand_in(&control);
    let mut other = stand_in(Path::new("somebody-else"));
    wait_until("it is called so", || {
        let line = fs::read(format!("/proc/{}/cmdline", machine.id())).unwrap_or_default();
        line.starts_with(control.as_os_str().as_encoded_bytes())
    });
    fs::write(folder.join("qemu.pid"), machine.id().to_string()).unwrap();
    sandbox.ok(&["points"]);
    assert!(machine.wait().unwrap().code().is_none(), "it was killed");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("qemu.pid"), other.id().to_string()).unwrap();
    sandbox.ok(&["points"]);
    assert!(other.try_wait().unwrap().is_none(), "a process with a number used again was killed");
    assert!(!folder.exists());
    kill(other.id());
    other.wait().unwrap();
}

#[test]
fn what_cannot_be_drilled_is_refused_before_anything_is_started() {
    let sandbox = Sandbox::with_plain_repository("64K");
    fs::write(sandbox.path("disk.raw"), vec![1; 1 << 20]).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    let table: [(i32, &[&str], &str); 9] = [
        (4, &["nobody"], "no recovery point or machine"),
        (2, &["vm", "--expect", "("], "cannot be expected"),
        (2, &["vm", "--network", "bridge:br0"], "no network `bridge:br0`"),
        (2, &["vm", "--network", "none", "--port", "22"], "has no port"),
        (2, &["vm", "--timeout", "0"], "cannot take 0 seconds"),
        (2, &["vm", "--parallel", "0"], "no drill at all"),
        (2, &["vm", "--memory", "2G", "--memory-budget", "1G"], "memory budget is less"),
        (2, &["vm", "--port", "0"], "0"),
        (5, &["vm", "--memory", "9000000G"], "the drill of vm is not started"),
    ];
    for (status, args, told) in table {
        let said = sandbox.fails(status, &[&["drill"], args].concat());
        assert!(said.contains(told), "{args:?}: {said}");
    }
    assert_nothing_is_left(&sandbox);
}
