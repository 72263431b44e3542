//! A service that is killed while it works: nothing that was begun is lost, and nothing is done twice unknowingly.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use lifeboat_tests::{Running, Sandbox, have, tool_output, wait_until};
use serde_json::{Value, json};

/// Jobs that are asked for.
const JOBS: usize = 50;
/// So many have begun when the service is killed.
const BEGUN: usize = 30;
/// And so many have been told.
const TOLD: usize = 5;

/// A disk that is read slowly, until dropped.
struct SlowDisk(Child, String);

impl SlowDisk {
    fn new(sandbox: &Sandbox) -> SlowDisk {
        let socket = sandbox.name("slow.sock");
        let child = Command::new("nbdkit")
            .args(["-f", "-U", &socket, "--filter=delay", "pattern", "64M", "rdelay=200ms"])
            .stdout(Stdio::null())
            .spawn()
            .expect("nbdkit is there");
        wait_until("nbdkit listens", || sandbox.path("slow.sock").exists());
        SlowDisk(child, format!("nbd+unix:///?socket={socket}"))
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A start that is asked for with a key.
struct Start {
    key: String,
    path: &'static str,
    body: String,
}

impl Start {
    fn new(number: usize, sandbox: &Sandbox, slow: &SlowDisk) -> Start {
        let backup = |source: &str| json!({ "machine": format!("vm{number}"), "sources": [{ "disk": "disk0", "location": source }] });
        let (path, body) = match number % 5 {
            0 | 1 => ("/api/v1/points", backup(&slow.1)),
            2 => ("/api/v1/points", backup(&sandbox.name("disk.raw"))),
            3 => ("/api/v1/verify", json!({ "read_data": true })),
            _ => ("/api/v1/collect", json!({ "dry_run": true })),
        };
        Start { key: format!("start-{number}"), path, body: body.to_string() }
    }

    /// The status and the number of the job, if there is an answer at all.
    fn ask(&self, socket: &str) -> Option<(u64, Option<u64>)> {
        let (key, url) = (format!("Idempotency-Key: {}", self.key), format!("http://l{}", self.path));
        let args = ["--silent", "--unix-socket", socket, "-H", "Content-Type: application/json", "-H", &key];
        let rest = ["--data", &self.body, "--write-out", "\n%{http_code}", &url];
        let output = tool_output("curl", &[&args[..], &rest].concat());
        let said = String::from_utf8(output.stdout).unwrap();
        let (body, status) = said.rsplit_once('\n')?;
        let answer: Value = serde_json::from_str(body).ok()?;
        Some((status.parse().ok()?, answer["id"].as_u64()))
    }
}

fn jobs(socket: &str) -> Vec<Value> {
    let output = tool_output("curl", &["--silent", "--unix-socket", socket, "http://l/api/v1/jobs"]);
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

fn serve(sandbox: &Sandbox, socket: &str) -> Running {
    let service = sandbox.start(&["serve"]);
    wait_until("the service answers", || !jobs(socket).is_empty());
    service
}

#[test]
fn killed_during_fifty_jobs_a_service_loses_none_and_does_none_twice() {
    if !have(&["curl", "nbdkit"]) {
        return;
    }
    let sandbox = Sandbox::with_plain_repository("64K");
    let slow = SlowDisk::new(&sandbox);
    fs::write(sandbox.path("disk.raw"), vec![7; 1 << 20]).unwrap();
    sandbox.ok(&["backup", "web01", &sandbox.name("disk.raw")]);
    let socket = sandbox.name("state/lifeboat.sock");
    let service = serve(&sandbox, &socket);
    let starts: Vec<Start> = (0..JOBS).map(|number| Start::new(number, &sandbox, &slow)).collect();
    let answered = AtomicUsize::new(0);
    let before: Vec<Option<(u64, Option<u64>)>> = std::thread::scope(|scope| {
        let ask = |start: &Start| {
            let answer = start.ask(&socket);
            answered.fetch_add(usize::from(answer.is_some()), Ordering::Relaxed);
            answer
        };
        let asked: Vec<_> = starts.iter().map(|start| scope.spawn(move || ask(start))).collect();
        wait_until("many have begun, and some know it", || {
            jobs(&socket).len() > BEGUN && answered.load(Ordering::Relaxed) >= TOLD
        });
        sandbox.kill_owner();
        asked.into_iter().map(|asked| asked.join().unwrap()).collect()
    });
    drop(service);
    let _service = serve(&sandbox, &socket);

    // Whatever was promised is there, and stands as what became of it.
    let found = jobs(&socket);
    let state = |id: u64| found.iter().find(|job| job["id"] == id).map(|job| job["state"].as_str().unwrap());
    let promised: Vec<u64> = before.iter().flatten().filter_map(|(_, id)| *id).collect();
    assert!(promised.len() >= TOLD && found.len() > BEGUN, "{before:?}");
    for id in &promised {
        let state = state(*id).unwrap_or_else(|| panic!("job {id} is lost: {found:?}"));
        assert!(["done", "failed", "interrupted"].contains(&state), "job {id} runs again by itself: {state}");
    }
    assert!(found.iter().any(|job| job["state"] == "interrupted"), "{found:?}");

    // Who asks again gets the job that there was, if there was one, and else one that is new.
    let mut known = BTreeSet::from([1]);
    for (start, before) in starts.iter().zip(&before) {
        let (status, id) = start.ask(&socket).unwrap_or_else(|| panic!("{} is not answered", start.key));
        match id {
            Some(id) => assert!(status == 202 && known.insert(id), "{}: two starts are job {id}", start.key),
            None => assert_eq!(status, 409, "{}", start.key),
        }
        if let Some((_, Some(promised))) = before {
            assert_eq!(id, Some(*promised), "{} was begun twice", start.key);
        }
    }
    // There is no job that nobody knows of.
    let all: BTreeSet<u64> = jobs(&socket).iter().map(|job| job["id"].as_u64().unwrap()).collect();
    assert_eq!(all, known);
    assert!(sandbox.json(&["audit", "verify"])["ok"].as_bool().unwrap());
}
