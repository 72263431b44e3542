//! [`Keyless::verify`]: what can be proven without the key.
//!
//! Proven: the configuration and every key slot are well-formed and belong together; every index run and every recovery
//! point hashes to its name; every pack that a run names exists, has the length it should have, and its table says what
//! the runs say; with `read_data`, every pack hashes to its name, so every frame is what the writer sealed.
//!
//! Not proven: what only the key shows, namely that the frames open, and that every chunk a recovery point needs is in
//! some pack (manifests and points are sealed).

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::Keyless;
use crate::error::ReadError;
use crate::format::FormatError;
use crate::format::pack::{MAX_PACK_LEN, decode_pack};
use crate::format::point::{Envelope, HEADER_LEN, MAX_PAYLOAD_LEN};
use crate::format::run::{Entry, PackRow};
use crate::id::{PackId, RecoveryPointId};
use crate::index::build::describe_pack;
use crate::index::read_table;
use crate::index::run::{Location, Run};
use crate::progress::Progress;
use crate::repository::{Damage, OpenError, Protected, VerifyError, damaged_protection, read_protection, read_slot};
use crate::storage::{Object, ObjectKind};

/// How often a listing that changes under our eyes is taken again.
const RELIST_MAX: u32 = 8;
/// Each worker holds one pack in memory.
const WORKERS_MAX: usize = 8;

/// The result of a verification without the key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeylessReport {
    /// Recovery points whose bytes match their names.
    pub points: u64,
    /// Key slots that are well-formed.
    pub key_slots: u64,
    /// Index runs that are whole.
    pub index_runs: u64,
    /// Packs looked at.
    pub packs: u64,
    /// Frames in their tables.
    pub frames: u64,
    /// Packs read whole.
    pub packs_read: u64,
    /// Bytes of them.
    pub bytes_read: u64,
    /// Packs that no index run names. Not damage: what a dead backup left, or a dropped point.
    pub unindexed: u64,
    /// Everything that is damaged, each object once.
    pub damaged: Vec<Damage>,
}

/// What is known of a pack from the runs.
#[derive(Default)]
struct Indexed {
    rows: Vec<PackRow>,
}

/// What was found out about a pack.
#[derive(Default)]
struct Checked {
    frames: u64,
    bytes_read: u64,
    problem: Option<String>,
}

struct Verifier<'a> {
    keyless: &'a Keyless,
    progress: &'a Progress,
    read_data: bool,
    runs: Vec<Run>,
    findings: BTreeMap<Object, String>,
    report: KeylessReport,
}

impl Keyless {
    /// Checks all that can be checked without the key, and changes nothing. Damage is not an error: it is in the
    /// report. Bounded memory: a table, or with `read_data` a pack, for each of at most eight threads.
    pub fn verify(&self, read_data: bool, progress: &Progress) -> Result<KeylessReport, VerifyError> {
        let mut verifier = Verifier {
            keyless: self,
            progress,
            read_data,
            runs: Vec::new(),
            findings: BTreeMap::new(),
            report: KeylessReport::default(),
        };
        verifier.check_head()?;
        // Packs first: a run that is listed later names none that a collect has deleted in between.
        let mut packs = self.listed_packs()?;
        verifier.open_runs()?;
        verifier.check_points()?;
        verifier.check_protections()?;
        verifier.check_drills()?;
        let indexed = verifier.indexed();
        for pack in indexed.keys().filter(|pack| !packs.contains_key(pack)).copied().collect::<Vec<_>>() {
            // Stored since the listing, or missing.
            if let Ok(len) = self.storage.len(&Object::Pack(pack)) {
                packs.insert(pack, len);
            } else if verifier.still_named(pack) {
                verifier.note(Object::Pack(pack), "it is missing");
            }
        }
        verifier.check_packs(packs, &indexed)?;
        let damaged = |(object, what)| Damage { object, what, affected: Vec::new() };
        verifier.report.damaged = verifier.findings.into_iter().map(damaged).collect();
        Ok(verifier.report)
    }

    fn listed_packs(&self) -> Result<HashMap<PackId, u64>, ReadError> {
        let listed = self.storage.list(ObjectKind::Pack);
        let listed = listed.map_err(|source| ReadError::Io { object: "packs".to_owned(), source })?;
        let packs = listed.into_iter().filter_map(|listed| match listed.object {
            Object::Pack(id) => Some((id, listed.len)),
            _ => None,
        });
        Ok(packs.collect())
    }
}

