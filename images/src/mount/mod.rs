//! The files of disks as a folder of this machine, through FUSE, read-only:
//!
//! ```text
//! DISK.raw             the disk itself
//! DISK/VOLUME/...      the files of each volume that can be read
//! ```
//!
//! The kernel sees names and bytes, never a structure of the disk. A logical volume `VG/LV` is the folder `VG-LV`.

mod answers;
mod nodes;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use fuser::{BackgroundSession, Config, Errno, FileAttr, FileHandle, INodeNo, MountOption};

use self::answers::{errno, of_node};
use self::nodes::{Nodes, What};
use crate::bytes::size;
use crate::fs::{FileSystem, Node, NodeId, Xattr};
use crate::volume::{DiskLayout, Kind};
use crate::{DiskImage, SharedDisk};

/// Threads that answer the kernel.
const THREADS: usize = 4;
/// How long the kernel keeps what never changes.
const FOR_LONG: Duration = Duration::from_secs(3600);
/// How long it, and we, keep what a running machine changes.
const FOR_SHORT: Duration = Duration::from_secs(1);

/// Whether the disks change while they are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Never.
    Fixed,
    /// They are a running machine's.
    Live,
}

/// A mounted folder. Dropped, it is unmounted, in use or not: who uses it keeps it until he is done.
#[derive(Debug)]
pub struct Mounted {
    session: Option<BackgroundSession>,
    dir: PathBuf,
}

impl Mounted {
    /// Whether somebody else has unmounted it.
    pub fn has_ended(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.guard.is_finished())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.has_ended() {
            // Taken out of sight even while it is in use, which the session itself does not do.
            let (program, options) = match rustix::process::geteuid().is_root() {
                true => ("umount", ["-l", "--"]),
                false => ("fusermount3", ["-uz", "--"]),
            };
            match Command::new(program).args(options).arg(&self.dir).stdin(Stdio::null()).output() {
                Ok(done) if done.status.success() => {}
                Ok(done) => {
                    let said = String::from_utf8_lossy(&done.stderr);
                    tracing::warn!(dir = %self.dir.display(), said = said.trim(), "cannot unmount");
                }
                Err(error) => tracing::warn!(dir = %self.dir.display(), %error, "cannot run {program}"),
            }
        }
        // Its threads end when the last user has gone.
        drop(self.session.take());
    }
}

/// Mounts the disks on the folder `dir`.
pub fn mount(dir: &Path, name: &str, layouts: Vec<DiskLayout>, content: Content) -> io::Result<Mounted> {
    let tree = Tree::new(layouts, content);
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::FSName(name.to_owned()),
        MountOption::Subtype("lifeboat".to_owned()),
    ];
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let session = fuser::spawn_mount(tree, dir, &config)?;
    Ok(Mounted { session: Some(session), dir: dir.to_owned() })
}

/// A disk's own file.
struct RawDisk {
    name: Vec<u8>,
    disk: SharedDisk,
}

/// A volume with files.
struct Files {
    disk: usize,
    name: Vec<u8>,
    kind: Kind,
    volume: SharedDisk,
    open: RwLock<Option<(Instant, Arc<dyn FileSystem>)>>,
}

struct Tree {
    content: Content,
    disks: Vec<RawDisk>,
    volumes: Vec<Files>,
    nodes: Mutex<Nodes>,
    opened: Mutex<HashMap<u64, Arc<dyn DiskImage>>>,
    next_handle: AtomicU64,
    owner: (u32, u32),
}

impl Tree {
    fn new(layouts: Vec<DiskLayout>, content: Content) -> Tree {
        let mut disks = Vec::new();
        let mut volumes = Vec::new();
        for (at, layout) in layouts.into_iter().enumerate() {
            for volume in layout.volumes.into_iter().filter(|volume| volume.content.kind.is_readable()) {
                volumes.push(Files {
                    disk: at,
                    name: volume.name.replace('/', "-").into_bytes(),
                    kind: volume.content.kind,
                    volume: volume.disk,
                    open: RwLock::default(),
                });
            }
            disks.push(RawDisk { name: layout.name.into_bytes(), disk: layout.disk });
        }
        let nodes = Mutex::new(Nodes::new(disks.len(), volumes.len()));
        let owner = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Tree { content, disks, volumes, nodes, opened: Mutex::default(), next_handle: AtomicU64::new(1), owner }
    }

