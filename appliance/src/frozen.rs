//! [`Frozen`]: a recovery's disk as it was at one instant, while its guest writes on. The rules: docs/design/commit.md

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use blockstore::base::Segment;
use blockstore::overlay::{Overlay, Room};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::problem::chain;
use crate::rehydrate::{REGION, RegionSet, touched};

/// Changes of different regions rarely wait for one another.
const TURNS: usize = 64;
/// The space that is left is looked at each time so many regions were put aside.
const LOOK: u64 = 256;
/// Changed extents asked for at a time.
const EXTENTS: usize = 1024;

/// A disk as it was. What the overlay held then is put aside before the guest changes it; what it did not hold is still
/// in the recovery point.
#[derive(Debug)]
pub struct Frozen {
    overlay: Arc<Overlay>,
    /// Regions of which the overlay held something at the instant.
    changed: RegionSet,
    /// Those of them that were put aside; the others are still in the overlay as they were.
    aside_now: RegionSet,
    /// The instant has come: until then changes are only noted.
    frozen: AtomicBool,
    /// Takes the old content of the others, each at its place. It has no name: it goes with the process.
    aside: File,
    /// Who changes a region first puts it aside, the others wait for that.
    turns: Vec<Mutex<()>>,
    put_aside: AtomicU64,
    /// Why some region could not be put aside: the guest went on, and what was at the instant is lost.
    lost: OnceLock<String>,
}

impl Frozen {
    /// Begins to take note of what `overlay` holds. From now on everybody who changes it must call
    /// [`Frozen::before_change`] first. Then [`Frozen::look`], then [`Frozen::freeze`].
    pub fn new(overlay: Arc<Overlay>, aside: File) -> Frozen {
        let size = overlay.size();
        Frozen {
            changed: RegionSet::new(size),
            aside_now: RegionSet::new(size),
            frozen: AtomicBool::new(false),
            aside,
            turns: (0..TURNS).map(|_| Mutex::default()).collect(),
            put_aside: AtomicU64::new(0),
            lost: OnceLock::new(),
            overlay,
        }
    }

    /// Notes what the overlay holds, which takes a while if that lies scattered. What is changed meanwhile is noted by
    /// whoever changes it.
    pub fn look(&self) {
        let (size, mut at) = (self.overlay.size(), 0);
        while at < size {
            for extent in self.overlay.changed(at, size - at, EXTENTS) {
                if extent.changed {
                    touched(at, extent.length).for_each(|region| self.changed.insert(region));
                }
                at += extent.length;
            }
        }
    }

    /// The instant. Nobody may be changing anything.
    pub fn freeze(&self) {
        self.frozen.store(true, Ordering::SeqCst);
    }

    /// Whether a change of this range has something to do before.
    pub fn concerns(&self, offset: u64, length: u64) -> bool {
        match self.frozen.load(Ordering::SeqCst) {
            true => self.next_there(touched(offset, length)).is_some(),
            false => touched(offset, length).any(|region| !self.changed.contains(region)),
        }
    }

    /// Puts aside what a change is about to replace. If that fails the frozen disk is lost, not the change. Before the
    /// instant the change is only noted.
    pub fn before_change(&self, offset: u64, length: u64) {
        let regions = touched(offset, length);
        if !self.frozen.load(Ordering::SeqCst) {
            regions.for_each(|region| self.changed.insert(region));
            return;
        }
        let mut at = regions.start;
        while self.lost.get().is_none() {
            let Some(region) = self.next_there(at..regions.end) else { return };
            if let Err(why) = self.put_aside(region) {
                tracing::warn!(why, "a disk that is being committed cannot be kept as it was");
                let _ = self.lost.set(why);
            }
            at = region + 1;
        }
        // Whoever reads a byte of the change sees before it that the region is not there any more, or that it is lost.
        fence(Ordering::SeqCst);
    }

