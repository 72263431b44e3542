//! A folder beside a target, in which another program writes the file under the target's own name: some formats keep their
//! file's name inside. It comes and goes as a [`Temporary`](super::temporary::Temporary) file does.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::temporary::{final_name, give_name, next_number, own, remove_leftovers, sync_folder_of, temporary_name};
use super::{Overwrite, check_place};
use crate::TargetError;

/// A file that another program writes, removed when dropped before it got its name.
#[derive(Debug)]
pub struct Staging {
    folder: PathBuf,
    file: PathBuf,
    name: PathBuf,
    overwrite: Overwrite,
    /// Tells others that the folder is no leftover.
    _lock: File,
}

impl Staging {
    /// Makes the folder for the file that will be `path`, an image of `format`.
    pub fn create(path: &Path, format: &'static str, overwrite: Overwrite) -> Result<Staging, TargetError> {
        check_place(path, format, overwrite)?;
        Staging::make(path, overwrite).map_err(|source| TargetError::Io { path: path.to_owned(), source })
    }

    fn make(path: &Path, overwrite: Overwrite) -> io::Result<Staging> {
        let name = final_name(path)?;
        let base = name.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?.to_owned();
        remove_leftovers(&name, &base);
        loop {
            let folder = name.with_file_name(temporary_name(&base, std::process::id(), next_number()));
            match DirBuilder::new().mode(0o700).create(&folder) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            // Gone already: somebody has taken it for a leftover.
            let Ok(lock) = File::open(&folder) else { continue };
            match own(&lock, &folder) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    fs::remove_dir(&folder)?;
                    return Err(error);
                }
            }
            let file = folder.join(&base);
            return Ok(Staging { folder, file, name, overwrite, _lock: lock });
        }
    }

    /// Where the other program makes the file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Durable order: the content, the name, the folder.
    pub fn publish(self) -> io::Result<()> {
        let file = File::options().write(true).open(&self.file)?;
        if let Ok(replaced) = fs::metadata(&self.name) {
            file.set_permissions(replaced.permissions())?;
        }
        file.sync_all()?;
        give_name(&self.file, &self.name, self.overwrite)?;
        sync_folder_of(&self.name)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::warn!(path = %self.folder.display(), %error, "cannot remove an unfinished image");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .expect("readable")
            .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_staged_file_gets_its_name_when_it_is_whole_and_goes_when_it_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("disk.vmdk");
        let left = dir.path().join("disk.vmdk.lifeboat-1-0");
        fs::create_dir(&left).expect("writable");
        fs::write(left.join("disk.vmdk"), "half").expect("writable");

        let given_up = Staging::create(&path, "vmdk", Overwrite::Refuse).expect("a folder");
        assert!(!left.exists(), "a leftover is still there");
        fs::write(given_up.file(), "half").expect("writable");
        let whole = Staging::create(&path, "vmdk", Overwrite::Refuse).expect("a folder");
        assert!(given_up.file().exists(), "one that is being written was taken for a leftover");
        drop(given_up);
        fs::write(whole.file(), "whole").expect("writable");
        whole.publish().expect("the name is free");
        assert_eq!(names(dir.path()), ["disk.vmdk"]);

        assert!(matches!(Staging::create(&path, "vmdk", Overwrite::Refuse), Err(TargetError::Exists { .. })));
        let other = Staging::create(&path, "vmdk", Overwrite::Replace).expect("a folder");
        fs::write(other.file(), "other").expect("writable");
        other.publish().expect("it replaces");
        assert_eq!(fs::read_to_string(&path).expect("readable"), "other");
        assert_eq!(names(dir.path()), ["disk.vmdk"]);
    }
}
