//! A recovery that was discarded has left nothing: no process, no socket, no file, no lease.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use lifeboat_tests::{Console, Guest, Sandbox, guest, have, noise, wait_until};

/// All files, folders and sockets below a folder.
fn below(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
            found.insert(entry.path());
        }
    }
    found
}

/// The sockets of all processes of this host that have a path.
fn sockets() -> BTreeSet<String> {
    let text = fs::read_to_string("/proc/net/unix").unwrap();
    text.lines().filter_map(|line| line.split_whitespace().nth(7)).map(str::to_owned).collect()
}

#[test]
fn a_discarded_recovery_leaves_nothing_behind() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let mut sandbox = Sandbox::new();
    sandbox.use_key_file("key");
    sandbox.ok(&["init"]);
    sandbox.ok(&["backup", "vm", &guest(Guest::Counter).display().to_string(), "--memory", "512M"]);
    // A socket whose path is too long for the kernel stands elsewhere, and has to go as well.
    let long = format!("{}-{}", "a".repeat(50), "b".repeat(50));
    for name in ["vm", &long] {
        let (repository, state) = (below(&sandbox.path("repo")), below(&sandbox.path("state/recoveries")));
        let view = sandbox.json(&["recover", "vm", "--name", name, "--display", "vnc", "--network", "user"]);
        let own: Vec<&str> = [&view["qmp"], &view["guest_agent"], &view["display"], &view["disks"][0]["nbd_uri"]]
            .map(|value| value.as_str().unwrap())
            .map(|text| text.strip_prefix("vnc+unix://").unwrap_or(text))
            .map(|text| text.split_once("socket=").map_or(text, |(_, path)| path))
            .to_vec();
        let control = format!("{}.ctl", own[0]);
        let listening = sockets();
        for socket in own.iter().chain([&control.as_str()]) {
            assert!(listening.contains(*socket), "{socket} does not listen");
        }
        let mut console = Console::new(view["console"].as_str().unwrap());
        console.wait_for("seq 3");
        assert_ne!(below(&sandbox.path("repo")), repository, "a recovery holds a lease");
        // Taken up once, so that what a restart makes is there too.
        sandbox.kill_owner();
        assert_eq!(sandbox.json(&["recovery", name])["pid"], view["pid"]);
        sandbox.json(&["commit", name]);
        let committed = sandbox.json(&["points"])[1]["id"].as_str().unwrap().to_owned();
        sandbox.ok(&["discard", name]);
        sandbox.ok(&["forget", &committed, "--newest"]);
        sandbox.ok(&["collect", "--reclaim-now", "--quarantine", "0"]);

        let pid = view["pid"].as_u64().unwrap();
        wait_until("its QEMU is gone", || !Path::new(&format!("/proc/{pid}/exe")).exists());
        let listening = sockets();
        for socket in own.iter().chain([&control.as_str()]) {
            assert!(!listening.contains(*socket) && !Path::new(socket).exists(), "{socket} is left");
        }
        assert_eq!(below(&sandbox.path("state/recoveries")), state);
        let left: Vec<PathBuf> = below(&sandbox.path("repo")).difference(&repository).cloned().collect();
        let holding: Vec<&PathBuf> = left.iter().filter(|path| path.to_string_lossy().contains("lease")).collect();
        assert!(holding.is_empty(), "{holding:?}");
    }
    let owner = sandbox.owner();
    wait_until("nothing runs any more but who serves", || sandbox.processes().iter().all(|pid| Some(*pid) == owner));
}

#[test]
fn a_recovery_whose_journal_says_nothing_keeps_its_overlays_until_it_is_discarded() {
    let sandbox = Sandbox::with_plain_repository("64K");
    fs::write(sandbox.path("disk.raw"), noise(1, 1 << 20)).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    let before = below(&sandbox.path("repo"));
    sandbox.ok(&["recover", "vm", "--on", "none"]);
    sandbox.kill_owner();
    fs::write(sandbox.path("state/recoveries/vm/journal"), vec![0; 400]).unwrap();
    for _ in 0..2 {
        let listed = sandbox.json(&["recovery", "vm"]);
        assert!(listed["problem"].as_str().unwrap().contains("overlays are there"), "{listed}");
        assert!(below(&sandbox.path("state/recoveries/vm/disks")).iter().any(|path| path.is_file()));
        sandbox.kill_owner();
    }
    sandbox.ok(&["discard", "vm"]);
    assert!(!sandbox.path("state/recoveries/vm").exists());
    let leases =
        |files: &BTreeSet<PathBuf>| files.iter().filter(|path| path.starts_with(sandbox.path("repo/leases"))).count();
    assert_eq!(leases(&below(&sandbox.path("repo"))), leases(&before), "it holds its point for ever");
}
