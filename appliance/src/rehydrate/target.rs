//! Production storage: where a disk moves to, written while the guest runs and served after a cutover.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbd_server::export::ZeroMode;
use nbd_server::{BlockingClient, ClientOptions, NbdUri};
use rustix::fs::{Advice, FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::Errno;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::qcow2::Qcow2Readback;
use crate::blocks;

/// Zeroes are written in steps of this where they cannot be asked for.
const ZERO_STEP: usize = 1 << 20;
/// A range that is compared or served is at most this long.
const BLOCK_MODE: u32 = 0o600;

/// A place on production storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// A raw file or a block device, by its absolute path.
    Raw(PathBuf),
    /// A qcow2 file, by its absolute path. Only QEMU writes one.
    Qcow2(PathBuf),
    /// An NBD export.
    Nbd(String),
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Raw(path) | Place::Qcow2(path) => write!(out, "{}", path.display()),
            Place::Nbd(uri) => out.write_str(uri),
        }
    }
}

/// Whether a target is new or was begun before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// A file is made; one that exists is refused.
    New,
    /// A file is made, or one that exists overwritten.
    Overwrite,
    /// It has been written before, and must be there.
    Again,
}

/// What a target holds. Blocks; called from several threads.
pub trait Readback: Send + Sync + fmt::Debug {
    /// Fills `buf` from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Lets the next reads of a synced range come from the storage itself, as far as that can be arranged.
    fn forget(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }

    /// The extent that begins at `offset` and is at most `length` long: its length, and whether it is a hole.
    fn extent(&self, offset: u64, length: u64) -> io::Result<(u64, bool)> {
        let _ = offset;
        Ok((length, false))
    }

    /// Returns once everything written is durable, whoever wrote it. After a failure what is durable is not known.
    fn sync(&self) -> io::Result<()>;

