//! The store against a simple model: random backups, forgotten points, key changes, verifications, power cuts and kills at random
//! operations, and restarts. Whatever happened, every recovery point that is listed restores bit for bit, nothing that was
//! acknowledged is gone, and exactly the secrets that should open the repository do.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use blockstore::sim::SimFolder;
use blockstore::{
    DataCheck, LocalStorage, PointDetails, PointError, Progress, Protection, RecoveryPointId, Repository, Secret, SlotState,
    Source, Target, VerifyOptions, ZeroPolicy, restore,
};
use lifeboat_tests::{Random, noise, rounds, seed};

const CHUNK: usize = 16 << 10;
const MACHINES: usize = 2;
/// Seconds since 1970.
const NOW: u64 = 1_800_000_000;
/// More packs and runs than that no crash leaves between two successful backups.
const STEPS: u64 = 14;

/// A machine's disks: a name and the bytes.
type Disks = Vec<(String, Arc<Vec<u8>>)>;

struct Bytes(Arc<Vec<u8>>);

impl Source for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0[start..start + buf.len()]);
        Ok(())
    }

    /// Chunks of zeroes are holes.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let first = usize::try_from(offset).unwrap() / CHUNK;
        let is_data = |chunk: &[u8]| chunk.iter().any(|byte| *byte != 0);
        let found = self.0.chunks(CHUNK).enumerate().skip(first).find(|(_, chunk)| is_data(chunk));
        Ok(found.map(|(number, chunk)| {
            let start = (number * CHUNK) as u64;
            start.max(offset)..start + chunk.len() as u64
        }))
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }
}

struct Memory(Mutex<Vec<u8>>);

impl Target for Memory {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        self.0.lock().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
}

fn secret(number: u8) -> Secret {
    Secret::key_file(vec![number; 64])
}

/// Whether a change that was cut off has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Yes,
    No,
    Either,
}

struct World {
    case: u64,
    random: Random,
    folder: SimFolder,
    repository: Repository,
    machines: Vec<Disks>,
    /// Every point that is there.
    points: BTreeMap<RecoveryPointId, (usize, Disks)>,
    /// Points of backups that were killed before they said that they were done: a power cut may still take them.
    unsure: BTreeSet<RecoveryPointId>,
    /// Points that were being forgotten when that was cut off: until the next power cut they may come and go.
    undecided: BTreeMap<RecoveryPointId, (usize, Disks)>,
    /// Secrets by their numbers; the first opens the repository for ever.
    keys: BTreeMap<u8, Known>,
    crashes: u64,
}

impl World {
    fn new(case: u64) -> World {
        let mut random = Random::new(case);
        let folder = SimFolder::new(case);
        let storage = Arc::new(LocalStorage::new(Arc::new(folder.clone())));
        let chunk = u32::try_from(CHUNK).unwrap();
        let repository = Repository::init(storage, chunk, Protection::Secret(secret(1))).unwrap();
        let machines = (0..MACHINES)
            .map(|machine| {
                let disks = 1 + random.below(2);
                (0..disks).map(|disk| (format!("disk{disk}"), first_content(&mut random, machine))).collect()
            })
            .collect();
        let (unsure, keys) = (BTreeSet::new(), BTreeMap::from([(1, Known::Yes)]));
        World {
            case,
            random,
            folder,
            repository,
            machines,
            points: BTreeMap::new(),
            unsure,
            undecided: BTreeMap::new(),
            keys,
            crashes: 0,
        }
    }

    #[track_caller]
    fn fail(&self, what: impl std::fmt::Display) -> ! {
        panic!("case {}: {what}", self.case)
    }

    /// Something goes wrong in one of the next operations, often.
    fn arm(&mut self) {
        if self.random.once_in(2) {
            let at = self.folder.operations() + self.random.below(60);
            self.folder = self.folder.clone().crash_at(at);
        }
    }

    fn step(&mut self) {
        match self.random.below(12) {
            10 | 11 => self.forget(),
            0..5 => {
                let machine = self.random.index(MACHINES);
                self.edit(machine);
                self.back_up(machine);
            }
            5 => self.add_key(),
            6 => self.remove_key(),
            7 => self.verify(),
            _ => {}
        }
        // Even without a crash: nothing may live in memory alone.
        if self.folder.is_off() || self.random.once_in(3) {
            self.restart();
        }
    }

    fn edit(&mut self, machine: usize) {
        let disks = self.machines[machine].len();
        let disk = self.random.index(disks);
        let (_, content) = &self.machines[machine][disk];
        let mut bytes = content.to_vec();
        for _ in 0..self.random.below(6) {
            let length = 1 + self.random.index(3 * CHUNK);
            let start = self.random.index(bytes.len());
            let end = (start + length).min(bytes.len());
            match self.random.below(4) {
                0 => bytes[start..end].fill(0),
                1 => {
                    // Moved from somewhere else on the disk.
                    let from = self.random.index(bytes.len() - (end - start) + 1);
                    bytes.copy_within(from..from + (end - start), start);
                }
                _ => bytes[start..end].copy_from_slice(&noise(self.random.number(), end - start)),
            }
        }
        match self.random.below(8) {
            0 => bytes.truncate(1 + self.random.index(bytes.len())),
            1 => bytes.extend(noise(self.random.number(), 1 + self.random.index(2 * CHUNK))),
            2 => {
                // The same disk as another machine has.
                let other = self.random.index(MACHINES);
                bytes = self.machines[other][0].1.to_vec();
            }
            _ => {}
        }
        self.machines[machine][disk].1 = Arc::new(bytes);
    }

