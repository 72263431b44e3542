//! qcow2 through the imago library.
//!
//! Each header is checked first, the chain of backing files is opened here, from its end and bounded, and a name that is
//! no plain file is left to QEMU. Where a mapping points outside of its file the image has been cut off, and that is an
//! error; the library would read zeroes there. A backing file has the format its image says it has: what stands in a
//! raw one, a guest may have written.

mod header;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use imago::file::File;
use imago::qcow2::Qcow2 as Driver;
use imago::raw::Raw as RawDriver;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, Storage, StorageExt};

use self::header::{Backing, Header, HeaderError};
use crate::detect::probe;
use crate::guard::guarded;
use crate::raw::Raw;
use crate::{BackingFiles, DiskImage, Format, OpenError};

/// Longest backing chain that is followed.
const CHAIN_MAX: usize = 64;
/// How far one look for data goes.
const MAPPING_WINDOW: u64 = 1 << 40;
/// Unpacked blocks kept for readers of pieces, each as large as the largest cluster of the chain: at most 2 MiB.
const BLOCKS_KEPT: usize = 4;
/// Compressed clusters up to here are unpacked for each piece: pieces are rarely smaller.
const SMALL_CLUSTER: u64 = 64 * 1024;

type Access = FormatAccess<File>;

/// A qcow2 image with its backing chain.
pub(crate) struct Qcow2 {
    path: PathBuf,
    image: Access,
    size: u64,
    /// The largest cluster of the chain: each compressed one lies inside one such block.
    block: u64,
    /// The raw image at the end of the chain, which knows its own holes.
    base: Option<(PathBuf, Raw)>,
    unpacked: Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>,
}

/// An image and what it is based on, from the top down.
struct Chain {
    layers: Vec<(PathBuf, Format)>,
    size: u64,
    block: u64,
    base: Option<(PathBuf, Raw)>,
}

impl Qcow2 {
    pub(crate) fn open(path: &Path, backing_files: BackingFiles) -> Result<Qcow2, OpenError> {
        let Chain { layers, size, block, base } = chain(path, backing_files)?;
        let mut below: Option<Access> = None;
        for (path, format) in layers.iter().rev() {
            below = Some(open_layer(path, *format, below.take())?);
        }
        let image = below.filter(|image| image.size() == size);
        let image = image.ok_or_else(|| damaged(path, "it changed while it was opened"))?;
        Ok(Qcow2 { path: path.to_owned(), image, size, block, base, unpacked: Mutex::default() })
    }

    fn mapping(&self, offset: u64, length: u64) -> io::Result<(Mapping<'_, File>, u64)> {
        let (mapping, length) = guarded(|| self.image.get_mapping(offset, length))?;
        if length == 0 {
            let message = format!("the image maps nothing at {offset}, where its disk goes on");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok((mapping, length))
    }

    /// Calls back for each compressed part; the rest is read or zeroed.
    fn read_parts(
        &self,
        mut offset: u64,
        mut buf: &mut [u8],
        compressed: impl Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        while !buf.is_empty() {
            let (mapping, length) = self.mapping(offset, buf.len() as u64)?;
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(buf.len());
            let (part, rest) = buf.split_at_mut(length);
            match mapping {
                Mapping::Raw { storage, offset, .. } => read_stored(storage, offset, part)?,
                Mapping::Zero { .. } | Mapping::Eof { .. } => part.fill(0),
                _ => compressed(offset, part)?,
            }
            offset += length as u64;
            buf = rest;
        }
        Ok(())
    }

    /// A large compressed cluster that is wanted in pieces is unpacked once for several of them.
    fn read_compressed(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = offset - offset % self.block;
        let end = (start + self.block).min(self.size);
        let is_piece = offset + buf.len() as u64 <= end && (buf.len() as u64) < end - start;
        if self.block <= SMALL_CLUSTER || !is_piece {
            return guarded(|| self.image.read(buf, offset));
        }
        let block = self.unpacked_block(start, end)?;
        let at = usize::try_from(offset - start).map_err(io::Error::other)?;
        buf.copy_from_slice(block.get(at..at + buf.len()).ok_or(io::ErrorKind::InvalidData)?);
        Ok(())
    }

    fn unpacked_block(&self, start: u64, end: u64) -> io::Result<Arc<Vec<u8>>> {
        let kept = || self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, block)) = kept().iter().find(|(at, _)| *at == start) {
            return Ok(Arc::clone(block));
        }
        let mut block = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        self.read_parts(start, &mut block, |at, part| guarded(|| self.image.read(part, at)))?;
        let block = Arc::new(block);
        let mut kept = kept();
        kept.truncate(BLOCKS_KEPT - 1);
        kept.push_front((start, Arc::clone(&block)));
        Ok(block)
    }

    /// Where a stored range may hold data: a raw file at the end of the chain knows its own holes.
    fn stored_data(&self, storage: &File, offset: u64, length: u64) -> io::Result<Option<Range<u64>>> {
        let end = offset.saturating_add(length);
        match &self.base {
            Some((path, base)) if storage.get_filename().as_ref() == Some(path) => {
                let data = base.next_data(offset)?.map(|data| data.start..data.end.min(end));
                Ok(data.filter(|data| data.start < data.end))
            }
            _ => Ok(Some(offset..end)),
        }
    }
}

