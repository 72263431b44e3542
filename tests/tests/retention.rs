//! Retention from the outside: what prune keeps and why, what protects a point, and what is never dropped by accident.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lifeboat_tests::{Sandbox, noise, wait_until};
use serde_json::Value;

/// A repository with `count` recovery points of `web01`, and their ids, oldest first. Each was made in another second.
fn with_points(count: usize) -> (Sandbox, Vec<String>) {
    let sandbox = Sandbox::with_repository();
    fs::write(sandbox.path("disk.raw"), noise(1, 1 << 20)).unwrap();
    let ids = (0..count).map(|number| back_up(&sandbox, "web01", &["--label", &format!("n={number}")])).collect();
    (sandbox, ids)
}

fn back_up(sandbox: &Sandbox, machine: &str, more: &[&str]) -> String {
    let disk = sandbox.name("disk.raw");
    let result = sandbox.json(&[&["backup", machine, &disk], more].concat());
    std::thread::sleep(Duration::from_millis(1100));
    result["point"].as_str().unwrap().to_owned()
}

/// The ids that are listed, oldest first.
fn listed(sandbox: &Sandbox) -> Vec<String> {
    let points = sandbox.json(&["points"]);
    points.as_array().unwrap().iter().map(|point| point["id"].as_str().unwrap().to_owned()).collect()
}

