//! The store against a simple model: random backups, forgotten and protected points, retention, collects, key changes,
//! verifications, readers that hold a point, power cuts and kills at random operations, and restarts. Whatever happened,
//! every recovery point that is listed or held restores bit for bit, nothing that was acknowledged is gone or comes back,
//! exactly the secrets that should open the repository do, and in the end no more is stored than the points need.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "model/storage.rs"]
mod storage;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use blockstore::sim::SimFolder;
use blockstore::{
    CollectError, CollectOptions, DataCheck, Lease, PointDetails, PointDisk, PointError, Progress, Protected,
    Protection, RecoveryPointId, Repository, Secret, SlotState, Source, Target, VerifyOptions, ZeroPolicy, restore,
};
use lifeboat_tests::{Random, noise, rounds, seed};
use storage::{Around, SimStorage};

const CHUNK: usize = 16 << 10;
const MACHINES: usize = 2;
const STEPS: u64 = 24;
/// Headers and tables of packs that hold next to nothing.
const SLACK: u64 = 4096;
/// A lease of a machine that lost its power counts for so long: 10 minutes, and 5 by which clocks may differ.
const LEASE_S: u64 = 901;
/// Until when a protection without end holds; 0 is none.
const ENDLESS: u64 = u64::MAX;

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

/// A reader that opened a point, and reads on when it is forgotten.
struct Reader {
    _lease: Lease,
    id: RecoveryPointId,
    disks: Vec<(Arc<PointDisk>, Arc<Vec<u8>>)>,
}

struct World {
    case: u64,
    random: Random,
    folder: SimFolder,
    around: Around,
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
    /// The key that is replaced and the one that takes its place, after a rotation that was cut off: one of them opens.
    rotating: Option<(u8, u8)>,
    /// Until when points are protected; several where a change was cut off.
    protections: BTreeMap<RecoveryPointId, Vec<u64>>,
    readers: Vec<Reader>,
    /// Until when a lease from before a power cut may count.
    leased_until: u64,
    tally: Tally,
}

/// What happened, summed up over cases: a run in which something never happened proves nothing about it.
#[derive(Debug, Default)]
struct Tally {
    points: u64,
    power_cuts: u64,
    kills: u64,
    backups: u64,
    forgotten: u64,
    refused: u64,
    collects: u64,
    freed_packs: u64,
    repacked_packs: u64,
    held_reads: u64,
    rotations: u64,
    /// Stored bytes after the last collect, in per cent of a new repository with the same points.
    worst_per_cent: u64,
}

impl World {
    fn new(case: u64) -> World {
        let mut random = Random::new(case);
        let folder = SimFolder::new(case);
        let around = Around::new();
        let storage = Arc::new(SimStorage::new(&folder, &around));
        let chunk = u32::try_from(CHUNK).unwrap();
        let repository = Repository::init(storage, chunk, Protection::Secret(secret(1))).unwrap();
        let machines = (0..MACHINES)
            .map(|machine| {
                let disks = 1 + random.below(2);
                (0..disks).map(|disk| (format!("disk{disk}"), first_content(&mut random, machine))).collect()
            })
            .collect();
        World {
            case,
            random,
            folder,
            around,
            repository,
            machines,
            points: BTreeMap::new(),
            unsure: BTreeSet::new(),
            undecided: BTreeMap::new(),
            keys: BTreeMap::from([(1, Known::Yes)]),
            rotating: None,
            protections: BTreeMap::new(),
            readers: Vec::new(),
            leased_until: 0,
            tally: Tally::default(),
        }
    }

    #[track_caller]
    fn fail(&self, what: impl std::fmt::Display) -> ! {
        panic!("case {}: {what}", self.case)
    }

    /// Something goes wrong in one of the next operations, often.
    fn arm(&mut self) {
        if self.random.once_in(2) {
            // Key changes and forgotten points take a handful of operations, backups and collects many.
            let within = [4, 12, 60][self.random.index(3)];
            let at = self.folder.operations() + self.random.below(within);
            self.folder = self.folder.clone().crash_at(at);
        }
    }

