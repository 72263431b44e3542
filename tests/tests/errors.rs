//! Bad input and bad luck: each gets the exit status and the words that say what failed, on which object and what to
//! do, and nothing that was stored is lost.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use lifeboat_tests::{Sandbox, SmallRoom, have, noise, tool, tool_output};

const MIB: u64 = 1 << 20;

/// A disk with data here and there.
fn disk(sandbox: &Sandbox, name: &str, size: u64) -> String {
    let path = sandbox.path(name);
    let file = fs::File::create(&path).unwrap();
    file.set_len(size).unwrap();
    for (seed, at) in [0, size / 2, size - 300_000].into_iter().enumerate() {
        file.write_all_at(&noise(seed as u64 + size, 300_000), at).unwrap();
    }
    sandbox.name(name)
}

/// A repository with one recovery point of `web01`.
fn with_point() -> Sandbox {
    let sandbox = Sandbox::with_repository();
    let disk = disk(&sandbox, "disk.raw", 8 * MIB);
    sandbox.ok(&["backup", "web01", &disk]);
    sandbox
}

/// All files below a folder of the repository.
fn objects(sandbox: &Sandbox, folder: &str) -> Vec<PathBuf> {
    fn collect(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            if entry.path().is_dir() {
                collect(&entry.path(), found);
            } else {
                found.push(entry.path());
            }
        }
    }
    let mut found = Vec::new();
    collect(&sandbox.path("repo").join(folder), &mut found);
    found.sort();
    found
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    let mut permissions = fs::metadata(path).unwrap().permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "the file is the test's own")]
    permissions.set_readonly(false);
    fs::set_permissions(path, permissions).unwrap();
    fs::write(path, bytes).unwrap();
}

fn flip(path: &Path) {
    change(path, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x10;
    });
}

fn cut(path: &Path) {
    change(path, |bytes| bytes.truncate(bytes.len() / 2));
}

