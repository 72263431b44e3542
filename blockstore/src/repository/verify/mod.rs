//! [`Repository::verify`]: checks what is stored, and names what is damaged and whom it hits.
//!
//! Structure ([`head`], [`walk`]): configuration, key slots, every index run as a whole, every recovery point, every
//! manifest node, and for every chunk that it has a place inside an existing pack of the right length. Data ([`packs`]):
//! packs that are needed are read and hashed, and their frames opened; those that waited longest first. A pack that fails
//! this is marked in the repository, so that later backups store its chunks anew; once they have, nothing needs the pack
//! and it is no damage any more. Whom it hits ([`affected`]): exactly, for every point. Damaged index runs are rebuilt,
//! and reported as repaired. What cannot be read is a finding, not the end of the verification.
//!
//! Memory: a bit for every index entry, a name for every pack, a pack for each thread, and what is damaged.

mod affected;
mod head;
mod packs;
mod walk;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::Range;

use super::Repository;
use super::repair::Wanted;
use crate::error::ReadError;
use crate::id::{ChunkId, IdHash, PackId, RecoveryPointId};
use crate::index::seen::Seen;
use crate::manifest::{FAN_OUT, Shape};
use crate::pack::verified::VerifiedPacks;
use crate::point::RecoveryPoint;
use crate::progress::Progress;
use crate::storage::{Object, ObjectKind};

/// How often the walk begins anew because the index changed.
const WALKS_MAX: u32 = 3;

/// What to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VerifyOptions {
    /// Only this recovery point, or all.
    pub point: Option<RecoveryPointId>,
    /// How much of the data to read.
    pub data: DataCheck,
    /// Whether a pack that hashes to its name is taken to be what it should be: its frames are not opened.
    pub hash_only: bool,
}

/// How much of the data a verification reads: of the packs that are needed, those that waited longest. Packs that are
/// marked as damaged are always read, unless nothing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DataCheck {
    /// Nothing but what the structure needs.
    #[default]
    None,
    /// Everything.
    All,
    /// About so many bytes.
    Bytes(u64),
    /// About so many thousandths.
    PerMille(u32),
}

/// A disk that damage hits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Affected {
    /// The recovery point.
    pub point: RecoveryPointId,
    /// Its machine.
    pub machine: String,
    /// The disk's name.
    pub disk: String,
    /// The bytes of the disk that cannot be read, in order.
    pub ranges: Vec<Range<u64>>,
}

/// A damaged object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which object; for a chunk that is nowhere, the recovery point that wants it.
    pub object: Object,
    /// What is wrong.
    pub what: String,
    /// Whom it hits. Nobody, where all that is needed of the object can be read.
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
    /// Packs that the verified recovery points need, and their bytes.
    pub packs_needed: u64,
    /// Their bytes.
    pub bytes_needed: u64,
    /// When the needed pack that waits longest was read whole, in seconds since 1970; 0 if it never was.
    pub oldest_unix_s: u64,
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

/// What is wrong with an object, said once, and whom it hits.
#[derive(Debug)]
struct Finding {
    what: String,
    affected: BTreeMap<(RecoveryPointId, String), Affected>,
}

/// A pack whose bytes are not those that were written, or that cannot be read.
#[derive(Debug)]
pub(super) struct Rotten {
    what: String,
    /// Chunks and nodes that cannot be read from it; none for all.
    bad: Option<HashSet<ChunkId, IdHash>>,
    missing: bool,
}

impl Rotten {
    fn holds(&self, id: &ChunkId) -> bool {
        self.bad.as_ref().is_none_or(|bad| bad.contains(id))
    }
}

/// What no place gives.
#[derive(Debug)]
pub(super) struct Blame {
    /// The packs that should: none if no pack holds it.
    packs: Vec<PackId>,
    /// The level of a node; none for a chunk.
    level: Option<u8>,
}

pub(super) type Bad = HashMap<ChunkId, Blame, IdHash>;