    /// The first of `regions` that is still in the overlay as it was.
    fn next_there(&self, mut regions: Range<u64>) -> Option<u64> {
        loop {
            let region = self.changed.next(regions.start).filter(|region| *region < regions.end)?;
            if !self.aside_now.contains(region) {
                return Some(region);
            }
            regions.start = region + 1;
        }
    }

    /// The disk cannot be kept any more, for a reason.
    pub fn lost(&self) -> Option<&str> {
        self.lost.get().map(String::as_str)
    }

    fn put_aside(&self, region: u64) -> Result<(), String> {
        let turn = usize::try_from(region % TURNS as u64).ok().and_then(|turn| self.turns.get(turn));
        let _turn = turn.map(|turn| turn.lock().unwrap_or_else(PoisonError::into_inner));
        if self.aside_now.contains(region) {
            return Ok(()); // somebody else was first
        }
        if self.put_aside.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK)
            && self.overlay.space().is_some_and(|space| space.room == Room::Critical)
        {
            return Err("hardly any space is left for the overlays; what is left is for the guest".to_owned());
        }
        let mut at = region * REGION;
        let mut segments = Vec::new();
        self.overlay
            .read(at, REGION.min(self.overlay.size() - at), &mut segments)
            .map_err(|error| format!("cannot read what the guest is about to change: {}", chain(&error)))?;
        for segment in segments {
            match segment {
                Segment::Data(bytes) => {
                    self.aside
                        .write_all_at(&bytes, at)
                        .map_err(|error| format!("cannot put aside what the guest is about to change: {error}"))?;
                    at += bytes.len() as u64;
                }
                Segment::Hole(length) => at += length,
            }
        }
        // Holes are not written: the file has been as long as the disk, and empty, from the beginning.
        self.aside_now.insert(region);
        Ok(())
    }

    /// Reads a part of one region.
    fn read_part(&self, region: u64, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let length = buf.len() as u64;
        let mut segments = Vec::new();
        if !self.changed.contains(region) {
            self.overlay.base().read(offset, length, &mut segments).map_err(io::Error::other)?;
            crate::exports::fill(&segments, buf);
            return Ok(());
        }
        if !self.aside_now.contains(region) {
            self.overlay.read(offset, length, &mut segments).map_err(io::Error::other)?;
            fence(Ordering::SeqCst);
            if !self.aside_now.contains(region) {
                crate::exports::fill(&segments, buf);
                return Ok(());
            }
        }
        self.aside.read_exact_at(buf, offset)
    }
}

impl blockstore::Source for Frozen {
    fn size(&self) -> u64 {
        self.overlay.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let region = at / REGION;
            let length = usize::try_from((region + 1) * REGION - at).unwrap_or(usize::MAX).min(rest.len());
            let (part, left) = std::mem::take(&mut rest).split_at_mut(length);
            self.read_part(region, at, part)?;
            at += length as u64;
            rest = left;
        }
        match self.lost() {
            Some(why) => Err(io::Error::other(why.to_owned())),
            None => Ok(()),
        }
    }

    /// Everything: what is zero is found out by reading, and a hole of the recovery point costs nothing to read.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size()).then(|| offset..self.size()))
    }

    fn next_change(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let Some(first) = self.changed.next(offset / REGION) else { return Ok(None) };
        let mut end = first + 1;
        while self.changed.contains(end) {
            end += 1;
        }
        Ok(Some((first * REGION).max(offset)..(end * REGION).min(self.size())))
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }
}

/// A file without a name in `dir`, as long as the disk it is for and empty.
pub fn aside(dir: &Path, size: u64) -> io::Result<File> {
    let mode = Mode::RUSR | Mode::WUSR;
    let file = match openat(CWD, dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Ok(file) => File::from(file),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
            // The file system has no such files. Nothing is written before the name is gone.
            let path = dir.join(".aside");
            let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::RDWR | OFlags::CLOEXEC;
            let file = File::from(openat(CWD, &path, flags, mode)?);
            std::fs::remove_file(&path)?;
            file
        }
        Err(errno) => return Err(errno.into()),
    };
    file.set_len(size)?;
    Ok(file)
}