/// The data pack is the larger one.
fn packs_by_size(sandbox: &Sandbox) -> Vec<PathBuf> {
    let mut packs = objects(sandbox, "packs");
    packs.sort_by_key(|pack| fs::metadata(pack).unwrap().len());
    packs
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_wrong_passphrase_is_told_from_a_missing_one() {
    let sandbox = with_point();
    let mut command = sandbox.command(&["points"]);
    command.env("LIFEBOAT_PASSPHRASE", "wrong");
    assert!(sandbox.command_fails(5, command).contains("wrong passphrase"));
    let mut command = sandbox.command(&["points"]);
    command.env_remove("LIFEBOAT_PASSPHRASE");
    assert!(sandbox.command_fails(5, command).contains("LIFEBOAT_PASSPHRASE"));
}

#[test]
fn what_is_no_repository_is_named_and_left_alone() {
    let sandbox = Sandbox::new();
    assert!(sandbox.fails(4, &["points"]).contains("lifeboat init"));
    fs::create_dir(sandbox.path("repo")).unwrap();
    fs::write(sandbox.path("repo/letter.txt"), "dear").unwrap();
    assert!(sandbox.fails(4, &["points"]).contains("there is no repository"));
    assert!(sandbox.fails(5, &["init"]).contains("not empty"));
    assert_eq!(fs::read_dir(sandbox.path("repo")).unwrap().count(), 1);
    let mut command = sandbox.command(&["points"]);
    command.env("LIFEBOAT_REPO", "s3://bucket/x");
    assert!(sandbox.command_fails(2, command).contains("s3"));
}

#[test]
fn a_repository_is_made_once_and_never_half() {
    let sandbox = with_point();
    assert!(sandbox.fails(5, &["init"]).contains("already"));
    assert_eq!(sandbox.json(&["points"]).as_array().unwrap().len(), 1);
    let other = Sandbox::new();
    for size in ["15K", "100000", "8M"] {
        assert!(other.fails(2, &["init", "--chunk-size", size]).contains("power of two"));
    }
    let mut command = other.command(&["init"]);
    command.env_remove("LIFEBOAT_PASSPHRASE");
    assert!(other.command_fails(2, command).contains("--no-encryption"));
    other.ok(&["init"]);
}

#[test]
fn damaged_packs_are_found_named_and_never_restored_from() {
    for damage in [flip as fn(&Path), cut] {
        let sandbox = with_point();
        let pack = packs_by_size(&sandbox).pop().unwrap();
        damage(&pack);
        let complaint = sandbox.fails(3, &["verify", "--read-data"]);
        assert!(complaint.contains("damage in "), "{complaint}");
        let report = sandbox.run(&["verify", "--read-data", "--json"]);
        let report = String::from_utf8_lossy(&report.stdout).into_owned();
        assert!(report.contains(&name_of(&pack)) && report.contains(r#""ok":false"#), "{report}");
        let complaint = sandbox.fails(3, &["restore", "web01", "--to", &sandbox.name("out.raw")]);
        assert!(complaint.contains("offset") && complaint.contains("verify"), "{complaint}");
        assert!(!sandbox.path("out.raw").exists());
        assert_eq!(
            fs::read_dir(sandbox.path(""))
                .unwrap()
                .flatten()
                .filter(|e| name_of(&e.path()).contains("out.raw"))
                .count(),
            0
        );
    }
}

#[test]
fn a_damaged_manifest_is_found_and_named() {
    let sandbox = with_point();
    flip(&packs_by_size(&sandbox)[0]);
    let report = sandbox.run(&["verify", "--read-data", "--json"]);
    assert_eq!(report.status.code(), Some(3));
    let complaint = sandbox.fails(3, &["restore", "web01", "--to", &sandbox.name("out.raw")]);
    assert!(complaint.contains("damaged"), "{complaint}");
}

#[test]
fn a_missing_or_damaged_index_is_built_anew_by_itself() {
    for damage in [flip as fn(&Path), cut, |path: &Path| fs::remove_file(path).unwrap()] {
        let sandbox = with_point();
        for run in objects(&sandbox, "index") {
            damage(&run);
        }
        sandbox.ok(&["restore", "web01", "--to", &sandbox.name("out.raw")]);
        assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(sandbox.path("disk.raw")).unwrap());
        let again = sandbox.json(&["backup", "web01", &sandbox.name("disk.raw")]);
        assert_eq!(again["new"], 0, "what is there was not found again");
        sandbox.ok(&["verify", "--read-data"]);
    }
}

#[test]
fn a_damaged_recovery_point_hides_no_other() {
    let sandbox = with_point();
    flip(&objects(&sandbox, "points")[0]);
    let damaged = name_of(&objects(&sandbox, "points")[0]);
    let disk = disk(&sandbox, "other.raw", 4 * MIB);
    sandbox.ok(&["backup", "db", &disk]);
    fs::remove_dir_all(sandbox.path("state")).unwrap();
    let points = sandbox.json(&["points"]);
    assert_eq!(points.as_array().unwrap().len(), 2);
    assert_eq!(points[0]["machine"], "db");
    assert_eq!(points[1]["id"], *damaged);
    assert!(points[1]["damaged"].as_str().unwrap().contains("damaged"));
    let report = sandbox.run(&["verify", "--json"]);
    assert_eq!(report.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&report.stdout).contains(&damaged));
}

#[test]
fn a_damaged_key_slot_is_told_from_a_wrong_key_file() {
    let sandbox = Sandbox::new();
    let key = sandbox.name("key");
    sandbox.ok(&["init", "--key-file", &key]);
    sandbox.ok(&["points", "--key-file", &key]);
    let good = fs::read(&key).unwrap();
    flip(Path::new(&key));
    assert!(sandbox.fails(5, &["points", "--key-file", &key]).contains("wrong passphrase or key file"));
    cut(Path::new(&key));
    sandbox.fails(5, &["points", "--key-file", &key]);
    fs::write(&key, &good).unwrap();
    flip(&objects(&sandbox, "keys")[0]);
    assert!(sandbox.fails(3, &["points", "--key-file", &key]).contains("damaged"));
    assert!(sandbox.fails(1, &["points", "--key-file", &sandbox.name("nokey")]).contains("nokey"));
}

#[test]
fn a_damaged_or_newer_configuration_is_refused() {
    let sandbox = with_point();
    let config = sandbox.path("repo/repository");
    let good = fs::read(&config).unwrap();
    flip(&config);
    assert!(sandbox.fails(3, &["points"]).contains("damaged"));
    // The magic names the layout and ends with its version.
    fs::write(&config, &good).unwrap();
    change(&config, |bytes| bytes[7] = b'9');
    assert!(sandbox.fails(5, &["points"]).contains("later version"));
    fs::write(&config, &good).unwrap();
    sandbox.ok(&["points"]);
}

#[test]
fn sources_that_cannot_be_read_make_no_recovery_point() {
    let sandbox = with_point();
    assert!(sandbox.fails(4, &["backup", "db", &sandbox.name("nothing")]).contains("nothing"));
    assert!(sandbox.fails(2, &["backup", "db", &sandbox.name("")]).contains("a folder"));
    assert!(sandbox.fails(2, &["backup", "db", "/dev/null"]).contains("a character device"));
    fs::write(sandbox.path("empty"), "").unwrap();
    assert!(sandbox.fails(2, &["backup", "db", &sandbox.name("empty")]).contains("empty"));
    assert!(sandbox.fails(2, &["backup", "../db", &sandbox.name("disk.raw")]).contains("name"));
    let twice = [format!("a={}", sandbox.name("disk.raw")), format!("a={}", sandbox.name("disk.raw"))];
    assert!(sandbox.fails(2, &["backup", "db", &twice[0], &twice[1]]).contains("twice"));
    sandbox.fails(1, &["backup", "db", &format!("nbd+unix:///?socket={}", sandbox.name("nobody.sock"))]);
    assert_eq!(sandbox.json(&["points"]).as_array().unwrap().len(), 1);
    sandbox.ok(&["verify", "--read-data"]);
}

#[test]
fn a_source_that_fails_half_way_leaves_no_point_and_no_damage() {
    if !have(&["nbdkit"]) {
        return;
    }
    let sandbox = with_point();
    let big = disk(&sandbox, "big.raw", 64 * MIB);
    fs::write(&big, noise(9, 48 << 20)).unwrap();
    // The server dies with its first failing read, somewhere in the middle.
    let backup = format!("'{}' backup db \"$uri\"", sandbox.command(&[]).get_program().to_string_lossy());
    let mut command = Command::new("nbdkit");
    command.args([
        "-U",
        "-",
        "--filter=error",
        "--filter=noextents",
        "file",
        &big,
        "error=EIO",
        "error-pread-rate=20%",
        "--run",
        &backup,
    ]);
    command.envs(sandbox.command(&[]).get_envs().filter_map(|(key, value)| Some((key, value?))));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("offset") && said.contains("no recovery point was made"), "{said}");
    assert_eq!(sandbox.json(&["points"]).as_array().unwrap().len(), 1);
    sandbox.ok(&["verify", "--read-data"]);
    sandbox.ok(&["backup", "db", &big]);
    sandbox.ok(&["restore", "db", "--to", &sandbox.name("out.raw")]);
    assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(&big).unwrap());
}

