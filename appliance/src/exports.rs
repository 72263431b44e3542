//! Joins the libraries, which do not know each other: disks of the store as NBD exports, foreign images and NBD
//! exports as sources of a backup, image files as targets of a restore.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blockstore::base::{Base, Segment};
use blockstore::error::ReadError;
use blockstore::overlay::{Overlay, OverlayError};
use nbd_server::export::{BlockSize, ContextExtent, Export, ExportError, Extent, ExtentKind, Piece, ZeroMode};

/// Guests and file systems work in 4 KiB; any alignment is served.
pub const BLOCK_SIZE: BlockSize = BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 };

/// The NBD metadata context that tells what was written since the recovery point; flag 1 is set where something was.
pub const CHANGED_CONTEXT: &str = "lifeboat:changed";

/// Notes when the first read came, in microseconds after `since`.
#[derive(Debug)]
pub struct FirstRead {
    since: Instant,
    micros: AtomicU64,
}

impl FirstRead {
    /// Counts from now.
    pub fn since(since: Instant) -> Arc<FirstRead> {
        Arc::new(FirstRead { since, micros: AtomicU64::new(u64::MAX) })
    }

    fn note(&self) {
        if self.micros.load(Ordering::Relaxed) == u64::MAX {
            let micros = u64::try_from(self.since.elapsed().as_micros()).unwrap_or(u64::MAX - 1);
            // Two first readers at once: either is the first.
            self.micros.fetch_min(micros, Ordering::Relaxed);
        }
    }

    /// Milliseconds until the first read, if there was one.
    pub fn millis(&self) -> Option<u64> {
        match self.micros.load(Ordering::Relaxed) {
            u64::MAX => None,
            micros => Some(micros / 1000),
        }
    }
}

thread_local! {
    /// Used again for each read: a read from memory allocates nothing.
    static SEGMENTS: RefCell<Vec<Segment>> = const { RefCell::new(Vec::new()) };
}

/// Calls `read` with an empty list and hands what it found over as pieces.
fn through_segments<R>(out: &mut Vec<Piece>, read: impl FnOnce(&mut Vec<Segment>) -> R) -> R {
    // Taken out meanwhile, so that a read within a read finds a list of its own.
    let mut segments = SEGMENTS.take();
    let result = read(&mut segments);
    out.extend(segments.drain(..).map(|segment| match segment {
        Segment::Data(bytes) => Piece::Data(bytes),
        Segment::Hole(length) => Piece::Hole(length),
    }));
    SEGMENTS.set(segments);
    result
}

fn extents(extents: Vec<blockstore::base::Extent>) -> Vec<Extent> {
    extents
        .into_iter()
        .map(|extent| Extent {
            length: extent.length,
            kind: if extent.hole { ExtentKind::Hole } else { ExtentKind::Data },
        })
        .collect()
}

/// A recovery point's disk, served read-only.
#[derive(Debug)]
pub struct BaseExport {
    /// The disk.
    pub base: Arc<dyn Base>,
    /// What it is, for a person.
    pub description: String,
}

impl BaseExport {
    fn failed(&self, error: &ReadError) -> ExportError {
        tracing::error!(export = %self.description, error = %crate::problem::chain(error), "read failed");
        ExportError::Io
    }
}

impl Export for BaseExport {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn block_size(&self) -> BlockSize {
        BLOCK_SIZE
    }

    fn read_resident(&self, offset: u64, length: u32, out: &mut Vec<Piece>) -> bool {
        through_segments(out, |segments| self.base.read_resident(offset, length.into(), segments))
    }

    fn read(&self, offset: u64, length: u32, out: &mut Vec<Piece>) -> Result<(), ExportError> {
        through_segments(out, |segments| self.base.read(offset, length.into(), segments))
            .map_err(|error| self.failed(&error))
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly)
    }

    fn write_zeroes(&self, _offset: u64, _length: u64, _mode: ZeroMode) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly)
    }

    fn trim(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Err(ExportError::ReadOnly)
    }

    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        warm(length, |at, step| self.base.read(offset + at, step, &mut Vec::new())).map_err(|error| self.failed(&error))
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        self.base.extents(offset, length, limit).map(extents).map_err(|error| self.failed(&error))
    }
}

