//! What tests of the repository share: sources and targets in memory, and small repositories.

#![expect(clippy::cast_possible_truncation, reason = "small disks, and bytes cut from random numbers")]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::backup::{BackupError, DiskStats, PointDetails, Source};
use crate::keys::{Protection, Secret};
use crate::point::RecoveryPoint;
use crate::progress::Progress;
use crate::repository::{DataCheck, Repository, VerifyOptions, VerifyReport};
use crate::restore::{Target, ZeroPolicy, restore};
use crate::sim::SimFolder;
use crate::storage::{Listed, LocalStorage, Object, ObjectKind, Storage};

pub const CHUNK: u32 = 16 << 10;

/// A disk of bytes and holes in memory.
pub struct MemorySource {
    pub bytes: Vec<u8>,
    /// Sorted, disjoint; the rest are holes.
    pub data: Vec<Range<u64>>,
    /// Reading at or after this offset fails.
    pub fail_at: Option<u64>,
    pub grows: bool,
    /// When all of it has been read once, the byte here is another one.
    pub lies_at: Option<u64>,
    pub read: AtomicU64,
    /// Cancels this when half is read.
    pub cancels: Option<Arc<Progress>>,
}

impl MemorySource {
    pub fn new(bytes: Vec<u8>) -> MemorySource {
        let all = 0..bytes.len() as u64;
        let data = if bytes.is_empty() { vec![] } else { vec![all] };
        MemorySource { bytes, data, fail_at: None, grows: false, lies_at: None, read: AtomicU64::new(0), cancels: None }
    }
}

impl Source for MemorySource {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset + buf.len() as u64;
        if self.fail_at.is_some_and(|at| at < end) {
            return Err(io::Error::other("bad sector"));
        }
        let read = self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        if let Some(progress) = &self.cancels
            && read > self.size() / 2
        {
            progress.cancel();
        }
        buf.copy_from_slice(&self.bytes[offset as usize..end as usize]);
        if let Some(at) = self.lies_at.filter(|at| read >= self.size() && (offset..end).contains(at)) {
            buf[(at - offset) as usize] ^= 1;
        }
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let next = self.data.iter().find(|range| range.end > offset);
        Ok(next.map(|range| range.start.max(offset)..range.end))
    }
    fn current_size(&self) -> io::Result<u64> {
        Ok(self.size() + u64::from(self.grows))
    }
}

/// A storage that changes a byte in the middle of every pack it is given, when told to.
#[derive(Debug)]
pub struct BadStorage {
    storage: Arc<dyn Storage>,
    pub damages_packs: AtomicBool,
}

impl BadStorage {
    pub fn new(storage: Arc<dyn Storage>) -> BadStorage {
        BadStorage { storage, damages_packs: AtomicBool::new(false) }
    }
}

impl Storage for BadStorage {
    fn put(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        let mut bytes = bytes.to_vec();
        if matches!(object, Object::Pack(_)) && self.damages_packs.load(Ordering::Relaxed) {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        self.storage.put(object, &bytes)
    }
    fn create(&self, object: &Object, bytes: &[u8]) -> io::Result<()> {
        self.storage.create(object, bytes)
    }
    fn get(&self, object: &Object, max: u64) -> io::Result<bytes::Bytes> {
        self.storage.get(object, max)
    }
    fn get_range(&self, object: &Object, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.storage.get_range(object, offset, buf)
    }
    fn len(&self, object: &Object) -> io::Result<u64> {
        self.storage.len(object)
    }
    fn list(&self, kind: ObjectKind) -> io::Result<Vec<Listed>> {
        self.storage.list(kind)
    }
    fn delete(&self, object: &Object) -> io::Result<()> {
        self.storage.delete(object)
    }
    fn settle(&self, kind: ObjectKind) -> io::Result<()> {
        self.storage.settle(kind)
    }
    fn map(&self, object: &Object) -> io::Result<crate::Mapping> {
        self.storage.map(object)
    }
    fn is_vacant(&self) -> io::Result<bool> {
        self.storage.is_vacant()
    }
}

/// A target in memory that notes whether anything was written twice.
pub struct MemoryTarget {
    pub bytes: Mutex<Vec<u8>>,
    pub fails: AtomicBool,
}

impl Target for MemoryTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(io::Error::other("target gone"));
        }
        let start = offset as usize;
        self.bytes.lock().expect("unpoisoned")[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// Numbers that look random; the same seed gives the same.
#[derive(Debug)]
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A disk with random, compressible, repeated and zero chunks.
pub fn mixed_disk(seed: u64, size: usize) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut bytes = vec![0; size];
    for chunk in bytes.chunks_mut(CHUNK as usize) {
        match numbers.below(5) {
            0 => {}
            1 => chunk.fill(7),
            2 => chunk.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 100) as u8 ^ seed as u8),
            _ => chunk.iter_mut().for_each(|byte| *byte = numbers.next() as u8),
        }
    }
    bytes
}

pub fn key(byte: u8) -> Secret {
    Secret::key_file(vec![byte; 64])
}

pub fn sim_storage(folder: &SimFolder) -> Arc<dyn Storage> {
    Arc::new(LocalStorage::new(Arc::new(folder.clone())))
}

pub fn new_repository(folder: &SimFolder) -> Repository {
    Repository::init(sim_storage(folder), CHUNK, Protection::Secret(key(1))).expect("init")
}

pub fn open_repository(folder: &SimFolder) -> Repository {
    Repository::open(sim_storage(folder), Some(&key(1)), 4 << 20).expect("open")
}

/// Backs up one disk called `disk0`.
pub fn back_up(
    repository: &Repository,
    bytes: &[u8],
    parent: Option<&RecoveryPoint>,
) -> Result<(RecoveryPoint, DiskStats), BackupError> {
    let source = MemorySource::new(bytes.to_vec());
    let mut backup = repository.begin_backup("web01", parent, Arc::default())?;
    let stats = backup.add_disk("disk0", &source)?;
    Ok((backup.seal(PointDetails::default())?, stats))
}

/// Restores a disk over rubbish.
pub fn restored(repository: &Repository, point: &RecoveryPoint, disk: &str) -> Vec<u8> {
    let size = point.disk(disk).expect("named").size as usize;
    let disk = repository.open_disk(point, disk).expect("opens");
    let target = MemoryTarget { bytes: Mutex::new(vec![0xaa; size]), fails: AtomicBool::new(false) };
    restore(&disk, &target, ZeroPolicy::WriteZeroes, &Progress::new()).expect("restores");
    target.bytes.into_inner().expect("unpoisoned")
}

pub fn verify(repository: &Repository, read_data: bool) -> VerifyReport {
    let data = if read_data { DataCheck::All } else { DataCheck::None };
    repository.verify(VerifyOptions { data, ..VerifyOptions::default() }, &Progress::new()).expect("completes")
}
