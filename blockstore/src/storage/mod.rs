//! [`Storage`]: where a repository's objects are kept. Objects are immutable and have typed names; a folder and an
//! object store can both give what is asked for here. Rules: docs/format/repository.md

mod local;

pub use local::LocalStorage;
pub(crate) use local::is_no_space;

use std::fmt;
use std::io;

use bytes::Bytes;

use crate::id::{BatchId, DrillId, LeaseId, PackId, RecoveryPointId, RunId, SlotId, VerifiedId};
use crate::lease::{Surroundings, System};
use crate::mapping::Mapping;

/// The name of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    /// The configuration.
    Config,
    /// A key slot.
    KeySlot(SlotId),
    /// A pack.
    Pack(PackId),
    /// An index run.
    IndexRun(RunId),
    /// An index run set aside because it is damaged.
    DamagedRun(RunId),
    /// A recovery point.
    Point(RecoveryPointId),
    /// The empty marker of a pack that was found damaged.
    DamagedPack(PackId),
    /// A lease: a note of who is at work.
    Lease(LeaseId),
    /// What protects a recovery point.
    Protection(RecoveryPointId),
    /// A note of packs that wait for their deletion.
    Quarantine(BatchId),
    /// A note of what the last collect knew.
    Liveness,
    /// A list of packs and when they were verified.
    Verified(VerifiedId),
    /// What a drill of a recovery point found.
    Drill(DrillId),
}

/// The kinds of objects that can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ObjectKind {
    /// Key slots.
    KeySlot,
    /// Packs.
    Pack,
    /// Index runs; those set aside are not listed.
    IndexRun,
    /// Recovery points.
    Point,
    /// Markers of damaged packs.
    DamagedPack,
    /// Leases.
    Lease,
    /// Protections of recovery points.
    Protection,
    /// Batches of packs that wait for their deletion.
    Quarantine,
    /// Lists of verified packs.
    Verified,
    /// Results of drills.
    Drill,
}

/// An object and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed {
    /// The object.
    pub object: Object,
    /// Its length in bytes.
    pub len: u64,
}

impl Object {
    /// The object's path below the repository's root, with `/` between its parts.
    pub fn path(&self) -> String {
        match self {
            Object::Config => "repository".to_owned(),
            Object::KeySlot(id) => format!("keys/{id}"),
            Object::Pack(id) => {
                let name = id.to_string();
                format!("packs/{}/{name}", name.get(..2).unwrap_or_default())
            }
            Object::IndexRun(id) => format!("index/{id}"),
            Object::DamagedRun(id) => format!("index/{id}.damaged"),
            Object::Point(id) => format!("points/{id}"),
            Object::DamagedPack(id) => format!("damaged/{id}"),
            Object::Lease(id) => format!("leases/{id}"),
            Object::Protection(id) => format!("protected/{id}"),
            Object::Quarantine(id) => format!("quarantine/{id}"),
            Object::Liveness => "liveness".to_owned(),
            Object::Verified(id) => format!("verified/{id}"),
            Object::Drill(id) => format!("drills/{id}"),
        }
    }

    /// The object of a kind that has this last path element, if it is one.
    pub fn parse(kind: ObjectKind, name: &str) -> Option<Object> {
        match kind {
            ObjectKind::KeySlot => name.parse().ok().map(Object::KeySlot),
            ObjectKind::Pack => name.parse().ok().map(Object::Pack),
            ObjectKind::IndexRun => name.parse().ok().map(Object::IndexRun),
            ObjectKind::Point => name.parse().ok().map(Object::Point),
            ObjectKind::DamagedPack => name.parse().ok().map(Object::DamagedPack),
            ObjectKind::Lease => name.parse().ok().map(Object::Lease),
            ObjectKind::Protection => name.parse().ok().map(Object::Protection),
            ObjectKind::Quarantine => name.parse().ok().map(Object::Quarantine),
            ObjectKind::Verified => name.parse().ok().map(Object::Verified),
            ObjectKind::Drill => name.parse().ok().map(Object::Drill),
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Config => out.write_str("configuration `repository`"),
            Object::KeySlot(_) => write!(out, "key slot {}", self.path()),
            Object::Pack(_) => write!(out, "pack {}", self.path()),
            Object::IndexRun(_) | Object::DamagedRun(_) => write!(out, "index run {}", self.path()),
            Object::Point(_) => write!(out, "recovery point {}", self.path()),
            Object::DamagedPack(_) => write!(out, "marker {}", self.path()),
            Object::Lease(_) => write!(out, "lease {}", self.path()),
            Object::Protection(_) => write!(out, "protection {}", self.path()),
            Object::Quarantine(_) => write!(out, "quarantine object {}", self.path()),
            Object::Liveness => out.write_str("summary `liveness`"),
            Object::Verified(_) => write!(out, "list of verified packs {}", self.path()),
            Object::Drill(_) => write!(out, "drill {}", self.path()),
        }
    }
}

