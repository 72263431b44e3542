//! [`Repository::verify`]: checks what is stored, and names what is damaged and whom it hits.
//!
//! Structure: configuration, key slots, every index run as a whole, every recovery point, every manifest node, and
//! for every chunk that it has a place inside an existing pack of the right length. With `read_data`, every frame of
//! every referenced pack is read, opened and hashed, and every such pack is hashed. A pack that fails this is marked in
//! the repository, so that later backups store its chunks anew; once they have, nothing needs the pack and it is no
//! damage any more. Damaged index runs are rebuilt, and reported as repaired.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use tracing::info;

use super::Repository;
use super::open::{OpenError, read_config, read_slot};
use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::pack::{MAX_PACK_LEN, decode_pack};
use crate::format::run::Entry;
use crate::id::{ChunkId, IdHash, PackId, RecoveryPointId, RunId};
use crate::index::SetAside;
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
    /// Everything that is damaged, each object once.
    pub damaged: Vec<Damage>,
    /// What was damaged and has been rebuilt, by this verification or since the repository was opened. No damage any
    /// more.
    pub repaired: Vec<Damage>,
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

/// Damage as it is collected: what is wrong with each object, said once, and whom it hits.
type Findings = BTreeMap<Object, (String, BTreeSet<Affected>)>;

/// A pack whose bytes are not those that were written.
struct Rotten {
    what: String,
    /// Chunks and nodes that cannot be read from it.
    bad: HashSet<ChunkId, IdHash>,
}

