//! `commit`: what a recovery's guest has written becomes a recovery point while it writes on: one instant of all disks,
//! only what changed is read, and nothing is lost when Lifeboat is killed in the middle.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use lifeboat_tests::{Random, Sandbox, noise, rounds, seed, wait_until};
use nbd_server::export::ZeroMode;
use nbd_server::{BlockingClient, ClientOptions};
use serde_json::Value;

const MIB: usize = 1 << 20;
const BLOCK: u64 = 4096;

fn connect(uri: &Value) -> BlockingClient {
    let options = ClientOptions { connect_timeout: Duration::from_secs(60), ..ClientOptions::default() };
    BlockingClient::connect(&uri.as_str().unwrap().parse().unwrap(), &options).unwrap()
}

/// A machine `vm` of two disks of noise, recovered without a VM; returns what the disks hold and a client of each.
fn published(sandbox: &Sandbox, bytes: [usize; 2]) -> ([Vec<u8>; 2], [BlockingClient; 2]) {
    let disks = [noise(21, bytes[0]), noise(22, bytes[1])];
    let names = ["a", "b"].map(|name| sandbox.name(&format!("{name}.raw")));
    for (name, disk) in names.iter().zip(&disks) {
        fs::write(name, disk).unwrap();
    }
    sandbox.ok(&["backup", "vm", &format!("a={}", names[0]), &format!("b={}", names[1])]);
    let view = sandbox.json(&["recover", "vm", "--on", "none"]);
    let clients = [0, 1].map(|at| connect(&view["disks"][at]["nbd_uri"]));
    (disks, clients)
}

fn restored(sandbox: &Sandbox, point: &str) -> [Vec<u8>; 2] {
    let names = ["a", "b"].map(|name| sandbox.name(&format!("back-{name}.raw")));
    let targets = [format!("a={}", names[0]), format!("b={}", names[1])];
    sandbox.ok(&["restore", point, "--to", &targets[0], &targets[1]]);
    names.map(|name| {
        let bytes = fs::read(&name).unwrap();
        fs::remove_file(&name).unwrap();
        bytes
    })
}

fn points(sandbox: &Sandbox) -> usize {
    sandbox.json(&["points"]).as_array().unwrap().len()
}