#[test]
fn a_full_repository_fails_the_backup_and_keeps_what_it_has() {
    let sandbox = Sandbox::new();
    let Some(_room) = SmallRoom::new(sandbox.path("repo"), "8m") else { return };
    sandbox.ok(&["init"]);
    let small = disk(&sandbox, "small.raw", 2 * MIB);
    sandbox.ok(&["backup", "web01", &small]);
    fs::write(sandbox.path("big.raw"), noise(5, 40 << 20)).unwrap();
    let complaint = sandbox.fails(1, &["backup", "db", &sandbox.name("big.raw")]);
    assert!(complaint.contains("no space left"), "{complaint}");
    let points = sandbox.json(&["points"]);
    assert_eq!(points.as_array().unwrap().len(), 1);
    sandbox.ok(&["verify", "--read-data"]);
    sandbox.ok(&["restore", "web01", "--to", &sandbox.name("out.raw")]);
    assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(&small).unwrap());
}

#[test]
fn a_guest_that_fills_the_overlay_gets_enospc_and_goes_on_when_there_is_room() {
    if !have(&["qemu-io"]) {
        return;
    }
    let sandbox = with_point();
    let Some(room) = SmallRoom::new(sandbox.path("room"), "6m") else { return };
    let filler = room.path().join("filler");
    let overlay = room.name("overlay");
    let (mut export, uri) = sandbox.export(&["web01", "--overlay", &overlay]);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 1 1M 1M", "-c", "flush", &uri]);
    fs::write(&filler, vec![1; 3 << 20]).unwrap();
    let output = tool_output("qemu-io", &["-f", "raw", "-c", "write -P 2 2M 6M", &uri]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("No space left"), "{said}");
    tool("qemu-io", &["-f", "raw", "-c", "read -P 1 1M 1M", &uri]);
    fs::remove_file(&filler).unwrap();
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 2M 2M", "-c", "flush", &uri]);
    assert!(export.stop().success());
    let (_export, uri) = sandbox.export(&["web01", "--overlay", &overlay]);
    tool("qemu-io", &["-f", "raw", "-c", "read -P 1 1M 1M", "-c", "read -P 3 2M 2M", &uri]);
}

