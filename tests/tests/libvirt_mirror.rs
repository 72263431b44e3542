//! Domains whose disks libvirt copies to production storage, and moves there: through crashes of Lifeboat and of the
//! daemon, pauses and second thoughts, with nothing lost that was acknowledged.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lifeboat_tests::{
    Doomed, Foreign, Guest, Libvirtd, Sandbox, SmallRoom, guest, have, holds_all, noise, tool, wait_for_domain,
    wait_until,
};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

fn recovery(sandbox: &Sandbox) -> Value {
    sandbox.json(&["recovery", "vm"])
}

fn wait_for_state(sandbox: &Sandbox, state: &str) {
    wait_until(&format!("the recovery is {state}"), || recovery(sandbox)["state"] == state);
}

fn begin() -> Option<Sandbox> {
    have(&["qemu-system-x86_64", "qemu-img", "nbdkit"]).then(|| Sandbox::with_plain_repository("64K"))
}

#[test]
fn a_persistent_domain_is_mirrored_through_crashes_of_lifeboat_and_libvirtd_and_keeps_all_it_synced() {
    let Some(sandbox) = begin() else { return };
    let Some(mut daemon) = Libvirtd::start(&sandbox) else { return };
    fs::write(sandbox.path("data.raw"), noise(5, 24 * MIB)).unwrap();
    let root = format!("root={}", guest(Guest::Counter).display());
    sandbox.ok(&["backup", "vm", &root, &format!("data={}", sandbox.name("data.raw"))]);
    let (view, mut console) = daemon.recover(&sandbox, &["--persistent"]);
    console.count_on(5);
    let (target, second) = (sandbox.name("production.raw"), sandbox.name("data.qcow2"));
    let to = [format!("root={target}"), format!("data={second}")];
    sandbox.ok(&["rehydrate", "vm", "--to", &to[0], &to[1], "--limit", "24M", "--detach"]);
    assert_eq!(recovery(&sandbox)["rehydration"]["mode"], "mirror");
    assert!(sandbox.fails(5, &["cutover", "vm"]).contains("not everything"));
    sandbox.kill_owner();
    wait_for_state(&sandbox, "rehydrating");
    console.count_on(3);
    // The daemon goes and comes back, and the copy with it.
    daemon.kill();
    wait_until("it is seen", || recovery(&sandbox)["rehydration"]["phase"] == "retrying");
    console.count_on(3);
    daemon.start_again();
    wait_until("it is copied on", || recovery(&sandbox)["rehydration"]["phase"] != "retrying");
    // Lifeboat is back before the daemon: the move waits for it and goes on by itself.
    daemon.kill();
    sandbox.kill_owner();
    wait_until("the move waits", || recovery(&sandbox)["vm"] == "unreachable");
    assert!(recovery(&sandbox)["problem"].as_str().unwrap().contains("goes on"), "{}", recovery(&sandbox));
    daemon.start_again();
    wait_for_state(&sandbox, "ready-for-cutover");
    let before = console.count_on(1);
    let cut = sandbox.json(&["cutover", "vm"]);
    assert_eq!((&cut["state"], &cut["pid"]), (&"cut-over".into(), &view["pid"]), "{cut}");
    assert!(cut["timings"]["cutover_pause_ms"].is_u64());
    console.wait_for(&format!("seq {}", before + 5));
    // Lifeboat is out of the path: it serves nothing, nobody names it, and the guest does not notice that it is gone.
    assert_eq!((&cut["problem"], &cut["disks"][0]["nbd_uri"]), (&Value::Null, &Value::Null));
    assert!(!sandbox.path("state/recoveries/vm/disks").exists(), "the overlay is still there");
    for kept in [daemon.virsh(&["dumpxml", "--inactive", "vm"]), daemon.virsh(&["dumpxml", "vm"])] {
        assert!(kept.contains(&target) && kept.contains(&second) && !kept.contains("nbd"), "{kept}");
    }
    sandbox.kill_owner();
    let promised = console.count_on(5);
    sandbox.ok(&["discard", "vm"]);
    assert!(daemon.knows("vm"), "a domain in production stays when its recovery ends");
    // The power goes. Production storage alone holds everything.
    daemon.virsh(&["destroy", "vm"]);
    holds_all(&sandbox, &target, promised);
    tool("qemu-img", &["check", "-q", &second]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &sandbox.name("data.raw"), &second]);
    daemon.virsh(&["start", "vm"]);
    daemon.virsh(&["destroy", "vm"]);
    daemon.virsh(&["undefine", "vm"]);
}