/// Every sequence number is written to its own block of one of the disks in turn, and acknowledged, before the next.
/// Old blocks are overwritten all the time, so that most of what is committed changes meanwhile.
#[test]
fn a_commit_is_one_instant_of_all_disks_however_much_is_written_meanwhile() {
    let sandbox = Sandbox::with_repository();
    let sizes = [6 * MIB, 5 * MIB + 12345];
    let blocks = 1024u64; // on each disk: the first 4 MiB
    let (original, clients) = published(&sandbox, sizes);
    let stop = AtomicBool::new(false);
    let reached = AtomicU64::new(0);
    let write = |number: u64| {
        let place = (number / 2) % blocks * BLOCK;
        let mut block = noise(number, usize::try_from(BLOCK).unwrap());
        block[..8].copy_from_slice(&number.to_le_bytes());
        clients[usize::try_from(number % 2).unwrap()].write(place, &block).unwrap();
        reached.store(number, Ordering::Release);
    };
    let committed = std::thread::scope(|scope| {
        let stopped = Stop(&stop);
        let writer = scope.spawn(|| {
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                write(number);
                number += 1;
            }
        });
        wait_until("everything was written once", || reached.load(Ordering::Acquire) > blocks * 2);
        let mut committed = Vec::new();
        for _ in 0..rounds(3, 30) {
            let before = reached.load(Ordering::Acquire);
            let result = sandbox.json(&["commit", "vm", "--label", "why=test"]);
            let after = reached.load(Ordering::Acquire);
            committed.push((before, after, result["point"].as_str().unwrap().to_owned()));
        }
        drop(stopped);
        writer.join().unwrap();
        committed
    });
    let mut written_meanwhile = 0;
    for (before, after, point) in committed {
        let disks = restored(&sandbox, &point);
        // The last number in the point; all before it must be there, or one that replaced it and is not after it.
        let number_at = |disk: usize, slot: u64| {
            let at = usize::try_from(slot * BLOCK).unwrap();
            u64::from_le_bytes(disks[disk][at..at + 8].try_into().unwrap())
        };
        let last = (0..blocks).flat_map(|slot| [number_at(0, slot), number_at(1, slot)]).max().unwrap();
        assert!((before..=after).contains(&last), "{last} is not between {before} and {after}");
        written_meanwhile += after - last;
        for slot in 0..blocks {
            for disk in 0..2u64 {
                let found = number_at(usize::try_from(disk).unwrap(), slot);
                // The newest number of this place that is not after the last.
                let first = slot * 2 + disk;
                let newest = first + (last - first) / (blocks * 2) * (blocks * 2);
                assert_eq!(found, newest, "disk {disk}, slot {slot} of a point that ends with {last}");
                let at = usize::try_from(slot * BLOCK).unwrap();
                let block = &disks[usize::try_from(disk).unwrap()][at + 8..at + usize::try_from(BLOCK).unwrap()];
                assert!(block == &noise(found, usize::try_from(BLOCK).unwrap())[8..], "disk {disk}, slot {slot}");
            }
        }
        let tail = usize::try_from(blocks * BLOCK).unwrap();
        for (disk, original) in disks.iter().zip(&original) {
            assert!(disk.len() == original.len() && disk[tail..] == original[tail..]);
        }
        assert_eq!(sandbox.json(&["show", &point])["labels"]["why"], "test");
        assert_eq!(sandbox.json(&["show", &point])["consistency"], "crash");
    }
    assert!(written_meanwhile > 0, "nothing was written while points were made: the test has tested nothing");
    assert_eq!(sandbox.json(&["recovery", "vm"])["state"], "running");
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn random_changes_come_back_bit_for_bit_and_only_what_changed_is_read_and_stored() {
    let seed = seed();
    let mut random = Random::new(seed);
    let sandbox = Sandbox::with_repository();
    let ([mut a, mut b], mut clients) = published(&sandbox, [40 * MIB + 777, 3 * MIB]);
    // Nothing has changed: nothing is read.
    let first = sandbox.json(&["commit", "vm"]);
    assert_eq!((&first["read"], &first["new"]), (&0.into(), &0.into()), "seed {seed}: {first}");
    assert!(restored(&sandbox, "vm") == [a.clone(), b.clone()], "seed {seed}");
    let mut previous = first["point"].as_str().unwrap().to_owned();
    for round in 0..4u64 {
        for _ in 0..12 {
            let (disk, client) = if random.once_in(3) { (&mut b, &clients[1]) } else { (&mut a, &clients[0]) };
            let length = 1 + random.below(90_000);
            let offset = random.below(disk.len() as u64 - length);
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
            match random.below(5) {
                0 => {
                    client.trim(offset, length).unwrap();
                    disk[range].fill(0);
                }
                1 => {
                    client.write_zeroes(offset, length, ZeroMode::KeepAllocated).unwrap();
                    disk[range].fill(0);
                }
                _ => {
                    disk[range.clone()].copy_from_slice(&noise(random.below(u64::MAX), range.len()));
                    client.write(offset, &disk[range]).unwrap();
                }
            }
        }
        let result = sandbox.json(&["commit", "vm"]);
        let read = result["read"].as_u64().unwrap();
        assert!(read <= (round + 1) * 12 * 3 * 65536, "seed {seed}, round {round}: {result}");
        assert!(restored(&sandbox, "vm") == [a.clone(), b.clone()], "seed {seed}, round {round}");
        let point = sandbox.json(&["show", result["point"].as_str().unwrap()]);
        assert_eq!(point["parent"], previous.as_str(), "seed {seed}, round {round}: {point}");
        previous = result["point"].as_str().unwrap().to_owned();
        if round == 1 {
            sandbox.kill_owner();
            let view = sandbox.json(&["recovery", "vm"]);
            clients = [0, 1].map(|at| connect(&view["disks"][at]["nbd_uri"]));
        }
    }
    // Once more without a change: it is read and stored nowhere twice. The points stand alone when the first is gone.
    let again = sandbox.json(&["commit", "vm"]);
    assert_eq!(again["new"], 0, "seed {seed}: {again}");
    sandbox.ok(&["discard", "vm"]);
    let listed = sandbox.json(&["points"]);
    for point in listed.as_array().unwrap() {
        let id = point["id"].as_str().unwrap();
        if id != again["point"].as_str().unwrap() {
            sandbox.ok(&["forget", id]);
        }
    }
    sandbox.ok(&["collect", "--reclaim-now", "--quarantine", "0"]);
    assert_eq!(points(&sandbox), 1);
    assert!(restored(&sandbox, "vm") == [a, b], "seed {seed}");
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
}