fn json(mut command: Command) -> Value {
    let output = command.arg("--json").output().unwrap();
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// What becomes of a point, and why.
fn fate(result: &Value, id: &str) -> (String, String) {
    let point = result["points"].as_array().unwrap().iter().find(|point| point["id"] == id).unwrap();
    (point["fate"].as_str().unwrap().to_owned(), point["reasons"].to_string())
}

fn point_file(sandbox: &Sandbox, id: &str) -> PathBuf {
    sandbox.path("repo/points").join(id)
}

fn damage(sandbox: &Sandbox, id: &str) {
    let path = point_file(sandbox, id);
    let mut bytes = fs::read(&path).unwrap();
    bytes[100] ^= 1;
    fs::write(path, bytes).unwrap();
    let _ = fs::remove_dir_all(sandbox.path("state")); // the catalog knows it from before
}

/// A zone in which the second `at` (of some day, UTC) begins a day.
fn zone_with_midnight_at(at: i64) -> String {
    let of_day = at.rem_euclid(86_400);
    // As POSIX has it, what is to be added to local time.
    let (sign, add) = if of_day <= 43_200 { ("", of_day) } else { ("-", 86_400 - of_day) };
    format!("TST{sign}{:02}:{:02}:{:02}", add / 3600, add / 60 % 60, add % 60)
}

/// Seconds since 1970 of a time in JSON.
fn seconds(time: &Value) -> i64 {
    let output = Command::new("date").args(["-u", "+%s", "-d", time.as_str().unwrap()]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().parse().unwrap()
}

#[test]
fn days_are_those_of_the_local_zone_and_a_dry_run_says_what_the_prune_then_does() {
    let (sandbox, ids) = with_points(4);
    let points = sandbox.json(&["points"]);
    let second = seconds(&points[1]["time"]);
    let prune = |zone: &str, more: &[&str]| {
        let mut command = sandbox.command(&[&["prune", "--keep-daily", "2"], more].concat());
        command.env("TZ", zone);
        json(command)
    };
    // A day ends between the second and the third point; or none ends anywhere near.
    let midnight = zone_with_midnight_at(second + 1);
    let noon = prune(&zone_with_midnight_at(second + 43_200), &["--dry-run"]);
    assert_eq!((&noon["forgotten"], &noon["kept"]), (&3.into(), &1.into()), "{noon}");
    let dry = prune(&midnight, &["--dry-run"]);
    let fates: Vec<String> = ids.iter().map(|id| fate(&dry, id).0).collect();
    assert_eq!(fates, ["forget", "keep", "forget", "keep"], "{dry}");
    assert!(fate(&dry, &ids[3]).1.contains("daily 1 of 2: newest of 20"), "{dry}");
    assert!(fate(&dry, &ids[3]).1.contains("newest"), "{dry}");
    assert!(fate(&dry, &ids[1]).1.contains("daily 2 of 2"), "{dry}");
    assert!(fate(&dry, &ids[0]).1.contains(&format!("{} is newer", &ids[1][..12])), "{dry}");
    assert_eq!(listed(&sandbox), ids, "a dry run changes nothing");
    let done = prune(&midnight, &[]);
    let fates: Vec<String> = ids.iter().map(|id| fate(&done, id).0).collect();
    assert_eq!(fates, ["forgotten", "keep", "forgotten", "keep"], "{done}");
    assert_eq!(listed(&sandbox), [ids[1].clone(), ids[3].clone()]);
    sandbox.ok(&["restore", &ids[1][..12], "--to", &sandbox.name("out.raw")]);
    assert!(fs::read(sandbox.path("out.raw")).unwrap() == fs::read(sandbox.path("disk.raw")).unwrap());
    sandbox.ok(&["verify", "--read-data"]);
}

#[test]
fn machines_and_labels_choose_and_the_newest_of_each_machine_stays() {
    let (sandbox, mut ids) = with_points(2);
    ids.push(back_up(&sandbox, "web01", &["--label", "n=0"]));
    ids.extend(["a", "b"].map(|kind| back_up(&sandbox, "db", &["--label", &format!("kind={kind}")])));
    let dry = |more: &[&str]| sandbox.json(&[&["prune", "--dry-run"], more].concat());
    let told = |result: &Value| result["points"].as_array().unwrap().len();
    let forgotten = |result: &Value| -> Vec<usize> {
        let points = result["points"].as_array().unwrap();
        let forgets = |id: &String| points.iter().any(|point| point["id"] == *id && point["fate"] == "forget");
        (0..ids.len()).filter(|number| forgets(&ids[*number])).collect()
    };
    assert_eq!(told(&dry(&["--keep-last", "1"])), 5);
    assert_eq!(told(&dry(&["--keep-last", "1", "--machine", "db"])), 2, "nothing is said of other machines");
    assert_eq!(forgotten(&dry(&["--keep-last", "1"])), [0, 1, 3]);
    assert_eq!(forgotten(&dry(&["--keep-last", "1", "--machine", "db"])), [3]);
    assert_eq!(forgotten(&dry(&["--keep-last", "1", "--label", "n=1"])), [] as [usize; 0]);
    assert_eq!(forgotten(&dry(&["--keep-label", "kind=x", "--label", "kind=b"])), [] as [usize; 0], "db's newest");
    assert_eq!(forgotten(&dry(&["--keep-label", "n=1"])), [0, 3]);
    assert_eq!(forgotten(&dry(&["--keep-last", "1", "--group-by", "n"])), [0, 3]);
    assert_eq!(forgotten(&dry(&["--keep-last", "1", "--group-by", "kind"])), [0, 1]);
    assert_eq!(forgotten(&dry(&["--keep-within", "14d"])), [] as [usize; 0]);
    let said = sandbox.ok(&["prune", "--keep-last", "1"]);
    assert!(said.contains("forgot 3 recovery points, kept 2") && said.contains("collect"), "{said}");
    assert_eq!(listed(&sandbox), [ids[2].clone(), ids[4].clone()]);
    assert!(sandbox.ok(&["prune", "--keep-last", "1"]).contains("forgot 0 recovery points, kept 2"));
}

#[test]
fn what_makes_no_sense_is_refused_and_drops_nothing() {
    let (sandbox, ids) = with_points(2);
    assert!(sandbox.fails(2, &["prune"]).contains("--keep-last"));
    assert!(sandbox.fails(2, &["prune", "--keep-last", "0"]).contains("no rule"));
    assert!(sandbox.fails(2, &["prune", "--dry-run", "--machine", "web01"]).contains("no rule"));
    sandbox.fails(2, &["prune", "--keep-daily", "-1"]);
    sandbox.fails(2, &["prune", "--keep-daily", "99999999999"]);
    assert!(sandbox.fails(2, &["prune", "--keep-within", "5x"]).contains("14d"));
    assert!(sandbox.fails(2, &["prune", "--keep-last", "1", "--keep-within", "0d"]).contains("keeps nothing"));
    assert!(sandbox.ok(&["prune", "--keep-within", "2w", "--dry-run"]).contains("within 2w"));
    sandbox.fails(2, &["prune", "--keep-label", "novalue"]);
    sandbox.fails(2, &["prune", "--keep-last", "1", "--label", "a=1", "--label", "a=2"]);
    assert!(sandbox.fails(4, &["prune", "--keep-last", "1", "--machine", "nobody"]).contains("nobody"));
    let disk = sandbox.name("disk.raw");
    assert!(sandbox.fails(2, &["backup", "web01", &disk, "--label", "a=1", "--label", "a=2"]).contains("twice"));
    assert!(sandbox.fails(2, &["protect", "web01", "--until", "2020-01-01"]).contains("past"));
    assert!(sandbox.fails(2, &["protect", "web01", "--until", "tomorrow"]).contains("2027-01-31"));
    for command in ["protect", "unprotect", "forget"] {
        sandbox.fails(4, &[command, "nobody"]);
        sandbox.fails(4, &[command, "web01~7"]);
    }
    assert_eq!(listed(&sandbox), ids);
}

#[test]
fn a_protected_point_stays_until_it_is_set_free() {
    let (sandbox, ids) = with_points(4);
    assert!(sandbox.ok(&["protect", "web01~3"]).contains("until it is unprotected"));
    sandbox.ok(&["protect", &ids[1][..12], "--until", "2099-12-31"]);
    let points = sandbox.json(&["points"]);
    let protected: Vec<bool> = (0..4).map(|at| points[at]["protected"] == true).collect();
    assert_eq!(protected, [true, true, false, false]);
    assert!(points[0]["protected_until"].is_null() && points[1]["protected_until"].as_str().unwrap().starts_with("2"));
    assert!(sandbox.ok(&["points"]).contains("until 2"));
    assert!(sandbox.ok(&["show", "web01~2"]).contains("until 2"));

    let result = sandbox.json(&["prune", "--keep-last", "1"]);
    assert_eq!(listed(&sandbox), [ids[0].clone(), ids[1].clone(), ids[3].clone()]);
    assert!(fate(&result, &ids[0]).1.contains("protected") && fate(&result, &ids[1]).1.contains("protected until 2"));
    assert!(sandbox.fails(5, &["forget", &ids[0][..12]]).contains("lifeboat unprotect"));
    assert!(sandbox.fails(5, &["forget", &ids[1][..12]]).contains("until 2"));

    sandbox.ok(&["unprotect", &ids[0][..12]]);
    sandbox.ok(&["forget", &ids[0][..12]]);
    let soon = Command::new("date").args(["-u", "-d", "+3 seconds", "+%Y-%m-%dT%H:%M:%SZ"]).output().unwrap();
    sandbox.ok(&["protect", &ids[1][..12], "--until", String::from_utf8_lossy(&soon.stdout).trim()]);
    wait_until("the protection has ended", || sandbox.json(&["points"])[0]["protected"] == false);
    sandbox.ok(&["prune", "--keep-last", "1"]);
    assert_eq!(listed(&sandbox), [ids[3].clone()]);
    assert_eq!(fs::read_dir(sandbox.path("repo/protected")).unwrap().count(), 0);
}

#[test]
fn the_newest_point_is_forgotten_only_when_that_is_said() {
    let (sandbox, ids) = with_points(2);
    assert!(sandbox.fails(5, &["forget", "web01"]).contains("--newest"));
    assert_eq!(listed(&sandbox), ids);
    let result = sandbox.json(&["forget", "web01", "--newest"]);
    assert_eq!((result["point"].as_str(), result["machine"].as_str()), (Some(&*ids[1]), Some("web01")));
    sandbox.ok(&["forget", "web01", "--newest"]);
    assert!(listed(&sandbox).is_empty());
}

#[test]
fn a_point_in_use_is_not_dropped_and_its_user_is_named() {
    let (sandbox, ids) = with_points(3);
    let (mut export, _) = sandbox.export(&[&ids[0][..12]]);
    let complaint = sandbox.fails(5, &["forget", &ids[0][..12]]);
    assert!(complaint.contains("in use by export"), "{complaint}");
    let result = sandbox.json(&["prune", "--keep-last", "1"]);
    assert!(fate(&result, &ids[0]).1.contains("held by export"), "{result}");
    assert_eq!(listed(&sandbox), [ids[0].clone(), ids[2].clone()]);
    assert!(export.stop().success());
    sandbox.ok(&["forget", &ids[0][..12]]);
}

#[test]
fn a_damaged_point_is_listed_and_never_pruned() {
    let (sandbox, ids) = with_points(3);
    sandbox.ok(&["protect", &ids[1][..12]]);
    damage(&sandbox, &ids[0]);
    damage(&sandbox, &ids[1]);
    let points = sandbox.json(&["points"]);
    let points = points.as_array().unwrap();
    assert_eq!(points.len(), 3, "{points:?}");
    let damaged: Vec<&Value> = points.iter().filter(|point| !point["damaged"].is_null()).collect();
    assert_eq!(damaged.len(), 2);
    assert!(damaged.iter().all(|point| point["machine"].is_null() && point["id"].is_string()));
    assert!(sandbox.ok(&["points"]).contains("DAMAGED"));
    assert!(sandbox.fails(3, &["restore", &ids[0][..12], "--to", &sandbox.name("x.raw")]).contains("damaged"));
    let result = sandbox.json(&["prune", "--keep-last", "1"]);
    assert_eq!(result["damaged"].as_array().unwrap().len(), 2);
    assert_eq!(listed(&sandbox).len(), 3);
    assert!(sandbox.fails(5, &["forget", &ids[1][..12]]).contains("protected"));
    sandbox.ok(&["unprotect", &ids[1][..12]]);
    sandbox.ok(&["forget", &ids[1][..12]]);
    sandbox.ok(&["forget", &ids[0][..12]]);
    assert_eq!(listed(&sandbox), [ids[2].clone()]);
    sandbox.ok(&["verify"]);
}