#[test]
fn addresses_in_use_or_out_of_bounds_are_refused() {
    let sandbox = with_point();
    let (_export, uri) = sandbox.export(&["web01"]);
    let listen = format!("unix:{}", sandbox.name("nbd.sock"));
    assert!(sandbox.fails(5, &["export", "web01", "--listen", &listen]).contains("in use"));
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("tcp:{}", holder.local_addr().unwrap());
    assert!(sandbox.fails(5, &["export", "web01", "--listen", &listen]).contains("in use"));
    assert!(sandbox.fails(5, &["export", "web01", "--listen", "tcp:0.0.0.0:10809"]).contains("loopback"));
    sandbox.fails(2, &["export", "web01", "--listen", "carrier-pigeon"]);
    sandbox.fails(2, &["export", "web01", "--listen", &format!("unix:/tmp/{}", "x".repeat(200))]);
    fs::write(sandbox.path("file"), "precious").unwrap();
    sandbox.fails(2, &["export", "web01", "--listen", &format!("unix:{}", sandbox.name("file"))]);
    assert_eq!(fs::read(sandbox.path("file")).unwrap(), b"precious");
    assert!(uri.starts_with("nbd+unix:///disk0?socket="), "{uri}");
}

#[test]
fn points_that_are_unknown_or_ambiguous_are_told_apart() {
    let sandbox = with_point();
    for _ in 0..20 {
        sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
    }
    for command in ["show", "recover"] {
        sandbox.fails(4, &[command, "nobody"]);
    }
    sandbox.fails(4, &["show", "web01~99"]);
    sandbox.fails(4, &["show", "ffffffffffffffff"]);
    sandbox.fails(4, &["points", "nobody"]);
    sandbox.fails(4, &["recovery", "nobody"]);
    sandbox.fails(4, &["discard", "nobody"]);
    // Among 21 ids, some of the 16 first digits are there twice.
    let points = sandbox.json(&["points"]);
    let ids: Vec<&str> = points.as_array().unwrap().iter().map(|point| point["id"].as_str().unwrap()).collect();
    let first = |digit: char| ids.iter().filter(|id| id.starts_with(digit)).count();
    let digit = ('0'..='9').chain('a'..='f').find(|digit| first(*digit) > 1).unwrap();
    let complaint = sandbox.fails(2, &["show", &digit.to_string()]);
    let listed = ids.iter().filter(|id| complaint.contains(&id[..12])).count();
    assert!(complaint.contains("ambiguous") && complaint.contains("tell them apart"), "{complaint}");
    assert_eq!(listed, first(digit).min(5), "{complaint}");
    // Among 21 ids, hardly ever two begin with the same three digits.
    let complaint = sandbox.fails(2, &["show", &ids[0][..3]]);
    assert!(complaint.contains("at least 4 characters") || complaint.contains("tell them apart"), "{complaint}");
    assert!(sandbox.fails(2, &["show", "web01~"]).contains("`web01~1` is the recovery point before the newest"));
    for unreadable in ["web01@", "web01@noon", "web01@2026-13-01"] {
        assert!(sandbox.fails(2, &["show", unreadable]).contains("write 2026-11-21"), "{unreadable}");
    }
    assert_eq!(sandbox.json(&["show", &ids[3][..16]])["id"], ids[3]);
    assert!(sandbox.fails(4, &["export", "web01", "--disk", "sdz", "--listen", "tcp:127.0.0.1:0"]).contains("disk0"));
}

