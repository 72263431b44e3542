//! A file on its way to its name.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::Overwrite;

/// What every file system takes as a name.
const NAME_MAX: usize = 255;

/// A file under a temporary name, removed when dropped before it got its own.
#[derive(Debug)]
pub(super) struct Temporary {
    file: File,
    temporary: PathBuf,
    name: PathBuf,
    overwrite: Overwrite,
    published: bool,
}

impl Temporary {
    /// Creates it beside its final name. A symbolic link there is followed: what it leads to is replaced, not the link.
    pub(super) fn create(name: &Path, overwrite: Overwrite) -> io::Result<Temporary> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = match fs::canonicalize(name) {
            Ok(name) => name,
            Err(error) if error.kind() == io::ErrorKind::NotFound => std::path::absolute(name)?,
            Err(error) => return Err(error),
        };
        let base = name.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        loop {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let ending = format!(".lifeboat-{}-{number}", std::process::id());
            let kept = base.as_bytes().get(..NAME_MAX - ending.len()).unwrap_or(base.as_bytes());
            let mut temporary = OsString::from(OsStr::from_bytes(kept));
            temporary.push(ending);
            let temporary = name.with_file_name(temporary);
            let file = match File::options().read(true).write(true).create_new(true).open(&temporary) {
                Ok(file) => file,
                // Left by an earlier process with our number.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            };
            let created = Temporary { file, temporary, name: name.clone(), overwrite, published: false };
            if let Ok(replaced) = fs::metadata(&name) {
                created.file.set_permissions(replaced.permissions())?;
            }
            return Ok(created);
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Durable order: the content, the name, the folder.
    pub(super) fn publish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        match self.overwrite {
            Overwrite::Replace => fs::rename(&self.temporary, &self.name)?,
            Overwrite::Refuse => {
                // A link replaces nothing, whoever made a file of this name meanwhile.
                fs::hard_link(&self.temporary, &self.name)?;
                fs::remove_file(&self.temporary)?;
            }
        }
        self.published = true;
        File::open(self.name.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.published
            && let Err(error) = fs::remove_file(&self.temporary)
        {
            tracing::warn!(path = %self.temporary.display(), %error, "cannot remove an unfinished image");
        }
    }
}
