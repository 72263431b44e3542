//! The state of a simulated machine's storage: inodes, names, what is durable and what is not yet, and the faults
//! to come.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::image::{Change, Image, PAGE};
use super::random::Random;

pub(crate) type InodeId = u64;

#[derive(Debug, Default, Clone)]
struct Inode {
    durable: Image,
    current: Image,
    pending: Vec<Change>,
    locked: bool,
}

/// A change to names that no `sync_dir` has covered yet. Names point at inodes, so an operation can be replayed
/// even where an earlier one was lost.
#[derive(Debug, Clone)]
enum NameChange {
    Create { path: PathBuf, inode: InodeId },
    Rename { from: PathBuf, to: PathBuf, inode: InodeId },
    Remove { path: PathBuf, inode: InodeId },
}

type Names = BTreeMap<PathBuf, InodeId>;

impl NameChange {
    /// The directory whose sync makes the change durable; for a rename the one that gains the name.
    fn dir(&self) -> &Path {
        match self {
            NameChange::Create { path, .. } | NameChange::Remove { path, .. } => dir_of(path),
            NameChange::Rename { to, .. } => dir_of(to),
        }
    }

    fn apply(&self, names: &mut Names) {
        match self {
            NameChange::Create { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            NameChange::Rename { from, to, inode } => {
                remove_if(names, from, *inode);
                names.insert(to.clone(), *inode);
            }
            NameChange::Remove { path, inode } => remove_if(names, path, *inode),
        }
    }
}

fn remove_if(names: &mut Names, path: &Path, inode: InodeId) {
    if names.get(path) == Some(&inode) {
        names.remove(path);
    }
}

pub(crate) fn dir_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

fn machine_off() -> io::Error {
    io::Error::other("the simulated machine is off")
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())
}

