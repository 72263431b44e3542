//! exFAT. Layout: "exFAT file system specification", Microsoft, 2019.
//!
//! A node is the place of its first directory entry, counted in entries from the disk's beginning; the topmost bit tells
//! that its directory lies in one piece, which the entries that follow it have to be found by.

use super::time::dos;
use super::{DirEntry, FileSystem, FileType, FsError, Node, NodeId, Timestamp, read, read_vec};
use crate::bytes::{le, part, size, u8, utf16};
use crate::mapped::Runs;
use crate::{DiskImage, SharedDisk};

const ENTRY: u64 = 32;
/// Longest directory of the specification.
const DIR_MAX: u64 = 256 << 20;
/// Entries of one file: its own, the stream's, 17 of its name, and what others added.
const SET_MAX: u8 = 32;
/// Bytes of a directory read at a time.
const WINDOW: u64 = 1 << 20;
/// Entries after which a page is full.
const PAGE: usize = 2048;
/// The directory of the node lies in one piece.
const IN_ONE_PIECE: u64 = 1 << 63;
/// The root directory, which has no entry.
const ROOT: NodeId = NodeId(0);

const READ_ONLY: u16 = 0x01;
const DIRECTORY: u16 = 0x10;

/// An open file system.
pub(super) struct ExFat {
    disk: SharedDisk,
    cluster: u64,
    table: u64,
    heap: u64,
    clusters: u32,
    root: u32,
}

/// A directory: its bytes, and where its clusters lie.
struct Directory {
    content: Box<dyn DiskImage>,
    places: Vec<u64>,
    in_one_piece: bool,
}

/// A file's entries, together.
struct Set {
    attributes: u16,
    modified: Timestamp,
    accessed: Timestamp,
    name: String,
    in_one_piece: bool,
    first: u32,
    /// Bytes that were written; what follows reads as zeroes.
    valid: u64,
    length: u64,
}

impl ExFat {
    pub(super) fn open(disk: SharedDisk) -> Result<ExFat, FsError> {
        let mut head = [0; 512];
        let object = "the boot sector";
        read(disk.as_ref(), &object, 0, &mut head)?;
        let (sector, per_cluster) = (u32::from(u8(&head, 108)), u32::from(u8(&head, 109)));
        let sane = part(&head, 3, 8) == b"EXFAT   " && (9..=12).contains(&sector) && sector + per_cluster <= 25;
        if !sane {
            return Err(FsError::damaged(&object, "it makes no sense"));
        }
        let clusters = le::u32(&head, 92).min(0xffff_fff5);
        // Of two tables the second is in use where the flag says so.
        let second = le::u16(&head, 106) & 1 != 0 && u8(&head, 110) > 1;
        let table_length = u64::from(le::u32(&head, 84)) << sector;
        let fs = ExFat {
            cluster: 1 << (sector + per_cluster),
            table: (u64::from(le::u32(&head, 80)) << sector) + if second { table_length } else { 0 },
            heap: u64::from(le::u32(&head, 88)) << sector,
            clusters: clusters.min(u32::try_from(table_length / 4).unwrap_or(u32::MAX).saturating_sub(2)),
            root: le::u32(&head, 96),
            disk,
        };
        if fs.offset(fs.root).is_none() {
            return Err(FsError::damaged(&object, "it names no root directory"));
        }
        Ok(fs)
    }

    /// Where a cluster lies, unless it is none.
    fn offset(&self, cluster: u32) -> Option<u64> {
        let index = cluster.checked_sub(2).filter(|index| *index < self.clusters)?;
        Some(self.heap + u64::from(index) * self.cluster)
    }

    fn next(&self, id: NodeId, cluster: u32) -> Result<u32, FsError> {
        let mut entry = [0; 4];
        read(self.disk.as_ref(), &id, self.table + 4 * u64::from(cluster), &mut entry)?;
        Ok(le::u32(&entry, 0))
    }

    /// The runs of a file or directory, up to `length` bytes.
    fn runs(&self, id: NodeId, first: u32, in_one_piece: bool, length: u64, whole: bool) -> Result<Runs, FsError> {
        let mut runs = Runs::default();
        let cut = || FsError::damaged(&id, "its chain of clusters ends too early");
        if in_one_piece && length > 0 {
            let count = u32::try_from(length.div_ceil(self.cluster)).map_err(|_| cut())?;
            let last = first.checked_add(count - 1).ok_or_else(cut)?;
            let (Some(offset), Some(_)) = (self.offset(first), self.offset(last)) else { return Err(cut()) };
            runs.push(&id, (0, u64::from(count) * self.cluster, offset))?;
            return Ok(runs);
        }
        let mut cluster = first;
        while runs.end() < length {
            let Some(offset) = self.offset(cluster) else {
                if whole {
                    return Err(cut());
                }
                break;
            };
            runs.push(&id, (runs.end(), self.cluster, offset))?;
            cluster = self.next(id, cluster)?;
        }
        Ok(runs)
    }

    /// The bytes of a directory.
    fn directory(&self, id: NodeId) -> Result<Directory, FsError> {
        let (first, piece, length) = if id == ROOT {
            (self.root, false, DIR_MAX)
        } else {
            let set = self.set(id)?;
            if set.attributes & DIRECTORY == 0 {
                return Err(FsError::NotADirectory { path: id.to_string() });
            }
            (set.first, set.in_one_piece, set.length.min(DIR_MAX))
        };
        let mut places = Vec::new();
        let mut cluster = first;
        while let Some(offset) = self.offset(cluster)
            && places.len() as u64 * self.cluster < length
        {
            places.push(offset);
            cluster = if piece { cluster + 1 } else { self.next(id, cluster)? };
        }
        let runs = self.runs(id, first, piece, length, false)?;
        let length = length.min(runs.end());
        Ok(Directory { content: Box::new(runs.over(self.disk.clone(), length)), places, in_one_piece: piece })
    }

