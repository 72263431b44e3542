//! The way back to production storage: copied while the guest writes, cut over without a reboot, through crashes of
//! Lifeboat and failing targets, with nothing lost that was acknowledged.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use lifeboat_tests::{Console, Firmware, Guest, Machine, Sandbox, SmallRoom, guest, have, kill, noise, wait_until};
use nbd_server::{BlockingClient, ClientOptions};
use serde_json::Value;

fn state(sandbox: &Sandbox, name: &str) -> String {
    sandbox.json(&["recovery", name])["state"].as_str().unwrap().to_owned()
}

#[test]
fn a_guest_moves_to_production_storage_through_kill_minus_nine_and_keeps_all_it_synced() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    sandbox.ok(&["backup", "vm", &guest(Guest::Counter).display().to_string()]);
    let view = sandbox.json(&["recover", "vm", "--memory", "512M"]);
    let mut console = Console::new(view["console"].as_str().unwrap());
    console.wait_for("seq 5");
    let target = sandbox.name("production.raw");
    assert!(sandbox.fails(5, &["cutover", "vm"]).contains("running"));
    sandbox.ok(&["rehydrate", "vm", "--to", &target, "--mode", "stream", "--limit", "24M", "--detach"]);
    assert!(sandbox.fails(5, &["cutover", "vm"]).contains("not everything"));
    assert!(sandbox.fails(5, &["rehydrate", "vm", "--to", &sandbox.name("other.raw")]).contains("rehydrating"));
    for _ in 0..2 {
        let reached = console.last_number("seq ").unwrap();
        sandbox.kill_owner();
        let view = sandbox.json(&["recovery", "vm"]);
        assert!(view["state"] == "rehydrating" || view["state"] == "ready-for-cutover", "{view}");
        console.wait_for(&format!("seq {}", reached + 5));
    }
    wait_until("all is copied", || state(&sandbox, "vm") == "ready-for-cutover");
    let before = console.last_number("seq ").unwrap();
    let view = sandbox.json(&["cutover", "vm"]);
    assert_eq!(view["state"], "cut-over");
    assert_eq!(view["disks"][0]["target"], target.as_str());
    assert!(view["timings"]["cutover_pause_ms"].is_u64());
    console.wait_for(&format!("seq {}", before + 5));
    assert!(!sandbox.path("state/recoveries/vm/disks").exists(), "the overlay is still there");
    assert!(sandbox.fails(5, &["cutover", "vm"]).contains("cut-over"));
    assert!(sandbox.fails(5, &["discard", "vm"]).contains("in production"));
    // Killed once more: the guest reaches production storage through Lifeboat until it is started anew.
    sandbox.kill_owner();
    assert_eq!(sandbox.json(&["recovery", "vm"])["state"], "cut-over");
    let reached = console.last_number("seq ").unwrap();
    console.wait_for(&format!("seq {}", reached + 5));
    // The power goes. Production storage alone holds everything, with the repository away.
    let pid = u32::try_from(view["pid"].as_u64().unwrap()).unwrap();
    sandbox.kill_owner();
    kill(pid);
    let promised = console.last_number("seq ").unwrap();
    let repository = sandbox.path("repo");
    let away = sandbox.path("away");
    fs::rename(&repository, &away).unwrap();
    let mut alone = Machine::boot(&sandbox, "alone", &target, Firmware::Bios);
    alone.console.wait_for("up boot=2");
    let kept = alone.console.next_number("log ok last=");
    assert!(kept >= promised, "the guest had synced record {promised}, production storage holds {kept}");
    alone.console.wait_for("slots ok");
    alone.kill();
    fs::rename(&away, &repository).unwrap();
    // And by Lifeboat, which no longer serves anything for it.
    assert_eq!(sandbox.json(&["start", "vm"])["disks"][0]["nbd_uri"], Value::Null);
    console.wait_for("up boot=3");
    let view = sandbox.json(&["recovery", "vm"]);
    kill(u32::try_from(view["pid"].as_u64().unwrap()).unwrap());
    wait_until("the VM is off", || sandbox.json(&["recovery", "vm"])["vm"] == "shut-off");
    assert!(sandbox.ok(&["discard", "vm"]).contains("production.raw"));
    assert!(sandbox.path("production.raw").exists());
}

/// A disk of noise and holes, recovered without a VM.
fn published(sandbox: &Sandbox, bytes: usize) -> (String, Vec<u8>) {
    let mut disk = noise(11, bytes);
    disk[bytes / 3..bytes / 2].fill(0);
    fs::write(sandbox.path("disk.raw"), &disk).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    let view = sandbox.json(&["recover", "vm", "--on", "none"]);
    (view["disks"][0]["nbd_uri"].as_str().unwrap().to_owned(), disk)
}

