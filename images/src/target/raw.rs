//! Raw targets: a sparse file, or a block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;

use super::direct::Direct;
use super::temporary::Temporary;
use super::{ImageTarget, Overwrite, check_range, write_zeroes};
use crate::raw::{device_size, next_data};

/// A file or device whose bytes become the disk.
pub(super) struct RawTarget {
    place: Place,
    direct: Direct,
    size: u64,
}

enum Place {
    File(Temporary),
    Device(File),
    /// A file under its own name.
    Named(File),
}

impl RawTarget {
    pub(super) fn file(path: &Path, size: u64, overwrite: Overwrite) -> io::Result<RawTarget> {
        let temporary = Temporary::create(path, overwrite)?;
        temporary.file().set_len(size)?;
        let direct = Direct::of(temporary.file());
        Ok(RawTarget { place: Place::File(temporary), direct, size })
    }

    /// What an interrupted restore left, or a new file; true for the first.
    pub(super) fn resume(path: &Path, size: u64, overwrite: Overwrite) -> io::Result<(RawTarget, bool)> {
        let (temporary, resumed) = Temporary::resume(path, overwrite)?;
        temporary.file().set_len(size)?;
        let direct = Direct::of(temporary.file());
        Ok((RawTarget { place: Place::File(temporary), direct, size }, resumed))
    }

    /// A file that exists. None if it is a qcow2 image.
    pub(super) fn in_place(path: &Path, size: u64) -> io::Result<Option<RawTarget>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(io::Error::other("another process is writing to it")),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK | Errno::INVAL) | Ok(()) => {}
            Err(error) => return Err(error.into()),
        }
        let mut magic = [0; 4];
        let says_raw = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("raw"));
        if !says_raw && file.read_exact_at(&mut magic, 0).is_ok() && magic == *b"QFI\xfb" {
            return Ok(None);
        }
        file.set_len(size)?;
        let direct = Direct::of(&file);
        Ok(Some(RawTarget { place: Place::Named(file), direct, size }))
    }

    fn handle(&self) -> &File {
        match &self.place {
            Place::File(temporary) => temporary.file(),
            Place::Device(file) | Place::Named(file) => file,
        }
    }

    /// Held exclusively: the kernel refuses a device that is mounted or belongs to a volume group.
    pub(super) fn device(path: &Path, size: u64) -> io::Result<RawTarget> {
        let exclusive = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap_or(0);
        let file = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(path)?;
        let direct = Direct::of(&file);
        Ok(RawTarget { place: Place::Device(file), direct, size })
    }

    /// Bytes there are room for.
    pub(super) fn available(&self) -> u64 {
        match &self.place {
            Place::File(_) | Place::Named(_) => self.size,
            Place::Device(file) => device_size(file).unwrap_or(0),
        }
    }
}

impl ImageTarget for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        check_range(offset, data.len(), self.size)?;
        if self.direct.write_at(offset, data)? {
            return Ok(());
        }
        self.handle().write_all_at(data, offset)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.size)?;
        self.handle().read_exact_at(buf, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        next_data(self.handle(), offset, self.size, matches!(self.place, Place::Device(_)))
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        check_range(offset, usize::try_from(length).unwrap_or(usize::MAX), self.size)?;
        match fallocate(self.handle(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(()),
            Err(_) => write_zeroes(length, |at, zeroes| self.handle().write_all_at(zeroes, offset + at)),
        }
    }

    fn starts_zeroed(&self) -> bool {
        matches!(self.place, Place::File(_))
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        match self.place {
            Place::File(temporary) => temporary.publish(),
            Place::Device(file) | Place::Named(file) => file.sync_all(),
        }
    }
}
