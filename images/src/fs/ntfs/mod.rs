//! NTFS. Layout: the NTFS documentation of the Linux-NTFS project, as libntfs-3g's `layout.h` has it; compression:
//! [MS-XCA], section 2.5 (LZNT1).
//!
//! Every object is a record of the master file table, which is a file itself. A node is known by the reference that a
//! directory has of it: record number, and above 48 bits how often the record was used anew.

mod attribute;
mod compressed;
mod index;
mod record;
mod reparse;
mod runs;
mod security;

use std::sync::{Arc, OnceLock};

use self::attribute::{Attribute, Value};
use self::record::{Boot, Record};
use self::security::Descriptors;
use super::{DirEntry, FileSystem, FileType, FsError, Node, NodeId, Stream, Timestamp, Xattr, read_vec};
use crate::bytes::{le, size, u8};
use crate::mapped::Inline;
use crate::{DiskImage, SharedDisk};

/// The root directory's record.
const ROOT: u64 = 5;
/// The record of the volume's name and state.
const VOLUME: u64 = 3;
/// Records from 0 on that are the file system's own.
const OWN_RECORDS: u64 = 24;
/// Records that one object's attributes may be spread over.
const RECORDS_MAX: usize = 4096;
/// Longest list of attributes; Windows makes 256 KiB.
const LIST_MAX: u64 = 1 << 20;
/// Longest alternate stream that is given as an extended attribute, as long as Linux takes one.
const STREAM_MAX: u64 = 64 << 10;

/// Types of attributes.
mod kind {
    pub const STANDARD: u32 = 0x10;
    pub const LIST: u32 = 0x20;
    pub const FILE_NAME: u32 = 0x30;
    pub const SECURITY: u32 = 0x50;
    pub const VOLUME_INFORMATION: u32 = 0x70;
    pub const DATA: u32 = 0x80;
    pub const REPARSE: u32 = 0xc0;
}
/// The stream in which Windows keeps what its overlay filter has compressed.
const COMPACT: &str = "WofCompressedData";
/// The attribute `$STANDARD_INFORMATION`.
const READ_ONLY: u32 = 0x1;
/// The name space of short names, which are no names of their own.
const DOS_NAME: u8 = 2;

/// An open file system.
pub(super) struct Ntfs {
    disk: SharedDisk,
    boot: Boot,
    table: Arc<dyn DiskImage>,
    /// Read when the first is asked for; nothing where they cannot be read.
    descriptors: OnceLock<Option<Descriptors>>,
    notices: Vec<String>,
}

/// All attributes of an object.
struct Object {
    id: NodeId,
    directory: bool,
    attributes: Vec<Attribute>,
}

impl Object {
    fn find(&self, kind: u32) -> Option<&Attribute> {
        self.attributes.iter().find(|attribute| attribute.kind == kind && attribute.name.is_empty())
    }

    /// The names of its alternate streams of such lengths.
    fn streams(&self, wanted: impl Fn(u64) -> bool) -> impl Iterator<Item = &str> {
        let streams = self
            .attributes
            .iter()
            .filter(|attribute| attribute.kind == kind::DATA && !attribute.name.is_empty() && attribute.first == 0);
        streams.filter(move |attribute| wanted(attribute.length())).map(|attribute| attribute.name.as_str())
    }

    fn resident(&self, kind: u32) -> &[u8] {
        match self.find(kind).map(|attribute| &attribute.value) {
            Some(Value::Resident(bytes)) => bytes,
            _ => &[],
        }
    }
}

impl Ntfs {
    pub(super) fn open(disk: SharedDisk) -> Result<Ntfs, FsError> {
        let boot = Boot::read(disk.as_ref())?;
        // The table's first record says where the table is; with a list of attributes only its beginning.
        let first = Record::read(disk.as_ref(), &boot, NodeId(0), boot.table_offset)?;
        let parts: Vec<Attribute> = first.attributes()?.into_iter().filter(|at| at.kind == kind::DATA).collect();
        let beginning = runs::content(&disk, &boot, NodeId(0), &parts.iter().collect::<Vec<_>>())?;
        let mut fs =
            Ntfs { disk, boot, table: Arc::from(beginning), descriptors: OnceLock::new(), notices: Vec::new() };
        if first.attributes()?.iter().any(|attribute| attribute.kind == kind::LIST) {
            let whole = fs.object(NodeId(0))?;
            fs.table = Arc::from(
                fs.stream(&whole, kind::DATA, "")?.ok_or_else(|| FsError::damaged(&NodeId(0), "it has no content"))?,
            );
        }
        fs.object(NodeId(ROOT))?;
        if let Ok(volume) = fs.object(NodeId(VOLUME))
            && le::u16(volume.resident(kind::VOLUME_INFORMATION), 10) & 1 != 0
        {
            fs.notices.push(
                "the file system was in use: the newest changes of its log are not among what is shown".to_owned(),
            );
        }
        Ok(fs)
    }