pub(super) struct Verifier<'a> {
    pub repository: &'a Repository,
    progress: &'a Progress,
    options: VerifyOptions,
    pub points: Vec<RecoveryPoint>,
    /// Lengths of the packs that exist.
    packs: HashMap<PackId, u64>,
    verified: VerifiedPacks,
    /// Of objects that are no packs, or of packs that are not as the index says.
    findings: BTreeMap<Object, Finding>,
    /// What the last walk found.
    pub bad: Bad,
    /// What only packs give that are known to be damaged, and its level if it is a node.
    fragile: HashMap<ChunkId, Option<u8>, IdHash>,
    /// What is wrong with packs that the last walk wanted something of.
    wrong: HashMap<PackId, String>,
    /// Packs the last walk needs.
    referenced: HashSet<PackId>,
    /// Packs read whole.
    read: HashSet<PackId>,
    /// Those of them that are damaged.
    pub rotten: HashMap<PackId, Rotten>,
    /// Bytes that may still be read, where not everything is.
    budget: Option<u64>,
    report: VerifyReport,
}

impl Repository {
    /// Checks the repository, or one recovery point of it. Damage is not an error: it is in the report.
    pub fn verify(&self, options: VerifyOptions, progress: &Progress) -> Result<VerifyReport, VerifyError> {
        let mut verifier = Verifier::begin(self, options, progress)?;
        verifier.run()?;
        verifier.finish()
    }
}

