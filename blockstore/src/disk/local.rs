//! [`LocalFolder`]: a directory of the host, its files reached with `pread` and `pwrite`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    Advice, FallocateFlags, FlockOperation, OFlags, fadvise, fallocate, fcntl_getfl, fcntl_setfl, flock, statvfs,
};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::{DIRECT_ALIGN, Disk, Entry, Folder, ReadAt};
use crate::uring;

/// Zeroes are written in pieces of this size where a hole cannot be punched.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// No page of the page cache is smaller.
const PAGE: u64 = 4096;

/// A directory of the host. Paths that are absolute or contain `..` are refused.
#[derive(Debug, Clone)]
pub struct LocalFolder {
    root: PathBuf,
}

impl LocalFolder {
    /// The tree below `root`, which need not exist yet: `create_dir("")` makes it.
    pub fn new(root: impl Into<PathBuf>) -> LocalFolder {
        LocalFolder { root: root.into() }
    }

    /// The directory this folder stands for.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
        check_path(path)?;
        Ok(self.root.join(path))
    }
}

/// Refuses a path that could lead out of a folder.
pub(crate) fn check_path(path: &Path) -> io::Result<()> {
    if path.components().all(|part| matches!(part, Component::Normal(_))) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{} is not a path inside a folder", path.display())))
}

impl Folder for LocalFolder {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(self.resolve(path)?)?;
        Ok(Arc::new(LocalDisk { file }))
    }

    fn open_exclusive(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(LocalDisk::open_exclusive(&self.resolve(path)?)?))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(LocalDisk::open_read(&self.resolve(path)?)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(self.resolve(from)?, self.resolve(to)?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(self.resolve(path)?)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for (path, metadata) in read_dir(&self.resolve(dir)?, dir)? {
            if metadata.is_file() {
                entries.push(Entry { path, len: metadata.len() });
            }
        }
        Ok(entries)
    }

    fn list_dirs(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let found = read_dir(&self.resolve(dir)?, dir)?;
        Ok(found.into_iter().filter(|(_, metadata)| metadata.is_dir()).map(|(path, _)| path).collect())
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        make_durable_dir(&self.resolve(dir)?)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(self.resolve(dir)?)?.sync_all()
    }

    fn space(&self, dir: &Path) -> io::Result<Option<(u64, u64)>> {
        let found = statvfs(self.resolve(dir)?)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(Some((bytes(found.f_bavail), bytes(found.f_blocks))))
    }

    fn boot_id(&self) -> Option<[u8; 16]> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let digits: Vec<u8> = text.chars().filter_map(|char| char.to_digit(16)?.try_into().ok()).collect();
        let bytes: Vec<u8> =
            digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
        bytes.try_into().ok()
    }

    fn real_path(&self, path: &Path) -> Option<PathBuf> {
        self.resolve(path).ok()
    }
}

/// Lets writes pass the page cache, or not. Only for a file that this thread alone writes to.
fn set_direct(file: &File, direct: OFlags) -> io::Result<()> {
    let flags = fcntl_getfl(file)?.difference(OFlags::DIRECT);
    Ok(fcntl_setfl(file, flags.union(direct))?)
}

/// Creates `dir` and what is missing above it, and syncs the parent of each directory it made.
fn make_durable_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = match dir.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Err(io::ErrorKind::NotFound.into()),
    };
    make_durable_dir(parent)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        other => other?,
    }
    File::open(parent)?.sync_all()
}