struct Verifier<'a> {
    repository: &'a Repository,
    progress: &'a Progress,
    /// Lengths of the packs that exist.
    packs: HashMap<PackId, u64>,
    findings: Findings,
    /// What the last walk found; the next one finds it again.
    walk_findings: Findings,
    /// Nodes walked, and what was found damaged below them.
    walked: HashMap<(u8, ChunkId), Vec<Object>>,
    /// Packs the last walk needs.
    referenced: HashSet<PackId>,
    /// Packs read whole.
    read: HashSet<PackId>,
    /// Those of them that are damaged.
    rotten: HashMap<PackId, Rotten>,
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
            walk_findings: Findings::new(),
            walked: HashMap::new(),
            referenced: HashSet::new(),
            read: HashSet::new(),
            rotten: HashMap::new(),
            report: VerifyReport::default(),
        };
        let damaged = &self.fetcher().damaged;
        damaged.load(self.storage()).map_err(|source| ReadError::Io { object: "damaged".to_owned(), source })?;
        verifier.check_head()?;
        verifier.check_index()?;
        let points = verifier.load_points(options.point)?;
        verifier.walk_all(&points)?;
        if options.read_data {
            // Where a pack turns out to be damaged, the points may need others in its place: look once more.
            while verifier.read_data()? {
                verifier.walk_all(&points)?;
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
        let mut findings = self.findings;
        for (object, (what, affected)) in self.walk_findings {
            findings.entry(object).or_insert((what, BTreeSet::new())).1.extend(affected);
        }
        // Damaged, though all that is needed of it can be read.
        for (pack, rotten) in self.rotten.into_iter().filter(|(pack, _)| self.referenced.contains(pack)) {
            findings.entry(Object::Pack(pack)).or_insert((rotten.what, BTreeSet::new()));
        }
        let damage = |(object, (what, affected)): (Object, (String, BTreeSet<Affected>))| Damage {
            object,
            what,
            affected: affected.into_iter().collect(),
        };
        self.report.damaged = findings.into_iter().map(damage).collect();
        self.report
    }

    fn stop_if_cancelled(&self) -> Result<(), VerifyError> {
        if self.progress.is_cancelled() { Err(VerifyError::Cancelled) } else { Ok(()) }
    }

    fn note(&mut self, object: Object, what: impl fmt::Display) {
        self.findings.entry(object).or_insert_with(|| (what.to_string(), BTreeSet::new()));
    }

    /// Notes what a walk finds.
    fn note_below(&mut self, object: Object, what: impl fmt::Display) -> Object {
        self.walk_findings.entry(object).or_insert_with(|| (what.to_string(), BTreeSet::new()));
        object
    }

    /// Configuration and key slots.
    fn check_head(&mut self) -> Result<(), VerifyError> {
        let storage = self.repository.storage();
        let config = self.repository.fetcher().config;
        match read_config(storage) {
            Ok(read) if read == config => {}
            Ok(_) => self.note(Object::Config, "it is not the one this repository was opened with"),
            Err(error) => self.note_open(Object::Config, error)?,
        }
        let slots = storage.list(ObjectKind::KeySlot);
        let slots = slots.map_err(|source| ReadError::Io { object: "key slots".to_owned(), source })?;
        if slots.is_empty() && self.repository.encrypted() {
            self.note(Object::Config, FormatError::NoKeySlot);
        }
        for listed in slots {
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
        if !damaged.is_empty() {
            index.replace_damaged(damaged)?;
        }
        for SetAside { run, reason, kept } in index.take_set_aside() {
            let object = Object::IndexRun(run);
            if kept {
                let what = format!("{reason}; it was set aside and rebuilt from the packs");
                self.report.repaired.push(Damage { object, what, affected: Vec::new() });
            } else {
                self.note(object, format!("{reason}; it is not used, but could not be set aside"));
            }
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
                Err(ReadError::Damaged { object, source }) => self.note(object, source),
                Err(ReadError::NoSuchPoint { .. }) if only.is_none() => {} // dropped since the listing
                Err(error) => return Err(error.into()),
            }
        }
        points.sort_by_key(|point| point.time_unix_ns);
        Ok(points)
    }

    fn walk_all(&mut self, points: &[RecoveryPoint]) -> Result<(), VerifyError> {
        self.walk_findings.clear();
        self.walked.clear();
        self.referenced.clear();
        (self.report.nodes, self.report.chunks) = (0, 0);
        let again = !self.read.is_empty();
        for point in points {
            for disk in &point.disks {
                let Some(shape) = Shape::of(disk.size, disk.chunk_size) else { continue }; // refused when loaded
                let hit = self.walk(disk.root, shape.levels - 1, point.id)?;
                let affected = Affected { point: point.id, disk: disk.name.clone() };
                for object in hit {
                    if let Some((_, hit)) = self.walk_findings.get_mut(&object) {
                        hit.insert(affected.clone());
                    }
                }
                if !again {
                    self.progress.add_done(disk.size);
                }
            }
        }
        Ok(())
    }

    /// Walks a subtree not walked yet and returns what is damaged in it. At most 7 levels deep.
    fn walk(&mut self, id: ChunkId, level: u8, point: RecoveryPointId) -> Result<Vec<Object>, VerifyError> {
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

    fn node_damage(&mut self, id: ChunkId, point: RecoveryPointId, error: ReadError) -> Result<Object, VerifyError> {
        match error {
            ReadError::CorruptChunk { pack, .. } => {
                Ok(self.note_below(Object::Pack(pack), format!("manifest node {id} in it is damaged")))
            }
            ReadError::MissingChunk { .. } => {
                Ok(self.note_below(Object::Point(point), format!("its node {id} is in no pack")))
            }
            error => Err(error.into()),
        }
    }

    /// Whether an id has a place in a pack that exists at the right length and is not known to hold it damaged; else
    /// what is wrong. Of several places the best counts, so that a damaged pack is needed only for what is in no other.
    fn look_up(&mut self, id: ChunkId, point: RecoveryPointId) -> Result<Vec<Object>, VerifyError> {
        let index = self.repository.fetcher().index.clone();
        let mut locations = index.locate(&id);
        if locations.is_empty() && index.repair(index.generation())? {
            locations = index.locate(&id);
        }
        let mut wrong = Vec::new();
        let mut marked = Vec::new();
        for location in &locations {
            let pack = location.pack.pack;
            if let Some(what) = self.pack_problem(location) {
                wrong.push((Object::Pack(pack), what));
            } else if self.rotten.contains_key(&pack) || self.repository.fetcher().damaged.contains(&pack) {
                marked.push(pack);
            } else {
                self.referenced.insert(pack);
                return Ok(Vec::new());
            }
        }
        self.referenced.extend(&marked);
        for pack in marked {
            match self.rotten.get(&pack) {
                Some(rotten) if rotten.bad.contains(&id) => wrong.push((Object::Pack(pack), rotten.what.clone())),
                _ => return Ok(Vec::new()), // marked, but this frame is good, or was not read yet
            }
        }
        if wrong.is_empty() {
            wrong.push((Object::Point(point), format!("its chunk or node {id} is in no pack")));
        }
        Ok(wrong.into_iter().map(|(object, what)| self.note_below(object, what)).collect())
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

    /// Reads every pack that is needed or marked and was not read yet, on all cores. Marks the damaged ones, takes the
    /// mark from those that are whole again. True if one is damaged.
    fn read_data(&mut self) -> Result<bool, VerifyError> {
        let damaged = &self.repository.fetcher().damaged;
        let marked = damaged.all().into_iter().filter(|pack| self.packs.contains_key(pack));
        let wanted: BTreeSet<PackId> = self.referenced.iter().copied().chain(marked).collect();
        let packs: Vec<PackId> = wanted.into_iter().filter(|pack| !self.read.contains(pack)).collect();
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
        let storage = self.repository.storage();
        let mut found = false;
        for (pack, result) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let (len, problems) = result?;
            self.report.packs_read += 1;
            self.report.bytes_read += len;
            self.read.insert(pack);
            match problems.what() {
                Some(what) => {
                    damaged.mark(storage, pack);
                    self.rotten.insert(pack, Rotten { what, bad: problems.chunks });
                    found = true;
                }
                None if damaged.contains(&pack) => {
                    info!(%pack, "the pack is whole again");
                    damaged.clear(storage, pack);
                }
                None => {}
            }
        }
        Ok(found)
    }
}

/// What is wrong with a pack.
#[derive(Default)]
struct PackProblems {
    whole: Option<String>,
    chunks: HashSet<ChunkId, IdHash>,
}

impl PackProblems {
    fn what(&self) -> Option<String> {
        match (&self.whole, self.chunks.len()) {
            (None, 0) => None,
            (Some(whole), 0) => Some(whole.clone()),
            (None, frames) => Some(format!("{frames} of its frames cannot be read")),
            (Some(whole), frames) => Some(format!("{whole}; {frames} of its frames cannot be read")),
        }
    }
}

/// Reads a pack and checks its name, its structure and its frames.
fn check_pack(repository: &Repository, pack: PackId) -> Result<(u64, PackProblems), ReadError> {
    let fetcher = repository.fetcher();
    let object = Object::Pack(pack);
    let mut problems = PackProblems::default();
    let bytes = match fetcher.storage.get(&object, u64::from(MAX_PACK_LEN)) {
        Ok(bytes) => bytes,
        Err(source) if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::FileTooLarge) => {
            problems.whole = Some("it is missing or too long".to_owned());
            problems.chunks = indexed_chunks(repository, pack);
            return Ok((0, problems));
        }
        Err(source) => return Err(ReadError::io(&object, source)),
    };
    let len = bytes.len() as u64;
    let named = blake3::hash(&bytes).as_bytes() == &pack.0;
    let mut bytes = bytes.to_vec();
    if named {
        // The bytes are those that were written; still open every frame, to notice what was written wrong.
        match decode_pack(&bytes) {
            Ok((header, frames)) => {
                let pack_len = u32::try_from(len).unwrap_or(MAX_PACK_LEN); // at most MAX_PACK_LEN
                let (row, entries) = describe_pack(pack, &header, pack_len, &frames);
                problems.chunks.extend(fetcher.bad_frames(&mut bytes, &row, &entries)?);
            }
            Err(error) => {
                problems.whole = Some(error.to_string());
                problems.chunks = indexed_chunks(repository, pack);
            }
        }
    } else {
        // Damaged somewhere; the index, not the pack's own table, says which frames ought to be there.
        problems.whole = Some(FormatError::Name.to_string());
        let locations = indexed(repository, pack);
        if let Some(row) = locations.first().map(|location| location.pack) {
            let entries: Vec<Entry> = locations.into_iter().map(|location| location.entry).collect();
            problems.chunks.extend(fetcher.bad_frames(&mut bytes, &row, &entries)?);
        }
    }
    Ok((len, problems))
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

fn indexed_chunks(repository: &Repository, pack: PackId) -> HashSet<ChunkId, IdHash> {
    indexed(repository, pack).into_iter().map(|location| location.entry.id).collect()
}