    fn step(&mut self) {
        match self.random.below(24) {
            0..8 => {
                let machine = self.random.index(MACHINES);
                self.edit(machine);
                self.back_up(machine);
            }
            8..11 => self.forget_one(),
            11 => self.prune(),
            12 => self.protect(),
            13 => self.unprotect(),
            14 => self.add_key(),
            15 => self.remove_key(),
            16 => self.rotate_key(),
            17 => self.verify(),
            18 => self.hold(),
            19 => self.let_time_pass(),
            _ => self.collect(),
        }
        self.folder = self.folder.clone().crash_at(u64::MAX); // what was armed and not reached
        if !self.folder.is_off() {
            self.read_what_is_held();
        }
        // Even without a crash: nothing may live in memory alone.
        if self.folder.is_off() || self.random.once_in(4) {
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
                self.tally.backups += 1;
                self.names_are_durable();
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

    /// The names of points that are there, and that are gone, stand in the directory that was synced.
    fn names_are_durable(&mut self) {
        self.unsure.clear();
        self.undecided.clear();
    }

    fn any_point(&mut self) -> Option<RecoveryPointId> {
        if self.points.is_empty() {
            return None;
        }
        let at = self.random.index(self.points.len());
        self.points.keys().copied().nth(at)
    }

    fn forget_one(&mut self) {
        let Some(id) = self.any_point() else { return };
        self.arm();
        self.forget(id, None);
    }

    /// As retention does it: points of one machine go, and the decision rests on one that stays.
    fn prune(&mut self) {
        let machine = self.random.index(MACHINES);
        let mut points: Vec<RecoveryPointId> =
            self.points.iter().filter(|(_, (of, _))| *of == machine).map(|(id, _)| *id).collect();
        let Some(heir) = points.pop() else { return };
        self.arm();
        for id in points {
            if self.random.once_in(3) || self.folder.is_off() {
                continue;
            }
            self.forget(id, Some(heir));
        }
    }

    fn forget(&mut self, id: RecoveryPointId, heir: Option<RecoveryPointId>) {
        let now = self.around.now();
        let protected: Vec<bool> = self.protections.get(&id).into_iter().flatten().map(|until| *until > now).collect();
        let forgotten = self.repository.forget(id, heir, now);
        match forgotten {
            Ok(()) if !protected.is_empty() && protected.iter().all(|protected| *protected) => {
                self.fail(format_args!("point {id} is protected, and was forgotten"));
            }
            Ok(()) => {
                self.points.remove(&id);
                self.protections.remove(&id);
                self.tally.forgotten += 1;
                self.names_are_durable();
            }
            Err(PointError::Protected { .. }) if protected.contains(&true) => self.tally.refused += 1,
            Err(_) if self.folder.is_off() => {
                let point = self.points.remove(&id);
                self.unsure.remove(&id);
                self.undecided.extend(point.map(|point| (id, point)));
            }
            Err(error) => self.fail(format_args!("point {id} cannot be forgotten: {error}")),
        }
    }

    fn protect(&mut self) {
        let Some(id) = self.any_point() else { return };
        let now = self.around.now();
        let until = (!self.random.once_in(3)).then(|| now + 1 + self.random.below(3 * 86_400));
        self.arm();
        let protected = self.repository.protect(id, until, now);
        self.note_protection(id, until.unwrap_or(ENDLESS), protected);
    }

    fn unprotect(&mut self) {
        let all: Vec<RecoveryPointId> =
            self.protections.keys().copied().filter(|id| self.points.contains_key(id)).collect();
        if all.is_empty() {
            return;
        }
        let id = all[self.random.index(all.len())];
        self.arm();
        let unprotected = self.repository.unprotect(id).map(drop);
        self.note_protection(id, 0, unprotected);
    }

    fn note_protection(&mut self, id: RecoveryPointId, until: u64, result: Result<(), PointError>) {
        match result {
            Ok(()) => drop(self.protections.insert(id, vec![until])),
            Err(_) if self.folder.is_off() => {
                self.protections.entry(id).or_insert_with(|| vec![0]).push(until);
            }
            Err(error) => self.fail(format_args!("the protection of point {id} cannot be changed: {error}")),
        }
    }

    fn hold(&mut self) {
        let Some(id) = self.any_point() else { return };
        let point = self.repository.load_point(id).unwrap_or_else(|error| self.fail(error));
        let lease = self.repository.hold_point("export", &point).unwrap_or_else(|error| self.fail(error));
        let open = |(name, bytes): &(String, Arc<Vec<u8>>)| {
            let disk = self.repository.open_disk(&point, name).unwrap_or_else(|error| self.fail(error));
            (disk, bytes.clone())
        };
        let disks = self.points[&id].1.iter().map(open).collect();
        self.readers.push(Reader { _lease: lease, id, disks });
    }

    fn read_what_is_held(&mut self) {
        for reader in &self.readers {
            for (disk, bytes) in &reader.disks {
                self.restores(&format!("point {}, which is held", reader.id), disk, bytes);
            }
            self.tally.held_reads += 1;
        }
        if self.random.once_in(6) {
            self.readers.clear();
        }
    }

    fn let_time_pass(&mut self) {
        self.readers.clear(); // their leases would lapse
        let seconds = self.random.below(2 * 86_400);
        self.around.advance(seconds);
    }

    fn collect(&mut self) {
        let options = CollectOptions {
            dry_run: self.random.once_in(5),
            reclaim_now: self.random.once_in(2),
            threshold: [0, 50, 50, 90, 100][self.random.index(5)],
            ..CollectOptions::default()
        };
        self.arm();
        match self.repository.collect(&options, &Progress::new()) {
            Ok(report) if report.lost_chunks > 0 || !report.blocked.is_empty() => {
                self.fail(format_args!("a collect finds damage: {report:?}"));
            }
            Ok(report) if !report.dry_run => {
                self.tally.collects += 1;
                self.tally.freed_packs += report.freed_packs;
                self.tally.repacked_packs += report.repacked_packs;
            }
            Ok(_) => {}
            Err(_) if self.folder.is_off() => {}
            // One that the power cut ended is waited for, as nobody knows that its host has gone.
            Err(CollectError::InUse { .. }) if self.around.now() < self.leased_until => {}
            Err(error) => self.fail(format_args!("a collect fails: {error}")),
        }
    }

    fn add_key(&mut self) {
        let Some(number) = self.new_key() else { return };
        self.arm();
        match self.repository.add_key(&secret(number), &number.to_string()) {
            Ok(_) => drop(self.keys.insert(number, Known::Yes)),
            Err(_) if self.folder.is_off() => drop(self.keys.insert(number, Known::Either)),
            Err(error) => self.fail(format_args!("key {number} cannot be added: {error}")),
        }
    }

    fn new_key(&mut self) -> Option<u8> {
        let number = 2 + u8::try_from(self.random.below(12)).unwrap();
        (!self.keys.contains_key(&number)).then_some(number)
    }

    fn rotate_key(&mut self) {
        let old = self.keys.iter().rfind(|(number, known)| **number > 1 && **known == Known::Yes);
        let Some(old) = old.map(|(number, _)| *number) else { return };
        let Some(new) = self.new_key() else { return };
        let repository = self.open(old).unwrap_or_else(|error| self.fail(error));
        self.arm();
        match repository.rotate_key(&secret(new), &new.to_string()) {
            Ok(_) => {
                self.keys.extend([(old, Known::No), (new, Known::Yes)]);
                self.tally.rotations += 1;
            }
            Err(_) if self.folder.is_off() => {
                self.keys.extend([(old, Known::Either), (new, Known::Either)]);
                self.rotating = Some((old, new));
            }
            Err(error) => self.fail(format_args!("key {old} cannot be rotated: {error}")),
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
        self.rotating = None; // the one that is removed may be the one that was left
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
        let killed = self.random.once_in(3);
        if killed {
            self.folder = self.folder.after_kill();
            self.around.killed();
            self.tally.kills += 1;
        } else {
            self.folder = self.folder.after_crash_with(self.random.number());
            self.around.power_cut();
            self.tally.power_cuts += 1;
            self.leased_until = self.around.now() + LEASE_S;
        }
        self.readers.clear(); // after the end of their process: their leases stay
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
        if let Some((old, new)) = self.rotating
            && self.open(old).is_err()
            && self.open(new).is_err()
        {
            self.fail(format_args!("key {old} was replaced by {new}, and neither opens"));
        }
        if !killed {
            self.rotating = None;
        }
        self.look_at_protections(killed);
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

    fn look_at_protections(&mut self, killed: bool) {
        for (id, allowed) in self.protections.clone() {
            let found = self.repository.protection(id).unwrap_or_else(|error| self.fail(error));
            let until = match found {
                None => 0,
                Some(Protected::Until(until)) => until,
                Some(Protected::Always) => ENDLESS,
                Some(damaged @ Protected::Damaged(_)) => self.fail(format_args!("point {id} is {damaged:?}")),
            };
            let gone = !self.points.contains_key(&id);
            if !gone && !allowed.contains(&until) {
                self.fail(format_args!("point {id} is protected until {until}, not until one of {allowed:?}"));
            }
            if !killed {
                self.protections.insert(id, vec![until]);
            }
        }
    }

    fn open(&self, key: u8) -> Result<Repository, blockstore::OpenError> {
        let storage = Arc::new(SimStorage::new(&self.folder, &self.around));
        Repository::open(storage, Some(&secret(key)), 1 << 20)
    }

    fn restores(&self, what: &str, disk: &PointDisk, bytes: &[u8]) {
        let target = Memory(Mutex::new(vec![0xaa; bytes.len()]));
        let restored = restore(disk, &target, ZeroPolicy::WriteZeroes, &Progress::new());
        restored.unwrap_or_else(|error| self.fail(format_args!("{what}: {error}")));
        if *target.0.lock().unwrap() != *bytes {
            self.fail(format_args!("{what}: restored with other bytes"));
        }
    }

    /// Every point restores bit for bit.
    fn check(&self) {
        for (id, (_, disks)) in &self.points {
            let point = self.repository.load_point(*id).unwrap_or_else(|error| self.fail(error));
            for (name, bytes) in disks {
                let disk = self.repository.open_disk(&point, name).unwrap_or_else(|error| self.fail(error));
                self.restores(&format!("point {id}, {name}"), &disk, bytes);
            }
        }
        let options = VerifyOptions { data: DataCheck::All, ..VerifyOptions::default() };
        let report = self.repository.verify(options, &Progress::new()).unwrap_or_else(|error| self.fail(error));
        if !report.is_ok() {
            self.fail(format_args!("damage: {:?}", report.damaged));
        }
    }

    /// What stays when everything that is not needed may go, against a new repository with the same points: each pack is
    /// at least half needed, and has a header and a table of its own.
    fn check_room(&mut self) {
        self.around.advance(LEASE_S);
        let options = CollectOptions { reclaim_now: true, ..CollectOptions::default() };
        let collected = self.repository.collect(&options, &Progress::new());
        let report = collected.unwrap_or_else(|error| self.fail(format_args!("the last collect fails: {error}")));
        if !report.quarantined.is_empty() || !self.repository.leases().unwrap().is_empty() {
            self.fail(format_args!("nobody is at work, and something waits: {report:?}"));
        }
        let left = packs(&self.repository);
        let folder = SimFolder::new(self.case);
        let storage = Arc::new(SimStorage::new(&folder, &self.around));
        let fresh = Repository::init(storage, u32::try_from(CHUNK).unwrap(), Protection::Secret(secret(1))).unwrap();
        for (machine, disks) in self.points.values() {
            let sources: Vec<Bytes> = disks.iter().map(|(_, bytes)| Bytes(bytes.clone())).collect();
            let mut backup = fresh.begin_backup(&format!("machine{machine}"), None, Arc::default()).unwrap();
            for ((name, _), source) in disks.iter().zip(&sources) {
                backup.add_disk(name, source).unwrap();
            }
            backup.seal(PointDetails::default()).unwrap();
        }
        fresh.collect(&options, &Progress::new()).unwrap();
        let needed = packs(&fresh);
        if left > 2 * needed + SLACK {
            self.fail(format_args!("{left} bytes are stored, where a new repository has {needed}"));
        }
        self.tally.worst_per_cent = (left * 100).checked_div(needed).unwrap_or(0);
    }
}

/// Bytes of all packs.
fn packs(repository: &Repository) -> u64 {
    let options = CollectOptions { dry_run: true, ..CollectOptions::default() };
    repository.collect(&options, &Progress::new()).unwrap().pack_bytes
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.points += other.points;
        self.power_cuts += other.power_cuts;
        self.kills += other.kills;
        self.backups += other.backups;
        self.forgotten += other.forgotten;
        self.refused += other.refused;
        self.collects += other.collects;
        self.freed_packs += other.freed_packs;
        self.repacked_packs += other.repacked_packs;
        self.held_reads += other.held_reads;
        self.rotations += other.rotations;
        self.worst_per_cent = self.worst_per_cent.max(other.worst_per_cent);
    }

    fn proves_something(&self) -> bool {
        let happened = [
            self.points,
            self.power_cuts,
            self.kills,
            self.backups,
            self.forgotten,
            self.refused,
            self.collects,
            self.freed_packs,
            self.repacked_packs,
            self.held_reads,
            self.rotations,
        ];
        !happened.contains(&0)
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
    let (seed, cases) = (seed(), rounds(150, 4000));
    println!("LIFEBOAT_SEED={seed}, {cases} cases");
    let mut tally = Tally::default();
    for case in seed..seed.wrapping_add(cases) {
        println!("case {case}: LIFEBOAT_SEED={case} LIFEBOAT_ROUNDS=1 repeats it");
        let mut world = World::new(case);
        for _ in 0..STEPS {
            world.step();
        }
        world.restart();
        world.check();
        world.check_room();
        world.check();
        world.tally.points = world.points.len() as u64;
        tally.add(&world.tally);
    }
    assert!(cases < 30 || tally.proves_something(), "seed {seed}: something never happened: {tally:?}");
    println!("seed {seed}: {cases} cases, {tally:?}");
}