#[derive(Debug)]
pub(crate) struct World {
    seed: u64,
    boots: u64,
    random: Random,
    inodes: BTreeMap<InodeId, Inode>,
    names: Names,
    durable_names: Names,
    pending_names: Vec<NameChange>,
    dirs: BTreeSet<PathBuf>,
    operations: u64,
    syncs: u64,
    off: bool,
    pub(crate) crash_at: Option<u64>,
    pub(crate) fail_sync_at: Option<u64>,
    pub(crate) fail_reads: bool,
    free_pages: Option<u64>,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        World {
            seed,
            boots: 0,
            random: Random::new(seed),
            inodes: BTreeMap::new(),
            names: Names::new(),
            durable_names: Names::new(),
            pending_names: Vec::new(),
            dirs: BTreeSet::from([PathBuf::new()]),
            operations: 0,
            syncs: 0,
            off: false,
            crash_at: None,
            fail_sync_at: None,
            fail_reads: false,
            free_pages: None,
        }
    }

    pub(crate) fn operations(&self) -> u64 {
        self.operations
    }

    pub(crate) fn syncs(&self) -> u64 {
        self.syncs
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn boot_id(&self) -> u128 {
        u128::from(self.seed) << 64 | u128::from(self.boots)
    }

    pub(crate) fn is_off(&self) -> bool {
        self.off
    }

    pub(crate) fn set_room(&mut self, bytes: Option<u64>) {
        self.free_pages = bytes.map(|bytes| bytes / PAGE);
    }

    pub(crate) fn alive(&self) -> io::Result<()> {
        if self.off { Err(machine_off()) } else { Ok(()) }
    }

    /// Counts one mutating operation and runs it. The operation that the power cut hits has its effect, as one
    /// more change that is not durable, and still fails.
    fn operation<T>(&mut self, run: impl FnOnce(&mut World, Cut) -> io::Result<T>) -> io::Result<T> {
        self.alive()?;
        let cut = if self.crash_at.is_some_and(|at| self.operations >= at) { Cut::Now } else { Cut::No };
        self.operations += 1;
        let result = run(self, cut);
        if cut == Cut::Now {
            self.off = true;
            return Err(machine_off());
        }
        result
    }

    /// Whether the sync under way goes wrong.
    fn sync_fails(&mut self) -> bool {
        self.syncs += 1;
        self.fail_sync_at == Some(self.syncs - 1)
    }

    fn inode(&mut self, id: InodeId) -> &mut Inode {
        self.inodes.entry(id).or_default()
    }

    fn released(&mut self, pages: u64) {
        if let Some(free) = &mut self.free_pages {
            *free += pages;
        }
    }

    // Files.

    pub(crate) fn len(&mut self, id: InodeId) -> io::Result<u64> {
        self.alive()?;
        Ok(self.inode(id).current.len())
    }

    pub(crate) fn read(&mut self, id: InodeId, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.alive()?;
        if self.fail_reads {
            return Err(eio());
        }
        let image = &self.inode(id).current;
        if !buf.is_empty() && offset.checked_add(buf.len() as u64).is_none_or(|end| end > image.len()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        image.read(offset, buf);
        Ok(())
    }

    pub(crate) fn write(&mut self, id: InodeId, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > i64::MAX.cast_unsigned()) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.operation(|world, _| {
            let free = world.free_pages.unwrap_or(u64::MAX);
            let inode = world.inode(id);
            let fits = inode.current.writable(offset, data.len() as u64, free);
            let data = data.get(..usize::try_from(fits).unwrap_or(data.len())).unwrap_or(data);
            let before = inode.current.page_count();
            inode.current.write(offset, data);
            let taken = inode.current.page_count() - before;
            inode.pending.push(Change::Write { offset, data: data.into() });
            if let Some(free) = &mut world.free_pages {
                *free = free.saturating_sub(taken);
            }
            Ok(data.len())
        })
        .and_then(|done| if done == data.len() { Ok(()) } else { Err(io::ErrorKind::StorageFull.into()) })
    }

    pub(crate) fn change(&mut self, id: InodeId, change: Change) -> io::Result<()> {
        self.operation(|world, _| {
            let inode = world.inode(id);
            let before = inode.current.page_count();
            inode.current.apply(&change);
            let released = before.saturating_sub(inode.current.page_count());
            inode.pending.push(change);
            world.released(released);
            Ok(())
        })
    }

    pub(crate) fn sync(&mut self, id: InodeId) -> io::Result<()> {
        self.operation(|world, cut| {
            let fails = world.sync_fails();
            let random = &mut world.random;
            let inode = world.inodes.entry(id).or_default();
            if cut == Cut::Now && random.below(4) != 0 {
                return Ok(()); // what is pending stays pending, and the power cut decides
            }
            let pending = mem::take(&mut inode.pending);
            if fails {
                // As a kernel does it: what was not written is forgotten, and a second sync would succeed.
                settle(&mut inode.durable, &pending, random);
                return Err(eio());
            }
            for change in &pending {
                inode.durable.apply(change);
            }
            Ok(())
        })
    }

    pub(crate) fn lock(&mut self, id: InodeId) -> io::Result<()> {
        let inode = self.inode(id);
        if mem::replace(&mut inode.locked, true) { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
    }

    pub(crate) fn unlock(&mut self, id: InodeId) {
        self.inode(id).locked = false;
    }

    // Names.

    pub(crate) fn find(&self, path: &Path) -> io::Result<InodeId> {
        self.alive()?;
        if self.dirs.contains(path) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn check_dir(&self, dir: &Path) -> io::Result<()> {
        if self.dirs.contains(dir) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    pub(crate) fn create(&mut self, path: &Path) -> io::Result<InodeId> {
        self.alive()?;
        self.check_dir(dir_of(path))?;
        if self.names.contains_key(path) || self.dirs.contains(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.operation(|world, _| {
            let inode = world.inodes.last_key_value().map_or(0, |(id, _)| id + 1);
            world.inodes.insert(inode, Inode::default());
            world.change_name(NameChange::Create { path: path.to_path_buf(), inode });
            Ok(inode)
        })
    }

    pub(crate) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let inode = self.find(from)?;
        self.check_dir(dir_of(to))?;
        if self.dirs.contains(to) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        self.operation(|world, _| {
            if from != to {
                world.release_name(to);
                world.change_name(NameChange::Rename { from: from.to_path_buf(), to: to.to_path_buf(), inode });
            }
            Ok(())
        })
    }

    pub(crate) fn remove(&mut self, path: &Path) -> io::Result<()> {
        let inode = self.find(path)?;
        self.operation(|world, _| {
            world.release_name(path);
            world.change_name(NameChange::Remove { path: path.to_path_buf(), inode });
            Ok(())
        })
    }

    fn release_name(&mut self, path: &Path) {
        if let Some(id) = self.names.get(path).copied() {
            let pages = self.inode(id).current.page_count();
            self.released(pages);
        }
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.pending_names.push(change);
    }

    pub(crate) fn sync_dir(&mut self, dir: &Path) -> io::Result<()> {
        self.alive()?;
        self.check_dir(dir)?;
        self.operation(|world, cut| {
            let fails = world.sync_fails();
            if cut == Cut::Now && world.random.below(4) != 0 {
                return Ok(());
            }
            for change in mem::take(&mut world.pending_names) {
                if change.dir() != dir {
                    world.pending_names.push(change);
                } else if !fails || world.random.coin() {
                    change.apply(&mut world.durable_names);
                    if let NameChange::Rename { from, inode, .. } = &change {
                        // The name the file was created under is gone with it, whichever directory it was in.
                        world.pending_names.retain(|earlier| {
                            !matches!(earlier, NameChange::Create { path, inode: id } if path == from && id == inode)
                        });
                    }
                }
            }
            if fails { Err(eio()) } else { Ok(()) }
        })
    }

    pub(crate) fn create_dir(&mut self, dir: &Path) -> io::Result<()> {
        self.alive()?;
        if dir.ancestors().any(|above| self.names.contains_key(above)) {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        self.operation(|world, cut| {
            if cut == Cut::No || world.random.coin() {
                world.dirs.extend(dir.ancestors().map(Path::to_path_buf));
            }
            Ok(())
        })
    }

    pub(crate) fn list(&mut self, dir: &Path) -> io::Result<Vec<(PathBuf, u64)>> {
        self.alive()?;
        let found = self.names.iter().filter(|(path, _)| dir_of(path) == dir);
        Ok(found.map(|(path, id)| (path.clone(), self.inodes.get(id).map_or(0, |inode| inode.current.len()))).collect())
    }

    pub(crate) fn list_dirs(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.alive()?;
        Ok(self.dirs.iter().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    /// Stops everything, if it is not off yet, and returns the same storage with nothing open: what was not synced is
    /// there and still not synced.
    pub(crate) fn kill(&mut self) -> World {
        self.off = true;
        let mut after = World::new(self.seed);
        after.boots = self.boots;
        after.random = self.random.clone();
        after.inodes.clone_from(&self.inodes);
        after.inodes.values_mut().for_each(|inode| inode.locked = false);
        after.names.clone_from(&self.names);
        after.durable_names.clone_from(&self.durable_names);
        after.pending_names.clone_from(&self.pending_names);
        after.dirs.clone_from(&self.dirs);
        after
    }

    /// Cuts the power, if it is not off yet, and returns what a machine finds that starts on this storage.
    pub(crate) fn crash(&mut self, seed: u64) -> World {
        self.off = true;
        let mut random = Random::new(seed ^ self.operations.wrapping_mul(0xd6e8_feb8_6659_fd93));
        let mut after = World::new(random.next());
        after.boots = self.boots + 1;
        after.dirs.clone_from(&self.dirs);
        after.names.clone_from(&self.durable_names);
        let mode = random.below(4);
        for change in &self.pending_names {
            if mode == 0 || (mode != 1 && random.coin()) {
                change.apply(&mut after.names);
            }
        }
        after.durable_names.clone_from(&after.names);
        for (id, inode) in &self.inodes {
            let mut durable = inode.durable.clone();
            settle(&mut durable, &inode.pending, &mut random);
            if after.names.values().any(|named| named == id) {
                after.inodes.insert(*id, Inode { current: durable.clone(), durable, ..Inode::default() });
            }
        }
        after
    }
}

/// Whether the power goes off in the middle of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Now,
    No,
}

/// Leaves of `pending` what fate decides: everything, nothing, or each change on its own whole, lost or torn.
fn settle(durable: &mut Image, pending: &[Change], random: &mut Random) {
    let mode = random.below(4);
    for change in pending {
        match mode {
            0 => durable.apply(change),
            1 => {}
            _ => durable.apply_torn(change, random),
        }
    }
}

/// Shared by a folder and the disks it has handed out.
pub(crate) type SharedWorld = Arc<std::sync::Mutex<World>>;
