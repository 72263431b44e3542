//! `kill -9` of the real program at random moments, whatever it is doing to a repository or a recovery: the next command
//! works, every recovery point that is listed restores bit for bit, none that was acknowledged is gone, none that was
//! forgotten is back, what was written through NBD and acknowledged is there, and no lease or temporary file stays.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "kill/recovery.rs"]
mod recovery;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lifeboat_tests::{Random, Sandbox, noise, rounds, seed, tool};
use serde_json::Value;

const CHUNK: usize = 16 << 10;
const MACHINES: usize = 2;
/// A command that was not seen to its end yet is taken to last so long.
const LASTS: Duration = Duration::from_millis(80);
/// More points than that of a machine are dropped.
const POINTS_MAX: usize = 6;

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
    /// The number of the key file that opens the repository; larger ones were not used yet.
    key: u64,
    keys_made: u64,
    /// Numbers of more key files that open it.
    spare: BTreeSet<u64>,
    /// How long each kind of command took when it was not killed.
    lasted: BTreeMap<&'static str, Duration>,
    killed: BTreeMap<&'static str, u64>,
    round: u64,
}

impl Harness {
    fn new(seed: u64) -> Harness {
        let sandbox = Sandbox::with_key_file(&key(0), "16K");
        let mut random = Random::new(seed);
        let mut machines = Vec::new();
        for machine in 0..MACHINES {
            let length = 40 * CHUNK + random.index(40 * CHUNK);
            let bytes = Arc::new(noise(random.number(), length));
            fs::write(sandbox.path(&image(machine)), &*bytes).unwrap();
            machines.push(bytes);
        }
        let (points, lasted, killed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Harness {
            seed,
            random,
            sandbox,
            machines,
            points,
            key: 0,
            keys_made: 0,
            spare: BTreeSet::new(),
            lasted,
            killed,
            round: 0,
        }
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
        let lasts = self.lasted.get(kind).copied().unwrap_or(LASTS);
        let lasts = Some(lasts).filter(|_| !self.random.once_in(4));
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
        match self.random.below(32) {
            0..9 => self.back_up(),
            9..12 => self.restore(),
            12..14 => self.restore_in_place(),
            14 => drop(self.disturbed("verify", &["verify"])),
            15 | 16 => drop(self.disturbed("verify --read-data", &["verify", "--read-data"])),
            17..19 => self.forget(),
            19..21 => self.prune(),
            21..25 => self.collect(),
            25 => self.add_key(),
            26 => self.remove_key(),
            27 => self.rotate_key(),
            _ => self.recover(),
        }
    }

    fn back_up(&mut self) {
        let machine = self.random.index(MACHINES);
        if self.points.values().filter(|point| point.machine == machine).count() >= POINTS_MAX {
            return self.prune();
        }
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
        let Some((id, point)) = self.any_point() else { return self.back_up() };
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

    /// What `--in-place` leaves half-done, `--in-place` finishes.
    fn restore_in_place(&mut self) {
        let Some((id, point)) = self.any_point() else { return };
        let (target, name) = (self.sandbox.path("place.raw"), self.sandbox.name("place.raw"));
        let way = if self.random.once_in(2) { "--in-place" } else { "--resume" };
        if way == "--in-place" && !target.exists() {
            fs::write(&target, noise(self.round, point.bytes.len())).unwrap();
        } else if way == "--resume" {
            let _ = fs::remove_file(&target);
        }
        let args = ["restore", &id, "--to", &name, way];
        if !self.disturbed(way, &args) && (way == "--in-place" || !target.exists()) {
            self.sandbox.ok(&args);
        }
        if fs::read(&target).unwrap() != *point.bytes {
            self.fail(format_args!("a restore of {id} with {way} left other bytes"));
        }
    }

    fn forget(&mut self) {
        let Some((id, _)) = self.any_point() else { return };
        let before = self.listed();
        let done = self.disturbed("forget", &["forget", &id, "--newest"]);
        let listed = self.dropped(&before, |gone| gone == id);
        if done && listed.contains_key(&id) {
            self.fail(format_args!("point {id} was forgotten, and is listed"));
        }
    }

    fn prune(&mut self) {
        let machine = self.random.index(MACHINES);
        let of = |points: &BTreeMap<String, Point>| points.values().filter(|point| point.machine == machine).count();
        if of(&self.points) == 0 {
            return;
        }
        let (before, points) = (self.listed(), self.points.clone());
        let name = format!("machine{machine}");
        let done = self.disturbed("prune", &["prune", "--keep-last", "2", "--machine", &name]);
        self.dropped(&before, |gone| points[gone].machine == machine);
        let (had, has) = (of(&points), of(&self.points));
        if has < had.min(2) || (done && has > 2) {
            self.fail(format_args!("2 of {had} points of {name} were to be kept, and {has} are"));
        }
    }

    /// Points that are not listed any more may be gone if `may` says so; what is left is listed from now on.
    fn dropped(&mut self, before: &BTreeMap<String, Value>, may: impl Fn(&str) -> bool) -> BTreeMap<String, Value> {
        let listed = self.listed();
        for gone in before.keys().filter(|id| !listed.contains_key(*id)) {
            if !may(gone) {
                self.fail(format_args!("point {gone} is gone, which nobody asked for"));
            }
        }
        self.points.retain(|id, _| listed.contains_key(id));
        listed
    }

    fn collect(&mut self) {
        match self.random.below(4) {
            0 => drop(self.disturbed("collect", &["collect"])),
            1 => drop(self.disturbed("collect --dry-run", &["collect", "--dry-run"])),
            2 => drop(self.disturbed("collect --reclaim-now", &["collect", "--reclaim-now"])),
            _ => {
                let args = ["collect", "--reclaim-now", "--threshold", "100"];
                self.disturbed("collect --threshold 100", &args);
            }
        }
    }

    fn new_key(&mut self) -> (u64, String) {
        self.keys_made += 1;
        (self.keys_made, self.sandbox.name(&key(self.keys_made)))
    }

    fn opens(&self, number: u64) -> bool {
        let mut command = self.sandbox.command(&["points"]);
        let output = command.env("LIFEBOAT_KEY_FILE", self.sandbox.path(&key(number))).output().unwrap();
        match output.status.code() {
            Some(0) => true,
            Some(5) => false,
            code => self.fail(format_args!("with key {number}: {code:?} {}", String::from_utf8_lossy(&output.stderr))),
        }
    }

    fn add_key(&mut self) {
        let (number, file) = self.new_key();
        let args = ["key", "add", "--new-key-file", &file, "--label", &key(number)];
        let done = self.disturbed("key add", &args);
        let opens = self.sandbox.path(&key(number)).exists() && self.opens(number);
        if done && !opens {
            self.fail(format_args!("key {number} was added, and does not open"));
        }
        if opens {
            self.spare.insert(number);
        }
    }

    fn remove_key(&mut self) {
        let Some(number) = self.spare.pop_last() else { return self.add_key() };
        let done = self.disturbed("key remove", &["key", "remove", &key(number)]);
        match (done, self.opens(number)) {
            (true, true) => self.fail(format_args!("key {number} was removed, and opens")),
            (false, true) => drop(self.spare.insert(number)),
            (_, false) => {}
        }
    }

    fn rotate_key(&mut self) {
        let (number, file) = self.new_key();
        let args = ["key", "rotate", "--new-key-file", &file, "--label", &key(number)];
        let done = self.disturbed("key rotate", &args);
        let (old, new) = (self.opens(self.key), self.sandbox.path(&key(number)).exists() && self.opens(number));
        match (old, new) {
            (false, false) => self.fail(format_args!("keys {} and {number}: neither opens", self.key)),
            (false, true) => {
                self.key = number;
                self.sandbox.use_key_file(&key(number));
            }
            _ if done => self.fail(format_args!("key {} was replaced by {number}: {old}, {new}", self.key)),
            (true, true) => drop(self.spare.insert(number)),
            (true, false) => {}
        }
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

    fn check_all(&mut self) {
        self.sandbox.ok(&["verify", "--read-data"]);
        for (id, point) in &self.points {
            self.restores(id, point);
        }
        self.nothing_stays();
    }

    /// What killed processes left is recognised: leases and quarantine by a collect, temporary files of two days ago by
    /// the next backup. The restores above took away what restores to the same name had left.
    fn nothing_stays(&mut self) {
        let collected = self.sandbox.json(&["collect", "--reclaim-now"]);
        for dir in ["leases", "quarantine"] {
            if let Some(left) = files(&self.sandbox, &format!("repo/{dir}")).first() {
                self.fail(format_args!("nobody is at work, and {dir}/{left} is there: {collected}"));
            }
        }
        for file in files(&self.sandbox, "repo/tmp") {
            tool("touch", &["-d", "2 days ago", &self.sandbox.name(&format!("repo/tmp/{file}"))]);
        }
        self.sandbox.ok(&["backup", "last", &self.sandbox.name(&image(0))]);
        let mut new = self.listed();
        new.retain(|id, _| !self.points.contains_key(id));
        let [id] = &new.keys().collect::<Vec<_>>()[..] else { self.fail(format_args!("one point, not {new:?}")) };
        self.sandbox.ok(&["forget", id, "--newest"]);
        let mut left = files(&self.sandbox, "repo/tmp");
        // Where no point is left there is nothing to restore, and a killed restore's file waits for the next.
        if let Some((id, _)) = self.any_point() {
            self.sandbox.ok(&["restore", &id, "--to", &self.sandbox.name("restored.raw"), "--overwrite"]);
            left.extend(files(&self.sandbox, "").into_iter().filter(|name| name.starts_with("restored.raw.")));
        }
        if !left.is_empty() {
            self.fail(format_args!("temporary files stay: {left:?}"));
        }
    }
}

/// Names of the files in a folder of the sandbox.
fn files(sandbox: &Sandbox, dir: &str) -> Vec<String> {
    let entries = fs::read_dir(sandbox.path(dir)).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().is_file()).map(|entry| entry.file_name().into_string().unwrap()).collect()
}

fn key(number: u64) -> String {
    format!("key{number}")
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