/// A recovery point's disk under an overlay that takes writes.
#[derive(Debug)]
pub struct OverlayExport {
    /// The disk.
    pub overlay: Arc<Overlay>,
    /// What it is, for a person.
    pub description: String,
    /// Told of the first read.
    pub first_read: Arc<FirstRead>,
}

impl OverlayExport {
    fn failed(&self, operation: &str, error: &OverlayError) -> ExportError {
        let export = &self.description;
        let text = crate::problem::chain(error);
        match error {
            OverlayError::NoSpace { .. } => {
                tracing::warn!(%export, operation, error = %text, "the overlay's file system is full; the guest is told");
                ExportError::NoSpace
            }
            OverlayError::OutOfRange { .. } => ExportError::Invalid,
            _ => {
                tracing::error!(%export, operation, error = %text, "disk operation failed");
                ExportError::Io
            }
        }
    }
}

impl Export for OverlayExport {
    fn size(&self) -> u64 {
        self.overlay.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn description(&self) -> String {
        self.description.clone()
    }

    fn block_size(&self) -> BlockSize {
        BLOCK_SIZE
    }

    fn read_resident(&self, offset: u64, length: u32, out: &mut Vec<Piece>) -> bool {
        self.first_read.note();
        through_segments(out, |segments| self.overlay.read_resident(offset, length.into(), segments))
    }

    fn read(&self, offset: u64, length: u32, out: &mut Vec<Piece>) -> Result<(), ExportError> {
        self.first_read.note();
        through_segments(out, |segments| self.overlay.read(offset, length.into(), segments))
            .map_err(|error| self.failed("read", &error))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), ExportError> {
        self.overlay.write(offset, data).map_err(|error| self.failed("write", &error))
    }

    fn write_resident(&self, offset: u64, data: &[u8]) -> Option<Result<(), ExportError>> {
        let written = self.overlay.write_resident(offset, data)?;
        Some(written.map_err(|error| self.failed("write", &error)))
    }

    fn write_zeroes(&self, offset: u64, length: u64, mode: ZeroMode) -> Result<(), ExportError> {
        let allocate = mode == ZeroMode::KeepAllocated;
        self.overlay.write_zeroes(offset, length, allocate).map_err(|error| self.failed("write zeroes", &error))
    }

    fn trim(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        self.overlay.trim(offset, length).map_err(|error| self.failed("trim", &error))
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.overlay.flush().map_err(|error| self.failed("flush", &error))
    }

    fn cache(&self, offset: u64, length: u64) -> Result<(), ExportError> {
        warm(length, |at, step| self.overlay.read(offset + at, step, &mut Vec::new()))
            .map_err(|error| self.failed("cache", &error))
    }

    fn extents(&self, offset: u64, length: u64, limit: usize) -> Result<Vec<Extent>, ExportError> {
        self.overlay.extents(offset, length, limit).map(extents).map_err(|error| self.failed("block status", &error))
    }

    fn fast_zeroes(&self) -> bool {
        true
    }

    fn contexts(&self) -> Vec<String> {
        vec![CHANGED_CONTEXT.to_owned()]
    }

    fn context_extents(
        &self,
        context: &str,
        offset: u64,
        length: u64,
        limit: usize,
    ) -> Result<Vec<ContextExtent>, ExportError> {
        if context != CHANGED_CONTEXT {
            return Err(ExportError::NotSupported);
        }
        let extents = self.overlay.changed(offset, length, limit).into_iter();
        Ok(extents.map(|extent| ContextExtent { length: extent.length, flags: extent.changed.into() }).collect())
    }
}

/// Reads a range in steps, so that a request for all of a disk holds little of it at a time.
fn warm<E>(length: u64, mut read: impl FnMut(u64, u64) -> Result<(), E>) -> Result<(), E> {
    const STEP: u64 = 4 << 20;
    let mut at = 0;
    while at < length {
        let step = STEP.min(length - at);
        read(at, step)?;
        at += step;
    }
    Ok(())
}

/// A foreign disk image as the source of a backup.
pub struct ImageSource(pub Box<dyn images::DiskImage>);

impl blockstore::Source for ImageSource {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(offset)
    }