/// Unlike the library, this does not read zeroes past the end of a file that has been cut off.
fn read_stored(storage: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    let end = offset.checked_add(buf.len() as u64);
    if end.is_none_or(|end| storage.size().is_ok_and(|size| end > size)) {
        let name = storage.get_filename().unwrap_or_default();
        let message = format!("{} is cut off: what stood at {offset} is missing", name.display());
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
    }
    guarded(|| storage.read(buf, offset))
}

fn damaged(path: &Path, reason: impl Into<String>) -> OpenError {
    OpenError::Damaged { path: path.to_owned(), format: "qcow2".to_owned(), reason: reason.into() }
}

fn chain(top: &Path, backing_files: BackingFiles) -> Result<Chain, OpenError> {
    // QEMU has to read the whole chain, so it is the top that is refused.
    let unsupported = |reason| OpenError::Unsupported { path: top.to_owned(), format: "qcow2".to_owned(), reason };
    let first = read_header(top, unsupported)?;
    let mut chain = Chain {
        layers: vec![(top.to_owned(), Format::Qcow2)],
        size: first.size,
        block: first.cluster_size,
        base: None,
    };
    let (mut above, mut next) = (top.to_owned(), first.backing);
    while let Some(backing) = next.take() {
        if backing_files == BackingFiles::Refuse {
            return Err(OpenError::BackingFile { path: above, backing: backing.name });
        }
        if chain.layers.len() == CHAIN_MAX {
            return Err(damaged(top, format!("its chain of backing files is longer than {CHAIN_MAX}, or a loop")));
        }
        let path = resolve(&above, &backing.name)
            .ok_or_else(|| unsupported(format!("its backing file {:?} is no plain file", backing.name)))?;
        let file = Raw::open(&path)?;
        match backing_format(&file, &path, &backing) {
            Ok(Format::Raw) => chain.base = Some((path.clone(), file)),
            Ok(Format::Qcow2) => {
                let header = read_header(&path, unsupported)?;
                chain.block = chain.block.max(header.cluster_size);
                next = header.backing;
            }
            Err(OpenError::Unsupported { format, .. }) => {
                return Err(unsupported(format!("its backing file is a {format} image")));
            }
            Err(error) => return Err(error),
        }
        let format = if chain.base.is_some() { Format::Raw } else { Format::Qcow2 };
        chain.layers.push((path.clone(), format));
        above = path;
    }
    Ok(chain)
}

fn read_header(path: &Path, unsupported: impl Fn(String) -> OpenError) -> Result<Header, OpenError> {
    header::read(&Raw::open(path)?).map_err(|error| match error {
        HeaderError::Unsupported(reason) => unsupported(format!("{}: {reason}", path.display())),
        HeaderError::Corrupt(reason) => damaged(path, reason),
        HeaderError::Io(source) => OpenError::Io { path: path.to_owned(), source },
    })
}