    fn ttl(&self) -> Duration {
        if self.content == Content::Fixed { FOR_LONG } else { FOR_SHORT }
    }

    /// The file system of a volume. A running machine's is opened anew when it has been looked at for a while.
    fn fs(&self, at: usize) -> Result<Arc<dyn FileSystem>, Errno> {
        let volume = self.volumes.get(at).ok_or(Errno::ENOENT)?;
        let fresh = |since: &Instant| self.content == Content::Fixed || since.elapsed() < FOR_SHORT;
        if let Some((since, fs)) = volume.open.read().unwrap_or_else(PoisonError::into_inner).as_ref()
            && fresh(since)
        {
            return Ok(fs.clone());
        }
        let mut open = volume.open.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((since, fs)) = open.as_ref()
            && fresh(since)
        {
            return Ok(fs.clone());
        }
        let fs: Arc<dyn FileSystem> =
            Arc::from(crate::fs::open(volume.kind, volume.volume.clone()).map_err(|error| errno("a volume", &error))?);
        if open.is_none() {
            let volume = String::from_utf8_lossy(&volume.name);
            fs.notices().iter().for_each(|notice| tracing::warn!(%volume, "{notice}"));
        }
        *open = Some((Instant::now(), fs.clone()));
        Ok(fs)
    }

    fn what(&self, ino: INodeNo) -> Result<What, Errno> {
        self.lock_nodes().what(ino.0).ok_or(Errno::ESTALE)
    }

    fn lock_nodes(&self) -> std::sync::MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node that something is, with its file system.
    fn node(&self, volume: usize, id: Option<NodeId>) -> Result<(Arc<dyn FileSystem>, Node), Errno> {
        let fs = self.fs(volume)?;
        let id = id.unwrap_or_else(|| fs.root());
        let node = fs.node(id).map_err(|error| errno("an object", &error))?;
        Ok((fs, node))
    }

    fn attributes(&self, ino: u64, what: What) -> Result<FileAttr, Errno> {
        let made = |kind, size, perm| FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        Ok(match what {
            What::Root | What::Disk(_) => made(fuser::FileType::Directory, 0, 0o555),
            What::Raw(at) => {
                let disk = self.disks.get(at).ok_or(Errno::ENOENT)?;
                made(fuser::FileType::RegularFile, disk.disk.size(), 0o444)
            }
            What::Node(volume, id) => of_node(ino, &self.node(volume, id)?.1),
        })
    }

    /// The number by which the kernel knows a node, counted as known once more.
    fn known(&self, volume: usize, fs: &dyn FileSystem, id: NodeId) -> u64 {
        if id == fs.root() {
            return self.lock_nodes().root_of(volume);
        }
        self.lock_nodes().known(volume, id)
    }

    fn find(&self, parent: INodeNo, name: &[u8]) -> Result<FileAttr, Errno> {
        let (ino, what) = match self.what(parent)? {
            What::Root => {
                let nodes = self.lock_nodes();
                let raw = name.strip_suffix(b".raw");
                if let Some(at) = self.disks.iter().position(|disk| disk.name == name) {
                    (nodes.disk(at), What::Disk(at))
                } else if let Some(at) = self.disks.iter().position(|disk| raw == Some(&disk.name)) {
                    (nodes.raw(at), What::Raw(at))
                } else {
                    return Err(Errno::ENOENT);
                }
            }
            What::Disk(disk) => {
                let at = self.volumes.iter().position(|volume| volume.disk == disk && volume.name == name);
                let at = at.ok_or(Errno::ENOENT)?;
                (self.lock_nodes().root_of(at), What::Node(at, None))
            }
            What::Raw(_) => return Err(Errno::ENOTDIR),
            What::Node(volume, id) => {
                let (fs, dir) = self.node(volume, id)?;
                let found = fs.lookup(dir.id, name).map_err(|error| errno("a directory", &error))?;
                let node = fs.node(found.ok_or(Errno::ENOENT)?).map_err(|error| errno("an object", &error))?;
                return Ok(of_node(self.known(volume, fs.as_ref(), node.id), &node));
            }
        };
        self.attributes(ino, what)
    }