#[test]
fn writes_of_any_client_before_during_and_after_the_move_are_all_on_production_storage() {
    let sandbox = Sandbox::with_repository();
    let (uri, mut disk) = published(&sandbox, 24 << 20);
    let client = BlockingClient::connect(&uri.parse().unwrap(), &ClientOptions::default()).unwrap();
    let stop = AtomicBool::new(false);
    let written = std::thread::scope(|scope| {
        let stopped = Stop(&stop);
        let writer = scope.spawn(|| {
            let (mut written, mut round) = (Vec::new(), 0u64);
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                // Short and long, aligned and not, trims and zeroes among them; the last to touch a byte wins.
                let roll = noise(round, 16);
                let number = |at: usize| u64::from(u16::from_le_bytes([roll[at], roll[at + 1]]));
                let length = 1 + number(0) * if roll[4].is_multiple_of(8) { 5 } else { 1 } / 3;
                let offset = (number(6) * 397) % ((24 << 20) - length);
                match roll[10] % 8 {
                    0 => client.write_zeroes(offset, length, nbd_server::export::ZeroMode::MayPunch).unwrap(),
                    1 => client.trim(offset, length).unwrap(),
                    _ => client.write(offset, &noise(round, usize::try_from(length).unwrap())).unwrap(),
                }
                if roll[11].is_multiple_of(16) {
                    client.flush().unwrap();
                }
                written.push((round, offset, length, roll[10] % 8));
            }
            written
        });
        sandbox.ok(&["rehydrate", "vm", "--to", &sandbox.name("out.raw"), "--limit", "40M"]);
        assert_eq!(state(&sandbox, "vm"), "ready-for-cutover");
        sandbox.ok(&["cutover", "vm"]);
        std::thread::sleep(std::time::Duration::from_millis(300));
        drop(stopped);
        writer.join().unwrap()
    });
    client.flush().unwrap();
    for (round, offset, length, kind) in &written {
        let range = usize::try_from(*offset).unwrap()..usize::try_from(offset + length).unwrap();
        match kind {
            // A trim may leave the edges of blocks it does not fill; Lifeboat makes all of it read as zeroes.
            0 | 1 => disk[range].fill(0),
            _ => disk[range.clone()].copy_from_slice(&noise(*round, range.len())),
        }
    }
    let out = fs::read(sandbox.path("out.raw")).unwrap();
    let differs = out.iter().zip(&disk).position(|(a, b)| a != b);
    assert_eq!((out.len(), differs), (disk.len(), None), "after {} writes", written.len());
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_target_that_is_full_holds_the_move_and_lets_it_go_on() {
    let sandbox = Sandbox::with_repository();
    let (uri, disk) = published(&sandbox, 8 << 20);
    let Some(small) = SmallRoom::new(sandbox.path("small"), "3m") else { return };
    let target = small.name("out.raw");
    let said = sandbox.fails(1, &["rehydrate", "vm", "--to", &target]);
    assert!(said.contains("is held") && said.contains("No space left"), "{said}");
    let view = sandbox.json(&["recovery", "vm"]);
    assert_eq!(view["state"], "rehydrating");
    assert!(view["problem"].as_str().unwrap().contains("No space left"));
    // The client has noticed nothing.
    let client = BlockingClient::connect(&uri.parse().unwrap(), &ClientOptions::default()).unwrap();
    client.write(4096, &[7; 4096]).unwrap();
    client.flush().unwrap();
    sandbox.kill_owner();
    sandbox.wait_for_problem("vm", "No space left");
    small.resize("32m");
    sandbox.ok(&["rehydrate", "vm", "--resume"]);
    sandbox.ok(&["cutover", "vm"]);
    let mut want = disk;
    want[4096..8192].fill(7);
    assert!(fs::read(&target).unwrap() == want);
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_cancelled_move_leaves_the_recovery_on_its_overlay_and_no_file() {
    let sandbox = Sandbox::with_repository();
    let (uri, disk) = published(&sandbox, 4 << 20);
    fs::write(sandbox.path("there.raw"), b"precious").unwrap();
    assert!(sandbox.fails(5, &["rehydrate", "vm", "--to", &sandbox.name("there.raw")]).contains("exists"));
    assert_eq!(fs::read(sandbox.path("there.raw")).unwrap(), b"precious");
    sandbox.ok(&["rehydrate", "vm", "--to", &sandbox.name("out.raw"), "--limit", "1M", "--detach"]);
    sandbox.ok(&["rehydrate", "vm", "--pause"]);
    let view = sandbox.json(&["recovery", "vm"]);
    assert_eq!((&view["state"], &view["rehydration"]["phase"]), (&"rehydrating".into(), &"held".into()));
    sandbox.ok(&["rehydrate", "vm", "--cancel"]);
    assert_eq!(state(&sandbox, "vm"), "running");
    assert!(!sandbox.path("out.raw").exists());
    let client = BlockingClient::connect(&uri.parse().unwrap(), &ClientOptions::default()).unwrap();
    let mut now = vec![0; disk.len()];
    client.read(0, &mut now).unwrap();
    assert!(now == disk);
    // And once more, over a file that may be overwritten and is longer than the disk.
    let longer = fs::File::create(sandbox.path("there.raw")).unwrap();
    longer.write_all_at(&[1; 4096], 9 << 20).unwrap();
    sandbox.ok(&["rehydrate", "vm", "--to", &sandbox.name("there.raw"), "--overwrite"]);
    sandbox.ok(&["cutover", "vm"]);
    assert!(fs::read(sandbox.path("there.raw")).unwrap() == disk);
    sandbox.ok(&["discard", "vm"]);
}

/// Lets the writer end when dropped, also by a failing test.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