/// What stands in `real`, named below `dir`. Names that vanish meanwhile are left out, symbolic links not followed.
fn read_dir(real: &Path, dir: &Path) -> io::Result<Vec<(PathBuf, fs::Metadata)>> {
    let listing = match fs::read_dir(real) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry?;
        match entry.metadata() {
            Ok(metadata) => found.push((dir.join(entry.file_name()), metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// A file or block device of the host. [`LocalFolder`] hands these out; a disk that stands elsewhere (a block
/// device to restore to) is opened directly.
#[derive(Debug)]
pub struct LocalDisk {
    file: File,
}

impl LocalDisk {
    /// Opens a file or block device for reading.
    pub fn open_read(path: &Path) -> io::Result<LocalDisk> {
        check_kind(path)?;
        Ok(LocalDisk { file: File::open(path)? })
    }

    /// Opens a file or block device for reading and writing and locks it against every other exclusive opener.
    /// A block device that is mounted or otherwise claimed by the kernel is refused as busy.
    pub fn open_exclusive(path: &Path) -> io::Result<LocalDisk> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if check_kind(path)? == Kind::BlockDevice {
            options.custom_flags(OFlags::EXCL.bits().cast_signed());
        }
        let file = options.open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(LocalDisk { file }),
            Err(Errno::WOULDBLOCK) => Err(io::ErrorKind::ResourceBusy.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn write_zeroes(&self, mut offset: u64, length: u64) -> io::Result<()> {
        let end = offset.saturating_add(length).min(self.len()?); // a punch never extends
        while offset < end {
            let step = usize::try_from(end - offset).map_or(ZEROES.len(), |left| left.min(ZEROES.len()));
            self.file.write_all_at(&ZEROES[..step], offset)?;
            offset += step as u64;
        }
        Ok(())
    }
}

#[derive(PartialEq, Eq)]
enum Kind {
    File,
    BlockDevice,
}

/// Looks before opening: opening a FIFO blocks, opening a character device may do anything.
fn check_kind(path: &Path) -> io::Result<Kind> {
    let kind = fs::metadata(path)?.file_type();
    if kind.is_file() {
        Ok(Kind::File)
    } else if kind.is_block_device() {
        Ok(Kind::BlockDevice)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is neither a file nor a block device", path.display()),
        ))
    }
}

impl Disk for LocalDisk {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn read_many(&self, reads: &mut [ReadAt]) -> io::Result<()> {
        uring::read_many(&self.file, reads)
    }

    fn read_resident_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let wanted = buf.len();
        match preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == wanted),
            // Part of it would wait, or the file system cannot tell.
            Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn forget(&self, offset: u64, length: u64) {
        let start = offset - offset % PAGE; // only whole pages are let go of
        let end = offset.saturating_add(length).div_ceil(PAGE).saturating_mul(PAGE);
        let _ = fadvise(&self.file, start, NonZeroU64::new(end - start), Advice::DontNeed);
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn write_past_cache(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let aligned = offset.is_multiple_of(DIRECT_ALIGN as u64) && data.as_ptr().addr().is_multiple_of(DIRECT_ALIGN);
        let (whole, rest) = data.split_at(data.len() - data.len() % DIRECT_ALIGN);
        if !aligned || whole.is_empty() || set_direct(&self.file, OFlags::DIRECT).is_err() {
            return self.write_at(offset, data); // a file system without it says so
        }
        let written = self.file.write_all_at(whole, offset);
        set_direct(&self.file, OFlags::empty())?;
        match written {
            // The device wants another alignment after all.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => self.write_at(offset, data),
            Err(error) => Err(error),
            Ok(()) => self.write_at(offset + whole.len() as u64, rest),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        if metadata.is_file() {
            return Ok(metadata.len());
        }
        (&self.file).seek(SeekFrom::End(0)) // a block device; nothing else here uses the file position
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        loop {
            match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // The file system cannot, or a device wants another alignment.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return self.write_zeroes(offset, length),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_local_folder_passes_the_conformance_suite() {
        let dir = tempfile::tempdir().unwrap();
        super::super::conformance::check(&LocalFolder::new(dir.path()));
        // A root that does not exist yet, two levels down.
        super::super::conformance::check(&LocalFolder::new(dir.path().join("deep/root")));
    }

    #[test]
    fn a_punch_gives_space_back_and_its_fallback_reads_the_same() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let folder = LocalFolder::new(dir.path());
        folder.create(Path::new("f")).unwrap();
        let disk = LocalDisk::open_exclusive(&dir.path().join("f")).unwrap();
        disk.write_at(0, &vec![1; 1 << 20]).unwrap();
        disk.sync().unwrap();
        let before = disk.file.metadata().unwrap().blocks();
        disk.punch(0, 1 << 19).unwrap();
        disk.sync().unwrap();
        assert!(disk.file.metadata().unwrap().blocks() <= before);
        disk.write_zeroes((1 << 20) - 100_000, u64::MAX).unwrap();
        assert_eq!(disk.len().unwrap(), 1 << 20);
        let mut tail = vec![1; 100_001];
        disk.read_at((1 << 20) - 100_001, &mut tail).unwrap();
        assert!(tail[0] == 1 && tail[1..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_written_past_the_cache_reads_the_same_wherever_it_begins_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let folder = LocalFolder::new(dir.path());
        let bytes: Vec<u8> = (0..300_000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let border = bytes.as_ptr().addr().wrapping_neg() % DIRECT_ALIGN;
        for (number, (start, len)) in
            [(border, 200_000), (border, 8192), (border, 100), (border + 1, 9000), (border, 0)].into_iter().enumerate()
        {
            let disk = folder.create(Path::new(&number.to_string())).unwrap();
            let data = &bytes[start..start + len];
            disk.write_past_cache(0, data).unwrap();
            disk.write_past_cache(len as u64, data).unwrap(); // mostly no border of a page
            disk.sync().unwrap();
            assert_eq!(disk.len().unwrap(), 2 * len as u64);
            disk.forget(0, 2 * len as u64);
            let mut found = vec![0; 2 * len];
            disk.read_at(0, &mut found).unwrap();
            assert!(found[..len] == *data && found[len..] == *data, "{len} bytes from {start}");
        }
    }

    #[test]
    fn the_boot_id_is_known_and_stays_the_same() {
        let (one, two) = (LocalFolder::new("/").boot_id(), LocalFolder::new("/tmp").boot_id());
        assert!(one == two && one.is_some_and(|id| id != [0; 16]), "{one:?}");
    }

    #[test]
    fn what_is_neither_file_nor_block_device_is_refused_without_opening_it() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(LocalDisk::open_read(&socket).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(LocalDisk::open_exclusive(Path::new("/dev/null")).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert!(LocalDisk::open_read(dir.path()).is_err());
    }
}
