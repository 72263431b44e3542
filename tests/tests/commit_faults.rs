//! Commits beside what ends a recovery, and into a repository that is full: the guest is not touched, nothing is half
//! written, and the next commit is made.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use lifeboat_tests::{Sandbox, SmallRoom, have, noise, rounds, wait_until};
use nbd_server::{BlockingClient, ClientOptions};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn points(sandbox: &Sandbox) -> usize {
    sandbox.json(&["points"]).as_array().unwrap().len()
}

/// A machine `vm` with one disk of noise, recovered; what its disk holds, and how it is reached.
fn recovered(sandbox: &Sandbox, size: usize, more: &[&str]) -> (Vec<u8>, BlockingClient) {
    let disk = noise(31, size);
    fs::write(sandbox.path("disk.raw"), &disk).unwrap();
    sandbox.ok(&["backup", "vm", &sandbox.name("disk.raw")]);
    let view = sandbox.json(&[&["recover", "vm"], more].concat());
    (disk, connect(&view))
}

fn connect(view: &Value) -> BlockingClient {
    let uri = view["disks"][0]["nbd_uri"].as_str().unwrap();
    BlockingClient::connect(&uri.parse().unwrap(), &ClientOptions::default()).unwrap()
}

/// Overwrites the disk from its beginning with new noise.
fn overwrite(disk: &mut [u8], client: &BlockingClient, seed: u64, length: usize) {
    disk[..length].copy_from_slice(&noise(seed, length));
    for at in (0..length).step_by(MIB) {
        client.write(at as u64, &disk[at..at + MIB]).unwrap();
    }
    client.flush().unwrap();
}

fn begin(sandbox: &Sandbox, args: &[&str]) -> Child {
    sandbox.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn restored(sandbox: &Sandbox, point: &str) -> Vec<u8> {
    let out = sandbox.name("out.raw");
    sandbox.ok(&["restore", point, "--to", &out]);
    let bytes = fs::read(&out).unwrap();
    fs::remove_file(&out).unwrap();
    bytes
}

#[test]
fn a_repository_that_is_full_fails_the_commit_and_takes_the_next_when_it_has_room() {
    let sandbox = Sandbox::new();
    let Some(room) = SmallRoom::new(sandbox.path("repo"), "40m") else { return };
    sandbox.ok(&["init"]);
    let (mut disk, client) = recovered(&sandbox, 32 * MIB, &["--on", "none", "--force"]);
    assert_eq!(points(&sandbox), 1);
    for _ in 0..2 {
        overwrite(&mut disk, &client, 5, 24 * MIB);
        let refused = sandbox.fails(1, &["commit", "vm"]);
        assert!(refused.contains("o space left"), "{refused}");
        let view = sandbox.json(&["recovery", "vm"]);
        assert_eq!((&view["state"], points(&sandbox)), (&"running".into(), 1), "{view}");
    }
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
    overwrite(&mut disk, &client, 6, MIB);
    room.resize("200m");
    let point = sandbox.json(&["commit", "vm"])["point"].as_str().unwrap().to_owned();
    assert!(restored(&sandbox, &point) == disk);
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn a_discard_ends_the_commit_beside_it_and_leaves_nothing_of_either() {
    let sandbox = Sandbox::with_repository();
    let (mut ended, mut made) = (0, 0);
    for round in 0..rounds(6, 40) {
        let (mut disk, client) = recovered(&sandbox, 32 * MIB, &["--on", "none"]);
        overwrite(&mut disk, &client, 50 + round, 32 * MIB);
        let had = points(&sandbox);
        let commit = begin(&sandbox, &["commit", "vm"]);
        std::thread::sleep(Duration::from_millis(60 * (round % 8)));
        sandbox.ok(&["discard", "vm"]);
        let output = commit.wait_with_output().unwrap();
        let said = said(&output);
        match output.status.code() {
            Some(0) => made += 1,
            // It was never there, or it had gone.
            Some(1 | 4 | 5) => ended += 1,
            other => panic!("{other:?}: {said}"),
        }
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(points(&sandbox), had + usize::from(output.status.success()), "{said}");
        assert!(!sandbox.path("state/recoveries/vm").exists());
        if output.status.success() {
            assert!(restored(&sandbox, "vm") == disk, "round {round}");
        }
    }
    assert!(ended > 0, "no commit was ended, {made} were made: the test has tested nothing");
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
}

/// The commit has begun when the cutover comes, and is of the instant when it began.
fn cut_over_beside_a_commit(sandbox: &Sandbox, more: &[&str], client: BlockingClient, disk: &[u8]) {
    let target = sandbox.name("production.raw");
    drop(client);
    wait_until("the disks can be moved", || {
        sandbox.run(&[&["rehydrate", "vm", "--to", &target], more].concat()).status.success()
    });
    let commit = begin(sandbox, &["commit", "vm"]);
    std::thread::sleep(Duration::from_millis(150));
    // Whoever comes second is either served or refused, and neither harms the other.
    let cut = sandbox.run(&["cutover", "vm"]);
    let output = commit.wait_with_output().unwrap();
    assert!(cut.status.success(), "{}", said(&cut));
    if output.status.success() {
        assert!(restored(sandbox, "vm") == *disk, "the point is not of the instant");
    } else {
        assert!(said(&output).contains("cut-over") || said(&output).contains("cutting-over"), "{}", said(&output));
        assert_eq!(points(sandbox), 1);
    }
    assert!(fs::read(&target).unwrap() == *disk);
    assert!(sandbox.fails(5, &["commit", "vm"]).contains("cut-over"));
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
}

#[test]
fn a_cutover_beside_a_commit_moves_the_guest_and_the_point_is_of_its_instant() {
    let sandbox = Sandbox::with_repository();
    let (mut disk, client) = recovered(&sandbox, 48 * MIB, &["--on", "none"]);
    overwrite(&mut disk, &client, 7, 48 * MIB);
    cut_over_beside_a_commit(&sandbox, &["--mode", "stream"], client, &disk);
    sandbox.ok(&["discard", "vm"]);
}

#[test]
fn the_same_where_the_vms_qemu_moves_its_disks() {
    if !have(&["qemu-system-x86_64"]) {
        return;
    }
    let sandbox = Sandbox::with_repository();
    let (mut disk, client) = recovered(&sandbox, 48 * MIB, &["--memory", "64M", "--wait", "0"]);
    overwrite(&mut disk, &client, 8, 48 * MIB);
    cut_over_beside_a_commit(&sandbox, &["--mode", "mirror"], client, &disk);
    let view = sandbox.json(&["recovery", "vm"]);
    assert_eq!((&view["state"], &view["vm"]), (&"cut-over".into(), &"running".into()), "{view}");
}
