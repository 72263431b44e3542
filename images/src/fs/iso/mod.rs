//! ISO 9660 with Rock Ridge or Joliet. Layout: ECMA-119; Joliet Specification (1995); IEEE P1281 (SUSP) and P1282 (Rock
//! Ridge) drafts.
//!
//! A node is the place of its directory record. Rock Ridge is preferred, since it has what Unix knows of a file; then
//! Joliet, which has long names; then plain names without their version.

mod rock_ridge;

use self::rock_ridge::Entries;
use super::time::civil;
use super::{DirEntry, FileSystem, FileType, FsError, Node, NodeId, Timestamp, read, read_vec};
use crate::bytes::{be, le, part, size, u8, utf16};
use crate::mapped::Runs;
use crate::{DiskImage, SharedDisk};

const SECTOR: u64 = 2048;
/// Volume descriptors that are looked at.
const DESCRIPTORS_MAX: u64 = 64;
/// Largest directory that is read.
const DIR_MAX: u64 = 1 << 30;
/// Sectors of a directory read at a time.
const PAGE: u64 = 64 << 10;
/// Records that one file may have, each up to 4 GiB.
const PARTS_MAX: usize = 4096;
/// Record flags.
const DIRECTORY: u8 = 0x02;
const GOES_ON: u8 = 0x80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    Plain,
    Joliet,
    RockRidge,
}

/// An open file system.
pub(super) struct Iso {
    disk: SharedDisk,
    /// The place of the root's record in its volume descriptor.
    root: u64,
    names: Names,
    /// Bytes before the entries of Rock Ridge.
    skip: usize,
    block: u64,
}

/// A directory record.
struct Record {
    place: u64,
    bytes: Vec<u8>,
}

impl Record {
    fn flags(&self) -> u8 {
        u8(&self.bytes, 25)
    }

    fn name(&self) -> &[u8] {
        part(&self.bytes, 33, usize::from(u8(&self.bytes, 32)))
    }

    /// Where Rock Ridge's entries are: behind the name, at an even place.
    fn system_use(&self) -> &[u8] {
        let name = usize::from(u8(&self.bytes, 32));
        part(&self.bytes, 33 + name + usize::from(name % 2 == 0), self.bytes.len())
    }

    fn is_dots(&self) -> bool {
        matches!(self.name(), [0 | 1])
    }

    fn time(&self) -> Timestamp {
        rock_ridge::short_time(part(&self.bytes, 18, 7))
    }
}

impl Iso {
    pub(super) fn open(disk: SharedDisk) -> Result<Iso, FsError> {
        let mut primary = None;
        let mut joliet = None;
        for sector in 16..16 + DESCRIPTORS_MAX {
            let descriptor = read_vec(disk.as_ref(), &"the volume descriptors", sector * SECTOR, 2048)?;
            if part(&descriptor, 1, 5) != b"CD001" {
                break;
            }
            let place = sector * SECTOR + 156;
            match u8(&descriptor, 0) {
                1 => primary = primary.or(Some((place, u64::from(le::u16(&descriptor, 128))))),
                2 if matches!(part(&descriptor, 88, 3), b"%/@" | b"%/C" | b"%/E") => joliet = joliet.or(Some(place)),
                255 => break,
                _ => {}
            }
        }
        let (root, block) =
            primary.ok_or_else(|| FsError::damaged(&"the volume descriptors", "none is the primary one"))?;
        if !matches!(block, 512 | 1024 | 2048) {
            return Err(FsError::unsupported(&"a CD", "its block size is not usual"));
        }
        let mut fs = Iso { disk, root, names: Names::Plain, skip: 0, block };
        // The first record of the root says whether there is Rock Ridge.
        let record = fs.record(NodeId(root))?;
        if let Some(own) = fs.record_in(fs.extent(&record), u64::from(le::u32(&record.bytes, 10)))? {
            let entries = Entries::read(&fs, own.system_use())?;
            if entries.has_rock_ridge() {
                fs.skip = entries.skip();
                fs.names = Names::RockRidge;
            }
        }
        if let (Names::Plain, Some(joliet)) = (fs.names, joliet) {
            fs.root = joliet;
            fs.names = Names::Joliet;
        }
        Ok(fs)
    }

    fn extent(&self, record: &Record) -> u64 {
        (u64::from(le::u32(&record.bytes, 2)) + u64::from(u8(&record.bytes, 1))) * self.block
    }