impl<'a> Verifier<'a> {
    pub fn begin(
        repository: &'a Repository,
        options: VerifyOptions,
        progress: &'a Progress,
    ) -> Result<Verifier<'a>, VerifyError> {
        let failed = |object: &str| {
            let object = object.to_owned();
            move |source| ReadError::Io { object, source }
        };
        let fetcher = repository.fetcher();
        fetcher.damaged.load(repository.storage()).map_err(failed("damaged"))?;
        let verified = VerifiedPacks::load(repository.storage(), repository.id()).map_err(failed("verified"))?;
        Ok(Verifier {
            repository,
            progress,
            options,
            points: Vec::new(),
            packs: list_packs(repository)?,
            verified,
            findings: BTreeMap::new(),
            bad: Bad::default(),
            fragile: HashMap::default(),
            wrong: HashMap::new(),
            referenced: HashSet::new(),
            read: HashSet::new(),
            rotten: HashMap::new(),
            budget: None,
            report: VerifyReport::default(),
        })
    }

    /// Looks at everything; [`Verifier::finish`] says what was found.
    pub fn run(&mut self) -> Result<(), VerifyError> {
        self.load()?;
        self.look()
    }

    /// What stands at the beginning; [`Verifier::look`] goes on to what the points need.
    pub fn load(&mut self) -> Result<(), VerifyError> {
        self.check_head()?;
        self.check_index()?;
        self.load_points()?;
        self.check_protections()?;
        self.check_drills()
    }

    /// After something was stored: what stands now.
    pub fn look_again(&mut self) -> Result<(), VerifyError> {
        self.packs = list_packs(self.repository)?;
        self.look()
    }

    /// What must be had from elsewhere: what is bad, and what is not in any good pack.
    pub fn wanted(&self) -> Wanted {
        let bad = self.bad.iter().map(|(id, blame)| (*id, blame.level));
        bad.chain(self.fragile.iter().map(|(id, level)| (*id, *level))).collect()
    }

    /// Those of `wanted` that stand in a disk of this name, of whatever point; below a node that cannot be read nothing is
    /// known to stand.
    pub fn wanted_of(&self, disk: &str, wanted: &Wanted) -> Result<Wanted, VerifyError> {
        let fetcher = self.repository.fetcher();
        let (seen, mut found) = (Seen::new(&fetcher.index), Wanted::default());
        for disk in self.points.iter().flat_map(|point| &point.disks).filter(|found| found.name == disk) {
            let Some(shape) = Shape::of(disk.size, disk.chunk_size) else { continue }; // refused when loaded
            let mut below = vec![(disk.root, Some(shape.levels - 1))];
            while let Some((id, level)) = below.pop() {
                if let Some(level) = wanted.get(&id) {
                    found.insert(id, *level);
                }
                let Some(level) = level.filter(|_| !id.is_zero() && !seen.contains(&id)) else { continue };
                self.stop_if_cancelled()?;
                seen.insert(&id);
                let Ok(node) = fetcher.node(&id, level) else { continue };
                let children = (0..FAN_OUT).map(|at| node.child(at)).filter(|child| !child.is_zero());
                below.extend(children.map(|child| (child, level.checked_sub(1))));
            }
        }
        Ok(found)
    }

    /// Packs that something was wanted of and that are missing, cut or damaged.
    pub fn lost_packs(&self) -> Vec<PackId> {
        let damaged = self.referenced.iter().filter(|pack| self.repository.fetcher().damaged.contains(pack));
        let mut packs: Vec<PackId> = self.wrong.keys().chain(damaged).copied().collect();
        packs.sort_unstable();
        packs.dedup();
        packs
    }

    /// Forgets what was found out about a pack that has been put back.
    pub fn is_back(&mut self, pack: PackId) {
        self.rotten.remove(&pack);
        self.read.remove(&pack);
        self.wrong.remove(&pack);
    }

    pub fn look(&mut self) -> Result<(), VerifyError> {
        self.walk()?;
        for _ in 0..WALKS_MAX {
            if self.wrong.is_empty() || !self.index_changed()? {
                break;
            }
            self.walk()?;
        }
        if self.options.data != DataCheck::None {
            // Where a pack turns out to be damaged, the points may need others in its place: look once more.
            while self.read_data()? {
                self.walk()?;
            }
        }
        Ok(())
    }

    /// Where something is not as the index says, it may be as a newer index says: a collect moves chunks to other packs.
    fn index_changed(&mut self) -> Result<bool, VerifyError> {
        let index = &self.repository.fetcher().index;
        let seen = index.generation();
        index.refresh()?;
        self.packs = list_packs(self.repository)?;
        Ok(index.generation() != seen)
    }

    pub fn finish(mut self) -> Result<VerifyReport, VerifyError> {
        let needed: Vec<PackId> =
            self.referenced.iter().filter(|pack| self.packs.contains_key(pack)).copied().collect();
        self.report.packs_needed = needed.len() as u64;
        self.report.bytes_needed = needed.iter().filter_map(|pack| self.packs.get(pack)).sum();
        self.report.oldest_unix_s = needed.iter().map(|pack| self.verified.time(pack)).min().unwrap_or(0);
        self.report.unreferenced = self.packs.keys().filter(|pack| !self.referenced.contains(pack)).count() as u64;
        self.attribute()?;
        for pack in needed {
            if let Some(rotten) = self.rotten.get(&pack) {
                // Damaged, though all that is needed of it can be read.
                let what = rotten.what.clone();
                self.note(Object::Pack(pack), what);
            } else if self.repository.fetcher().damaged.contains(&pack) && !self.read.contains(&pack) {
                let what =
                    "it was found damaged before, and points still need it; `verify --read-data` says whom it hits";
                self.note(Object::Pack(pack), what);
            }
        }
        let damage = |(object, finding): (Object, Finding)| Damage {
            object,
            what: finding.what,
            affected: finding.affected.into_values().collect(),
        };
        self.report.damaged = self.findings.into_iter().map(damage).collect();
        Ok(self.report)
    }

    pub fn stop_if_cancelled(&self) -> Result<(), VerifyError> {
        if self.progress.is_cancelled() { Err(VerifyError::Cancelled) } else { Ok(()) }
    }

    /// Notes what is wrong with an object, unless that was said already.
    fn note(&mut self, object: Object, what: impl fmt::Display) {
        self.findings.entry(object).or_insert_with(|| Finding { what: what.to_string(), affected: BTreeMap::new() });
    }
}

fn list_packs(repository: &Repository) -> Result<HashMap<PackId, u64>, ReadError> {
    let listed = repository.storage().list(ObjectKind::Pack);
    let listed = listed.map_err(|source| ReadError::Io { object: "packs".to_owned(), source })?;
    let packs = listed.into_iter().filter_map(|listed| match listed.object {
        Object::Pack(id) => Some((id, listed.len)),
        _ => None,
    });
    Ok(packs.collect())
}
