//! A machine's storage in memory, for tests: deterministic, with the semantics of a power cut.
//!
//! What a [`SimFolder`] keeps through [`SimFolder::after_crash`] is what real storage promises, and no more:
//! - synced bytes, lengths and names are always kept;
//! - a change no sync has covered is kept, lost, or torn at 512-byte sectors, each sector for itself, whatever
//!   happened to earlier or later changes;
//! - a created, renamed or removed name without [`Folder::sync_dir`] is kept or lost, each for itself, so a file
//!   whose content was synced can still vanish;
//! - a sync that failed loses what it did not write: a second sync would succeed and would not bring it back.
//!
//! The boot id is another one after a power cut; what is not synced
//! is still there when only the process was killed ([`SimFolder::after_kill`]).
//!
//! The seed decides; the same seed and the same operations give the same outcome. Every operation that changes
//! something, and every sync, counts as one ([`SimFolder::operations`]), so a test can run its workload once to count
//! and then once more for each operation, with the power cut there. Directories are durable as soon as they are
//! made.

mod image;
mod random;
mod world;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, Entry, Folder, check_path};
use image::Change;
use world::{InodeId, SharedWorld, World};

/// A simulated folder. Clones share one storage.
#[derive(Clone)]
pub struct SimFolder {
    world: SharedWorld,
}

impl fmt::Debug for SimFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let world = self.world();
        let (seed, operations) = (world.seed(), world.operations());
        f.debug_struct("SimFolder").field("seed", &seed).field("operations", &operations).finish_non_exhaustive()
    }
}

impl SimFolder {
    /// An empty folder whose fate `seed` decides.
    pub fn new(seed: u64) -> SimFolder {
        SimFolder { world: Arc::new(Mutex::new(World::new(seed))) }
    }

    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }

    /// Cuts the power in operation `n` (the first is 0): it fails, and so does everything after it, reads too.
    #[must_use]
    pub fn crash_at(self, n: u64) -> SimFolder {
        self.world().crash_at = Some(n);
        self
    }

    /// Makes sync `n` fail (the first is 0; files and directories are counted together, see [`SimFolder::syncs`]).
    #[must_use]
    pub fn fail_sync_at(self, n: u64) -> SimFolder {
        self.world().fail_sync_at = Some(n);
        self
    }

    /// Lets `bytes` more be written, in pages of 4 KiB, before the storage is full. Overwriting takes no room;
    /// punching, cutting and removing give it back. May be called at any time.
    #[must_use]
    pub fn full_after(self, bytes: u64) -> SimFolder {
        self.world().set_room(Some(bytes));
        self
    }

    /// Makes every read of a file fail from now on.
    #[must_use]
    pub fn fail_reads(self) -> SimFolder {
        self.world().fail_reads = true;
        self
    }

    /// Ends the faults that can end: there is room again, reads and syncs work. A power cut stays.
    pub fn heal(&self) {
        let mut world = self.world();
        world.set_room(None);
        world.fail_reads = false;
        world.fail_sync_at = None;
    }

    /// Mutating operations and syncs so far.
    pub fn operations(&self) -> u64 {
        self.world().operations()
    }

    /// Syncs of files and directories so far.
    pub fn syncs(&self) -> u64 {
        self.world().syncs()
    }

    /// Whether the power has been cut.
    pub fn is_off(&self) -> bool {
        self.world().is_off()
    }

    /// Cuts the power, unless that has happened already, and returns what is found at the next start. No faults are
    /// carried over, locks are free, operations count from 0. Asked twice, it gives the same outcome twice.
    #[must_use]
    pub fn after_crash(&self) -> SimFolder {
        let seed = self.world().seed();
        self.after_crash_with(seed)
    }

    /// As [`SimFolder::after_crash`], with another seed: one of the many outcomes of the same power cut.
    #[must_use]
    pub fn after_crash_with(&self, seed: u64) -> SimFolder {
        SimFolder { world: Arc::new(Mutex::new(self.world().crash(seed))) }
    }

    /// Ends everything that uses this folder, as if its process had been killed at that point while the machine ran on,
    /// and returns what the next process finds: all that was written, synced or not, under the same boot id. With
    /// [`SimFolder::crash_at`] the process is killed at any operation. Faults are not carried over, locks are free.
    #[must_use]
    pub fn after_kill(&self) -> SimFolder {
        SimFolder { world: Arc::new(Mutex::new(self.world().kill())) }
    }

    fn open(&self, inode: InodeId, access: Access) -> Arc<dyn Disk> {
        Arc::new(SimDisk { world: Arc::clone(&self.world), inode, access })
    }
}

/// A panic in another thread of a test must not hide behind a second one.
fn lock(world: &SharedWorld) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Folder for SimFolder {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        check_path(path)?;
        let inode = self.world().create(path)?;
        Ok(self.open(inode, Access::Write))
    }

    fn open_exclusive(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        check_path(path)?;
        let mut world = self.world();
        let inode = world.find(path)?;
        world.lock(inode)?;
        drop(world);
        Ok(self.open(inode, Access::Exclusive))
    }

    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn Disk>> {
        check_path(path)?;
        let inode = self.world().find(path)?;
        Ok(self.open(inode, Access::Read))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        check_path(from)?;
        check_path(to)?;
        self.world().rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        check_path(path)?;
        self.world().remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<Entry>> {
        check_path(dir)?;
        let found = self.world().list(dir)?;
        Ok(found.into_iter().map(|(path, len)| Entry { path, len }).collect())
    }

    fn list_dirs(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        check_path(dir)?;
        self.world().list_dirs(dir)
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        check_path(dir)?;
        self.world().create_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        check_path(dir)?;
        self.world().sync_dir(dir)
    }

    fn boot_id(&self) -> Option<[u8; 16]> {
        Some(self.world().boot_id().to_le_bytes())
    }

    fn real_path(&self, _path: &Path) -> Option<PathBuf> {
        None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    Exclusive,
}

/// One open file of a [`SimFolder`].
struct SimDisk {
    world: SharedWorld,
    inode: InodeId,
    access: Access,
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDisk").field("inode", &self.inode).field("access", &self.access).finish_non_exhaustive()
    }
}

impl SimDisk {
    fn writable(&self) -> io::Result<MutexGuard<'_, World>> {
        if self.access == Access::Read {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(lock(&self.world))
    }
}

impl Disk for SimDisk {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        lock(&self.world).read(self.inode, offset, buf)
    }

    fn read_resident_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.read_at(offset, buf).map(|()| true)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.writable()?.write(self.inode, offset, data)
    }

    fn sync(&self) -> io::Result<()> {
        lock(&self.world).sync(self.inode)
    }

    fn len(&self) -> io::Result<u64> {
        lock(&self.world).len(self.inode)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.writable()?.change(self.inode, Change::SetLen(len))
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.writable()?.change(self.inode, Change::Punch { offset, length })
    }
}

impl Drop for SimDisk {
    fn drop(&mut self) {
        if self.access == Access::Exclusive {
            lock(&self.world).unlock(self.inode);
        }
    }
}

#[cfg(test)]
mod tests;