/// Keeps objects. All methods block and may be called from several threads.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Stores an object atomically and durably: when this returns it survives a power cut; if it fails the object is
    /// absent or whole. An existing object is replaced: notes and protections by others, all else by the same bytes.
    fn put(&self, object: &Object, bytes: &[u8]) -> io::Result<()>;

    /// Like [`Storage::put`], but [`io::ErrorKind::AlreadyExists`] if the object exists; of several that race, one
    /// wins.
    fn create(&self, object: &Object, bytes: &[u8]) -> io::Result<()>;

    /// Makes a repository: deletes the key slots an unfinished init left, creates `slot`, then `config` as
    /// [`Object::Config`]. [`io::ErrorKind::AlreadyExists`] if there is a configuration, and then nothing is touched.
    /// Of several that race, one wins; where the storage can hold others off, they cannot come in between.
    fn init(&self, slot: Option<(&Object, &[u8])>, config: &[u8]) -> io::Result<()> {
        match self.len(&Object::Config) {
            Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        for left_over in self.list(ObjectKind::KeySlot)? {
            self.delete(&left_over.object)?;
        }
        if let Some((object, bytes)) = slot {
            self.create(object, bytes)?;
        }
        self.create(&Object::Config, config)
    }

    /// Holds off everybody else who decides by what stands in the repository what to delete (key slots, points), until
    /// the guard is dropped, also by the end of the process. [`io::ErrorKind::ResourceBusy`] if it takes too long.
    /// Not to be held across [`Storage::create`] or [`Storage::init`], which take it themselves. Where storage cannot
    /// hold others off this does nothing.
    fn hold(&self) -> io::Result<Box<dyn Send>> {
        Ok(Box::new(()))
    }

    /// A whole object. One longer than `max` is an [`io::ErrorKind::FileTooLarge`] error and is not read.
    fn get(&self, object: &Object, max: u64) -> io::Result<Bytes>;

    /// Fills `buf` from `offset` of an object; [`io::ErrorKind::UnexpectedEof`] if it is too short.
    fn get_range(&self, object: &Object, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// The length of an object.
    fn len(&self, object: &Object) -> io::Result<u64>;

    /// All objects of a kind, in no particular order. Other names are left out.
    fn list(&self, kind: ObjectKind) -> io::Result<Vec<Listed>>;

    /// Something that is another as soon as another object of a kind is there, or one is gone or replaced; nothing where
    /// that is not known, or may change once more without this changing. Only for kinds that lie in one place.
    fn mark(&self, kind: ObjectKind) -> Option<u64> {
        let _ = kind;
        None
    }

    /// Deletes an object, durably; one that is gone already is no error.
    fn delete(&self, object: &Object) -> io::Result<()>;

    /// Makes durable which objects of a kind are there and which are gone. Whoever deleted one and was killed may not have
    /// come to that, and a power cut brings the object back: nothing may rest on its absence before this returns.
    fn settle(&self, kind: ObjectKind) -> io::Result<()>;

    /// The bytes of an object without reading them now, where that is possible.
    fn map(&self, object: &Object) -> io::Result<Mapping>;

    /// The clock and the processes that leases go by. Simulated storage may have its own.
    fn surroundings(&self) -> &dyn Surroundings {
        &System
    }

    /// Lets go of what is kept in memory of a range, so that the next read of it comes from the device. A hint.
    fn forget(&self, object: &Object, offset: u64, len: u64) {
        let _ = (object, offset, len);
    }

    /// Removes what writers that were killed left half-written, where it is too old to belong to a living one.
    fn tidy(&self) -> io::Result<()> {
        Ok(())
    }

    /// Whether nothing but what an unfinished init leaves (key slots, temporary files) stands at the root.
    fn is_vacant(&self) -> io::Result<bool>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_documented_ones() {
        let paths = [
            Object::Config,
            Object::KeySlot(SlotId([0xab; 16])),
            Object::Pack(PackId([0xcd; 32])),
            Object::IndexRun(RunId([1; 32])),
            Object::DamagedRun(RunId([1; 32])),
            Object::Point(RecoveryPointId([2; 32])),
            Object::DamagedPack(PackId([3; 32])),
            Object::Lease(LeaseId([4; 16])),
            Object::Protection(RecoveryPointId([4; 32])),
            Object::Quarantine(BatchId([5; 16])),
            Object::Liveness,
            Object::Verified(VerifiedId([4; 32])),
            Object::Drill(DrillId { point: RecoveryPointId([6; 32]), time_unix_ms: 0x019a }),
        ]
        .map(|object| object.path());
        let pack = format!("packs/cd/{}", "cd".repeat(32));
        let run = format!("index/{}", "01".repeat(32));
        let damaged = format!("{run}.damaged");
        let slot = format!("keys/{}", "ab".repeat(16));
        let point = format!("points/{}", "02".repeat(32));
        let marker = format!("damaged/{}", "03".repeat(32));
        let protection = format!("protected/{}", "04".repeat(32));
        let lease = format!("leases/{}", "04".repeat(16));
        let verified = format!("verified/{}", "04".repeat(32));
        let batch = format!("quarantine/{}", "05".repeat(16));
        let drill = format!("drills/{}-000000000000019a", "06".repeat(32));
        let (config, liveness) = ("repository".to_owned(), "liveness".to_owned());
        assert_eq!(
            paths,
            [config, slot, pack, run, damaged, point, marker, lease, protection, batch, liveness, verified, drill]
        );
    }

    #[test]
    fn only_whole_names_are_objects() {
        let name = "01".repeat(32);
        assert_eq!(Object::parse(ObjectKind::IndexRun, &name), Some(Object::IndexRun(RunId([1; 32]))));
        assert_eq!(Object::parse(ObjectKind::IndexRun, &format!("{name}.damaged")), None);
        assert_eq!(Object::parse(ObjectKind::Pack, "lost+found"), None);
        let drill = Object::Drill(DrillId { point: RecoveryPointId([1; 32]), time_unix_ms: u64::MAX });
        assert_eq!(Object::parse(ObjectKind::Drill, &format!("{name}-{}", "f".repeat(16))), Some(drill));
        for bad in [name.clone(), format!("{name}-"), format!("{name}-12"), format!("{name}-{}", "F".repeat(16))] {
            assert_eq!(Object::parse(ObjectKind::Drill, &bad), None, "{bad}");
        }
    }
}