    fn back_up(&mut self, machine: usize) {
        let parents: Vec<RecoveryPointId> =
            self.points.iter().filter(|(_, (of, _))| *of == machine).map(|(id, _)| *id).collect();
        let parent =
            (!parents.is_empty() && !self.random.once_in(4)).then(|| parents[self.random.index(parents.len())]);
        let parent = parent.map(|id| self.repository.load_point(id).unwrap_or_else(|error| self.fail(error)));
        let disks = self.machines[machine].clone();
        self.arm();
        let sources: Vec<(&String, Bytes)> = disks.iter().map(|(name, bytes)| (name, Bytes(bytes.clone()))).collect();
        let backup = self.repository.begin_backup(&format!("machine{machine}"), parent.as_ref(), Arc::default());
        let sealed = backup.and_then(|mut backup| {
            for (name, source) in &sources {
                backup.add_disk(name, source)?;
            }
            if self.random.once_in(10) {
                return Ok(None); // given up
            }
            backup.seal(PointDetails::default()).map(Some)
        });
        match sealed {
            Ok(Some(point)) => {
                self.points.insert(point.id, (machine, disks));
                // Their names, and those that are gone, stand in the directory that was synced.
                self.unsure.clear();
                self.undecided.clear();
            }
            Ok(None) => {}
            // What a cut-off backup may have left is found at the restart.
            Err(_) if self.folder.is_off() => self.adopt(machine, disks),
            Err(error) => self.fail(format_args!("a backup fails: {error}")),
        }
    }

    /// After a backup that was cut off: its point is there or not, but there is no other.
    fn adopt(&mut self, machine: usize, disks: Disks) {
        self.restart_with(|world, id| {
            let point = world.repository.load_point(id).unwrap_or_else(|error| world.fail(error));
            if point.machine != format!("machine{machine}") || point.disks.len() != disks.len() {
                world.fail(format_args!("point {id} was never sealed"));
            }
            world.points.insert(id, (machine, disks.clone()));
            world.unsure.insert(id);
        });
    }

    fn forget(&mut self) {
        if self.points.is_empty() {
            return;
        }
        let at = self.random.index(self.points.len());
        let Some(id) = self.points.keys().copied().nth(at) else { return };
        if self.random.once_in(3) {
            self.repository.protect(id, None, NOW).unwrap_or_else(|error| self.fail(error));
            let refused = self.repository.forget(id, None, NOW);
            if !matches!(refused, Err(PointError::Protected { .. })) {
                self.fail(format_args!("point {id} is protected, and to forget it gives {refused:?}"));
            }
            self.repository.unprotect(id).unwrap_or_else(|error| self.fail(error));
        }
        self.arm();
        let forgotten = self.repository.forget(id, None, NOW);
        let point = self.points.remove(&id);
        match forgotten {
            Ok(()) => drop(self.unsure.remove(&id)),
            Err(_) if self.folder.is_off() => self.undecided.extend(point.map(|point| (id, point))),
            Err(error) => self.fail(format_args!("point {id} cannot be forgotten: {error}")),
        }
    }

    fn add_key(&mut self) {
        let number = 2 + u8::try_from(self.random.below(4)).unwrap();
        if self.keys.contains_key(&number) {
            return;
        }
        self.arm();
        match self.repository.add_key(&secret(number), &number.to_string()) {
            Ok(_) => drop(self.keys.insert(number, Known::Yes)),
            Err(_) if self.folder.is_off() => drop(self.keys.insert(number, Known::Either)),
            Err(error) => self.fail(format_args!("key {number} cannot be added: {error}")),
        }
    }

    fn remove_key(&mut self) {
        let Some(number) = self.keys.keys().copied().rfind(|number| *number > 1) else { return };
        let slots = self.repository.key_slots().unwrap_or_else(|error| self.fail(error));
        let slot = slots
            .iter()
            .find(|slot| matches!(&slot.state, SlotState::Intact { label, .. } if *label == number.to_string()));
        let Some(slot) = slot else { return };
        self.arm();
        match self.repository.remove_key(slot.id) {
            Ok(()) => drop(self.keys.insert(number, Known::No)),
            Err(_) if self.folder.is_off() => drop(self.keys.insert(number, Known::Either)),
            Err(error) => self.fail(format_args!("key {number} cannot be removed: {error}")),
        }
    }