#[test]
fn one_state_folder_has_one_service_and_everybody_else_speaks_with_it() {
    let sandbox = with_point();
    let mut service = sandbox.start(&["serve"]);
    // A command that came before the service had the folder would own it for a moment, and the service would refuse.
    lifeboat_tests::wait_until("the service owns the state folder", || sandbox.path("state/lifeboat.sock").exists());
    sandbox.ok(&["points"]);
    let complaint = sandbox.fails(5, &["serve"]);
    assert!(complaint.contains("in use by process"), "{complaint}");
    sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
    let mut elsewhere = sandbox.command(&["points"]);
    elsewhere.env("LIFEBOAT_REPO", sandbox.path("other"));
    assert!(sandbox.command_fails(5, elsewhere).contains("--state"));
    assert!(service.stop().success());
    assert_eq!(sandbox.json(&["points"]).as_array().unwrap().len(), 2);
}

#[test]
fn a_restore_replaces_nothing_unasked() {
    let sandbox = with_point();
    fs::write(sandbox.path("out.raw"), "precious").unwrap();
    let target = sandbox.name("out.raw");
    assert!(sandbox.fails(5, &["restore", "web01", "--to", &target]).contains("--overwrite"));
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    sandbox.ok(&["restore", "web01", "--to", &target, "--overwrite"]);
    assert!(fs::read(&target).unwrap() == fs::read(sandbox.path("disk.raw")).unwrap());
    sandbox.fails(1, &["restore", "web01", "--to", &sandbox.name("no/such/folder/x.raw")]);
    sandbox.fails(4, &["restore", "web01", "--to", &format!("sdz={}", sandbox.name("x.raw"))]);
}

#[test]
fn errors_are_problem_documents_for_programs() {
    let sandbox = with_point();
    let output = sandbox.run(&["show", "nobody", "--json"]);
    assert_eq!(output.status.code(), Some(4));
    let problem: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(problem["kind"], "not-found");
    assert!(problem["title"].as_str().unwrap().contains("nobody"));
}

#[test]
fn commands_at_the_same_time_share_a_state_folder() {
    let sandbox = with_point();
    for round in 0..4 {
        let mut all: Vec<_> = (0..6)
            .map(|number| {
                let machine = format!("m{round}-{number}");
                let disk = sandbox.name("disk.raw");
                if number % 2 == 0 { sandbox.start(&["backup", &machine, &disk]) } else { sandbox.start(&["points"]) }
            })
            .collect();
        for command in &mut all {
            assert!(command.wait().success(), "a command failed beside others");
        }
    }
    assert_eq!(sandbox.json(&["points"]).as_array().unwrap().len(), 1 + 4 * 3);
}

#[test]
fn what_is_damaged_is_stored_anew_and_does_not_stop_backups() {
    // The manifest's pack: without it a backup has no parent to compare with. Then the data's.
    for which in [0, 1] {
        let sandbox = with_point();
        let disk = sandbox.name("disk.raw");
        flip(&packs_by_size(&sandbox)[which]);
        sandbox.fails(3, &["verify", "--read-data"]);
        let again = sandbox.json(&["backup", "web01", &disk]);
        assert!(again["stored"].as_u64().unwrap() > 0, "what is damaged was taken for stored");
        for point in ["web01", "web01~1"] {
            sandbox.ok(&["restore", point, "--to", &sandbox.name("out.raw"), "--overwrite"]);
            assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(&disk).unwrap());
        }
        sandbox.ok(&["verify", "--read-data"]);
    }
}

#[test]
fn nothing_is_written_over_the_repository() {
    let sandbox = with_point();
    let config = sandbox.name("repo/repository");
    assert!(sandbox.fails(5, &["restore", "web01", "--to", &config, "--overwrite"]).contains("lies in the repository"));
    let folder = sandbox.name("repo/overlay");
    sandbox.fails(5, &["export", "web01", "--listen", "tcp:127.0.0.1:0", "--overlay", &folder]);
    sandbox.ok(&["verify", "--read-data"]);
}

#[test]
fn every_answer_to_a_program_is_one_document() {
    let sandbox = with_point();
    flip(&packs_by_size(&sandbox)[0]);
    for (status, args) in [
        (3, &["verify", "--read-data", "--json"][..]),
        (2, &["--json", "bogus"]),
        (2, &["init", "--json", "--chunk-size", "x"]),
        (2, &["backup", "web01", &sandbox.name("disk.raw"), "--label", "a=\u{1b}[31m", "--json"]),
    ] {
        let output = sandbox.run(args);
        assert_eq!(output.status.code(), Some(status), "{args:?}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        serde_json::from_str::<serde_json::Value>(&text)
            .unwrap_or_else(|error| panic!("{args:?}: {error} in {text:?}"));
    }
}
