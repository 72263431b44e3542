//! Where an object goes, resolved below the destination and through no link.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;

/// What to do with a file that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It stays.
    Keep,
    /// It is replaced.
    Replace,
}

/// The destination.
#[derive(Debug)]
pub struct Target {
    folder: Arc<OwnedFd>,
    /// What the first component of every path becomes; without it, `.` is dropped and other names stay.
    name: Option<Vec<u8>>,
    /// The folder that was opened last: files of a folder come one after the other.
    last: Mutex<Option<(Vec<u8>, Arc<OwnedFd>)>>,
}

/// A name in an open folder.
#[derive(Debug)]
pub struct Parent {
    folder: Arc<OwnedFd>,
    name: CString,
    path: Vec<u8>,
}

impl Target {
    /// Everything goes into the folder `dest`.
    pub fn into(dest: &Path) -> io::Result<Target> {
        Target::open(dest, None)
    }

    /// The one thing that is copied becomes `dest`, which does not exist or is a file.
    pub fn named(dest: &Path) -> io::Result<Target> {
        let name = dest.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it has no name"))?;
        let parent = dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Target::open(parent, Some(name.as_bytes().to_vec()))
    }

    fn open(folder: &Path, name: Option<Vec<u8>>) -> io::Result<Target> {
        let folder = rustix::fs::openat(CWD, folder, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Target { folder: Arc::new(folder), name, last: Mutex::new(None) })
    }

    /// The path below the destination.
    fn mapped(&self, path: &[u8]) -> Vec<u8> {
        let (first, rest) = match path.iter().position(|byte| *byte == b'/') {
            Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..)),
            None => (path, None),
        };
        match (&self.name, rest) {
            (Some(name), Some(rest)) => [name, b"/".as_slice(), rest].concat(),
            (Some(name), None) => name.clone(),
            (None, Some(rest)) if first == b"." => rest.to_vec(),
            (None, _) => path.to_vec(),
        }
    }

    /// The open folder of `path`, and the name in it.
    pub fn parent(&self, path: &[u8]) -> io::Result<Parent> {
        let path = self.mapped(path);
        let split = path.iter().rposition(|byte| *byte == b'/');
        let (dir, name) = match split {
            Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
            None => (&b""[..], path.as_slice()),
        };
        if name == b".." || name.is_empty() || (name == b"." && !dir.is_empty()) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it has no name"));
        }
        let name =
            CString::new(name).map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "its name has a zero byte"))?;
        let folder = self.folder_at(dir)?;
        Ok(Parent { folder, name, path })
    }

    /// Opens a folder that was made before, to set its attributes.
    pub fn open_folder(&self, path: &[u8]) -> io::Result<File> {
        let path = self.mapped(path);
        self.beneath(&path).map(File::from)
    }

    fn folder_at(&self, dir: &[u8]) -> io::Result<Arc<OwnedFd>> {
        if dir.is_empty() {
            return Ok(self.folder.clone());
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, folder)) = last.as_ref()
            && known == dir
        {
            return Ok(folder.clone());
        }
        let folder = Arc::new(self.beneath(dir)?);
        *last = Some((dir.to_vec(), folder.clone()));
        Ok(folder)
    }

    fn beneath(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(self.folder.as_fd(), OsStr::from_bytes(path), flags, Mode::empty(), resolve).map_err(
            |error| match error {
                Errno::LOOP => {
                    io::Error::new(io::ErrorKind::PermissionDenied, "a link is in the way, and links are not followed")
                }
                Errno::XDEV => {
                    io::Error::new(io::ErrorKind::PermissionDenied, "it would lie outside of the destination")
                }
                error => error.into(),
            },
        )
    }
}

impl Parent {
    /// Folder and name, for system calls.
    pub fn at(&self) -> (BorrowedFd<'_>, &CString) {
        (self.folder.as_fd(), &self.name)
    }

    /// The path below the destination, for a person.
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }

    /// Whether the name is taken.
    pub fn exists(&self) -> io::Result<bool> {
        match rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a folder. Returns whether it is new; one that was there is as good.
    pub fn folder(&self) -> io::Result<bool> {
        match rustix::fs::mkdirat(&self.folder, &self.name, Mode::RWXU) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => {
                let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                rustix::fs::openat(&self.folder, &self.name, flags, Mode::empty())?;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A new file beside the name, for its owner alone.
    pub fn temporary(&self) -> io::Result<(File, String)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        loop {
            let name = format!(".lifeboat-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            match rustix::fs::openat(&self.folder, name.as_str(), flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => return Ok((file.into(), name)),
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives a complete file its name.
    pub fn rename(&self, temporary: &str, existing: Existing) -> io::Result<()> {
        let flags = if existing == Existing::Keep { RenameFlags::NOREPLACE } else { RenameFlags::empty() };
        match rustix::fs::renameat_with(&self.folder, temporary, &self.folder, &self.name, flags) {
            // A file system that does not know the flag.
            Err(Errno::INVAL | Errno::NOSYS) if existing == Existing::Keep => {
                if self.exists()? {
                    return Err(Errno::EXIST.into());
                }
                rustix::fs::renameat(&self.folder, temporary, &self.folder, &self.name)?;
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Takes a temporary file away.
    pub fn remove(&self, temporary: &str) {
        if let Err(error) = rustix::fs::unlinkat(&self.folder, temporary, AtFlags::empty()) {
            tracing::warn!(file = temporary, %error, "cannot remove an incomplete copy");
        }
    }

    /// Takes away what has the name, if it is to be replaced; a folder stays.
    pub fn clear(&self, existing: Existing) -> io::Result<()> {
        if existing == Existing::Keep {
            return Ok(());
        }
        match rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Another name of a file that was written before.
    pub fn link(&self, first: &Parent) -> io::Result<()> {
        Ok(rustix::fs::linkat(&first.folder, &first.name, &self.folder, &self.name, AtFlags::empty())?)
    }

    /// A symbolic link; where it points is nobody's business here, since no link is followed.
    pub fn symlink(&self, target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(OsStr::from_bytes(target), &self.folder, &self.name)?)
    }

    /// A pipe or device.
    pub fn special(&self, kind: FileType, device: (u32, u32)) -> io::Result<()> {
        let device = rustix::fs::makedev(device.0, device.1);
        Ok(rustix::fs::mknodat(&self.folder, &self.name, kind, Mode::RUSR | Mode::WUSR, device)?)
    }
}