/// A machine without an operating system, on two disks of noise with a hole, and the daemon that runs it.
fn bare(sandbox: &Sandbox) -> Option<(Libvirtd, [Vec<u8>; 2])> {
    let daemon = Libvirtd::start(sandbox)?;
    let mut disks = [noise(1, 4 * MIB), noise(2, 4 * MIB)];
    disks.iter_mut().for_each(|disk| disk[MIB..2 * MIB].fill(0));
    let mut backup = vec!["backup".to_owned(), "vm".to_owned()];
    for (at, bytes) in disks.iter().enumerate() {
        fs::write(sandbox.path(&format!("source{at}.raw")), bytes).unwrap();
        backup.push(format!("d{at}={}", sandbox.name(&format!("source{at}.raw"))));
    }
    sandbox.ok(&backup.iter().map(String::as_str).collect::<Vec<_>>());
    daemon.recover(sandbox, &[]);
    Some((daemon, disks))
}

#[test]
fn a_copy_is_paused_given_up_and_begun_again_and_a_full_target_costs_the_guest_nothing() {
    let Some(sandbox) = begin() else { return };
    // Mounted before the daemon begins, which sees it then, too.
    let Some(small) = SmallRoom::new(sandbox.path("small"), "5m") else { return };
    let Some((daemon, disks)) = bare(&sandbox) else { return };
    let targets = ["t0.raw", "t1.raw"].map(|name| sandbox.name(name));
    let to = [format!("d0={}", targets[0]), format!("d1={}", targets[1])];
    sandbox.ok(&["rehydrate", "vm", "--mode", "mirror", "--to", &to[0], &to[1], "--limit", "1M", "--detach"]);
    sandbox.ok(&["rehydrate", "vm", "--pause"]);
    assert_eq!(recovery(&sandbox)["rehydration"]["phase"], "held");
    sandbox.kill_owner();
    assert_eq!(recovery(&sandbox)["rehydration"]["phase"], "held");
    sandbox.ok(&["rehydrate", "vm", "--cancel"]);
    assert_eq!(recovery(&sandbox)["state"], "running");
    assert!(!sandbox.path("t0.raw").exists() && !sandbox.path("t1.raw").exists());
    assert!(!daemon.virsh(&["dumpxml", "vm"]).contains("<mirror"), "libvirt copies on");

    let full = ["t0.raw", "t1.raw"].map(|name| small.name(name));
    let to = [format!("d0={}", full[0]), format!("d1={}", full[1])];
    let said = sandbox.fails(1, &["rehydrate", "vm", "--mode", "mirror", "--to", &to[0], &to[1]]);
    assert!(said.contains("No space left on device") && said.contains("small/t"), "{said}");
    assert_eq!(recovery(&sandbox)["state"], "rehydrating");
    wait_for_domain(&daemon, "vm", "running");
    small.resize("32m");
    sandbox.ok(&["rehydrate", "vm", "--resume"]);
    wait_for_state(&sandbox, "ready-for-cutover");
    sandbox.ok(&["cutover", "vm"]);
    assert!(sandbox.fails(5, &["discard", "vm"]).contains("in production"));
    for (target, want) in full.iter().zip(&disks) {
        assert!(fs::read(target).unwrap() == *want, "{target}");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(target).unwrap());
        assert!(blocks * 512 <= 3 << 20, "{blocks} blocks: the hole in the guest's disk is filled");
    }
    // A transient domain's next start is from there, by Lifeboat.
    daemon.virsh(&["destroy", "vm"]);
    wait_until("the end is seen", || recovery(&sandbox)["vm"] == "shut-off");
    sandbox.ok(&["start", "vm"]);
    let made = daemon.virsh(&["dumpxml", "vm"]);
    assert!(full.iter().all(|target| made.contains(target)) && !made.contains("nbd"), "{made}");
    daemon.virsh(&["destroy", "vm"]);
    wait_until("the end is seen", || recovery(&sandbox)["vm"] == "shut-off");
    sandbox.ok(&["discard", "vm"]);
    assert!(!daemon.knows("vm"));
}

