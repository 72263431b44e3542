//! Verification with the real program: portions, offsets, packs that cannot be read.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lifeboat_tests::{Sandbox, noise, tool};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn packs(sandbox: &Sandbox) -> Vec<PathBuf> {
    let dirs = fs::read_dir(sandbox.path("repo/packs")).unwrap().flatten();
    let mut packs: Vec<PathBuf> =
        dirs.flat_map(|dir| fs::read_dir(dir.path()).unwrap().flatten()).map(|entry| entry.path()).collect();
    packs.sort_by_key(|path| fs::metadata(path).unwrap().len());
    packs
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn report(sandbox: &Sandbox, args: &[&str]) -> (Option<i32>, Value) {
    let output = sandbox.run(&[args, &["--json"]].concat());
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
}

fn back_up(sandbox: &Sandbox, machine: &str, seed: u64, mib: usize) {
    let path = sandbox.path(machine);
    fs::write(&path, noise(seed, mib << 20)).unwrap();
    sandbox.ok(&["backup", machine, &sandbox.name(machine), "--format", "raw"]);
}

#[test]
fn portions_begin_with_what_waits_longest_and_get_round() {
    let sandbox = Sandbox::with_repository();
    for seed in 0..4 {
        back_up(&sandbox, &format!("vm{seed}"), seed, 2);
    }
    let all = packs(&sandbox).len() as u64;
    let mut read = 0;
    for round in 0..all {
        let (status, report) = report(&sandbox, &["verify", "--read-data", "1"]);
        assert_eq!((status, &report["packs_read"]), (Some(0), &1.into()), "round {round}: {report}");
        assert_eq!(report["packs_needed"], all);
        assert_eq!(report["oldest_verified"].is_null(), round + 1 < all, "round {round}: {report}");
        read += report["bytes_read"].as_u64().unwrap();
        assert_eq!(read == report["bytes_needed"].as_u64().unwrap(), round + 1 == all);
    }
    let (_, half) = report(&sandbox, &["verify", "--read-data", "50%"]);
    let (half, bytes) = (half["bytes_read"].as_u64().unwrap(), half["bytes_needed"].as_u64().unwrap());
    assert!(half * 2 >= bytes && half < bytes, "{half} of {bytes}");
    for bad in ["0%", "101%", "vm1"] {
        sandbox.fails(2, &["verify", "--read-data", bad]);
    }
    sandbox.ok(&["verify", "vm1", "--read-data", "--hash-only"]);
    sandbox.fails(2, &["verify", "--hash-only"]);
    // Without the lists everything counts as never verified, and nothing else changes.
    fs::remove_dir_all(sandbox.path("repo/verified")).unwrap();
    sandbox.ok(&["verify", "--read-data", "5%"]);
}

#[test]
fn damage_is_named_with_every_machine_disk_and_offset_that_it_hits() {
    let sandbox = Sandbox::with_repository();
    let shared = noise(1, 1 << 20);
    let file = File::create(sandbox.path("a.raw")).unwrap();
    file.set_len(64 * MIB).unwrap();
    file.write_all_at(&shared, 8 * MIB).unwrap();
    sandbox.ok(&["backup", "a", &format!("root={}", sandbox.name("a.raw"))]);
    // Another machine has the same data, twice, and so has the next point of the first.
    file.write_all_at(b"something else", 60 * MIB).unwrap();
    sandbox.ok(&["backup", "a", &format!("root={}", sandbox.name("a.raw"))]);
    let file = File::create(sandbox.path("b.raw")).unwrap();
    file.set_len(64 * MIB).unwrap();
    file.write_all_at(&shared, 0).unwrap();
    file.write_all_at(&shared, 32 * MIB).unwrap();
    sandbox.ok(&["backup", "b", &format!("data={}", sandbox.name("b.raw"))]);

    let pack = packs(&sandbox).pop().unwrap();
    fs::remove_file(&pack).unwrap();
    for args in [&["verify"][..], &["verify", "--read-data"]] {
        let (status, report) = report(&sandbox, args);
        assert_eq!(status, Some(3), "{report}");
        let damaged = report["damaged"].as_array().unwrap();
        assert_eq!(damaged.len(), 1, "{report}");
        let mut hits: Vec<(String, String, Vec<[u64; 2]>)> = damaged[0]["hits"]
            .as_array()
            .unwrap()
            .iter()
            .map(|hit| {
                let text = |field: &str| hit[field].as_str().unwrap().to_owned();
                (text("machine"), text("disk"), serde_json::from_value(hit["ranges"].clone()).unwrap())
            })
            .collect();
        hits.sort();
        let a = ("a".to_owned(), "root".to_owned(), vec![[8 * MIB, 9 * MIB]]);
        let b = ("b".to_owned(), "data".to_owned(), vec![[0, MIB], [32 * MIB, 33 * MIB]]);
        assert_eq!(hits, [a.clone(), a, b], "{args:?}");
    }
    let said = String::from_utf8(sandbox.run(&["verify"]).stdout).unwrap();
    assert!(
        said.contains("b disk data of point") && said.contains("2.00 MiB at 0+1048576, 33554432+1048576"),
        "{said}"
    );
    let (_, only) = report(&sandbox, &["verify", "b"]);
    assert_eq!(only["damaged"][0]["hits"].as_array().unwrap().len(), 1);
}

