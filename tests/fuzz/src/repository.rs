//! A whole repository of hostile objects: opened, listed, verified, read, and backed up into.
//!
//! An input is a row of objects: kind (1 byte), length (4 bytes), bytes. Packs, index runs and points get good checksums
//! and the names that their bytes give them, and what an index run says of packs is made to fit packs that are there:
//! otherwise nothing that was mutated would ever be looked at.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use blockstore::base::{Base, Segment};
use blockstore::disk::Folder;
use blockstore::sim::SimFolder;
use blockstore::{DataCheck, PackId, PointDetails, Progress, Repository, Source, VerifyOptions};

use crate::objects::{CHUNK, open, plain_config, write};
use crate::{Input, seal};

const PACK: u8 = 1;
const INDEX_RUN: u8 = 2;
const POINT: u8 = 3;
/// Objects of other kinds, as they are, below these folders and under the hash of their bytes.
const OTHERS: [&str; 8] = ["keys", "damaged", "leases", "quarantine", "protected", "verified", "index", "tmp"];
/// Of these, the names are shorter.
const SHORT: [&str; 3] = ["keys", "leases", "quarantine"];

pub(crate) fn run(data: &[u8]) {
    let folder = SimFolder::new(1);
    write(&folder, "repository", &plain_config().encode());
    let mut input = Input::new(data);
    let (mut packs, mut runs) = (Vec::new(), Vec::new());
    while !input.is_empty() {
        let kind = input.number(1);
        let length = input.length(4);
        let mut bytes = input.bytes(length).to_vec();
        let name = |bytes: &[u8]| blake3::hash(bytes).to_hex().to_string();
        match u8::try_from(kind).unwrap_or(0) {
            PACK => {
                seal::pack(&mut bytes);
                let name = name(&bytes);
                write(&folder, &format!("packs/{}/{name}", &name[..2]), &bytes);
                packs.push((PackId(*blake3::hash(&bytes).as_bytes()), bytes));
            }
            INDEX_RUN => runs.push(bytes),
            POINT => {
                seal::point(&mut bytes);
                write(&folder, &format!("points/{}", name(&bytes)), &bytes);
            }
            other => {
                let dir = OTHERS[usize::from(other) % OTHERS.len()];
                let name = name(&bytes);
                let named = if SHORT.contains(&dir) { &name[..32] } else { &name };
                write(&folder, &format!("{dir}/{named}"), &bytes);
            }
        }
    }
    for mut bytes in runs {
        let rows = (seal::number(&bytes, 12) as usize).min(bytes.len() / 80);
        for (row, (id, pack)) in (0..rows).zip(packs.iter().cycle()) {
            seal::put(&mut bytes, 64 + row * 80, id.as_bytes());
            seal::put(&mut bytes, 64 + row * 80 + 32, pack.get(32..64).unwrap_or_default());
        }
        seal::index_run(&mut bytes);
        write(&folder, &format!("index/{}", blake3::hash(&bytes).to_hex()), &bytes);
    }
    let Ok(repository) = open(&folder) else { return };
    use_all_of(&repository);
}

/// Every point of a repository that nobody damaged.
pub(crate) fn read_all(repository: &Repository) {
    let ids = repository.list_points().unwrap_or_else(|error| panic!("points cannot be listed: {error}"));
    assert!(!ids.is_empty(), "points are gone");
    for id in ids {
        let point = repository.load_point(id).unwrap_or_else(|error| panic!("point {id}: {error}"));
        for disk in &point.disks {
            let read = repository.open_disk(&point, &disk.name).and_then(|disk| {
                let mut segments = Vec::new();
                disk.read(0, disk.size(), &mut segments)
            });
            read.unwrap_or_else(|error| panic!("point {id}, {}: {error}", disk.name));
        }
    }
}