#[test]
fn a_cutover_that_is_interrupted_is_undone_before_it_is_decided_and_finished_after() {
    let Some(sandbox) = begin() else { return };
    let Some((daemon, disks)) = bare(&sandbox) else { return };
    let targets = [sandbox.name("t0.raw"), sandbox.name("t1.raw")];
    sandbox.ok(&["rehydrate", "vm", "--to", &format!("d0={}", targets[0]), &format!("d1={}", targets[1])]);
    for (point, before, after) in [
        ("before:\"cut-over\"", "paused", ["rehydrating", "ready-for-cutover"]),
        ("after:\"cut-over\"", "paused", ["cut-over", "cut-over"]),
    ] {
        let doomed = Doomed::start(&sandbox, point);
        wait_for_state(&sandbox, "ready-for-cutover");
        assert!(!sandbox.run(&["cutover", "vm"]).status.success());
        doomed.wait(point);
        assert_eq!(daemon.virsh(&["domstate", "vm"]).trim(), before, "{point}");
        let view = recovery(&sandbox);
        assert!(after.contains(&view["state"].as_str().unwrap()), "{point}: {view}");
        wait_for_domain(&daemon, "vm", "running");
    }
    assert!(!daemon.virsh(&["dumpxml", "vm"]).contains("nbd"));
    assert!(!sandbox.path("state/recoveries/vm/disks").exists(), "the overlays are still there");
    // Once more: what is over stays over.
    sandbox.kill_owner();
    let view = recovery(&sandbox);
    assert_eq!((&view["state"], &view["vm"]), (&"cut-over".into(), &"running".into()), "{view}");
    daemon.virsh(&["destroy", "vm"]);
    for (target, want) in targets.iter().zip(&disks) {
        assert!(fs::read(target).unwrap() == *want, "{target}");
    }
}

#[test]
fn a_repository_that_is_away_and_an_nbd_target_that_is_larger_only_take_longer() {
    let Some(sandbox) = begin() else { return };
    let Some((daemon, disks)) = bare(&sandbox) else { return };
    let (served, socket) = (sandbox.name("served.raw"), sandbox.name("served.sock"));
    fs::File::create(&served).unwrap().set_len(6 << 20).unwrap();
    let mut server = Command::new("nbdkit");
    server.args(["--foreground", "--exit-with-parent", "--unix", &socket, "file", &served]);
    let _server = Foreign::start(server.stderr(Stdio::null()));
    wait_until("nbdkit listens", || sandbox.path("served.sock").exists());
    // Killed, so that nothing of the repository is in a cache.
    sandbox.kill_owner();
    let (packs, away) = (sandbox.path("repo/packs"), sandbox.path("away"));
    recovery(&sandbox);
    fs::rename(&packs, &away).unwrap();
    let to = [format!("d0={}", sandbox.name("t0.qcow2")), format!("d1=nbd+unix:///?socket={socket}")];
    sandbox.ok(&["rehydrate", "vm", "--to", &to[0], &to[1], "--detach"]);
    wait_until("the move waits for the repository", || {
        let view = recovery(&sandbox);
        view["rehydration"]["phase"] == "retrying" && view["problem"].as_str().is_some_and(|why| why.contains("again"))
    });
    fs::rename(&away, &packs).unwrap();
    wait_for_state(&sandbox, "ready-for-cutover");
    sandbox.ok(&["cutover", "vm"]);
    for disk in ["vda", "vdb"] {
        let info = daemon.virsh(&["domblkinfo", "vm", disk]);
        assert!(info.lines().any(|line| line.starts_with("Capacity") && line.ends_with(" 4194304")), "{info}");
    }
    daemon.virsh(&["destroy", "vm"]);
    assert!(fs::read(&served).unwrap()[..4 * MIB] == disks[1]);
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &sandbox.name("source0.raw"), &sandbox.name("t0.qcow2")]);
}

