//! A file system whose directories are remembered by name: a large one is read once, not for every name that is looked
//! up in it.

use std::collections::HashMap;
use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::{DirEntry, FileSystem, FsError, Node, NodeId, Stream, Xattr};
use crate::DiskImage;

/// Bytes of names kept, with what they cost beside them. A directory with more is searched from its beginning each time.
const BYTES_MAX: u64 = 64 << 20;
const ENTRY_COST: u64 = 64;
/// Directories that are expected among them.
const DIRECTORIES: usize = 1024;

/// The names of a directory.
struct Names {
    exact: HashMap<Vec<u8>, NodeId>,
    /// In small letters, where case does not count.
    folded: HashMap<String, NodeId>,
    bytes: u64,
}

#[derive(Clone)]
struct Bytes;

impl Weighter<NodeId, Option<Arc<Names>>> for Bytes {
    fn weight(&self, _: &NodeId, names: &Option<Arc<Names>>) -> u64 {
        names.as_ref().map_or(0, |names| names.bytes) + ENTRY_COST
    }
}

/// An open file system. It must not change.
pub(super) struct Remembered {
    fs: Box<dyn FileSystem>,
    /// Nothing for a directory with too many names.
    directories: Cache<NodeId, Option<Arc<Names>>, Bytes>,
}

impl Remembered {
    pub(super) fn new(fs: Box<dyn FileSystem>) -> Remembered {
        Remembered { fs, directories: Cache::with_weighter(DIRECTORIES, BYTES_MAX, Bytes) }
    }

    /// All names of a directory; nothing if it has too many.
    fn read(&self, dir: NodeId) -> Result<Option<Arc<Names>>, FsError> {
        let ignores_case = self.fs.ignores_case();
        let mut names = Names { exact: HashMap::new(), folded: HashMap::new(), bytes: 0 };
        let mut cursor = 0;
        loop {
            let entries = self.fs.read_dir(dir, cursor)?;
            match entries.last() {
                Some(last) if last.next > cursor => cursor = last.next,
                _ => return Ok(Some(Arc::new(names))),
            }
            for entry in entries {
                names.bytes += entry.name.len() as u64 * (1 + u64::from(ignores_case)) + ENTRY_COST;
                if ignores_case {
                    names.folded.entry(fold(&entry.name)).or_insert(entry.id);
                }
                names.exact.entry(entry.name).or_insert(entry.id);
            }
            if names.bytes > BYTES_MAX / 2 {
                return Ok(None);
            }
        }
    }
}

/// A name as it is compared where case does not count.
pub(super) fn fold(name: &[u8]) -> String {
    String::from_utf8_lossy(name).to_lowercase()
}

impl FileSystem for Remembered {
    fn root(&self) -> NodeId {
        self.fs.root()
    }

    fn node(&self, id: NodeId) -> Result<Node, FsError> {
        self.fs.node(id)
    }

    fn read_dir(&self, dir: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
        self.fs.read_dir(dir, cursor)
    }

    fn open(&self, file: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
        self.fs.open(file)
    }

    fn read_link(&self, link: NodeId) -> Result<Vec<u8>, FsError> {
        self.fs.read_link(link)
    }

    fn xattrs(&self, id: NodeId) -> Result<Vec<Xattr>, FsError> {
        self.fs.xattrs(id)
    }

    fn streams(&self, id: NodeId) -> Result<Vec<Stream>, FsError> {
        self.fs.streams(id)
    }

    fn ignores_case(&self) -> bool {
        self.fs.ignores_case()
    }

    fn lookup(&self, dir: NodeId, name: &[u8]) -> Result<Option<NodeId>, FsError> {
        let names = match self.directories.get(&dir) {
            Some(names) => names,
            // A directory that is damaged somewhere may still have the name before that.
            None => match self.read(dir) {
                Ok(names) => {
                    self.directories.insert(dir, names.clone());
                    names
                }
                Err(_) => None,
            },
        };
        let Some(names) = names else { return self.fs.lookup(dir, name) };
        let folded = || self.fs.ignores_case().then(|| names.folded.get(&fold(name))).flatten();
        Ok(names.exact.get(name).or_else(folded).copied())
    }

    fn notices(&self) -> Vec<String> {
        self.fs.notices()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A directory with a name for each number, and one that stands there twice.
    struct Numbers {
        read: Arc<AtomicU64>,
        damaged_from: u64,
    }

    impl FileSystem for Numbers {
        fn root(&self) -> NodeId {
            NodeId(0)
        }

        fn node(&self, id: NodeId) -> Result<Node, FsError> {
            Err(FsError::damaged(&id, "it is only a name"))
        }

        fn read_dir(&self, dir: NodeId, cursor: u64) -> Result<Vec<DirEntry>, FsError> {
            self.read.fetch_add(1, Ordering::Relaxed);
            if cursor >= self.damaged_from {
                return Err(FsError::damaged(&dir, "it ends here"));
            }
            let entry = |number: u64| DirEntry {
                name: format!("Name {}", number % 999).into_bytes(),
                id: NodeId(number),
                next: number + 1,
            };
            Ok((cursor..(cursor + 100).min(1000)).map(entry).collect())
        }

        fn open(&self, file: NodeId) -> Result<Box<dyn DiskImage>, FsError> {
            Err(FsError::damaged(&file, "it is only a name"))
        }

        fn ignores_case(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_directory_is_read_once() {
        let read = Arc::new(AtomicU64::new(0));
        let fs = Remembered::new(Box::new(Numbers { read: read.clone(), damaged_from: u64::MAX }));
        let look = |name: &[u8]| fs.lookup(NodeId(0), name).unwrap().map(|id| id.0);
        assert_eq!((look(b"Name 998"), look(b"Name 0"), look(b"NAME 77")), (Some(998), Some(0), Some(77)));
        assert_eq!((look(b"Name 999"), look(b"")), (None, None));
        assert_eq!(read.load(Ordering::Relaxed), 11);
    }

    #[test]
    fn names_before_a_damage_are_found() {
        let fs = Remembered::new(Box::new(Numbers { read: Arc::default(), damaged_from: 500 }));
        assert_eq!(fs.lookup(NodeId(0), b"Name 7").unwrap(), Some(NodeId(7)));
        assert!(fs.lookup(NodeId(0), b"Name 700").is_err());
    }
}