    fn record(&self, id: NodeId) -> Result<Record, FsError> {
        let bad = || FsError::damaged(&id, "no directory record is there");
        self.record_in(id.0, SECTOR)?.ok_or_else(bad)
    }

    /// The record at a place, if one is there.
    fn record_in(&self, place: u64, length: u64) -> Result<Option<Record>, FsError> {
        let id = NodeId(place);
        let room = SECTOR - place % SECTOR;
        let bytes = read_vec(self.disk.as_ref(), &id, place, size(room.min(255).min(length)))?;
        let length = usize::from(u8(&bytes, 0));
        let bytes = part(&bytes, 0, length).to_vec();
        if length < 34 || bytes.len() != length || 33 + usize::from(u8(&bytes, 32)) > length {
            return Ok(None);
        }
        Ok(Some(Record { place, bytes }))
    }

    fn entries(&self, record: &Record) -> Result<Option<Entries>, FsError> {
        if self.names != Names::RockRidge {
            return Ok(None);
        }
        Entries::read(self, part(record.system_use(), self.skip, 255)).map(Some)
    }

    /// The record of a node, which for a directory that was moved deeper is the moved one's own.
    fn resolve(&self, id: NodeId) -> Result<(Record, Option<Entries>), FsError> {
        let record = self.record(id)?;
        if record.place == self.root && self.names == Names::RockRidge {
            // What Rock Ridge says of the root is in the root's own first record.
            let own = self.record(NodeId(self.extent(&record)))?;
            let entries = self.entries(&own)?;
            return Ok((record, entries));
        }
        let entries = self.entries(&record)?;
        if let Some(moved) = entries.as_ref().and_then(Entries::moved_to) {
            let own = self.record(NodeId(u64::from(moved) * self.block))?;
            return Ok((own, entries));
        }
        Ok((record, entries))
    }

    fn name(&self, record: &Record, entries: Option<&Entries>) -> Vec<u8> {
        match (self.names, entries.and_then(Entries::name)) {
            (_, Some(name)) => name.to_vec(),
            (Names::Joliet, None) => {
                let units: Vec<u16> = record.name().chunks_exact(2).map(|unit| be::u16(unit, 0)).collect();
                without_version(&utf16(&units)).as_bytes().to_vec()
            }
            _ => {
                let name = String::from_utf8_lossy(record.name()).into_owned();
                without_version(&name).trim_end_matches('.').as_bytes().to_vec()
            }
        }
    }

    /// The parts of a file: records that follow each other.
    fn parts(&self, first: Record) -> Result<Vec<Record>, FsError> {
        let mut parts = vec![first];
        while let Some(last) = parts.last().filter(|last| last.flags() & GOES_ON != 0) {
            let id = NodeId(last.place);
            let mut place = last.place + last.bytes.len() as u64;
            let mut next = if place.is_multiple_of(SECTOR) { None } else { self.record_in(place, SECTOR)? };
            if next.is_none() {
                place = place.next_multiple_of(SECTOR);
                next = self.record_in(place, SECTOR)?;
            }
            match next {
                Some(next) if next.name() == last.name() && parts.len() < PARTS_MAX => parts.push(next),
                _ => return Err(FsError::damaged(&id, "a part of it is missing")),
            }
        }
        Ok(parts)
    }
}

fn without_version(name: &str) -> &str {
    match name.rsplit_once(';') {
        Some((name, version)) if version.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => name,
    }
}

impl FileSystem for Iso {
    fn root(&self) -> NodeId {
        NodeId(self.root)
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        let (record, entries) = self.resolve(id)?;
        let directory = record.flags() & DIRECTORY != 0;
        let time = record.time();
        let unix = entries.as_ref().and_then(Entries::unix);
        let kind = match (directory, unix.and_then(|unix| FileType::from_mode(unix.mode))) {
            (true, _) => FileType::Directory,
            (false, Some(kind)) if kind != FileType::Directory => kind,
            _ => FileType::File,
        };
        let length = match kind {
            FileType::File => self.parts(record)?.iter().map(|part| u64::from(le::u32(&part.bytes, 10))).sum(),
            _ => 0,
        };
        let times = entries.as_ref().map(Entries::times).unwrap_or_default();
        Ok(Node {
            id,
            kind,
            mode: unix.map_or(if directory { 0o555 } else { 0o444 }, |unix| unix.mode & 0o7777),
            uid: unix.map_or(0, |unix| unix.uid),
            gid: unix.map_or(0, |unix| unix.gid),
            size: length,
            // Records of the same file are told by their extent only, which empty files share.
            links: 1,
            modified: times.modified.unwrap_or(time),
            accessed: times.accessed.unwrap_or(time),
            changed: times.changed.unwrap_or(time),
            device: entries.as_ref().and_then(Entries::device).unwrap_or((0, 0)),
        })
    }