/// None of this may panic, hang or take more memory than is bounded; what fails, fails.
fn use_all_of(repository: &Repository) {
    let _ = repository.stats();
    let ids = repository.list_points().unwrap_or_else(|error| panic!("points cannot be listed: {error}"));
    let mut parent = None;
    for id in ids {
        let Ok(point) = repository.load_point(id) else { continue };
        for disk in point.disks.iter().take(4) {
            let Ok(disk) = repository.open_disk(&point, &disk.name) else { continue };
            let last = disk.size().saturating_sub(5000);
            for offset in [0, disk.size() / 2, last] {
                let length = (disk.size() - offset).min(70_000);
                let mut segments = Vec::new();
                if length > 0 && disk.read(offset, length, &mut segments).is_ok() {
                    let _ = disk.extents(offset, length, 10);
                }
            }
        }
        parent = Some(point);
    }
    let _ = repository.verify(VerifyOptions { data: DataCheck::All, ..VerifyOptions::default() }, &Progress::new());
    let source = Bytes(vec![3; 2 * CHUNK as usize]);
    let backup = repository.begin_backup("web01", parent.as_ref(), std::sync::Arc::default());
    let sealed = backup.and_then(|mut backup| {
        backup.add_disk("disk0", &source)?;
        backup.seal(PointDetails::default())
    });
    // A pack may have claimed to hold a chunk and hold another: then it is damaged, but never read as something else.
    if let Ok(point) = sealed {
        let disk = repository.open_disk(&point, "disk0").unwrap_or_else(|error| panic!("just written: {error}"));
        let mut segments = Vec::new();
        if disk.read(0, disk.size(), &mut segments).is_ok() {
            for segment in segments {
                let right = matches!(&segment, Segment::Data(bytes) if bytes.iter().all(|byte| *byte == 3));
                assert!(right, "other bytes than were stored: {segment:?}");
            }
        }
    }
}

struct Bytes(Vec<u8>);

impl Source for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        buf.copy_from_slice(self.0.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size()).then_some(offset..self.size()))
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }
}

/// A small repository with two points.
pub(crate) fn real_one() -> SimFolder {
    let folder = SimFolder::new(1);
    write(&folder, "repository", &plain_config().encode());
    let repository = open(&folder).unwrap_or_else(|error| panic!("it does not open: {error}"));
    let mut parent = None;
    for round in 0..2 {
        let mut bytes = vec![0; 5 * CHUNK as usize + 99];
        bytes[..100].fill(1 + round);
        bytes[2 * CHUNK as usize..][..500].fill(5);
        bytes[3 * CHUNK as usize..][..500].fill(7);
        let source = Bytes(bytes);
        let point =
            repository.begin_backup("web01", parent.as_ref(), std::sync::Arc::default()).and_then(|mut backup| {
                backup.add_disk("disk0", &source)?;
                backup.seal(PointDetails::default())
            });
        parent = Some(point.unwrap_or_else(|error| panic!("the backup fails: {error}")));
    }
    folder
}

/// Paths and bytes of all objects but the configuration.
pub(crate) fn files(folder: &SimFolder) -> Vec<(PathBuf, Vec<u8>)> {
    let mut dirs = vec![PathBuf::new()];
    let mut files = Vec::new();
    while let Some(dir) = dirs.pop() {
        dirs.extend(folder.list_dirs(&dir).unwrap_or_default());
        for entry in folder.list(&dir).unwrap_or_default() {
            let mut bytes = vec![0; usize::try_from(entry.len).unwrap_or(0)];
            let read = folder.open_read(&entry.path).and_then(|file| file.read_at(0, &mut bytes));
            read.unwrap_or_else(|error| panic!("{}: {error}", entry.path.display()));
            files.push((entry.path, bytes));
        }
    }
    files.retain(|(path, _)| path.parent() != Some(Path::new("")));
    files
}

pub(crate) fn objects_of_a_real_one(wanted: impl Fn(&str) -> bool) -> Vec<Vec<u8>> {
    let files = files(&real_one());
    files.into_iter().filter(|(path, _)| wanted(&path.to_string_lossy())).map(|(_, bytes)| bytes).collect()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seed = Vec::new();
    let mut seeds = Vec::new();
    for (path, bytes) in files(&real_one()) {
        let kind = match path.components().next() {
            Some(first) if first.as_os_str() == "packs" => PACK,
            Some(first) if first.as_os_str() == "index" => INDEX_RUN,
            Some(first) if first.as_os_str() == "points" => POINT,
            _ => continue,
        };
        seed.push(kind);
        seed.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        seed.extend(bytes);
        if kind == POINT {
            seeds.push(seed.clone());
        }
    }
    seeds.push(seed);
    seeds
}