    fn record(&self, id: NodeId) -> Result<Record, FsError> {
        let number = id.0 & 0xffff_ffff_ffff;
        let offset = number.checked_mul(self.boot.record_size).filter(|offset| *offset < self.table.size());
        let offset = offset.ok_or_else(|| FsError::damaged(&id, "there is no such record"))?;
        let record = Record::read(self.table.as_ref(), &self.boot, id, offset)?;
        let used = u64::from(record.sequence());
        if id.0 >> 48 != 0 && id.0 >> 48 != used {
            return Err(FsError::damaged(&id, "it was deleted, and its record is used by another"));
        }
        Ok(record)
    }

    /// The security descriptor of an object: its own, or by number one that several have.
    fn descriptor(&self, object: &Object) -> Result<Option<Vec<u8>>, FsError> {
        if let Some(own) = self.stream(object, kind::SECURITY, "")? {
            return read_vec(own.as_ref(), &object.id, 0, size(own.size().min(STREAM_MAX))).map(Some);
        }
        let standard = object.resident(kind::STANDARD);
        // Versions before 3 have shorter information, and no number.
        let number = le::u32(standard, 52);
        if number == 0 {
            return Ok(None);
        }
        let descriptors = self.descriptors.get_or_init(|| {
            let stream = self.stream(&self.object(security::RECORD).ok()?, kind::DATA, security::STREAM).ok()??;
            Descriptors::read(stream).ok()
        });
        descriptors.as_ref().map_or(Ok(None), |descriptors| descriptors.find(number))
    }

    /// The object with this base record. A list of attributes names the other records that have some of them.
    fn object(&self, id: NodeId) -> Result<Object, FsError> {
        let base = self.record(id)?;
        if !base.in_use() {
            return Err(FsError::damaged(&id, "it was deleted"));
        }
        let mut attributes = base.attributes()?;
        let list: Vec<&Attribute> = attributes.iter().filter(|attribute| attribute.kind == kind::LIST).collect();
        if !list.is_empty() {
            let list = runs::content(&self.disk, &self.boot, id, &list)?;
            if list.size() > LIST_MAX {
                return Err(FsError::damaged(&id, "its list of attributes is too long"));
            }
            let list = read_vec(list.as_ref(), &id, 0, size(list.size()))?;
            let own = id.0 & 0xffff_ffff_ffff;
            let mut others: Vec<u64> =
                attribute::listed(&list).filter(|other| other & 0xffff_ffff_ffff != own).collect();
            others.sort_unstable();
            others.dedup();
            if others.len() > RECORDS_MAX {
                return Err(FsError::damaged(&id, "its attributes are in more records than any file's"));
            }
            for other in others {
                let record = self.record(NodeId(other))?;
                if record.base() & 0xffff_ffff_ffff != own {
                    return Err(FsError::damaged(&id, "its list of attributes names a record of another"));
                }
                attributes.extend(record.attributes()?);
            }
        }
        Ok(Object { id, directory: base.is_directory(), attributes })
    }

    /// The content of a stream, if the object has it.
    fn stream(&self, object: &Object, kind: u32, name: &str) -> Result<Option<Box<dyn DiskImage>>, FsError> {
        let parts: Vec<&Attribute> =
            object.attributes.iter().filter(|attribute| attribute.kind == kind && attribute.name == name).collect();
        if parts.is_empty() {
            return Ok(None);
        }
        runs::content(&self.disk, &self.boot, object.id, &parts).map(Some)
    }

    /// What a reparse point is, if the object is one.
    fn reparse(&self, object: &Object) -> Result<Option<reparse::Reparse>, FsError> {
        let Some(content) = self.stream(object, kind::REPARSE, "")? else { return Ok(None) };
        let length = content.size().min(reparse::LENGTH_MAX);
        Ok(Some(reparse::decode(&read_vec(content.as_ref(), &object.id, 0, size(length))?)))
    }
}

