//! Keys from the outside: who can open the repository, and what a host without the key can still prove.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;

use lifeboat_tests::{Sandbox, noise, wait_until};
use serde_json::Value;

/// A repository that the passphrase `correct horse` opens, with one recovery point of `web01`.
fn with_point() -> Sandbox {
    let sandbox = Sandbox::with_repository();
    fs::write(sandbox.path("disk.raw"), noise(1, 2 << 20)).unwrap();
    sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
    sandbox
}

fn with_passphrase(sandbox: &Sandbox, passphrase: &str, args: &[&str]) -> Command {
    let mut command = sandbox.command(args);
    command.env("LIFEBOAT_PASSPHRASE", passphrase);
    command
}

fn with_key_file(sandbox: &Sandbox, key: &str, args: &[&str]) -> Command {
    let mut command = without_key(sandbox, args);
    command.args(["--key-file", key]);
    command
}

fn without_key(sandbox: &Sandbox, args: &[&str]) -> Command {
    let mut command = sandbox.command(args);
    command.env_remove("LIFEBOAT_PASSPHRASE");
    command
}

fn opens(mut command: Command) -> bool {
    let output = command.output().unwrap();
    match output.status.code() {
        Some(0) => true,
        Some(5) => false,
        other => panic!("{other:?}: {}", String::from_utf8_lossy(&output.stderr)),
    }
}

fn json(mut command: Command) -> (Option<i32>, Value) {
    let output = command.arg("--json").output().unwrap();
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
}

fn flip(path: &std::path::Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn files(dir: PathBuf) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.path().is_dir() { found.extend(files(entry.path())) } else { found.push(entry.path()) }
    }
    found
}

#[test]
fn passphrases_and_key_files_come_and_go_and_the_last_one_stays() {
    let sandbox = with_point();
    let key = sandbox.name("spare.key");
    let added = sandbox.json(&["key", "add", "--new-key-file", &key, "--label", "spare"]);
    assert_eq!(added["left"], 2);
    let made = fs::metadata(&key).unwrap();
    assert_eq!((made.len(), made.mode() & 0o777), (64, 0o600));
    assert!(opens(with_key_file(&sandbox, &key, &["points"])));

    fs::write(sandbox.path("new"), "battery staple\nsecond line\n").unwrap();
    sandbox.ok(&["key", "add", "--new-passphrase-file", &sandbox.name("new")]);
    assert!(opens(with_passphrase(&sandbox, "battery staple", &["points"])));
    let listed = sandbox.json(&["key", "list"]);
    let listed = listed.as_array().unwrap();
    assert_eq!(listed.len(), 3);
    assert_eq!(listed.iter().filter(|slot| slot["in_use"] == true).count(), 1);
    assert_eq!(listed.iter().filter(|slot| slot["kind"] == "key-file" && slot["label"] == "spare").count(), 1);

    assert!(sandbox.fails(5, &["key", "add", "--new-key-file", &key]).contains("already"));
    let another = sandbox.name("another.key");
    for command in ["add", "rotate"] {
        let complaint = sandbox.fails(5, &["key", command, "--new-key-file", &another, "--label", "spare"]);
        assert!(complaint.contains("called `spare` already") && complaint.contains("another --label"), "{complaint}");
    }
    assert!(!sandbox.path("another.key").exists(), "what is refused makes no key file");
    sandbox.ok(&["key", "remove", "spare"]);
    assert!(!opens(with_key_file(&sandbox, &key, &["points"])));
    assert_eq!(fs::metadata(&key).unwrap().len(), 64, "a key file is the user's");
    let mine = listed.iter().find(|slot| slot["in_use"] == true).unwrap()["slot"].as_str().unwrap();
    let output = sandbox.run(&["key", "remove", &mine[..8]]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("the one in use"));
    assert!(!opens(with_passphrase(&sandbox, "correct horse", &["points"])));

    let (_, left) = json(with_passphrase(&sandbox, "battery staple", &["key", "list"]));
    let last = left[0]["slot"].as_str().unwrap().to_owned();
    let refused = with_passphrase(&sandbox, "battery staple", &["key", "remove", &last]);
    assert!(sandbox.command_fails(5, refused).contains("the last"));
    assert!(opens(with_passphrase(&sandbox, "battery staple", &["verify", "--read-data"])));
}