    /// Sees what another program has written and synced since it was opened.
    fn refresh(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk on production storage that Lifeboat writes.
pub trait Production: Readback {
    /// Writes `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes a range read as zeroes, giving space back if `mode` allows.
    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> io::Result<()>;
}

/// Opens a place for a disk of `size` bytes that somebody else writes, to sync it and to read it back.
pub fn open_readback(place: &Place, size: u64, opening: Opening) -> io::Result<Arc<dyn Readback>> {
    Ok(match place {
        Place::Raw(path) => Arc::new(RawProduction::open(path, size, opening)?),
        Place::Nbd(uri) => Arc::new(NbdProduction::open(uri, size)?),
        Place::Qcow2(path) => Arc::new(Qcow2Readback::open(path, size, opening)?),
    })
}

/// Opens a place for a disk of `size` bytes. [`Place::Qcow2`] is refused.
pub fn open(place: &Place, size: u64, opening: Opening) -> io::Result<Box<dyn Production>> {
    match place {
        Place::Raw(path) => Ok(Box::new(RawProduction::open(path, size, opening)?)),
        Place::Nbd(uri) => Ok(Box::new(NbdProduction::open(uri, size)?)),
        Place::Qcow2(_) => Err(io::Error::new(io::ErrorKind::Unsupported, "a qcow2 file is written by QEMU only")),
    }
}

/// A raw file or block device, locked while it is open.
#[derive(Debug)]
struct RawProduction {
    file: File,
    size: u64,
    device: bool,
}

impl RawProduction {
    fn open(path: &Path, size: u64, opening: Opening) -> io::Result<RawProduction> {
        let device = match std::fs::metadata(path) {
            Ok(there) if there.file_type().is_block_device() => true,
            Ok(there) if !there.is_file() => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device"));
            }
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound && opening != Opening::Again => false,
            Err(error) => return Err(error),
        };
        if device && opening == Opening::New {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is a block device"));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(BLOCK_MODE);
        match opening {
            Opening::New => options.create_new(true),
            Opening::Overwrite => options.create(!device),
            Opening::Again => &mut options,
        };
        let file = options.open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another program has locked it"));
            }
            Err(error) => return Err(error.into()),
        }
        let there = rustix::fs::seek(&file, SeekFrom::End(0))?;
        match (device, opening) {
            (true, _) | (false, Opening::Again) if there < size => {
                let message = format!("it has {there} bytes, and the disk {size}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
            (false, Opening::New | Opening::Overwrite) => {
                // What an overwritten file held is not wanted, and its blocks are best given back.
                file.set_len(0)?;
                file.set_len(size)?;
                file.sync_all()?;
                if let Some(dir) = path.parent() {
                    File::open(dir)?.sync_all()?;
                }
            }
            _ => {}
        }
        Ok(RawProduction { file, size, device })
    }
}

impl Readback for RawProduction {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn forget(&self, offset: u64, length: u64) {
        // Only advice: without it the comparison reads what the kernel remembers.
        let _ = rustix::fs::fadvise(&self.file, offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
    }

    fn extent(&self, offset: u64, length: u64) -> io::Result<(u64, bool)> {
        if self.device {
            return Ok((length, false));
        }
        let end = (offset + length).min(self.size);
        let until = |at: u64| at.clamp(offset, end) - offset;
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((until(data), true)),
            Ok(_) => {
                let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(offset))?;
                Ok((until(hole), false))
            }
            Err(Errno::NXIO) => Ok((length, true)),
            Err(_) => Ok((length, false)),
        }
    }
}

impl Production for RawProduction {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> io::Result<()> {
        let flags = match mode {
            ZeroMode::MayPunch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            ZeroMode::KeepAllocated => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        match rustix::fs::fallocate(&self.file, flags, offset, length) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::INVAL | Errno::NOSYS) => {
                write_zeroes(offset, length, |at, zeroes| self.file.write_all_at(zeroes, at))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn write_zeroes(mut offset: u64, length: u64, write: impl Fn(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let zeroes = vec![0; ZERO_STEP.min(usize::try_from(length).unwrap_or(ZERO_STEP))];
    let end = offset + length;
    while offset < end {
        let step = usize::try_from(end - offset).unwrap_or(usize::MAX).min(zeroes.len());
        write(offset, zeroes.get(..step).unwrap_or(&zeroes))?;
        offset += step as u64;
    }
    Ok(())
}

/// An NBD export.
struct NbdProduction {
    client: BlockingClient,
    uri: String,
}

impl fmt::Debug for NbdProduction {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("NbdProduction").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl NbdProduction {
    fn open(uri: &str, size: u64) -> io::Result<NbdProduction> {
        let parsed: NbdUri =
            uri.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, format!("{error}")))?;
        let client = BlockingClient::connect(&parsed, &ClientOptions::default()).map_err(io::Error::other)?;
        if client.size() < size {
            let message = format!("it has {} bytes, and the disk {size}", client.size());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        if client.read_only() {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(NbdProduction { client, uri: uri.to_owned() })
    }
}

impl Readback for NbdProduction {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        blocks::read(&self.client, offset, buf)
    }

    fn sync(&self) -> io::Result<()> {
        self.client.flush().map_err(io::Error::other)
    }
}

impl Production for NbdProduction {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        blocks::write(&self.client, offset, data)
    }

    fn zero(&self, offset: u64, length: u64, mode: ZeroMode) -> io::Result<()> {
        blocks::zero(&self.client, offset, length, mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn holds(file: &dyn Production, offset: u64, length: usize) -> Vec<u8> {
        let mut buf = vec![9; length];
        file.read_at(offset, &mut buf).unwrap();
        buf
    }

    #[test]
    fn a_file_is_made_sparse_kept_from_others_and_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::Raw(dir.path().join("disk.raw"));
        assert!(open(&place, SIZE, Opening::Again).is_err());
        let first = open(&place, SIZE, Opening::New).unwrap();
        assert_eq!(first.extent(0, SIZE).unwrap(), (SIZE, true));
        first.write_at(8192, &[1; 4096]).unwrap();
        let error = open(&place, SIZE, Opening::Again).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(open(&place, SIZE, Opening::New).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        drop(first);
        let again = open(&place, SIZE, Opening::Again).unwrap();
        assert_eq!(holds(&*again, 8192, 4096), [1; 4096]);
        assert_eq!(again.extent(0, SIZE).unwrap(), (8192, true));
        again.zero(8192, 4096, ZeroMode::MayPunch).unwrap();
        assert_eq!(holds(&*again, 8192, 4096), [0; 4096]);
        drop(again);
        assert!(open(&place, SIZE * 2, Opening::Again).is_err());
        let over = open(&place, SIZE, Opening::Overwrite).unwrap();
        assert_eq!(holds(&*over, 8192, 4096), [0; 4096]);
    }

    #[test]
    fn folders_and_qcow2_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open(&Place::Raw(dir.path().to_owned()), SIZE, Opening::Overwrite).is_err());
        assert!(open(&Place::Qcow2(dir.path().join("a.qcow2")), SIZE, Opening::New).is_err());
    }

    #[test]
    fn zeroes_can_be_written_where_they_cannot_be_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = open(&Place::Raw(dir.path().join("d")), 4 << 20, Opening::New).unwrap();
        file.write_at(0, &vec![7; 4 << 20]).unwrap();
        write_zeroes(5, (3 << 20) - 10, |at, zeroes| file.write_at(at, zeroes)).unwrap();
        let all = holds(&*file, 0, 4 << 20);
        assert_eq!(all.iter().position(|byte| *byte == 0), Some(5));
        assert_eq!(all.iter().rposition(|byte| *byte == 0), Some((3 << 20) - 6));
    }
}