    /// Gives `add` the entries of a directory from a cursor: name, next cursor, attributes. It returns true when it is
    /// full.
    fn list(&self, ino: INodeNo, cursor: u64, add: &mut dyn FnMut(&[u8], u64, &FileAttr) -> bool) -> Result<(), Errno> {
        let made: Vec<(Vec<u8>, u64, What)> = match self.what(ino)? {
            What::Root => {
                let nodes = self.lock_nodes();
                let folders =
                    self.disks.iter().enumerate().map(|(at, disk)| (disk.name.clone(), nodes.disk(at), What::Disk(at)));
                let raw = self.disks.iter().enumerate();
                let raw =
                    raw.map(|(at, disk)| ([disk.name.as_slice(), b".raw"].concat(), nodes.raw(at), What::Raw(at)));
                folders.chain(raw).collect()
            }
            What::Disk(disk) => {
                let nodes = self.lock_nodes();
                let volumes = self.volumes.iter().enumerate().filter(|(_, volume)| volume.disk == disk);
                volumes.map(|(at, volume)| (volume.name.clone(), nodes.root_of(at), What::Node(at, None))).collect()
            }
            What::Raw(_) => return Err(Errno::ENOTDIR),
            What::Node(volume, id) => return self.list_node(volume, id, cursor, add),
        };
        for (at, (name, ino, what)) in (1..).zip(made).skip(size(cursor)) {
            // A volume that cannot be opened still has its name.
            let attributes = self.attributes(ino, what).or_else(|_| self.attributes(1, What::Root))?;
            if add(&name, at, &FileAttr { ino: INodeNo(ino), ..attributes }) {
                break;
            }
        }
        Ok(())
    }

    fn list_node(
        &self,
        volume: usize,
        id: Option<NodeId>,
        mut cursor: u64,
        add: &mut dyn FnMut(&[u8], u64, &FileAttr) -> bool,
    ) -> Result<(), Errno> {
        let (fs, dir) = self.node(volume, id)?;
        loop {
            let entries = fs.read_dir(dir.id, cursor).map_err(|error| errno("a directory", &error))?;
            match entries.last() {
                Some(last) if last.next > cursor => cursor = last.next,
                _ => return Ok(()),
            }
            for entry in entries {
                let legal = !entry.name.is_empty()
                    && entry.name.len() <= 1024
                    && !entry.name.contains(&b'/')
                    && !entry.name.contains(&0);
                // What cannot be read is not shown; its name alone would stop who lists the directory.
                let Some(node) = fs.node(entry.id).ok().filter(|_| legal) else { continue };
                let ino = self.known(volume, fs.as_ref(), entry.id);
                if add(&entry.name, entry.next, &of_node(ino, &node)) {
                    self.lock_nodes().forget(ino, 1);
                    return Ok(());
                }
            }
        }
    }

    fn content(&self, ino: INodeNo, handle: FileHandle) -> Result<Arc<dyn DiskImage>, Errno> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).get(&handle.0).cloned();
        match opened {
            Some(content) => Ok(content),
            None => self.open_content(ino),
        }
    }

    fn open_content(&self, ino: INodeNo) -> Result<Arc<dyn DiskImage>, Errno> {
        match self.what(ino)? {
            What::Raw(at) => Ok(self.disks.get(at).ok_or(Errno::ENOENT)?.disk.clone()),
            What::Node(volume, Some(id)) => {
                self.fs(volume)?.open(id).map(Arc::from).map_err(|error| errno("a file", &error))
            }
            What::Root | What::Disk(_) | What::Node(_, None) => Err(Errno::EISDIR),
        }
    }

    fn xattrs(&self, ino: INodeNo) -> Result<Vec<Xattr>, Errno> {
        match self.what(ino)? {
            What::Node(volume, id) => {
                let (fs, node) = self.node(volume, id)?;
                fs.xattrs(node.id).map_err(|error| errno("extended attributes", &error))
            }
            What::Root | What::Disk(_) | What::Raw(_) => Ok(Vec::new()),
        }
    }
}