#[test]
fn a_commit_that_is_killed_leaves_no_point_no_file_and_the_recovery_as_it_was() {
    let sandbox = Sandbox::with_repository();
    let ([mut a, b], clients) = published(&sandbox, [48 * MIB, MIB]);
    a[..40 * MIB].copy_from_slice(&noise(5, 40 * MIB));
    for at in (0..40 * MIB).step_by(MIB) {
        clients[0].write(at as u64, &a[at..at + MIB]).unwrap();
    }
    clients[0].flush().unwrap();
    let before = files(&sandbox);
    let mut cut = 0;
    for round in 0..rounds(4, 20) {
        let had = points(&sandbox);
        let commit = sandbox.start(&["commit", "vm"]);
        let recovery = sandbox.path("state/recoveries/vm");
        std::thread::sleep(Duration::from_millis(40 * round));
        // What it replaces is put aside.
        let client = connect(&sandbox.json(&["recovery", "vm"])["disks"][0]["nbd_uri"]);
        let new = noise(100 + round, 3 * 4096);
        client.write(4096 * (1 + round), &new).unwrap();
        client.flush().unwrap();
        a[4096 * (1 + usize::try_from(round).unwrap())..][..new.len()].copy_from_slice(&new);
        sandbox.kill_owner();
        drop(commit);
        let view = sandbox.json(&["recovery", "vm"]);
        assert_eq!((&view["state"], &view["problem"]), (&"running".into(), &Value::Null), "{view}");
        cut += u64::from(points(&sandbox) == had);
        assert!(recovery.exists());
        let client = connect(&view["disks"][0]["nbd_uri"]);
        let mut now = vec![0; a.len()];
        for (at, part) in now.chunks_mut(4 * MIB).enumerate() {
            client.read((at * 4 * MIB) as u64, part).unwrap();
        }
        assert!(now == a, "round {round}");
        assert_eq!(files(&sandbox), before, "round {round}");
    }
    assert!(cut > 0, "no commit was killed before its point was there: the test has tested nothing");
    sandbox.ok(&["commit", "vm"]);
    assert!(restored(&sandbox, "vm") == [a, b]);
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_commit_is_refused_where_there_is_no_overlay_and_made_while_it_is_rehydrated() {
    let sandbox = Sandbox::with_repository();
    assert!(sandbox.fails(4, &["commit", "vm"]).contains("there is no recovery"));
    let ([mut a, b], clients) = published(&sandbox, [4 * MIB, MIB]);
    sandbox.fails(2, &["commit", "vm", "--label", "no value"]);
    let said = sandbox.ok(&["commit", "vm"]);
    assert!(said.starts_with("recovery point ") && said.contains(" of vm: read 0 B"), "{said}");
    clients[0].write(5, &[7; 9000]).unwrap();
    a[5..9005].fill(7);
    let targets = ["a", "b"].map(|name| format!("{name}={}", sandbox.name(&format!("out-{name}.raw"))));
    sandbox.ok(&["rehydrate", "vm", "--to", &targets[0], &targets[1]]);
    assert_eq!(sandbox.json(&["recovery", "vm"])["state"], "ready-for-cutover");
    assert!(sandbox.json(&["recovery", "vm"])["next"].as_array().unwrap().contains(&"commit".into()));
    sandbox.ok(&["commit", "vm"]);
    assert!(restored(&sandbox, "vm") == [a, b]);
    sandbox.ok(&["cutover", "vm"]);
    assert!(sandbox.fails(5, &["commit", "vm"]).contains("cut-over"));
    sandbox.ok(&["discard", "vm"]);
}

/// The files of the recovery `vm`.
fn files(sandbox: &Sandbox) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![sandbox.path("state/recoveries/vm/disks")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                folders.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// Lets the writer end when dropped, also by a failing test.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
