//! Disks that the VM's own QEMU copies to production storage, and moves there: through crashes of Lifeboat at every point
//! of the way, of QEMU, and of the target, with nothing lost that was acknowledged.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use lifeboat_tests::{
    Console, Firmware, Foreign, Guest, Machine, Sandbox, SmallRoom, guest, have, kill, noise, tool, wait_until,
};
use nbd_server::{BlockingClient, ClientOptions};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

fn recovery(sandbox: &Sandbox) -> Value {
    sandbox.json(&["recovery", "vm"])
}

fn state(sandbox: &Sandbox) -> String {
    recovery(sandbox)["state"].as_str().unwrap().to_owned()
}

fn phase(sandbox: &Sandbox) -> String {
    recovery(sandbox)["rehydration"]["phase"].as_str().unwrap_or_default().to_owned()
}

/// The recovered machine's QEMU, as somebody with its other socket sees it.
struct Qemu(BufReader<UnixStream>);

impl Qemu {
    fn of(sandbox: &Sandbox) -> Qemu {
        let socket = UnixStream::connect(recovery(sandbox)["qmp"].as_str().unwrap()).unwrap();
        let mut qemu = Qemu(BufReader::new(socket));
        qemu.call("qmp_capabilities", json!({}));
        qemu
    }

    fn call(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{line}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "QEMU has gone");
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }

    /// Writes to a disk as the guest would.
    fn write(&mut self, disk: usize, pattern: u8, offset: usize, length: usize) {
        let line = format!(
            "qemu-io -d /machine/peripheral/device{disk}/virtio-backend \"write -P {pattern} {offset} {length}\""
        );
        let said = self.call("human-monitor-command", json!({ "command-line": line }));
        assert!(!said.as_str().unwrap().contains("rror"), "{said}");
    }

    fn status(&mut self) -> String {
        self.call("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }
}

/// A machine without an operating system, on as many disks of noise: what is written to them is up to the test.
fn bare(sandbox: &Sandbox, disks: usize, size: usize) -> Vec<Vec<u8>> {
    let contents: Vec<Vec<u8>> = (0..disks).map(|disk| noise(disk as u64 + 1, size)).collect();
    let mut backup = vec!["backup".to_owned(), "vm".to_owned()];
    for (disk, bytes) in contents.iter().enumerate() {
        let path = sandbox.name(&format!("source{disk}.raw"));
        fs::write(&path, bytes).unwrap();
        backup.push(format!("d{disk}={path}"));
    }
    sandbox.ok(&backup.iter().map(String::as_str).collect::<Vec<_>>());
    sandbox.ok(&["recover", "vm", "--memory", "64M", "--wait", "0"]);
    contents
}

fn assert_holds(path: &str, want: &[u8]) {
    let there = fs::read(path).unwrap();
    let differs = there.iter().zip(want).position(|(a, b)| a != b);
    assert_eq!((there.len(), differs), (want.len(), None), "{path}");
}

/// Says in the recovery's journal what a Lifeboat that is killed had just said.
fn journal(sandbox: &Sandbox, state: &str) {
    let json = format!("{{\"record\":\"state\",\"state\":\"{state}\",\"problem\":null}}");
    let line = format!("{:08x} {json}\n", crc32c::crc32c(json.as_bytes()));
    let path = sandbox.path("state/recoveries/vm/journal");
    fs::OpenOptions::new().append(true).open(path).unwrap().write_all(line.as_bytes()).unwrap();
}

#[test]
fn a_guest_is_mirrored_to_production_storage_through_kill_minus_nine_and_keeps_all_it_synced() {
    if !have(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let data = noise(5, 24 * MIB);
    fs::write(sandbox.path("data.raw"), &data).unwrap();
    let root = format!("root={}", guest(Guest::Counter).display());
    sandbox.ok(&["backup", "vm", &root, &format!("data={}", sandbox.name("data.raw"))]);
    let view = sandbox.json(&["recover", "vm", "--memory", "512M"]);
    let mut console = Console::new(view["console"].as_str().unwrap());
    console.wait_for("seq 5");
    let (target, second) = (sandbox.name("production.raw"), sandbox.name("data.qcow2"));
    let to = [format!("root={target}"), format!("data={second}")];
    sandbox.ok(&["rehydrate", "vm", "--to", &to[0], &to[1], "--limit", "24M", "--detach"]);
    assert_eq!(recovery(&sandbox)["rehydration"]["mode"], "mirror");
    assert!(sandbox.fails(5, &["cutover", "vm"]).contains("not everything"));
    for _ in 0..2 {
        let reached = console.last_number("seq ").unwrap();
        sandbox.kill_owner();
        let view = recovery(&sandbox);
        assert!(view["state"] == "rehydrating" || view["state"] == "ready-for-cutover", "{view}");
        console.wait_for(&format!("seq {}", reached + 5));
    }
    wait_until("all is copied", || state(&sandbox) == "ready-for-cutover");
    let before = console.last_number("seq ").unwrap();
    let view = sandbox.json(&["cutover", "vm"]);
    assert_eq!(view["state"], "cut-over", "{view}");
    assert!(view["timings"]["cutover_pause_ms"].is_u64());
    console.wait_for(&format!("seq {}", before + 5));
    // Lifeboat is out of the path: it serves nothing, and the guest does not notice that it is gone.
    assert_eq!(view["disks"][0]["nbd_uri"], Value::Null);
    assert!(!sandbox.path("state/recoveries/vm/disks").exists(), "the overlay is still there");
    sandbox.kill_owner();
    let reached = console.last_number("seq ").unwrap();
    console.wait_for(&format!("seq {}", reached + 5));
    // The power goes. Production storage alone holds everything, with the repository away.
    kill(u32::try_from(view["pid"].as_u64().unwrap()).unwrap());
    let promised = console.last_number("seq ").unwrap();
    let (repository, away) = (sandbox.path("repo"), sandbox.path("away"));
    fs::rename(&repository, &away).unwrap();
    let mut alone = Machine::boot(&sandbox, "alone", &target, Firmware::Bios);
    alone.console.wait_for("up boot=2");
    let kept = alone.console.next_number("log ok last=");
    assert!(kept >= promised, "the guest had synced record {promised}, production storage holds {kept}");
    alone.console.wait_for("slots ok");
    alone.kill();
    fs::rename(&away, &repository).unwrap();
    tool("qemu-img", &["check", "-q", &second]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &sandbox.name("data.raw"), &second]);
    // And by Lifeboat, from the same storage.
    sandbox.ok(&["start", "vm"]);
    console.wait_for("up boot=3");
    kill(u32::try_from(recovery(&sandbox)["pid"].as_u64().unwrap()).unwrap());
    wait_until("the VM is off", || recovery(&sandbox)["vm"] == "shut-off");
    sandbox.ok(&["discard", "vm"]);
    assert!(sandbox.path("production.raw").exists());
}

#[test]
fn a_cutover_that_is_interrupted_is_undone_before_it_is_decided_and_finished_after() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let mut disks = bare(&sandbox, 2, 4 * MIB);
    let targets = [sandbox.name("t0.raw"), sandbox.name("t1.raw")];
    sandbox.ok(&["rehydrate", "vm", "--to", &format!("d0={}", targets[0]), &format!("d1={}", targets[1])]);
    assert_eq!(state(&sandbox), "ready-for-cutover");
    let mut qemu = Qemu::of(&sandbox);
    for (disk, bytes) in disks.iter_mut().enumerate() {
        qemu.write(disk, 7, MIB, 4096);
        bytes[MIB..MIB + 4096].fill(7);
    }
    // Killed when the guest was held and nothing was decided. (A QEMU that is told to stop while its disks are away would
    // wait for them, so it is told before the kill, as it was.)
    qemu.call("stop", json!({}));
    sandbox.kill_owner();
    journal(&sandbox, "cutting-over");
    let view = recovery(&sandbox);
    assert!(view["state"] == "rehydrating" || view["state"] == "ready-for-cutover", "{view}");
    assert_eq!(qemu.status(), "running");
    wait_until("all is proven again", || state(&sandbox) == "ready-for-cutover");
    // Killed when it was decided, between the first disk and the second.
    qemu.call("stop", json!({}));
    qemu.call("block-job-complete", json!({ "device": "mirror-disk0" }));
    wait_until("the first disk has moved", || {
        let jobs = qemu.call("query-block-jobs", json!({}));
        jobs.as_array().unwrap().iter().any(|job| job["device"] == "mirror-disk0" && job["status"] == "concluded")
    });
    sandbox.kill_owner();
    journal(&sandbox, "cutting-over");
    journal(&sandbox, "cut-over");
    assert_eq!(state(&sandbox), "cut-over");
    assert_eq!(qemu.status(), "running");
    let nodes = qemu.call("query-named-block-nodes", json!({ "flat": true }));
    assert!(nodes.as_array().unwrap().iter().all(|node| node["drv"] != "nbd"), "QEMU still uses an export: {nodes}");
    assert!(!sandbox.path("state/recoveries/vm/disks").exists(), "the overlays are still there");
    for (disk, bytes) in disks.iter_mut().enumerate() {
        qemu.write(disk, 9, 2 * MIB, 4096);
        bytes[2 * MIB..2 * MIB + 4096].fill(9);
    }
    // Once more: what is over stays over.
    sandbox.kill_owner();
    let view = recovery(&sandbox);
    assert_eq!((&view["state"], &view["vm"]), (&"cut-over".into(), &"running".into()));
    kill(u32::try_from(view["pid"].as_u64().unwrap()).unwrap());
    for (target, want) in targets.iter().zip(&disks) {
        assert_holds(target, want);
    }
}

