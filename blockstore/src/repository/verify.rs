//! [`Repository::verify`]: checks what is stored, and names what is damaged and whom it hits.
//!
//! Structure: configuration, key slots, every index run as a whole, every recovery point, every manifest node, and
//! for every chunk that it has a place inside an existing pack of the right length. With `read_data`, every frame of
//! every referenced pack is read, opened and hashed, and every such pack is hashed. Damaged index runs are reported,
//! and rebuilt so that the check can go on.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::Repository;
use super::open::{OpenError, read_config, read_slot};
use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::pack::{MAX_PACK_LEN, decode_pack};
use crate::id::{ChunkId, IdHash, PackId, RecoveryPointId, RunId};
use crate::index::build::describe_pack;
use crate::index::run::Location;
use crate::manifest::{FAN_OUT, Shape};
use crate::point::RecoveryPoint;
use crate::progress::Progress;
use crate::storage::{Object, ObjectKind};

/// What to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyOptions {
    /// Only this recovery point, or all.
    pub point: Option<RecoveryPointId>,
    /// Whether to read the data, too.
    pub read_data: bool,
}

/// A disk that damage hits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Affected {
    /// The recovery point.
    pub point: RecoveryPointId,
    /// The disk's name.
    pub disk: String,
}

/// A damaged object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which object; for a chunk that is nowhere, the recovery point that wants it.
    pub object: Object,
    /// What is wrong.
    pub what: String,
    /// Whom it hits, as far as known.
    pub affected: Vec<Affected>,
}

/// The result of a verification.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VerifyReport {
    /// Recovery points checked.
    pub points: u64,
    /// Different manifest nodes checked.
    pub nodes: u64,
    /// Chunks looked up, once for every different leaf they stand in.
    pub chunks: u64,
    /// Packs read whole.
    pub packs_read: u64,
    /// Bytes of them.
    pub bytes_read: u64,
    /// Packs that no verified recovery point needs. Not damage: what a dead backup or a dropped point left.
    pub unreferenced: u64,
    /// Everything that is damaged.
    pub damaged: Vec<Damage>,
}

impl VerifyReport {
    /// Whether nothing is damaged.
    pub fn is_ok(&self) -> bool {
        self.damaged.is_empty()
    }
}

/// Why a verification could not be completed.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Storage or the index failed in a way that is not damage.
    #[error("the verification could not be completed")]
    Read(#[from] ReadError),
    /// The caller cancelled.
    #[error("the verification was cancelled")]
    Cancelled,
}

/// One damage as it is collected: equal ones are one, with more affected.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    object: Object,
    what: String,
}

type Findings = BTreeMap<Finding, BTreeSet<Affected>>;

struct Verifier<'a> {
    repository: &'a Repository,
    progress: &'a Progress,
    /// Lengths of the packs that exist.
    packs: HashMap<PackId, u64>,
    findings: Findings,
    /// Nodes walked, and what was found below them.
    walked: HashMap<(u8, ChunkId), Vec<Finding>>,
    referenced: HashSet<PackId>,
    /// Chunks whose frames are bad; filled by reading the data.
    bad: HashMap<ChunkId, Finding, IdHash>,
    report: VerifyReport,
}

impl Repository {
    /// Checks the repository, or one recovery point of it. Damage is not an error: it is in the report.
    pub fn verify(&self, options: VerifyOptions, progress: &Progress) -> Result<VerifyReport, VerifyError> {
        let mut verifier = Verifier {
            repository: self,
            progress,
            packs: self.list_packs()?,
            findings: Findings::new(),
            walked: HashMap::new(),
            referenced: HashSet::new(),
            bad: HashMap::default(),
            report: VerifyReport::default(),
        };
        verifier.check_head()?;
        verifier.check_index()?;
        let points = verifier.load_points(options.point)?;
        verifier.walk_all(&points)?;
        if options.read_data {
            verifier.read_data()?;
            if !verifier.bad.is_empty() {
                verifier.walked.clear(); // once more, to learn whom the bad chunks hit
                let (nodes, chunks) = (verifier.report.nodes, verifier.report.chunks);
                verifier.walk_all(&points)?;
                (verifier.report.nodes, verifier.report.chunks) = (nodes, chunks);
            }
        }
        Ok(verifier.finish())
    }