#[test]
fn a_rotation_takes_the_old_passphrases_place() {
    let sandbox = with_point();
    let mut command = sandbox.command(&["key", "rotate", "--label", "2027"]);
    command.env("LIFEBOAT_NEW_PASSPHRASE", "next year's");
    let (status, change) = json(command);
    assert_eq!((status, &change["left"], &change["removed_in_use"]), (Some(0), &1.into(), &true.into()));
    assert!(!opens(with_passphrase(&sandbox, "correct horse", &["points"])));
    let mut again = with_passphrase(&sandbox, "next year's", &["key", "rotate", "--label", "2027"]);
    let said = String::from_utf8(again.env("LIFEBOAT_NEW_PASSPHRASE", "and later's").output().unwrap().stdout).unwrap();
    let order = ["added key slot", "removed key slot", "1 key slot can open"].map(|line| said.find(line));
    assert!(order.is_sorted() && order.iter().all(Option::is_some), "{said}");
    let mut back = with_passphrase(&sandbox, "and later's", &["key", "rotate"]);
    assert!(back.env("LIFEBOAT_NEW_PASSPHRASE", "next year's").status().unwrap().success());
    assert!(opens(with_passphrase(&sandbox, "next year's", &["restore", "web01", "--to", &sandbox.name("out.raw")])));
    assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(sandbox.path("disk.raw")).unwrap());
}

#[test]
fn a_service_goes_on_after_its_own_key_is_rotated() {
    let sandbox = with_point();
    let mut service = sandbox.start(&["serve"]);
    wait_until("the service answers", || sandbox.path("state/lifeboat.sock").exists());
    let mut command = without_key(&sandbox, &["key", "rotate"]);
    command.env("LIFEBOAT_NEW_PASSPHRASE", "second");
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && said.contains("when it starts again"), "{said}");
    sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
    let mut command = without_key(&sandbox, &["key", "rotate"]);
    command.env("LIFEBOAT_NEW_PASSPHRASE", "third");
    assert!(opens(command));
    assert!(service.stop().success());
    assert!(!opens(with_passphrase(&sandbox, "second", &["points"])));
    let (_, points) = json(with_passphrase(&sandbox, "third", &["points"]));
    assert_eq!(points.as_array().unwrap().len(), 2);
}

#[test]
fn what_makes_no_sense_is_refused_and_makes_no_key_file() {
    let sandbox = with_point();
    assert!(sandbox.fails(2, &["key", "add"]).contains("LIFEBOAT_NEW_PASSPHRASE"));
    assert!(sandbox.fails(2, &["key", "add", "--new-key-file", "k", "--new-passphrase-file", "p"]).contains("cannot"));
    sandbox.fails(1, &["key", "add", "--new-passphrase-file", &sandbox.name("nowhere")]);
    fs::write(sandbox.path("short"), "too short").unwrap();
    assert!(sandbox.fails(2, &["key", "add", "--new-key-file", &sandbox.name("short")]).contains("32"));
    assert_eq!(fs::read(sandbox.path("short")).unwrap(), b"too short");
    sandbox.fails(4, &["key", "remove", "nobody"]);
    sandbox.fails(4, &["key", "remove", "ffffffff"]);
    assert_eq!(sandbox.json(&["key", "list"]).as_array().unwrap().len(), 1);

    let plain = Sandbox::new();
    let run = |status, args: &[&str]| plain.command_fails(status, without_key(&plain, args));
    assert!(without_key(&plain, &["init", "--no-encryption"]).status().unwrap().success());
    for args in [&["key", "list"][..], &["key", "add", "--new-key-file", &plain.name("k")], &["key", "remove", "abcd"]]
    {
        assert!(run(5, args).contains("not encrypted"), "{args:?}");
    }
    assert!(!plain.path("k").exists());
}

