//! Freeing space with the real program: what is said, what is left, who is waited for.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;

use chrono::DateTime;
use lifeboat_tests::{Sandbox, assert_same_bytes, noise};

const MIB: usize = 1 << 20;

/// A repository with a point that stays and one whose object is gone; returns the name of the disk that stays.
fn with_something_to_free(sandbox: &Sandbox) -> String {
    fs::write(sandbox.path("kept.raw"), noise(1, 4 * MIB)).unwrap();
    fs::write(sandbox.path("gone.raw"), noise(2, 8 * MIB)).unwrap();
    sandbox.ok(&["backup", "kept", &sandbox.name("kept.raw")]);
    let gone = sandbox.json(&["backup", "gone", &sandbox.name("gone.raw")]);
    fs::remove_file(sandbox.path("repo/points").join(gone["point"].as_str().unwrap())).unwrap();
    sandbox.name("kept.raw")
}

fn files(sandbox: &Sandbox, dir: &str) -> usize {
    fs::read_dir(sandbox.path("repo").join(dir)).map_or(0, |entries| entries.flatten().count())
}

#[test]
fn what_nothing_needs_is_quarantined_then_freed_and_the_rest_restores() {
    let sandbox = Sandbox::with_repository();
    let kept = with_something_to_free(&sandbox);
    let dry = sandbox.json(&["collect", "--dry-run"]);
    assert_eq!((&dry["condemned_packs"], &dry["freed_bytes"]), (&2.into(), &0.into()), "{dry}");
    assert_eq!(files(&sandbox, "quarantine"), 0);
    let first = sandbox.json(&["collect", "--quarantine", "7d"]);
    assert_eq!((&first["condemned_packs"], &first["freed_packs"]), (&2.into(), &0.into()), "{first}");
    let batch = &first["quarantined"][0];
    let time = |field: &str| DateTime::parse_from_rfc3339(batch[field].as_str().unwrap()).unwrap();
    assert_eq!((time("due") - time("created")).num_days(), 7, "{batch}");
    assert_eq!(sandbox.json(&["collect"])["freed_packs"], 0);
    let said = sandbox.ok(&["collect", "--reclaim-now"]);
    assert!(said.contains("2 packs deleted, ") && said.contains("1 recovery point needs "), "{said}");
    assert_eq!((files(&sandbox, "quarantine"), files(&sandbox, "leases")), (0, 0));
    sandbox.ok(&["restore", "kept", "--to", &sandbox.name("back.raw")]);
    assert_same_bytes(&sandbox.path("back.raw"), kept.as_ref());
    assert!(sandbox.ok(&["verify", "--read-data"]).contains("all is whole"));
}

#[test]
fn an_export_keeps_a_point_that_is_gone_and_explain_names_it() {
    let sandbox = Sandbox::with_repository();
    fs::write(sandbox.path("disk.raw"), noise(1, 4 * MIB)).unwrap();
    let point = sandbox.json(&["backup", "web01", &sandbox.name("disk.raw")]);
    let listen = format!("unix:{}", sandbox.name("nbd.sock"));
    let export = sandbox.start(&["export", "web01", "--read-only", "--listen", &listen]);
    lifeboat_tests::wait_until("the export serves", || sandbox.path("nbd.sock").exists());
    fs::remove_file(sandbox.path("repo/points").join(point["point"].as_str().unwrap())).unwrap();
    let held = sandbox.json(&["collect", "--reclaim-now"]);
    assert_eq!((&held["points"], &held["freed_packs"]), (&1.into(), &0.into()), "{held}");
    let packs = sandbox.path("repo/packs");
    let pack = fs::read_dir(packs).unwrap().flatten().flat_map(|dir| fs::read_dir(dir.path()).unwrap()).flatten();
    let pack = pack.last().unwrap().file_name().into_string().unwrap();
    let said = sandbox.ok(&["collect", "--explain", &pack[..10]]);
    assert!(said.contains("of web01, which is forgotten but held"), "{said}");
    assert!(said.contains("held by export of web01"), "{said}");
    drop(export);
    lifeboat_tests::wait_until("what is not held is freed", || {
        sandbox.json(&["collect", "--reclaim-now"])["pack_bytes"] == 0
    });
}

#[test]
fn without_the_key_a_dry_run_tells_what_the_last_collect_knew() {
    let sandbox = Sandbox::with_repository();
    with_something_to_free(&sandbox);
    let keyless = |args: &[&str]| {
        let mut command = sandbox.command(args);
        command.env_remove("LIFEBOAT_PASSPHRASE");
        command
    };
    let said = |args: &[&str]| String::from_utf8(keyless(args).output().unwrap().stdout).unwrap();
    assert!(said(&["collect", "--dry-run"]).contains("what its points need is not known"));
    sandbox.ok(&["collect"]);
    let told = said(&["collect", "--dry-run", "--json"]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
    assert_eq!(
        (&told["keyless"], &told["packs"], &told["quarantined"][0]["packs"]),
        (&true.into(), &4.into(), &2.into())
    );
    assert!(DateTime::parse_from_rfc3339(told["as_of"].as_str().unwrap()).is_ok(), "{told}");
    sandbox.command_fails(5, keyless(&["collect"]));
}

#[test]
fn what_makes_no_sense_is_refused_and_damage_frees_nothing() {
    let sandbox = Sandbox::with_repository();
    with_something_to_free(&sandbox);
    for args in [&["collect", "--threshold", "101"][..], &["collect", "--quarantine", "soon"]] {
        sandbox.fails(2, args);
    }
    assert!(sandbox.fails(4, &["collect", "--explain", "ffffffffffffffff"]).contains("there is no pack"));
    let point = fs::read_dir(sandbox.path("repo/points")).unwrap().flatten().next().unwrap().path();
    let whole = fs::read(&point).unwrap();
    fs::write(&point, &whole[..50]).unwrap();
    let complaint = sandbox.fails(3, &["collect", "--reclaim-now"]);
    assert!(complaint.contains("nothing is freed") && complaint.contains("recovery point points/"), "{complaint}");
    assert!(sandbox.fails(3, &["collect", "--dry-run"]).contains("cannot be read"));
    fs::write(&point, &whole).unwrap();
    assert_eq!(sandbox.json(&["collect", "--reclaim-now"])["freed_packs"], 2);

    let pack = largest_pack(&sandbox);
    let whole = fs::read(&pack).unwrap();
    let name = pack.file_name().unwrap().to_str().unwrap();
    for (left, problem) in [(None, "it is missing"), (Some(100), "it has 100 bytes in the place of")] {
        fs::remove_file(&pack).unwrap();
        if let Some(left) = left {
            fs::write(&pack, &whole[..left]).unwrap();
        }
        for args in [&["collect", "--dry-run"][..], &["collect"], &["collect", "--reclaim-now", "--json"]] {
            let output = sandbox.run(args);
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert_eq!(output.status.code(), Some(3), "{said}");
            assert!(said.contains(name) && said.contains(problem) && said.contains("lifeboat verify"), "{said}");
        }
        fs::write(&pack, &whole).unwrap();
    }
    sandbox.ok(&["collect"]);
    sandbox.ok(&["verify", "--read-data"]);
}

fn largest_pack(sandbox: &Sandbox) -> PathBuf {
    let dirs = fs::read_dir(sandbox.path("repo/packs")).unwrap().flatten();
    let packs = dirs.flat_map(|dir| fs::read_dir(dir.path()).unwrap().flatten()).map(|entry| entry.path());
    packs.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap()
}