    fn read_dir(&self, id: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        let (record, _) = self.resolve(id)?;
        if record.flags() & DIRECTORY == 0 {
            return Err(FsError::NotADirectory { path: id.to_string() });
        }
        let (extent, length) = (self.extent(&record), u64::from(le::u32(&record.bytes, 10)));
        if length > DIR_MAX {
            return Err(FsError::damaged(&id, "it is larger than any directory"));
        }
        let mut found = Vec::new();
        let mut at = cursor;
        let mut goes_on = false;
        while at < length && (found.is_empty() || at - cursor < PAGE || goes_on) {
            let Some(record) = self.record_in(extent + at, length - at)? else {
                // Records do not cross sectors; what is left of one is empty.
                at = (at / SECTOR + 1) * SECTOR;
                continue;
            };
            at += record.bytes.len() as u64;
            let later = goes_on;
            goes_on = record.flags() & GOES_ON != 0;
            if record.is_dots() || later {
                continue;
            }
            let entries = self.entries(&record)?;
            if entries.as_ref().is_some_and(Entries::is_moved) {
                continue;
            }
            let name = self.name(&record, entries.as_ref());
            found.push(DirEntry { name, id: NodeId(record.place), next: at });
        }
        // Later parts of a file belong to its entry.
        if let Some(last) = found.last_mut() {
            last.next = last.next.max(at);
        }
        Ok(found)
    }

    fn open(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let (record, entries) = self.resolve(id)?;
        if record.flags() & DIRECTORY != 0 {
            return Err(FsError::damaged(&id, "it is not a file"));
        }
        if entries.as_ref().is_some_and(Entries::is_compressed) {
            return Err(FsError::unsupported(&id, "it is compressed (zisofs)"));
        }
        let mut runs = Runs::default();
        let mut length = 0;
        for part in self.parts(record)? {
            if part.bytes.get(26..28).is_some_and(|interleave| interleave != [0, 0]) {
                return Err(FsError::unsupported(&id, "it is interleaved with others"));
            }
            let bytes = u64::from(le::u32(&part.bytes, 10));
            let offset = self.extent(&part);
            if bytes > 0 && offset + bytes > self.disk.size() {
                return Err(FsError::damaged(&id, "it points outside of its volume"));
            }
            runs.push(&id, (length, bytes, offset))?;
            length += bytes;
        }
        Ok(Box::new(runs.over(self.disk.clone(), length)))
    }

    fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        let (_, entries) = self.resolve(id)?;
        entries.and_then(|entries| entries.link()).ok_or_else(|| FsError::damaged(&id, "it is no symbolic link"))
    }

    fn ignores_case(&self) -> bool {
        self.names != Names::RockRidge
    }
}

/// Reads what SUSP continues elsewhere.
fn continuation(fs: &Iso, block: u32, offset: u32, length: u32) -> Result<Vec<u8>, FsError> {
    let place = u64::from(block) * fs.block + u64::from(offset);
    let mut bytes = vec![0; size(u64::from(length).min(SECTOR))];
    read(fs.disk.as_ref(), &NodeId(place), place, &mut bytes)?;
    Ok(bytes)
}

/// Seventeen digits and a zone, as volume descriptors and Rock Ridge's long times have them.
fn long_time(bytes: &[u8]) -> Option<Timestamp> {
    let digits =
        |from: usize, count: usize| -> Option<i64> { std::str::from_utf8(part(bytes, from, count)).ok()?.parse().ok() };
    let date = (digits(0, 4)?, digits(4, 2)?, digits(6, 2)?);
    if date.0 == 0 {
        return None;
    }
    let time = civil(date, (digits(8, 2)?, digits(10, 2)?, digits(12, 2)?));
    let zone = i64::from(u8(bytes, 16).cast_signed());
    let hundredths = u32::try_from(digits(14, 2)?).ok()?;
    Some(Timestamp { seconds: time.seconds - zone * 900, nanoseconds: hundredths * 10_000_000 })
}