    /// The entries of a file.
    fn set(&self, id: NodeId) -> Result<Set, FsError> {
        let in_one_piece = id.0 & IN_ONE_PIECE != 0;
        let mut place = (id.0 & !IN_ONE_PIECE).saturating_mul(ENTRY);
        let bad = || FsError::damaged(&id, "no directory entry is there");
        let mut bytes = read_vec(self.disk.as_ref(), &id, place, 32)?;
        let more = u8(&bytes, 1);
        if u8(&bytes, 0) != 0x85 || more > SET_MAX || place < self.heap {
            return Err(bad());
        }
        for _ in 0..more {
            place += ENTRY;
            if (place - self.heap).is_multiple_of(self.cluster) {
                let index = (place - self.heap) / self.cluster;
                let last = u32::try_from(index + 1).map_err(|_| bad())?;
                let next = if in_one_piece { last + 1 } else { self.next(id, last)? };
                place = self.offset(next).ok_or_else(bad)?;
            }
            bytes.extend(read_vec(self.disk.as_ref(), &id, place, 32)?);
        }
        Set::decode(&bytes).ok_or_else(bad)
    }
}

impl Set {
    fn decode(bytes: &[u8]) -> Option<Set> {
        let stream = part(bytes, 32, 32);
        if u8(bytes, 0) != 0x85 || u8(stream, 0) != 0xc0 {
            return None;
        }
        let names = bytes.chunks_exact(32).skip(2).filter(|entry| u8(entry, 0) == 0xc1);
        let units: Vec<u16> = names.flat_map(|entry| (0..15).map(|at| le::u16(entry, 2 + 2 * at))).collect();
        let name = units.get(..usize::from(u8(stream, 3)))?;
        let time = |at: usize, tens: u8, zone: usize| {
            let local = dos(le::u16(bytes, at + 2), le::u16(bytes, at), tens);
            // Quarters of an hour east of UTC in seven bits, if the eighth says that they are known.
            let zone = match u8(bytes, zone) {
                known @ 0x80.. => i64::from((known << 1).cast_signed() >> 1),
                _ => 0,
            };
            Timestamp { seconds: local.seconds - zone * 900, ..local }
        };
        let length = le::u64(stream, 24);
        Some(Set {
            attributes: le::u16(bytes, 4),
            modified: time(12, u8(bytes, 21), 23),
            accessed: time(16, 0, 24),
            name: utf16(name),
            in_one_piece: u8(stream, 1) & 2 != 0,
            first: le::u32(stream, 20),
            valid: le::u64(stream, 8).min(length),
            length,
        })
    }
}

impl FileSystem for ExFat {
    fn root(&self) -> NodeId {
        ROOT
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        let (kind, mode, length, modified, accessed) = if id == ROOT {
            (FileType::Directory, 0o755, 0, Timestamp::default(), Timestamp::default())
        } else {
            let set = self.set(id)?;
            match set.attributes {
                attributes if attributes & DIRECTORY != 0 => {
                    (FileType::Directory, 0o755, 0, set.modified, set.accessed)
                }
                attributes if attributes & READ_ONLY != 0 => {
                    (FileType::File, 0o444, set.length, set.modified, set.accessed)
                }
                _ => (FileType::File, 0o644, set.length, set.modified, set.accessed),
            }
        };
        Ok(Node {
            id,
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: length,
            links: 1,
            modified,
            accessed,
            changed: modified,
            device: (0, 0),
        })
    }

    fn read_dir(&self, id: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        let Directory { content, places, in_one_piece } = self.directory(id)?;
        let mut found = Vec::new();
        let mut at = cursor;
        let mut window: Vec<u8> = Vec::new();
        let mut window_at = 0;
        while at + ENTRY <= content.size() && found.len() < PAGE {
            // A set may reach over the window's end.
            let needed = at + u64::from(SET_MAX + 1) * ENTRY;
            if at < window_at || needed.min(content.size()) > window_at + window.len() as u64 {
                window_at = at;
                window = read_vec(content.as_ref(), &id, at, size(WINDOW.min(content.size() - at)))?;
            }
            let bytes = part(&window, size(at - window_at), window.len());
            match u8(bytes, 0) {
                0 => break,
                0x85 => {
                    let length = (u64::from(u8(bytes, 1)) + 1) * ENTRY;
                    let set = Set::decode(part(bytes, 0, size(length)));
                    let place = places.get(size(at / self.cluster)).map(|cluster| cluster + at % self.cluster);
                    if let (Some(set), Some(place)) = (set, place) {
                        let flag = if in_one_piece { IN_ONE_PIECE } else { 0 };
                        let next = at + length;
                        found.push(DirEntry { name: set.name.into_bytes(), id: NodeId((place / ENTRY) | flag), next });
                        at = next;
                        continue;
                    }
                }
                _ => {}
            }
            at += ENTRY;
        }
        Ok(found)
    }

    fn open(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let set = self.set(id)?;
        if set.attributes & DIRECTORY != 0 {
            return Err(FsError::damaged(&id, "it is not a file"));
        }
        if set.length > u64::from(self.clusters) * self.cluster {
            return Err(FsError::damaged(&id, "it is longer than its volume"));
        }
        let runs = self.runs(id, set.first, set.in_one_piece, set.length, true)?;
        Ok(Box::new(runs.cut(set.valid).over(self.disk.clone(), set.length)))
    }

    fn ignores_case(&self) -> bool {
        true
    }
}