    fn verify(&mut self) {
        let options = VerifyOptions {
            data: if self.random.once_in(2) { DataCheck::All } else { DataCheck::None },
            ..VerifyOptions::default()
        };
        self.arm();
        match self.repository.verify(options, &Progress::new()) {
            Ok(report) if report.is_ok() || self.folder.is_off() => {}
            Ok(report) => self.fail(format_args!("damage: {:?}", report.damaged)),
            Err(_) if self.folder.is_off() => {}
            Err(error) => self.fail(format_args!("verify fails: {error}")),
        }
    }

    fn restart(&mut self) {
        self.restart_with(|world, id| world.fail(format_args!("point {id} came out of nowhere")));
    }

    /// The power goes, or the process is killed; then everything is looked at. `unknown` judges points that the model does
    /// not know.
    fn restart_with(&mut self, unknown: impl Fn(&mut World, RecoveryPointId)) {
        self.crashes += u64::from(self.folder.is_off());
        let killed = self.random.once_in(3);
        self.folder = match killed {
            true => self.folder.after_kill(),
            false => self.folder.after_crash_with(self.random.number()),
        };
        for (number, known) in self.keys.clone() {
            let opened = self.open(number);
            match (opened.is_ok(), known) {
                (true, Known::No) => self.fail(format_args!("key {number} was removed, and opens")),
                (false, Known::Yes) => {
                    self.fail(format_args!("key {number} does not open: {:?}", opened.err()));
                }
                (_, Known::Either) if killed => {} // as it is now, but a power cut may still change that
                (true, _) => drop(self.keys.insert(number, Known::Yes)),
                (false, _) => drop(self.keys.remove(&number)),
            }
        }
        self.repository = self.open(1).unwrap_or_else(|error| self.fail(error));
        let listed = self.repository.list_points().unwrap_or_else(|error| self.fail(error));
        let listed: BTreeSet<RecoveryPointId> = listed.into_iter().collect();
        for id in &listed {
            if let Some(point) = self.undecided.remove(id) {
                self.points.insert(*id, point);
                self.unsure.insert(*id);
            } else if !self.points.contains_key(id) {
                unknown(self, *id);
            }
        }
        if !killed {
            let unsure = std::mem::take(&mut self.unsure);
            self.undecided.clear();
            self.points.retain(|id, _| listed.contains(id) || !unsure.contains(id));
        }
        if let Some(gone) = self.points.keys().find(|id| !listed.contains(id)) {
            self.fail(format_args!("point {gone} was acknowledged, and is gone"));
        }
    }

    fn open(&self, key: u8) -> Result<Repository, blockstore::OpenError> {
        let storage = Arc::new(LocalStorage::new(Arc::new(self.folder.clone())));
        Repository::open(storage, Some(&secret(key)), 1 << 20)
    }

    /// Every point restores bit for bit.
    fn check(&self) {
        for (id, (_, disks)) in &self.points {
            let point = self.repository.load_point(*id).unwrap_or_else(|error| self.fail(error));
            for (name, bytes) in disks {
                let disk = self.repository.open_disk(&point, name).unwrap_or_else(|error| self.fail(error));
                let target = Memory(Mutex::new(vec![0xaa; bytes.len()]));
                let restored = restore(&disk, &target, ZeroPolicy::WriteZeroes, &Progress::new());
                restored.unwrap_or_else(|error| self.fail(format_args!("point {id}, {name}: {error}")));
                if *target.0.lock().unwrap() != **bytes {
                    self.fail(format_args!("point {id}, {name}: restored with other bytes"));
                }
            }
        }
        let options = VerifyOptions { data: DataCheck::All, ..VerifyOptions::default() };
        let report = self.repository.verify(options, &Progress::new()).unwrap_or_else(|error| self.fail(error));
        if !report.is_ok() {
            self.fail(format_args!("damage: {:?}", report.damaged));
        }
    }
}

fn first_content(random: &mut Random, machine: usize) -> Arc<Vec<u8>> {
    let length = 1 + random.index(20 * CHUNK);
    let mut bytes = noise(random.number(), length);
    // Chunks that repeat, and some that both machines have.
    for chunk in bytes.chunks_mut(CHUNK) {
        match random.below(5) {
            0 => chunk.fill(0),
            1 => chunk.fill(7),
            2 => chunk.fill(u8::try_from(machine).unwrap() + 1),
            _ => {}
        }
    }
    Arc::new(bytes)
}

#[test]
fn every_listed_point_restores_bit_for_bit_whatever_happened() {
    let (seed, cases) = (seed(), rounds(60, 3000));
    println!("LIFEBOAT_SEED={seed}, {cases} cases");
    let (mut points, mut crashes) = (0, 0);
    for case in seed..seed.wrapping_add(cases) {
        println!("case {case}: LIFEBOAT_SEED={case} LIFEBOAT_ROUNDS=1 repeats it");
        let mut world = World::new(case);
        for _ in 0..STEPS {
            world.step();
        }
        world.restart();
        world.check();
        points += world.points.len();
        crashes += world.crashes;
    }
    assert!(cases < 20 || (points > 0 && crashes > 0), "{points} points, {crashes} crashes: that proves nothing");
    println!("seed {seed}: {cases} cases, {crashes} crashes, {points} points restored");
}
