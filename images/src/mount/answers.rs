//! What the kernel asks through FUSE, and the answers.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyXattr, Request,
};

use super::nodes::What;
use super::{Content, Tree};
use crate::bytes::size;
use crate::fs::{FileType, FsError, Node, Timestamp};

/// What the kernel reads ahead.
const READ_AHEAD: u32 = 1 << 20;

/// What the reader is told. The whole story is in the log.
pub(super) fn errno(what: &str, error: &FsError) -> Errno {
    match error {
        FsError::NotFound { .. } => return Errno::ENOENT,
        FsError::NotADirectory { .. } => return Errno::ENOTDIR,
        FsError::Loop { .. } => return Errno::ELOOP,
        FsError::Unsupported { .. } => {
            tracing::warn!(%error, "cannot read {what}");
            return Errno::EOPNOTSUPP;
        }
        FsError::Damaged { .. } | FsError::Io { .. } => {}
    }
    tracing::warn!(%error, "cannot read {what}");
    Errno::EIO
}

pub(super) fn of_node(ino: u64, node: &Node) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: node.size,
        blocks: node.size.div_ceil(512),
        atime: system_time(node.accessed),
        mtime: system_time(node.modified),
        ctime: system_time(node.changed),
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(node.kind),
        perm: u16::try_from(node.mode & 0o7777).unwrap_or(0),
        nlink: node.links,
        uid: node.uid,
        gid: node.gid,
        rdev: u32::try_from(rustix::fs::makedev(node.device.0, node.device.1)).unwrap_or(0),
        blksize: 4096,
        flags: 0,
    }
}

fn kind(kind: FileType) -> fuser::FileType {
    match kind {
        FileType::File => fuser::FileType::RegularFile,
        FileType::Directory => fuser::FileType::Directory,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        FileType::Socket => fuser::FileType::Socket,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let nanoseconds = Duration::from_nanos(time.nanoseconds.into());
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let base = if time.seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    };
    base.and_then(|base| base.checked_add(nanoseconds)).unwrap_or(SystemTime::UNIX_EPOCH)
}

impl Filesystem for Tree {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Whatever of these the kernel does not have it does without.
        let _ = config.add_capabilities(InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_PARALLEL_DIROPS);
        let _ = config.set_max_readahead(READ_AHEAD);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name.as_bytes()) {
            Ok(attributes) => reply.entry(&self.ttl(), &attributes, Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, count: u64) {
        self.lock_nodes().forget(ino.0, count);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.what(ino).and_then(|what| self.attributes(ino.0, what)) {
            Ok(attributes) => reply.attr(&self.ttl(), &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.what(ino).and_then(|what| match what {
            What::Node(volume, Some(id)) => {
                self.fs(volume)?.read_link(id).map_err(|error| errno("a symbolic link", &error))
            }
            _ => Err(Errno::EINVAL),
        });
        match target {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.open_content(ino) {
            Ok(content) => {
                let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
                self.opened.lock().unwrap_or_else(PoisonError::into_inner).insert(handle, content);
                let flags =
                    if self.content == Content::Fixed { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
                reply.opened(FileHandle(handle), flags);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.content(ino, handle).and_then(|content| {
            let length = u64::from(length).min(content.size().saturating_sub(offset));
            let mut bytes = vec![0; size(length)];
            content.read_at(offset, &mut bytes).map_err(|error| {
                tracing::warn!(%error, "cannot read a file");
                Errno::EIO
            })?;
            Ok(bytes)
        });
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(&handle.0);
        reply.ok();
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut numbers = Vec::new();
        let listed = self.list(ino, offset, &mut |name, next, attributes| {
            let full = reply.add(attributes.ino, next, attributes.kind, OsStr::from_bytes(name));
            if !full {
                numbers.push(attributes.ino.0);
            }
            full
        });
        // A plain listing does not make the kernel know them.
        let mut nodes = self.lock_nodes();
        numbers.into_iter().for_each(|ino| nodes.forget(ino, 1));
        drop(nodes);
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let ttl = self.ttl();
        let listed = self.list(ino, offset, &mut |name, next, attributes| {
            reply.add(attributes.ino, next, OsStr::from_bytes(name), &ttl, attributes, Generation(0))
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, room: u32, reply: ReplyXattr) {
        let found = self.xattrs(ino).and_then(|all| {
            let found = all.into_iter().find(|(known, _)| known == name.as_bytes());
            found.map(|(_, value)| value).ok_or(Errno::NO_XATTR)
        });
        answer(found, room, reply);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, room: u32, reply: ReplyXattr) {
        let names = self
            .xattrs(ino)
            .map(|all| all.into_iter().flat_map(|(name, _)| [name, vec![0]].concat()).collect::<Vec<u8>>());
        answer(names, room, reply);
    }

    fn lseek(&self, _req: &Request, ino: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        const DATA: i32 = 3;
        const HOLE: i32 = 4;
        let found = self.content(ino, handle).and_then(|content| {
            let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
            if offset >= content.size() {
                return Err(Errno::ENXIO);
            }
            let failed = |_| Errno::EIO;
            match whence {
                DATA => {
                    content.next_data(offset).map_err(failed)?.map(|data| data.start.max(offset)).ok_or(Errno::ENXIO)
                }
                HOLE => {
                    let mut at = offset;
                    // Ranges may follow each other without a hole.
                    while let Some(data) =
                        content.next_data(at).map_err(failed)?.filter(|data| data.start <= at && data.end > at)
                    {
                        at = data.end;
                    }
                    Ok(at.min(content.size()))
                }
                _ => Err(Errno::EINVAL),
            }
        });
        match found.and_then(|offset| i64::try_from(offset).map_err(|_| Errno::EINVAL)) {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error),
        }
    }
}

/// Sends a value, or how long it is where no room for it is given.
fn answer(value: Result<Vec<u8>, Errno>, room: u32, reply: ReplyXattr) {
    match value {
        Ok(value) if room == 0 => reply.size(u32::try_from(value.len()).unwrap_or(u32::MAX)),
        Ok(value) if value.len() > size(room.into()) => reply.error(Errno::ERANGE),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(error),
    }
}