/// Bounds below which half and 99 % of the guest's writes lie, in milliseconds, of those in the next seconds; as near as
/// QEMU's histogram with steps of a quarter tells.
fn latency(daemon: &Libvirtd) -> (f64, f64) {
    let ask = |command: Value| -> Value {
        let said = daemon.virsh(&["qemu-monitor-command", "vm", &command.to_string()]);
        serde_json::from_str(&said).unwrap()
    };
    let bounds: Vec<u64> = std::iter::successors(Some(20_000u64), |bound| Some(bound * 5 / 4)).take(60).collect();
    let device = "/machine/peripheral/virtio-disk0/virtio-backend";
    let arguments = json!({ "id": device, "boundaries": bounds });
    ask(json!({ "execute": "block-latency-histogram-set", "arguments": arguments }));
    std::thread::sleep(Duration::from_secs(10));
    let answer = ask(json!({ "execute": "query-blockstats" }));
    let devices = answer["return"].as_array().unwrap();
    let ours =
        devices.iter().find(|one| one["qdev"].as_str().is_some_and(|qdev| qdev.contains("virtio-disk0"))).unwrap();
    let bins = ours["stats"]["wr_latency_histogram"]["bins"].as_array().unwrap();
    let bins: Vec<u64> = bins.iter().map(|bin| bin.as_u64().unwrap()).collect();
    let all: u64 = bins.iter().sum();
    assert!(all > 0, "the guest has written nothing");
    let below = |share: u64| {
        let mut left = all * share / 100;
        let reached = bins.iter().position(|bin| {
            left = left.saturating_sub(*bin);
            left == 0
        });
        bounds[reached.unwrap_or(59).min(59)] as f64 / 1e6
    };
    (below(50), below(99))
}

#[test]
#[ignore = "nightly: prints what a guest feels while libvirt copies its disks"]
fn what_a_guest_that_writes_and_syncs_feels_while_libvirt_copies() {
    let Some(sandbox) = begin() else { return };
    let Some(daemon) = Libvirtd::start(&sandbox) else { return };
    fs::write(sandbox.path("data.raw"), noise(5, 512 * MIB)).unwrap();
    let root = format!("root={}", guest(Guest::Counter).display());
    sandbox.ok(&["backup", "vm", &root, &format!("data={}", sandbox.name("data.raw"))]);
    let (_, mut console) = daemon.recover(&sandbox, &[]);
    console.count_on(20);
    let calm = latency(&daemon);
    let to = [format!("root={}", sandbox.name("root.raw")), format!("data={}", sandbox.name("out.raw"))];
    let began = Instant::now();
    sandbox.ok(&["rehydrate", "vm", "--to", &to[0], &to[1], "--detach"]);
    let busy = latency(&daemon);
    wait_for_state(&sandbox, "ready-for-cutover");
    let ready = began.elapsed();
    let pause = sandbox.json(&["cutover", "vm"])["timings"]["cutover_pause_ms"].clone();
    eprintln!("writes, half and 99 % below: {calm:?} ms before, {busy:?} ms while it copies");
    eprintln!("704 MiB copied and compared after {ready:?}; the cutover held the guest for {pause} ms");
    console.count_on(5);
}