impl FileSystem for Ntfs {
    fn root(&self) -> NodeId {
        NodeId(ROOT)
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        let object = self.object(id)?;
        let standard = object.resident(kind::STANDARD);
        let (kind, length) = match self.reparse(&object)? {
            Some(reparse::Reparse::Link(target)) => (FileType::Symlink, target.len() as u64),
            _ if object.directory => (FileType::Directory, 0),
            _ => {
                let first =
                    object.attributes.iter().find(|at| at.kind == kind::DATA && at.name.is_empty() && at.first == 0);
                (FileType::File, first.map_or(0, Attribute::length))
            }
        };
        let mode = match kind {
            FileType::Directory => 0o755,
            FileType::Symlink => 0o777,
            _ if le::u32(standard, 32) & READ_ONLY != 0 => 0o444,
            _ => 0o644,
        };
        let names = object.attributes.iter().filter(|attribute| {
            attribute.kind == kind::FILE_NAME
                && matches!(&attribute.value, Value::Resident(bytes) if u8(bytes, 65) != DOS_NAME)
        });
        Ok(Node {
            id,
            kind,
            mode,
            uid: 0,
            gid: 0,
            size: length,
            links: u32::try_from(names.count().max(1)).unwrap_or(1),
            modified: time(le::u64(standard, 8)),
            accessed: time(le::u64(standard, 24)),
            changed: time(le::u64(standard, 16)),
            device: (0, 0),
        })
    }

    fn read_dir(&self, id: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        let object = self.object(id)?;
        if !object.directory {
            return Err(FsError::NotADirectory { path: id.to_string() });
        }
        let mut found = index::read(self, &object, cursor)?;
        if id.0 & 0xffff_ffff_ffff == ROOT {
            found.retain(|entry| entry.id.0 & 0xffff_ffff_ffff >= OWN_RECORDS);
            // A page of nothing but the file system's own is not the directory's end.
            if found.is_empty() && cursor == 0 {
                let own = index::read(self, &object, cursor)?;
                if let Some(last) = own.last() {
                    return self.read_dir(id, last.next);
                }
            }
        }
        Ok(found)
    }

    fn open(&self, id: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        let object = self.object(id)?;
        if object.directory {
            return Err(FsError::damaged(&id, "it is not a file"));
        }
        if let Some(reparse::Reparse::Other(reason)) = self.reparse(&object)? {
            return Err(FsError::unsupported(&id, reason));
        }
        Ok(self.stream(&object, kind::DATA, "")?.unwrap_or_else(|| Box::new(Inline { bytes: Vec::new(), size: 0 })))
    }

    fn read_link(&self, id: NodeId) -> Result<Vec<u8>, FsError> {
        match self.reparse(&self.object(id)?)? {
            Some(reparse::Reparse::Link(target)) => Ok(target),
            _ => Err(FsError::damaged(&id, "it is no symbolic link")),
        }
    }

    /// Alternate data streams and the security descriptor, as ntfs-3g gives them.
    fn xattrs(&self, id: NodeId) -> Result<Vec<Xattr>, FsError> {
        let object = self.object(id)?;
        let mut found: Vec<Xattr> = Vec::new();
        for name in object.streams(|length| length <= STREAM_MAX) {
            if let Some(content) = self.stream(&object, kind::DATA, name)? {
                let value = read_vec(content.as_ref(), &id, 0, size(content.size().min(STREAM_MAX)))?;
                found.push((format!("user.{name}").into_bytes(), value));
            }
        }
        if let Some(descriptor) = self.descriptor(&object)? {
            found.push((b"system.ntfs_acl".to_vec(), descriptor));
        }
        Ok(found)
    }

    fn streams(&self, id: NodeId) -> Result<Vec<Stream>, FsError> {
        let object = self.object(id)?;
        let mut found: Vec<Stream> = Vec::new();
        for name in object.streams(|length| length > STREAM_MAX).filter(|name| *name != COMPACT) {
            if let Some(content) = self.stream(&object, kind::DATA, name)? {
                found.push((name.as_bytes().to_vec(), content));
            }
        }
        Ok(found)
    }

    fn ignores_case(&self) -> bool {
        true
    }

    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }
}

/// Times count 100 ns from 1601.
fn time(stored: u64) -> Timestamp {
    const TO_1970: i64 = 11_644_473_600;
    let nanoseconds = u32::try_from(stored % 10_000_000).unwrap_or(0) * 100;
    Timestamp { seconds: i64::try_from(stored / 10_000_000).unwrap_or(0) - TO_1970, nanoseconds }
}