#[test]
fn damaged_slots_are_listed_as_damaged_and_a_missing_one_is_said_to_be_missing() {
    let sandbox = with_point();
    let key = sandbox.name("spare.key");
    let added = sandbox.json(&["key", "add", "--new-key-file", &key])["added"].as_str().unwrap().to_owned();
    flip(&sandbox.path("repo/keys").join(&added), 150);
    let listed = sandbox.json(&["key", "list"]);
    let slot = listed.as_array().unwrap().iter().find(|slot| slot["slot"] == added.as_str()).unwrap();
    assert!(slot["damaged"].as_str().unwrap().contains("checksum"), "{slot}");
    assert!(sandbox.ok(&["key", "list"]).contains("DAMAGED"));
    let mine = listed.as_array().unwrap().iter().find(|slot| slot["in_use"] == true).unwrap();
    assert!(
        sandbox.fails(5, &["key", "remove", mine["slot"].as_str().unwrap()]).contains("damaged slots do not count")
    );
    for slot in files(sandbox.path("repo/keys")) {
        fs::remove_file(slot).unwrap();
    }
    let complaint = sandbox.fails(3, &["points"]);
    assert!(complaint.contains("no key slot is left") && !complaint.contains("damaged"), "{complaint}");
}

#[test]
fn a_host_without_the_key_proves_what_is_stored_and_finds_damage() {
    let sandbox = with_point();
    fs::remove_dir_all(sandbox.path("state")).unwrap();
    let (status, report) = json(without_key(&sandbox, &["verify", "--read-data"]));
    assert_eq!(
        (status, &report["ok"], &report["keyless"], &report["points"]),
        (Some(0), &true.into(), &true.into(), &1.into())
    );
    assert!(report["bytes_read"].as_u64().unwrap() > 1 << 20);
    assert!(!sandbox.path("state").exists(), "it needs no state folder");
    let output = without_key(&sandbox, &["verify"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("without the key"));
    for dir in ["packs", "points", "index", "keys"] {
        let object = files(sandbox.path("repo").join(dir)).remove(0);
        let at = fs::metadata(&object).unwrap().len() / 2;
        flip(&object, at);
        let (status, report) = json(without_key(&sandbox, &["verify", "--read-data"]));
        assert_eq!(status, Some(3), "{dir}");
        let name = object.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(report["damaged"].to_string().contains(&name), "{dir}: {report}");
        flip(&object, at);
    }
    let refused = without_key(&sandbox, &["verify", "web01"]);
    assert!(sandbox.command_fails(5, refused).contains("LIFEBOAT_PASSPHRASE"));
    let (_, full) = json(sandbox.command(&["verify"]));
    assert_eq!(full["keyless"], false);

    let point = sandbox.json(&["points"])[0]["id"].as_str().unwrap().to_owned();
    sandbox.ok(&["protect", "web01"]);
    sandbox.ok(&["verify"]);
    flip(&files(sandbox.path("repo/protected"))[0], 20);
    for (command, machine) in [
        (without_key(&sandbox, &["verify"]), ""),
        (sandbox.command(&["verify"]), " of web01"),
        (sandbox.command(&["verify", "web01"]), " of web01"),
    ] {
        let (status, report) = json(command);
        assert_eq!((status, &report["ok"]), (Some(3), &false.into()), "{report}");
        let damaged = report["damaged"].as_array().unwrap();
        assert_eq!(damaged.len(), 1, "{report}");
        let object = damaged[0]["object"].as_str().unwrap();
        assert!(object.starts_with("protection protected/") && object.contains(&point[..12]), "{report}");
        assert!(damaged[0]["problem"].to_string().contains(&format!("point {point}{machine} stays protected")));
    }
    sandbox.ok(&["protect", "web01"]);
    sandbox.ok(&["verify"]);
}