#[test]
fn a_pack_that_was_found_damaged_is_mentioned_without_reading_it_again() {
    let sandbox = Sandbox::with_repository();
    back_up(&sandbox, "vm", 1, 1);
    flip(packs(&sandbox).last().unwrap());
    sandbox.ok(&["verify"]); // nobody has looked into it yet
    let complaint = sandbox.fails(3, &["verify", "--read-data", "--hash-only"]);
    assert!(complaint.contains("damage in 1 object"), "{complaint}");
    let (status, report) = report(&sandbox, &["verify"]);
    assert_eq!((status, &report["ok"]), (Some(3), &false.into()));
    assert!(report["damaged"][0]["problem"].as_str().unwrap().contains("found damaged before"), "{report}");
    // A backup stores anew what the pack held; then nobody needs it.
    sandbox.ok(&["backup", "vm", &sandbox.name("vm"), "--format", "raw"]);
    sandbox.ok(&["verify"]);
    sandbox.ok(&["verify", "--read-data"]);
}

#[test]
fn a_pack_that_cannot_be_read_is_a_finding_and_the_rest_is_verified() {
    let sandbox = Sandbox::with_repository();
    for seed in 0..3 {
        back_up(&sandbox, &format!("vm{seed}"), seed, 1);
    }
    let pack = packs(&sandbox).pop().unwrap();
    let len = fs::metadata(&pack).unwrap().len();
    fs::remove_file(&pack).unwrap();
    // Reading a folder fails, with whatever rights.
    fs::create_dir(&pack).unwrap();
    let (status, report) = report(&sandbox, &["verify", "--read-data"]);
    assert_eq!(status, Some(3), "{report}");
    assert_eq!(report["damaged"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(report["packs_read"].as_u64().unwrap() + 1, packs(&sandbox).len() as u64, "{report}");
    assert!(len > 0);
}

#[test]
fn damage_is_repaired_from_a_copy_and_from_an_image_and_what_remains_is_said() {
    let sandbox = Sandbox::with_repository();
    back_up(&sandbox, "vm", 1, 3);
    tool("cp", &["-a", &sandbox.name("repo"), &sandbox.name("copy")]);

    flip(packs(&sandbox).last().unwrap());
    sandbox.fails(3, &["verify", "--read-data"]);
    let repaired = sandbox.json(&["verify", "--repair", "--copy", &sandbox.name("copy")]);
    assert_eq!((&repaired["repair"]["packs"], &repaired["ok"]), (&1.into(), &true.into()), "{repaired}");
    sandbox.ok(&["verify", "--read-data"]);

    // Nothing is left but the point and the image it was made from.
    packs(&sandbox).iter().for_each(|pack| fs::remove_file(pack).unwrap());
    fs::write(sandbox.path("other.raw"), noise(2, 100_000)).unwrap();
    fs::copy(sandbox.path("vm"), sandbox.path("vm.raw")).unwrap();
    let unknown = sandbox.fails(2, &["verify", "--repair", "--source", &format!("sdz={}", sandbox.name("vm.raw"))]);
    assert!(unknown.contains("called sdz") && unknown.contains("the disks there are: disk0;"), "{unknown}");
    let complaint = sandbox.fails(3, &["verify", "--repair", "--source", &sandbox.name("other.raw")]);
    assert!(complaint.contains("--copy"), "{complaint}");
    let said = sandbox.ok(&["verify", "--repair", "--source", &sandbox.name("vm.raw")]);
    assert!(said.contains("stored anew") && said.contains("all is whole"), "{said}");
    sandbox.ok(&["verify", "--read-data"]);
    sandbox.ok(&["restore", "vm", "--to", &sandbox.name("out.raw")]);
    assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(sandbox.path("vm")).unwrap());

    // An image with a name is used for the disks that are called so, and for no other.
    fs::write(sandbox.path("b.raw"), noise(3, 1 << 20)).unwrap();
    let named = |disk: &str, file: &str| format!("{disk}={}", sandbox.name(file));
    sandbox.ok(&["backup", "b", &named("data", "b.raw")]);
    packs(&sandbox).iter().for_each(|pack| fs::remove_file(pack).unwrap());
    let both = ["--source", &named("data", "vm.raw"), "--source", &named("disk0", "b.raw")];
    let (_, crossed) = report(&sandbox, &[&["verify", "--repair"][..], &both].concat());
    assert_eq!((&crossed["ok"], &crossed["repair"]["chunks"]), (&false.into(), &0.into()), "{crossed}");
    let (_, half) = report(&sandbox, &["verify", "--repair", "--source", &named("data", "b.raw")]);
    assert_eq!(half["ok"], false, "{half}");
    sandbox.ok(&["verify", "b"]);
    sandbox.ok(&["verify", "--repair", "--source", &named("disk0", "vm.raw")]);

    sandbox.fails(4, &["verify", "--repair", "--copy", &sandbox.name("nowhere")]);
    sandbox.fails(2, &["verify", "--copy", &sandbox.name("copy")]);
    let other = Sandbox::with_repository();
    sandbox.fails(5, &["verify", "--repair", "--copy", &other.name("repo")]);
}