#[test]
fn failing_targets_a_dead_qemu_and_second_thoughts_cost_the_guest_nothing() {
    if !have(&["qemu-system-x86_64", "nbdkit"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let mut disk = bare(&sandbox, 1, 8 * MIB).remove(0);
    let uri = recovery(&sandbox)["disks"][0]["nbd_uri"].as_str().unwrap().to_owned();
    // Whoever else is connected would be cut off, and what he writes QEMU would not see.
    let other = BlockingClient::connect(&uri.parse().unwrap(), &ClientOptions::default()).unwrap();
    let raw = sandbox.name("t.raw");
    let said = sandbox.fails(5, &["rehydrate", "vm", "--to", &raw, "--mode", "mirror"]);
    assert!(said.contains("another NBD client uses disk d0"), "{said}");
    drop(other);
    // A change of mind.
    wait_until("only QEMU is connected", || {
        sandbox
            .run(&["rehydrate", "vm", "--to", &raw, "--mode", "mirror", "--limit", "1M", "--detach"])
            .status
            .success()
    });
    let mut qemu = Qemu::of(&sandbox);
    sandbox.ok(&["rehydrate", "vm", "--pause"]);
    assert_eq!(phase(&sandbox), "held");
    sandbox.kill_owner();
    assert_eq!(phase(&sandbox), "held");
    sandbox.ok(&["rehydrate", "vm", "--cancel"]);
    assert_eq!(state(&sandbox), "running");
    assert!(!sandbox.path("t.raw").exists());
    assert_eq!(qemu.call("query-block-jobs", json!({})), json!([]));
    // A target that fails now and then, until somebody looks after it.
    let target = Failing::serve(&sandbox, 8 * MIB);
    let said = sandbox.fails(1, &["rehydrate", "vm", "--to", &target.uri, "--mode", "mirror"]);
    assert!(said.contains("is held") && said.contains("Input/output error"), "{said}");
    assert_eq!(qemu.status(), "running");
    qemu.write(0, 7, MIB, 4096);
    disk[MIB..MIB + 4096].fill(7);
    sandbox.kill_owner();
    sandbox.wait_for_problem("vm", "Input/output error");
    fs::remove_file(sandbox.path("trigger")).unwrap();
    sandbox.ok(&["rehydrate", "vm", "--resume"]);
    assert_eq!(state(&sandbox), "ready-for-cutover");
    // QEMU dies. The overlay holds all, and the target is not believed.
    kill(u32::try_from(recovery(&sandbox)["pid"].as_u64().unwrap()).unwrap());
    wait_until("it is noticed", || state(&sandbox) == "rehydrating" && phase(&sandbox) == "held");
    let view = recovery(&sandbox);
    assert_eq!(view["vm"], "shut-off");
    assert!(view["problem"].as_str().unwrap().contains("the VM has ended"), "{view}");
    sandbox.ok(&["start", "vm"]);
    let mut qemu = Qemu::of(&sandbox);
    qemu.write(0, 9, 2 * MIB, 4096);
    disk[2 * MIB..2 * MIB + 4096].fill(9);
    sandbox.ok(&["rehydrate", "vm", "--resume"]);
    let view = sandbox.json(&["cutover", "vm"]);
    assert_eq!(view["state"], "cut-over", "{view}");
    qemu.write(0, 11, 3 * MIB, 4096);
    disk[3 * MIB..3 * MIB + 4096].fill(11);
    kill(u32::try_from(view["pid"].as_u64().unwrap()).unwrap());
    assert_holds(&sandbox.name("served.raw"), &disk);
}

#[test]
fn a_full_target_and_a_qemu_that_dies_in_the_middle_hold_the_mirror_and_lose_nothing() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    let Some(small) = SmallRoom::new(sandbox.path("small"), "3m") else { return };
    let mut disk = bare(&sandbox, 1, 8 * MIB).remove(0);
    let target = small.name("t.raw");
    let said = sandbox.fails(1, &["rehydrate", "vm", "--to", &target, "--mode", "mirror"]);
    assert!(said.contains("is held") && said.contains("No space left"), "{said}");
    let mut qemu = Qemu::of(&sandbox);
    assert_eq!(qemu.status(), "running");
    qemu.write(0, 7, MIB, 4096);
    disk[MIB..MIB + 4096].fill(7);
    sandbox.kill_owner();
    sandbox.wait_for_problem("vm", "No space left");
    // With room it goes on where it was, and QEMU dies when half of it is copied.
    small.resize("32m");
    sandbox.ok(&["rehydrate", "vm", "--resume", "--detach"]);
    let copied = |view: &Value| view["disks"][0]["hydrated"].as_u64().unwrap() > 0;
    wait_until("some is copied", || copied(&recovery(&sandbox)));
    kill(u32::try_from(recovery(&sandbox)["pid"].as_u64().unwrap()).unwrap());
    wait_until("it is noticed", || recovery(&sandbox)["vm"] == "shut-off" && phase(&sandbox) == "held");
    sandbox.ok(&["start", "vm"]);
    sandbox.ok(&["rehydrate", "vm", "--resume"]);
    let view = sandbox.json(&["cutover", "vm"]);
    kill(u32::try_from(view["pid"].as_u64().unwrap()).unwrap());
    assert_holds(&target, &disk);
}

/// An NBD server for `served.raw` whose writes fail at random while the file `trigger` is there.
struct Failing {
    _server: Foreign,
    uri: String,
}

impl Failing {
    fn serve(sandbox: &Sandbox, size: usize) -> Failing {
        fs::File::create(sandbox.path("served.raw")).unwrap().set_len(size as u64).unwrap();
        fs::write(sandbox.path("trigger"), b"").unwrap();
        let socket = sandbox.name("served.sock");
        let mut server = Command::new("nbdkit");
        server.args(["--foreground", "--exit-with-parent", "--filter=error", "--unix", &socket, "file"]);
        server.args([sandbox.name("served.raw"), "error-pwrite=EIO".to_owned(), "error-pwrite-rate=30%".to_owned()]);
        server.arg(format!("error-pwrite-file={}", sandbox.name("trigger")));
        let server = Foreign::start(server.stderr(Stdio::null()));
        wait_until("nbdkit listens", || sandbox.path("served.sock").exists());
        Failing { _server: server, uri: format!("nbd+unix:///?socket={socket}") }
    }
}
