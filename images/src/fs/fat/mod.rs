//! FAT12, FAT16 and FAT32 with long names. Layout: "Microsoft Extensible Firmware Initiative FAT32 File System
//! Specification", version 1.03.

mod geometry;
mod names;

pub(crate) use geometry::Geometry;

use self::names::Name;
use super::time::dos;
use super::{DirEntry, FileSystem, FileType, FsError, Node, NodeId, Timestamp, read, read_vec};
use crate::bytes::{le, size, u8};
use crate::mapped::Runs;
use crate::{DiskImage, SharedDisk};

/// Size of a directory entry.
const ENTRY: u64 = 32;
/// Longest directory, as Linux and Windows have it: 65,536 entries.
const DIR_MAX: u64 = 65_536 * ENTRY;
/// The root directory, which has no entry; every other node is the place of its entry.
const ROOT: NodeId = NodeId(0);

const READ_ONLY: u8 = 0x01;
const VOLUME: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;

/// An open file system.
pub(super) struct Fat {
    disk: SharedDisk,
    geometry: Geometry,
}

impl Fat {
    pub(super) fn open(disk: SharedDisk) -> Result<Fat, FsError> {
        let mut head = [0; 512];
        read(disk.as_ref(), &"the boot sector", 0, &mut head)?;
        let geometry =
            Geometry::decode(&head).ok_or_else(|| FsError::damaged(&"the boot sector", "it makes no sense"))?;
        Ok(Fat { disk, geometry })
    }

    /// A directory entry that is a node.
    fn entry(&self, id: NodeId) -> Result<[u8; 32], FsError> {
        let mut entry = [0; 32];
        if !id.0.is_multiple_of(ENTRY) || id.0 < self.geometry.root_offset().min(self.geometry.data) {
            return Err(FsError::damaged(&id, "no directory entry is there"));
        }
        read(self.disk.as_ref(), &id, id.0, &mut entry)?;
        Ok(entry)
    }

    fn first_cluster(&self, entry: &[u8]) -> u32 {
        let high = if self.geometry.bits == 32 { u32::from(le::u16(entry, 20)) } else { 0 };
        u32::from(le::u16(entry, 26)) | high << 16
    }

    /// The runs of a chain, up to `length` bytes. A chain that ends early is an error where `whole` is asked for.
    fn chain(&self, id: NodeId, first: u32, length: u64, whole: bool) -> Result<Runs, FsError> {
        let mut runs = Runs::default();
        let mut cluster = first;
        while runs.end() < length {
            let Some(offset) = self.geometry.cluster_offset(cluster) else {
                if whole {
                    return Err(FsError::damaged(&id, "its chain of clusters ends too early"));
                }
                break;
            };
            runs.push(&id, (runs.end(), self.geometry.cluster_size, offset))?;
            cluster = self
                .geometry
                .next(self.disk.as_ref(), cluster)
                .map_err(|source| FsError::Io { object: id.to_string(), source })?;
        }
        Ok(runs)
    }

    /// The bytes of a directory.
    fn directory(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let first = if id == ROOT {
            if let Some(length) = self.geometry.fixed_root {
                let mut runs = Runs::default();
                runs.push(&id, (0, length, self.geometry.root_offset()))?;
                return Ok(Box::new(runs.over(self.disk.clone(), length)));
            }
            self.geometry.root_cluster
        } else {
            let entry = self.entry(id)?;
            if u8(&entry, 11) & DIRECTORY == 0 {
                return Err(FsError::NotADirectory { path: id.to_string() });
            }
            self.first_cluster(&entry)
        };
        let runs = self.chain(id, first, DIR_MAX, false)?;
        let length = runs.end();
        Ok(Box::new(runs.over(self.disk.clone(), length)))
    }

    /// Where byte `at` of a directory lies on the disk: what its entries are known by.
    fn place(&self, id: NodeId, clusters: &[u64], at: u64) -> Option<u64> {
        if id == ROOT && self.geometry.fixed_root.is_some() {
            return Some(self.geometry.root_offset() + at);
        }
        let cluster = clusters.get(size(at / self.geometry.cluster_size))?;
        Some(cluster + at % self.geometry.cluster_size)
    }

    /// The places of a directory's clusters.
    fn clusters(&self, id: NodeId) -> Result<Vec<u64>, FsError> {
        let first = match (id, self.geometry.fixed_root) {
            (ROOT, Some(_)) => return Ok(Vec::new()),
            (ROOT, None) => self.geometry.root_cluster,
            _ => self.first_cluster(&self.entry(id)?),
        };
        let mut found = Vec::new();
        let mut cluster = first;
        while let Some(offset) = self.geometry.cluster_offset(cluster) {
            if found.len() as u64 * self.geometry.cluster_size >= DIR_MAX {
                break;
            }
            found.push(offset);
            cluster = self
                .geometry
                .next(self.disk.as_ref(), cluster)
                .map_err(|source| FsError::Io { object: id.to_string(), source })?;
        }
        Ok(found)
    }
}

impl FileSystem for Fat {
    fn root(&self) -> NodeId {
        ROOT
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        let directory = |modified: Timestamp, accessed| Node {
            id,
            kind: FileType::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            links: 1,
            modified,
            accessed,
            changed: modified,
            device: (0, 0),
        };
        if id == ROOT {
            return Ok(directory(Timestamp::default(), Timestamp::default()));
        }
        let entry = self.entry(id)?;
        let attributes = u8(&entry, 11);
        let modified = dos(le::u16(&entry, 24), le::u16(&entry, 22), 0);
        let accessed = dos(le::u16(&entry, 18), 0, 0);
        if attributes & DIRECTORY != 0 {
            return Ok(directory(modified, accessed));
        }
        let mode = if attributes & READ_ONLY != 0 { 0o444 } else { 0o644 };
        Ok(Node { kind: FileType::File, mode, size: le::u32(&entry, 28).into(), ..directory(modified, accessed) })
    }

    fn read_dir(&self, id: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        let content = self.directory(id)?;
        let clusters = self.clusters(id)?;
        let bytes = read_vec(content.as_ref(), &id, 0, size(content.size()))?;
        let mut name = Name::default();
        let mut found = Vec::new();
        for (index, entry) in bytes.chunks_exact(32).enumerate() {
            let at = index as u64 * ENTRY;
            match (u8(entry, 0), u8(entry, 11)) {
                (0, _) => break,
                (0xe5, _) => name = Name::default(),
                (_, attributes) if attributes & 0x3f == LONG_NAME => name.add(entry),
                (_, attributes) if attributes & VOLUME != 0 => name = Name::default(),
                _ => {
                    let full = std::mem::take(&mut name).finish(entry);
                    if matches!(full.as_str(), "." | "..") || at < cursor {
                        continue;
                    }
                    let Some(place) = self.place(id, &clusters, at) else { break };
                    found.push(DirEntry { name: full.into_bytes(), id: NodeId(place), next: at + ENTRY });
                }
            }
        }
        Ok(found)
    }

    fn open(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let entry = self.entry(id)?;
        if id == ROOT || u8(&entry, 11) & (DIRECTORY | VOLUME) != 0 {
            return Err(FsError::damaged(&id, "it is not a file"));
        }
        let length = u64::from(le::u32(&entry, 28));
        let runs = self.chain(id, self.first_cluster(&entry), length, true)?;
        Ok(Box::new(runs.over(self.disk.clone(), length)))
    }

    fn ignores_case(&self) -> bool {
        true
    }
}
