//! `kill -9` of the real program at random moments, whatever it is doing to a repository: the next command works, every
//! recovery point that is listed restores bit for bit, and none that was acknowledged is gone.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lifeboat_tests::{Random, Sandbox, noise, rounds, seed};
use serde_json::Value;

const CHUNK: usize = 16 << 10;
const MACHINES: usize = 2;

/// A point's machine and disk.
#[derive(Clone)]
struct Point {
    machine: usize,
    bytes: Arc<Vec<u8>>,
}

struct Harness {
    seed: u64,
    random: Random,
    sandbox: Sandbox,
    machines: Vec<Arc<Vec<u8>>>,
    points: BTreeMap<String, Point>,
    /// How long each kind of command took when it was not killed.
    lasted: BTreeMap<&'static str, Duration>,
    killed: BTreeMap<&'static str, u64>,
    round: u64,
}

impl Harness {
    fn new(seed: u64) -> Harness {
        let sandbox = Sandbox::with_plain_repository("16K");
        let mut random = Random::new(seed);
        let mut machines = Vec::new();
        for machine in 0..MACHINES {
            let length = 40 * CHUNK + random.index(40 * CHUNK);
            let bytes = Arc::new(noise(random.number(), length));
            fs::write(sandbox.path(&image(machine)), &*bytes).unwrap();
            machines.push(bytes);
        }
        let (points, lasted, killed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Harness { seed, random, sandbox, machines, points, lasted, killed, round: 0 }
    }

    #[track_caller]
    fn fail(&self, what: impl std::fmt::Display) -> ! {
        panic!("seed {}, round {}: {what}", self.seed, self.round)
    }

    /// Runs a command, and three times of four kills it somewhere between its beginning and its end. Whether it came to
    /// its end, with success; what else ends it than the kill is a failure.
    fn disturbed(&mut self, kind: &'static str, args: &[&str]) -> bool {
        let mut command = self.sandbox.command(args);
        let began = Instant::now();
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lasts = self.lasted.get(kind).copied().filter(|_| !self.random.once_in(4));
        if let Some(lasts) = lasts {
            let micros = u64::try_from(lasts.as_micros()).unwrap_or(u64::MAX).max(1000);
            thread::sleep(Duration::from_micros(self.random.below(micros + micros / 8)));
            child.kill().unwrap();
        }
        let output = child.wait_with_output().unwrap();
        match output.status.code() {
            Some(0) => {
                if lasts.is_none() {
                    self.lasted.insert(kind, began.elapsed());
                }
                true
            }
            None if lasts.is_some() => {
                *self.killed.entry(kind).or_default() += 1;
                false
            }
            code => self.fail(format_args!("{args:?} ends with {code:?}: {}", String::from_utf8_lossy(&output.stderr))),
        }
    }

    fn step(&mut self) {
        match self.random.below(8) {
            0..4 => self.back_up(),
            4 | 5 => self.restore(),
            6 => drop(self.disturbed("verify", &["verify"])),
            _ => drop(self.disturbed("verify --read-data", &["verify", "--read-data"])),
        }
    }

    fn back_up(&mut self) {
        let machine = self.random.index(MACHINES);
        let mut bytes = self.machines[machine].to_vec();
        for _ in 0..1 + self.random.below(12) {
            let start = self.random.index(bytes.len());
            let end = (start + 1 + self.random.index(2 * CHUNK)).min(bytes.len());
            match self.random.once_in(4) {
                true => bytes[start..end].fill(0),
                false => bytes[start..end].copy_from_slice(&noise(self.random.number(), end - start)),
            }
        }
        let bytes = Arc::new(bytes);
        fs::write(self.sandbox.path(&image(machine)), &*bytes).unwrap();
        self.machines[machine] = Arc::clone(&bytes);
        let (name, disk) = (format!("machine{machine}"), self.sandbox.name(&image(machine)));
        let done = self.disturbed("backup", &["backup", &name, &disk]);
        let mut new = self.listed();
        new.retain(|id, _| !self.points.contains_key(id));
        match new.len() {
            0 if done => self.fail("a backup said that it was done, and its point is not listed"),
            0 => {}
            1 => {
                let (id, point) = new.pop_first().unwrap();
                if point["machine"] != name.as_str() {
                    self.fail(format_args!("a point of another machine came up: {point}"));
                }
                self.points.insert(id, Point { machine, bytes });
            }
            _ => self.fail(format_args!("one backup made {} points", new.len())),
        }
    }

    fn listed(&self) -> BTreeMap<String, Value> {
        let listed = self.sandbox.json(&["points"]);
        let listed = listed.as_array().unwrap_or_else(|| self.fail("points are no list"));
        listed.iter().map(|point| (point["id"].as_str().unwrap_or_default().to_owned(), point.clone())).collect()
    }

    fn any_point(&mut self) -> Option<(String, Point)> {
        if self.points.is_empty() {
            return None;
        }
        let at = self.random.index(self.points.len());
        self.points.iter().nth(at).map(|(id, point)| (id.clone(), point.clone()))
    }

    /// A restore that was killed leaves nothing that a second one cannot deal with, and nothing that looks finished.
    fn restore(&mut self) {
        let Some((id, point)) = self.any_point() else { return };
        let target = self.sandbox.path("restored.raw");
        let name = self.sandbox.name("restored.raw");
        let _ = fs::remove_file(&target);
        let done = self.disturbed("restore", &["restore", &id, "--to", &name]);
        if let Ok(found) = fs::read(&target) {
            if found != *point.bytes {
                self.fail(format_args!("a restore of {id} left a file with other bytes under the target's name"));
            }
        } else if done {
            self.fail(format_args!("a restore of {id} said that it was done, and its target is not there"));
        }
        self.restores(&id, &point);
    }

    fn restores(&self, id: &str, point: &Point) {
        self.sandbox.ok(&["restore", id, "--to", &self.sandbox.name("again.raw"), "--overwrite"]);
        if fs::read(self.sandbox.path("again.raw")).unwrap() != *point.bytes {
            self.fail(format_args!("point {id} of machine{} restores with other bytes", point.machine));
        }
    }

    fn check(&mut self) {
        let listed = self.listed();
        if let Some(gone) = self.points.keys().find(|id| !listed.contains_key(*id)) {
            self.fail(format_args!("point {gone} was acknowledged, and is gone"));
        }
        if let Some(new) = listed.keys().find(|id| !self.points.contains_key(*id)) {
            self.fail(format_args!("point {new} came out of nowhere"));
        }
        if let Some((id, point)) = self.any_point().filter(|_| self.random.once_in(3)) {
            self.restores(&id, &point);
        }
        if self.round.is_multiple_of(20) {
            self.check_all();
        }
    }

    fn check_all(&self) {
        self.sandbox.ok(&["verify", "--read-data"]);
        for (id, point) in &self.points {
            self.restores(id, point);
        }
    }
}

fn image(machine: usize) -> String {
    format!("machine{machine}.raw")
}

#[test]
fn whatever_is_killed_at_any_moment_the_repository_stays_whole() {
    let (seed, rounds) = (seed(), rounds(25, 1000));
    println!("LIFEBOAT_SEED={seed}, {rounds} rounds");
    let mut harness = Harness::new(seed);
    let mut points = 0;
    for round in 1..=rounds {
        harness.round = round;
        harness.step();
        harness.check();
        if round.is_multiple_of(100) || round == rounds {
            harness.check_all();
            points += harness.points.len();
            let killed = std::mem::take(&mut harness.killed);
            harness = Harness { killed, ..Harness::new(harness.random.number()) };
        }
    }
    let kills: u64 = harness.killed.values().sum();
    assert!(rounds < 20 || kills > 0, "seed {seed}: nothing was killed: that proves nothing");
    println!("seed {seed}: {rounds} rounds, {kills} killed {:?}, {points} points restored", harness.killed);
}