    fn list_packs(&self) -> Result<HashMap<PackId, u64>, ReadError> {
        let listed = self.storage().list(ObjectKind::Pack);
        let listed = listed.map_err(|source| ReadError::Io { object: "packs".to_owned(), source })?;
        let packs = listed.into_iter().filter_map(|listed| match listed.object {
            Object::Pack(id) => Some((id, listed.len)),
            _ => None,
        });
        Ok(packs.collect())
    }
}

impl Verifier<'_> {
    fn finish(mut self) -> VerifyReport {
        self.report.unreferenced = self.packs.keys().filter(|pack| !self.referenced.contains(pack)).count() as u64;
        self.report.damaged = self
            .findings
            .into_iter()
            .map(|(finding, affected)| Damage {
                object: finding.object,
                what: finding.what,
                affected: affected.into_iter().collect(),
            })
            .collect();
        self.report
    }

    fn stop_if_cancelled(&self) -> Result<(), VerifyError> {
        if self.progress.is_cancelled() { Err(VerifyError::Cancelled) } else { Ok(()) }
    }

    fn note(&mut self, object: Object, what: impl fmt::Display) -> Finding {
        let finding = Finding { object, what: what.to_string() };
        self.findings.entry(finding.clone()).or_default();
        finding
    }

    /// Configuration and key slots.
    fn check_head(&mut self) -> Result<(), VerifyError> {
        let storage = self.repository.storage();
        let config = self.repository.fetcher().config;
        match read_config(storage) {
            Ok(read) if read == config => {}
            Ok(_) => drop(self.note(Object::Config, "it is not the one this repository was opened with")),
            Err(error) => self.note_open(Object::Config, error)?,
        }
        let slots = storage.list(ObjectKind::KeySlot);
        for listed in slots.map_err(|source| ReadError::Io { object: "key slots".to_owned(), source })? {
            let Object::KeySlot(id) = listed.object else { continue };
            if let Err(error) = read_slot(storage, &config, id) {
                self.note_open(listed.object, error)?;
            }
        }
        Ok(())
    }

    fn note_open(&mut self, object: Object, error: OpenError) -> Result<(), VerifyError> {
        let what = match error {
            OpenError::Damaged { source, .. } | OpenError::UnknownVersion(source) => source.to_string(),
            OpenError::NotARepository => "it is missing".to_owned(),
            OpenError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => "it is missing".to_owned(),
            OpenError::Io { object, source } => return Err(ReadError::Io { object, source }.into()),
            other => other.to_string(),
        };
        self.note(object, what);
        Ok(())
    }

    /// Hashes every run; damaged ones are replaced.
    fn check_index(&mut self) -> Result<(), VerifyError> {
        let index = self.repository.fetcher().index.clone();
        let mut damaged: Vec<(RunId, FormatError)> = Vec::new();
        for run in index.runs() {
            self.stop_if_cancelled()?;
            if !run.is_intact() {
                damaged.push((run.id, FormatError::Name));
            }
        }
        for (id, reason) in &damaged {
            self.note(Object::IndexRun(*id), format!("{reason}; it was set aside and rebuilt from the packs"));
        }
        if !damaged.is_empty() {
            index.replace_damaged(damaged)?;
        }
        Ok(())
    }

    fn load_points(&mut self, only: Option<RecoveryPointId>) -> Result<Vec<RecoveryPoint>, VerifyError> {
        let ids = match only {
            Some(id) => vec![id],
            None => self.repository.list_points()?,
        };
        let mut points = Vec::new();
        for id in ids {
            match self.repository.load_point(id) {
                Ok(point) => {
                    self.report.points += 1;
                    self.progress.add_total(point.disks.iter().map(|disk| disk.size).sum());
                    points.push(point);
                }
                Err(ReadError::Damaged { object, source }) => drop(self.note(object, source)),
                Err(ReadError::NoSuchPoint { .. }) if only.is_none() => {} // dropped since the listing
                Err(error) => return Err(error.into()),
            }
        }
        points.sort_by_key(|point| point.time_unix_ns);
        Ok(points)
    }

    fn walk_all(&mut self, points: &[RecoveryPoint]) -> Result<(), VerifyError> {
        for point in points {
            for disk in &point.disks {
                let Some(shape) = Shape::of(disk.size, disk.chunk_size) else { continue }; // refused when loaded
                let hit = self.walk(disk.root, shape.levels - 1, point.id)?;
                let affected = Affected { point: point.id, disk: disk.name.clone() };
                for finding in hit {
                    self.findings.entry(finding).or_default().insert(affected.clone());
                }
                self.progress.add_done(disk.size);
            }
        }
        Ok(())
    }

    /// Walks a subtree not walked yet and returns what is damaged in it. At most 7 levels deep.
    fn walk(&mut self, id: ChunkId, level: u8, point: RecoveryPointId) -> Result<Vec<Finding>, VerifyError> {
        if id.is_zero() {
            return Ok(Vec::new());
        }
        if let Some(found) = self.walked.get(&(level, id)) {
            return Ok(found.clone());
        }
        self.stop_if_cancelled()?;
        let mut found = self.look_up(id, point)?;
        if found.is_empty() {
            match self.repository.fetcher().node(&id, level) {
                Ok(node) => {
                    self.report.nodes += 1;
                    for at in 0..FAN_OUT {
                        let child = node.child(at);
                        if child.is_zero() {
                            continue;
                        }
                        let below = if level == 0 {
                            self.report.chunks += 1;
                            self.look_up(child, point)?
                        } else {
                            self.walk(child, level - 1, point)?
                        };
                        found.extend(below);
                    }
                }
                Err(error) => found.push(self.node_damage(id, point, error)?),
            }
        }
        found.sort_unstable();
        found.dedup();
        self.walked.insert((level, id), found.clone());
        Ok(found)
    }

    fn node_damage(&mut self, id: ChunkId, point: RecoveryPointId, error: ReadError) -> Result<Finding, VerifyError> {
        match error {
            ReadError::CorruptChunk { pack, .. } => {
                Ok(self.note(Object::Pack(pack), format!("manifest node {id} in it is damaged")))
            }
            ReadError::MissingChunk { .. } => {
                Ok(self.note(Object::Point(point), format!("its node {id} is in no pack")))
            }
            error => Err(error.into()),
        }
    }

    /// Whether an id has a place in a pack that exists at the right length; else what is wrong.
    fn look_up(&mut self, id: ChunkId, point: RecoveryPointId) -> Result<Vec<Finding>, VerifyError> {
        if let Some(bad) = self.bad.get(&id) {
            return Ok(vec![bad.clone()]);
        }
        let index = self.repository.fetcher().index.clone();
        let mut locations = index.locate(&id);
        if locations.is_empty() && index.repair(index.generation())? {
            locations = index.locate(&id);
        }
        let mut wrong = Vec::new();
        for location in &locations {
            let pack = location.pack.pack;
            if let Some(what) = self.pack_problem(location) {
                wrong.push((Object::Pack(pack), what));
            } else {
                self.referenced.insert(pack);
                return Ok(Vec::new());
            }
        }
        if wrong.is_empty() {
            wrong.push((Object::Point(point), format!("its chunk or node {id} is in no pack")));
        }
        Ok(wrong.into_iter().map(|(object, what)| self.note(object, what)).collect())
    }

    fn pack_problem(&mut self, location: &Location) -> Option<String> {
        let pack = location.pack.pack;
        if !self.packs.contains_key(&pack) {
            // Not in the listing: perhaps a backup that runs at the same time stored it since.
            if let Ok(len) = self.repository.storage().len(&Object::Pack(pack)) {
                self.packs.insert(pack, len);
            }
        }
        match self.packs.get(&pack) {
            None => Some("it is missing".to_owned()),
            Some(len) if *len != u64::from(location.pack.len) => {
                Some(format!("it has {len} bytes instead of {}", location.pack.len))
            }
            Some(_) => None,
        }
    }

    /// Reads every referenced pack, on all cores.
    fn read_data(&mut self) -> Result<(), VerifyError> {
        let mut packs: Vec<PackId> = self.referenced.iter().copied().collect();
        packs.sort_unstable();
        self.progress.add_total(packs.iter().filter_map(|pack| self.packs.get(pack)).sum());
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let workers = thread::available_parallelism().map_or(2, |cores| cores.get().min(16));
        let check = || {
            while let Some(pack) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.progress.is_cancelled() {
                    return;
                }
                let result = check_pack(self.repository, *pack);
                if let Ok((len, _)) = &result {
                    self.progress.add_done(*len);
                    self.progress.add_read(*len);
                }
                results.lock().unwrap_or_else(PoisonError::into_inner).push((*pack, result));
            }
        };
        thread::scope(|scope| {
            for _ in 1..workers {
                let _ = thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, check); // or fewer
            }
            check();
        });
        self.stop_if_cancelled()?;
        for (pack, result) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let (len, problems) = result?;
            self.report.packs_read += 1;
            self.report.bytes_read += len;
            for what in problems.whole {
                self.note(Object::Pack(pack), what);
            }
            for chunk in problems.chunks {
                let finding = self.note(Object::Pack(pack), "frames in it are damaged");
                if !self.has_good_copy(chunk, pack) {
                    self.bad.insert(chunk, finding);
                }
            }
        }
        Ok(())
    }

    fn has_good_copy(&self, chunk: ChunkId, except: PackId) -> bool {
        let fetcher = self.repository.fetcher();
        let others: Vec<_> =
            fetcher.index.locate(&chunk).into_iter().filter(|location| location.pack.pack != except).collect();
        others.iter().any(|location| {
            let mut frame = vec![0; location.entry.stored_len as usize]; // inside a pack: checked by the run
            let object = Object::Pack(location.pack.pack);
            let read = fetcher.storage.get_range(&object, u64::from(location.entry.offset), &mut frame);
            read.is_ok() && fetcher.check_frame(location.pack.pack, location, &mut frame).is_ok()
        })
    }
}

