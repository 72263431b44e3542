//! A simulated machine's storage with a clock and processes of its own, by which leases are judged.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use blockstore::lease::{Process, Surroundings};
use blockstore::sim::SimFolder;
use blockstore::storage::{Listed, Object, ObjectKind};
use blockstore::{LocalStorage, Mapping, Storage};
use bytes::Bytes;

/// The clock, and which process of which boot is at work. Clones share them.
#[derive(Debug, Clone)]
pub struct Around(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    now: AtomicU64,
    boot: AtomicU32,
    pid: AtomicU32,
}

impl Around {
    pub fn new() -> Around {
        Around(Arc::new(Shared { now: 1_800_000_000.into(), boot: 1.into(), pid: 1.into() }))
    }

    /// Seconds since 1970.
    pub fn now(&self) -> u64 {
        self.0.now.load(Ordering::Relaxed)
    }

    pub fn advance(&self, seconds: u64) {
        self.0.now.fetch_add(seconds, Ordering::Relaxed);
    }

    /// The process has ended: another one follows.
    pub fn killed(&self) {
        self.0.pid.fetch_add(1, Ordering::Relaxed);
    }

    /// The machine has gone down: nobody can know any more which of its processes had ended.
    pub fn power_cut(&self) {
        self.0.boot.fetch_add(1, Ordering::Relaxed);
        self.killed();
    }
}

/// This process of this boot, whatever follows it.
#[derive(Debug)]
pub struct SimStorage {
    inner: LocalStorage,
    around: Around,
    process: Process,
}

impl SimStorage {
    pub fn new(folder: &SimFolder, around: &Around) -> SimStorage {
        let process = Process {
            host: "simulated".to_owned(),
            boot: around.0.boot.load(Ordering::Relaxed).to_string(),
            namespace: "one".to_owned(),
            pid: around.0.pid.load(Ordering::Relaxed),
            process_started: 0,
        };
        let inner = LocalStorage::new(Arc::new(folder.clone()));
        SimStorage { inner, around: around.clone(), process }
    }
}

impl Surroundings for SimStorage {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.around.now())
    }

    fn process(&self) -> Process {
        self.process.clone()
    }

    fn is_gone(&self, process: &Process) -> bool {
        process.boot == self.process.boot && process.pid != self.process.pid
    }
}

impl Storage for SimStorage {
    fn put(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        self.inner.put(object, bytes)
    }

    fn create(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        self.inner.create(object, bytes)
    }

    fn init(&self, slot: Option<(&Object, &[u8])>, config: &[u8]) -> io::Result<()> {
        self.inner.init(slot, config)
    }

    fn hold(&self) -> io::Result<Box<dyn Send>> {
        self.inner.hold()
    }

    fn get(&self, object: &Object, max: u64) -> io::Result<Bytes> {
        self.inner.get(object, max)
    }

    fn get_range(&self, object: &Object, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.get_range(object, offset, buf)
    }

    fn len(&self, object: &Object) -> io::Result<u64> {
        self.inner.len(object)
    }

    fn list(&self, kind: ObjectKind) -> io::Result<Vec<Listed>> {
        self.inner.list(kind)
    }

    fn delete(&self, object: &Object) -> io::Result<()> {
        self.inner.delete(object)
    }

    fn settle(&self, kind: ObjectKind) -> io::Result<()> {
        self.inner.settle(kind)
    }

    fn map(&self, object: &Object) -> io::Result<Mapping> {
        self.inner.map(object)
    }

    fn surroundings(&self) -> &dyn Surroundings {
        self
    }

    fn forget(&self, object: &Object, offset: u64, len: u64) {
        self.inner.forget(object, offset, len);
    }

    fn tidy(&self) -> io::Result<()> {
        self.inner.tidy()
    }

    fn is_vacant(&self) -> io::Result<bool> {
        self.inner.is_vacant()
    }
}