    fn current_size(&self) -> io::Result<u64> {
        self.0.current_size()
    }
}

/// A recovery point's disk, read as an image is.
pub struct BaseImage(pub Arc<dyn Base>);

impl images::DiskImage for BaseImage {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.0.size(), offset, buf)?;
        let mut segments = Vec::new();
        self.0.read(offset, buf.len() as u64, &mut segments).map_err(io::Error::other)?;
        fill(&segments, buf);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        first_data(self.0.size(), offset, |at, length| self.0.extents(at, length, EXTENTS).map_err(io::Error::other))
    }
}

/// A running recovery's disk as it is at present, read as an image is.
pub struct OverlayImage(pub Arc<Overlay>);

impl images::DiskImage for OverlayImage {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(self.0.size(), offset, buf)?;
        let mut segments = Vec::new();
        self.0.read(offset, buf.len() as u64, &mut segments).map_err(io::Error::other)?;
        fill(&segments, buf);
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        first_data(self.0.size(), offset, |at, length| self.0.extents(at, length, EXTENTS).map_err(io::Error::other))
    }
}

/// Extents asked for at a time when data is looked for.
const EXTENTS: usize = 1024;

fn check_range(size: u64, offset: u64, buf: &[u8]) -> io::Result<()> {
    match offset.checked_add(buf.len() as u64) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the disk's end")),
    }
}

pub(crate) fn fill(segments: &[Segment], buf: &mut [u8]) {
    let mut rest = buf;
    for segment in segments {
        let length = match segment {
            Segment::Data(bytes) => bytes.len(),
            Segment::Hole(length) => usize::try_from(*length).unwrap_or(usize::MAX),
        };
        let (part, left) = std::mem::take(&mut rest).split_at_mut(length);
        match segment {
            Segment::Data(bytes) => part.copy_from_slice(bytes),
            Segment::Hole(_) => part.fill(0),
        }
        rest = left;
    }
}

/// The first range of data at or behind `offset`, by the extents that `extents` tells from a place on.
fn first_data(
    size: u64,
    offset: u64,
    extents: impl Fn(u64, u64) -> io::Result<Vec<blockstore::base::Extent>>,
) -> io::Result<Option<Range<u64>>> {
    let mut at = offset;
    let mut found: Option<Range<u64>> = None;
    while at < size {
        let told = extents(at, size - at)?;
        if told.is_empty() {
            break;
        }
        for extent in told {
            match (&mut found, extent.hole) {
                (None, true) => {}
                (None, false) => found = Some(at..at + extent.length),
                (Some(found), false) => found.end = at + extent.length,
                (Some(_), true) => return Ok(found),
            }
            at += extent.length;
        }
        // Enough is known: data goes on behind it, and who wants more asks again.
        if found.is_some() {
            break;
        }
    }
    Ok(found)
}

/// An image file as the target of a restore.
pub struct ImageTarget<'a>(pub &'a dyn images::ImageTarget);

impl blockstore::Target for ImageTarget<'_> {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(offset)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.write_zeroes(offset, length)
    }
}

/// A disk that a restore has written, to be compared.
pub struct WrittenDisk(pub Box<dyn blockstore::Source>);

impl blockstore::Target for WrittenDisk {
    fn write_at(&self, _offset: u64, _data: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.0.next_data(offset)
    }
}