impl Verifier<'_> {
    fn note(&mut self, object: Object, what: impl ToString) {
        self.findings.entry(object).or_insert_with(|| what.to_string());
    }

    fn stop_if_cancelled(&self) -> Result<(), VerifyError> {
        if self.progress.is_cancelled() { Err(VerifyError::Cancelled) } else { Ok(()) }
    }

    fn list(&self, kind: ObjectKind, name: &str) -> Result<Vec<Object>, ReadError> {
        let listed = self.keyless.storage.list(kind);
        let listed = listed.map_err(|source| ReadError::Io { object: name.to_owned(), source })?;
        Ok(listed.into_iter().map(|listed| listed.object).collect())
    }

    /// Key slots; the configuration was read when the repository was opened.
    fn check_head(&mut self) -> Result<(), VerifyError> {
        for object in self.list(ObjectKind::KeySlot, "key slots")? {
            let Object::KeySlot(id) = object else { continue };
            match read_slot(&*self.keyless.storage, &self.keyless.config, id) {
                Ok(_) => self.report.key_slots += 1,
                Err(OpenError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {} // removed since
                Err(OpenError::Damaged { source, .. } | OpenError::UnknownVersion(source)) => self.note(object, source),
                Err(error) => self.note(object, format!("it cannot be read: {}", chain(&error))),
            }
        }
        if self.keyless.encrypted() && self.report.key_slots == 0 && self.findings.is_empty() {
            self.note(Object::Config, FormatError::NoKeySlot);
        }
        Ok(())
    }

    /// Opens and hashes every run. One that vanishes was merged, and the merged run was there before: list again.
    fn open_runs(&mut self) -> Result<(), VerifyError> {
        let mut tries = 0;
        'list: loop {
            tries += 1;
            let (mut runs, mut damaged) = (Vec::new(), Vec::new());
            for object in self.list(ObjectKind::IndexRun, "index")? {
                self.stop_if_cancelled()?;
                let Object::IndexRun(id) = object else { continue };
                match Run::open(&*self.keyless.storage, id, self.keyless.config.repository) {
                    Ok(run) if run.is_intact() => runs.push(run),
                    Ok(_) => damaged.push((object, FormatError::Name.to_string())),
                    Err(ReadError::Damaged { source, .. }) => damaged.push((object, source.to_string())),
                    Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                        if tries < RELIST_MAX {
                            continue 'list;
                        }
                    }
                    Err(error) => damaged.push((object, format!("it cannot be read: {}", chain(&error)))),
                }
            }
            self.report.index_runs = runs.len() as u64;
            self.runs = runs;
            damaged.into_iter().for_each(|(object, what)| self.note(object, what));
            return Ok(());
        }
    }

    fn check_points(&mut self) -> Result<(), VerifyError> {
        for object in self.list(ObjectKind::Point, "points")? {
            self.stop_if_cancelled()?;
            let Object::Point(id) = object else { continue };
            let max = u64::from(MAX_PAYLOAD_LEN) + HEADER_LEN as u64;
            match self.keyless.storage.get(&object, max) {
                Ok(bytes) => match self.point_problem(id, &bytes) {
                    None => self.report.points += 1,
                    Some(problem) => self.note(object, problem),
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {} // dropped since the listing
                Err(error) => self.note(object, format!("it cannot be read: {error}")),
            }
        }
        Ok(())
    }

    fn check_protections(&mut self) -> Result<(), VerifyError> {
        for object in self.list(ObjectKind::Protection, "protections")? {
            let Object::Protection(point) = object else { continue };
            match read_protection(&*self.keyless.storage, self.keyless.config.repository, point) {
                Ok(Some(Protected::Damaged(problem))) => {
                    self.note(object, damaged_protection(&point.to_string(), &problem));
                }
                Ok(_) => {}
                Err(error) => self.note(object, format!("it cannot be read: {}", chain(&error))),
            }
        }
        Ok(())
    }

    fn check_drills(&mut self) -> Result<(), VerifyError> {
        for object in self.list(ObjectKind::Drill, "drills")? {
            self.stop_if_cancelled()?;
            let Object::Drill(id) = object else { continue };
            if let Some(problem) = crate::drill::problem(&*self.keyless.storage, &self.keyless.config, id) {
                self.note(object, problem);
            }
        }
        Ok(())
    }

    fn point_problem(&self, id: RecoveryPointId, bytes: &[u8]) -> Option<FormatError> {
        if blake3::hash(bytes).as_bytes() != &id.0 {
            return Some(FormatError::Name);
        }
        match Envelope::decode(bytes) {
            Err(error) => Some(error),
            Ok((envelope, _)) if envelope.repository != self.keyless.config.repository => {
                Some(FormatError::OtherRepository)
            }
            Ok((envelope, _)) if envelope.encryption != self.keyless.config.encryption => {
                Some(FormatError::Field { field: "encryption" })
            }
            Ok(_) => None,
        }
    }

    fn indexed(&self) -> HashMap<PackId, Indexed> {
        let mut indexed: HashMap<PackId, Indexed> = HashMap::new();
        for row in self.runs.iter().flat_map(|run| run.packs()) {
            indexed.entry(row.pack).or_default().rows.push(row);
        }
        indexed
    }

    /// Whether a run that names the pack still exists; else a collect took both away meanwhile.
    fn still_named(&self, pack: PackId) -> bool {
        let names = |run: &&Run| run.packs().any(|row| row.pack == pack);
        self.runs.iter().filter(names).any(|run| self.keyless.storage.len(&Object::IndexRun(run.id)).is_ok())
    }

    /// Looks at every pack, on all cores.
    fn check_packs(
        &mut self,
        packs: HashMap<PackId, u64>,
        indexed: &HashMap<PackId, Indexed>,
    ) -> Result<(), VerifyError> {
        let mut packs: Vec<(PackId, u64)> = packs.into_iter().collect();
        packs.sort_unstable();
        self.progress.add_total(packs.iter().map(|(_, len)| len).sum());
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let this = &*self;
        let check = || {
            while let Some((pack, len)) = packs.get(next.fetch_add(1, Ordering::Relaxed)) {
                if this.progress.is_cancelled() {
                    return;
                }
                let checked = this.check_pack(*pack, *len, indexed.get(pack));
                this.progress.add_done(*len);
                this.progress.add_read(checked.as_ref().map_or(0, |checked| checked.bytes_read));
                results.lock().unwrap_or_else(PoisonError::into_inner).push((*pack, checked));
            }
        };
        let workers = thread::available_parallelism().map_or(2, |cores| cores.get().min(WORKERS_MAX));
        thread::scope(|scope| {
            for _ in 1..workers {
                let _ = thread::Builder::new().name("verify".to_owned()).spawn_scoped(scope, check); // or fewer
            }
            check();
        });
        self.stop_if_cancelled()?;
        for (pack, checked) in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
            let Some(checked) = checked else { continue };
            self.report.packs += 1;
            self.report.frames += checked.frames;
            self.report.packs_read += u64::from(checked.bytes_read > 0);
            self.report.bytes_read += checked.bytes_read;
            self.report.unindexed += u64::from(!indexed.contains_key(&pack));
            if let Some(problem) = checked.problem {
                self.note(Object::Pack(pack), problem);
            }
        }
        Ok(())
    }

    /// None for a pack that is gone since the listing and that nothing needs.
    fn check_pack(&self, pack: PackId, len: u64, indexed: Option<&Indexed>) -> Option<Checked> {
        let mut checked = Checked::default();
        let found = if self.read_data { self.read_whole(pack, &mut checked) } else { self.read_table(pack, len) };
        match found {
            Ok((row, entries)) => {
                checked.frames = entries.len() as u64;
                let problem = indexed.and_then(|indexed| self.disagreement(&row, &entries, indexed));
                checked.problem = checked.problem.or(problem);
            }
            Err(ReadError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                if indexed.is_none() || !self.still_named(pack) {
                    return None;
                }
                checked.problem = Some("it is missing".to_owned());
            }
            Err(ReadError::Damaged { source, .. }) => {
                checked.problem = checked.problem.or(Some(source.to_string()));
            }
            Err(error) => checked.problem = Some(format!("it cannot be read: {}", chain(&error))),
        }
        Some(checked)
    }

    fn read_table(&self, pack: PackId, len: u64) -> Result<(PackRow, Vec<Entry>), ReadError> {
        read_table(&*self.keyless.storage, pack, len, self.keyless.config.repository)
    }

    fn read_whole(&self, pack: PackId, checked: &mut Checked) -> Result<(PackRow, Vec<Entry>), ReadError> {
        let object = Object::Pack(pack);
        let damaged = |source| ReadError::Damaged { object, source };
        let bytes = self.keyless.storage.get(&object, u64::from(MAX_PACK_LEN)).map_err(|source| {
            let too_long = source.kind() == io::ErrorKind::FileTooLarge;
            if too_long { damaged(FormatError::Length { part: "the pack" }) } else { ReadError::io(&object, source) }
        })?;
        checked.bytes_read = bytes.len() as u64;
        if blake3::hash(&bytes).as_bytes() != &pack.0 {
            checked.problem = Some(FormatError::Name.to_string());
        }
        let (header, frames) = decode_pack(&bytes).map_err(damaged)?;
        if header.repository != self.keyless.config.repository {
            return Err(damaged(FormatError::OtherRepository));
        }
        Ok(describe_pack(pack, &header, u32::try_from(bytes.len()).unwrap_or(MAX_PACK_LEN), &frames))
    }

    /// Where the pack's own table and the runs contradict each other.
    fn disagreement(&self, row: &PackRow, entries: &[Entry], indexed: &Indexed) -> Option<String> {
        for said in &indexed.rows {
            if (PackRow { entries: 0, ..*said }) != (PackRow { entries: 0, ..*row }) {
                return Some("its header, length or table are not those that the index knows".to_owned());
            }
        }
        let told: u64 = indexed.rows.iter().map(|said| u64::from(said.entries)).sum();
        let mut locations: Vec<Location> = Vec::new();
        let mut met = 0;
        for entry in entries {
            locations.clear();
            self.runs.iter().for_each(|run| run.locate(&entry.id, &mut locations));
            for said in locations.iter().filter(|said| said.pack.pack == row.pack) {
                if (Entry { row: 0, ..said.entry }) != *entry {
                    return Some(format!("its table and the index disagree about chunk {}", entry.id));
                }
                met += 1;
            }
        }
        let other = || format!("the index knows {told} chunks in it, {met} of them are in its table");
        (met != told).then(other)
    }
}

/// An error and its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let cause = error.source().map_or(String::new(), |cause| format!(": {}", chain(cause)));
    format!("{error}{cause}")
}