/// The format the image gives its backing file; only without one the content is looked at, as QEMU does.
fn backing_format(file: &Raw, path: &Path, backing: &Backing) -> Result<Format, OpenError> {
    match backing.format.as_deref() {
        Some("qcow2") => Ok(Format::Qcow2),
        Some("raw" | "file" | "host_device") => Ok(Format::Raw),
        Some(format) => Err(OpenError::Unsupported {
            path: path.to_owned(),
            format: format.to_owned(),
            reason: "its format".to_owned(),
        }),
        None => probe(file, path),
    }
}

/// A backing file's name is relative to the image that names it. QEMU also takes URLs and JSON: those are `None`.
fn resolve(image: &Path, name: &str) -> Option<PathBuf> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    // `name:` before the first slash is a protocol.
    if name.split('/').next().is_some_and(|first| first.contains(':')) {
        return None;
    }
    Some(image.parent().unwrap_or(Path::new("")).join(name))
}

fn open_layer(path: &Path, format: Format, below: Option<Access>) -> Result<Access, OpenError> {
    let opened = guarded(|| {
        let options = imago::StorageOpenOptions::new().filename(path);
        let file = File::from_open_file(std::fs::File::open(path)?, options)?;
        match format {
            Format::Raw => RawDriver::builder(file).open(DenyImplicitOpenGate::default()).map(FormatAccess::new),
            Format::Qcow2 => {
                let builder = Driver::<File>::builder(file).backing(below);
                builder.open(DenyImplicitOpenGate::default()).map(FormatAccess::new)
            }
        }
    });
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {
            OpenError::Io { path: path.to_owned(), source: error }
        }
        io::ErrorKind::Unsupported => {
            OpenError::Unsupported { path: path.to_owned(), format: "qcow2".to_owned(), reason: error.to_string() }
        }
        _ => damaged(path, error.to_string()),
    })
}

impl DiskImage for Qcow2 {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the read reaches past the disk's end"));
        }
        self.read_parts(offset, buf, |at, part| self.read_compressed(at, part))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let mut at = offset;
        let mut found: Option<Range<u64>> = None;
        while at < self.size {
            let (mapping, length) = self.mapping(at, MAPPING_WINDOW.min(self.size - at))?;
            let length = length.min(self.size - at);
            let data = match mapping {
                Mapping::Zero { .. } | Mapping::Eof { .. } => None,
                Mapping::Raw { storage, offset, .. } => self
                    .stored_data(storage, offset, length)?
                    .map(|data| at + (data.start - offset)..at + (data.end - offset)),
                _ => Some(at..at + length),
            };
            // Clusters that follow each other on the disk but not in the file are one range.
            match (&mut found, data) {
                (None, None) => at += length,
                (None, Some(data)) => {
                    at = data.end;
                    found = Some(data);
                }
                (Some(found), Some(data)) if data.start == found.end => {
                    at = data.end;
                    found.end = data.end;
                }
                (Some(_), _) => break,
            }
        }
        Ok(found)
    }

    fn current_size(&self) -> io::Result<u64> {
        let unsupported = |reason| OpenError::Unsupported { path: self.path.clone(), format: "qcow2".into(), reason };
        read_header(&self.path, unsupported).map(|header| header.size).map_err(io::Error::other)
    }

    fn describe(&self) -> String {
        "qcow2".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_names_are_paths_beside_the_image_or_nothing() {
        let resolved = |name| resolve(Path::new("/images/top.qcow2"), name);
        assert_eq!(resolved("base.raw"), Some("/images/base.raw".into()));
        assert_eq!(resolved("/srv/base.raw"), Some("/srv/base.raw".into()));
        assert_eq!(resolved("file:../a:b/base.raw"), Some("/images/../a:b/base.raw".into()));
        assert_eq!(resolved("./a:b.raw"), Some("/images/./a:b.raw".into()));
        for url in ["nbd://host/x", "json:{}", "ssh:x", "file:nbd:x"] {
            assert_eq!(resolved(url), None, "{url}");
        }
    }
}