/// What is wrong with a pack.
#[derive(Default)]
struct PackProblems {
    whole: Vec<String>,
    chunks: Vec<ChunkId>,
}

/// Reads a pack and checks its name, its structure and its frames.
fn check_pack(repository: &Repository, pack: PackId) -> Result<(u64, PackProblems), ReadError> {
    let fetcher = repository.fetcher();
    let object = Object::Pack(pack);
    let mut problems = PackProblems::default();
    let bytes = match fetcher.storage.get(&object, u64::from(MAX_PACK_LEN)) {
        Ok(bytes) => bytes,
        Err(source) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::FileTooLarge) => {
            problems.whole.push("it is missing or too long".to_owned());
            problems.chunks = indexed_chunks(repository, pack);
            return Ok((0, problems));
        }
        Err(source) => return Err(ReadError::io(&object, source)),
    };
    let len = bytes.len() as u64;
    if blake3::hash(&bytes).as_bytes() == &pack.0 {
        // The bytes are those that were written; still open every frame, to notice what was written wrong.
        match decode_pack(&bytes) {
            Ok((header, frames)) => {
                let pack_len = u32::try_from(len).unwrap_or(MAX_PACK_LEN); // at most MAX_PACK_LEN
                let (row, entries) = describe_pack(pack, &header, pack_len, &frames);
                for entry in entries {
                    let location = Location { pack: row, entry };
                    if !frame_is_good(repository, &bytes, &location)? {
                        problems.chunks.push(entry.id);
                    }
                }
            }
            Err(error) => {
                problems.whole.push(error.to_string());
                problems.chunks = indexed_chunks(repository, pack);
            }
        }
    } else {
        // Damaged somewhere; the index, not the pack's own table, says which frames ought to be there.
        problems.whole.push(FormatError::Name.to_string());
        for location in indexed(repository, pack) {
            if !frame_is_good(repository, &bytes, &location)? {
                problems.chunks.push(location.entry.id);
            }
        }
    }
    Ok((len, problems))
}

fn frame_is_good(repository: &Repository, bytes: &[u8], location: &Location) -> Result<bool, ReadError> {
    let start = location.entry.offset as usize;
    let frame = bytes.get(start..).and_then(|rest| rest.get(..location.entry.stored_len as usize));
    let Some(frame) = frame else { return Ok(false) };
    match repository.fetcher().check_frame(location.pack.pack, location, &mut frame.to_vec()) {
        Ok(()) => Ok(true),
        Err(ReadError::CorruptChunk { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Everything the index says about a pack. Slow, but only damaged packs come here.
fn indexed(repository: &Repository, pack: PackId) -> Vec<Location> {
    let mut found = Vec::new();
    for run in repository.fetcher().index.runs() {
        if run.packs().any(|row| row.pack == pack) {
            let locations = run.entries().iter().filter_map(|raw| run.location(raw));
            found.extend(locations.filter(|location| location.pack.pack == pack));
        }
    }
    found
}

fn indexed_chunks(repository: &Repository, pack: PackId) -> Vec<ChunkId> {
    indexed(repository, pack).into_iter().map(|location| location.entry.id).collect()
}
