//! qcow2 through the imago library. The header is looked at first (QEMU `docs/interop/qcow2.txt`): what imago does not
//! read is refused as unsupported, and the backing chain is opened from its end, layer by layer and bounded.

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use imago::file::File;
use imago::qcow2::Qcow2 as Driver;
use imago::raw::Raw as RawDriver;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, PermissiveImplicitOpenGate};

use crate::detect::{QCOW_MAGIC, detect};
use crate::raw::Raw;
use crate::{BackingFiles, DiskImage, Format, OpenError};

/// Longest backing chain that is followed.
const CHAIN_MAX: usize = 64;
/// Longest backing file name, as the format says.
const BACKING_NAME_MAX: u32 = 1023;
/// How far one look for data goes.
const MAPPING_WINDOW: u64 = 1 << 40;
/// Header bytes of version 3 with the compression type.
const HEADER: usize = 112;

type Layer = FormatAccess<File>;

/// A qcow2 image with its backing chain.
pub(crate) struct Qcow2 {
    path: PathBuf,
    image: Layer,
    size: u64,
}

/// What decides whether and how an image is opened.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    size: u64,
    backing: Option<String>,
    unsupported: Option<&'static str>,
}

impl Qcow2 {
    pub(crate) fn open(path: &Path, backing_files: BackingFiles) -> Result<Qcow2, OpenError> {
        let chain = chain(path, backing_files)?;
        let mut below: Option<Layer> = None;
        for (path, format) in chain.iter().rev() {
            below = Some(open_layer(path, *format, below.take())?);
        }
        let image = below.ok_or_else(|| damaged(path, "its chain is empty"))?;
        let size = image.size();
        Ok(Qcow2 { path: path.to_owned(), image, size })
    }
}

fn damaged(path: &Path, reason: impl Into<String>) -> OpenError {
    OpenError::Damaged { path: path.to_owned(), format: "qcow2".to_owned(), reason: reason.into() }
}

/// The image and what it is based on, from the top down.
fn chain(path: &Path, backing_files: BackingFiles) -> Result<Vec<(PathBuf, Format)>, OpenError> {
    let mut layers = Vec::new();
    let mut at = path.to_owned();
    let mut format = Format::Qcow2;
    loop {
        layers.push((at.clone(), format));
        if format == Format::Raw {
            return Ok(layers);
        }
        let header = read_header(&at)?;
        if let Some(reason) = header.unsupported {
            // QEMU has to read the whole chain, so it is the top that is refused.
            return Err(OpenError::Unsupported {
                path: path.to_owned(),
                format: "qcow2".to_owned(),
                reason: reason.to_owned(),
            });
        }
        let Some(backing) = header.backing else { return Ok(layers) };
        if backing_files == BackingFiles::Refuse {
            return Err(OpenError::BackingFile { path: at, backing });
        }
        if layers.len() == CHAIN_MAX {
            return Err(damaged(path, format!("its chain of backing files is longer than {CHAIN_MAX}, or a loop")));
        }
        let name = backing.strip_prefix("file:").unwrap_or(&backing);
        if name.starts_with("json:") || has_protocol(name) {
            return Err(OpenError::Unsupported {
                path: path.to_owned(),
                format: "qcow2".to_owned(),
                reason: format!("its backing file is {backing}"),
            });
        }
        at = at.parent().unwrap_or(Path::new("")).join(name);
        format = match detect(&Raw::open(&at)?, &at) {
            Ok(format) => format,
            Err(OpenError::Unsupported { format, .. }) => {
                return Err(OpenError::Unsupported {
                    path: path.to_owned(),
                    format: "qcow2".to_owned(),
                    reason: format!("its backing file is a {format} image"),
                });
            }
            Err(error) => return Err(error),
        };
    }
}

/// QEMU takes `name:` before the first slash for a protocol.
fn has_protocol(name: &str) -> bool {
    name.split('/').next().is_some_and(|first| first.contains(':'))
}

fn read_header(path: &Path) -> Result<Header, OpenError> {
    let file = Raw::open(path)?;
    let io_error = |source| OpenError::Io { path: path.to_owned(), source };
    let length = usize::try_from(file.size()).unwrap_or(usize::MAX).min(HEADER);
    let mut bytes = [0_u8; HEADER];
    file.read_at(0, bytes.get_mut(..length).unwrap_or_default()).map_err(io_error)?;
    let (mut header, name) = parse_header(&bytes, length).map_err(|reason| damaged(path, reason))?;
    if let Some(range) = name {
        let length = usize::try_from(range.end - range.start).unwrap_or(0);
        let mut name = vec![0_u8; length];
        if range.end > file.size() {
            return Err(damaged(path, "the name of its backing file lies outside of the file"));
        }
        file.read_at(range.start, &mut name).map_err(io_error)?;
        let name = String::from_utf8(name).map_err(|_| damaged(path, "the name of its backing file is not UTF-8"))?;
        header.backing = Some(name);
    }
    Ok(header)
}

/// The header's fields, and where the backing file's name stands.
fn parse_header(bytes: &[u8; HEADER], length: usize) -> Result<(Header, Option<Range<u64>>), &'static str> {
    let u32_at = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
    let u64_at = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    if length < 72 || !bytes.starts_with(&QCOW_MAGIC) {
        return Err("it has no qcow2 header");
    }
    let version = u32_at(4);
    let (name_at, name_length) = (u64_at(8), u32_at(16));
    if name_length > BACKING_NAME_MAX {
        return Err("the name of its backing file is too long");
    }
    let name_end = name_at.checked_add(name_length.into()).ok_or("the name of its backing file lies nowhere")?;
    let incompatible = if version >= 3 { u64_at(72) } else { 0 };
    let header_length = if version >= 3 { u32_at(100) } else { 72 };
    let zstd = incompatible & 8 != 0 && header_length > 104 && bytes.get(104).is_some_and(|kind| *kind != 0);
    let unsupported = match () {
        () if !(2..=3).contains(&version) => Some("its version"),
        () if u32_at(32) != 0 => Some("it is encrypted"),
        () if incompatible & 2 != 0 => Some("it is marked as corrupt"),
        () if incompatible & 4 != 0 => Some("its data is in another file"),
        () if zstd => Some("its clusters are not compressed with zlib"),
        () if incompatible & 16 != 0 => Some("it has extended L2 entries"),
        () if incompatible & !0x1f != 0 => Some("it has unknown features"),
        () => None,
    };
    let header = Header { size: u64_at(24), backing: None, unsupported };
    Ok((header, (name_length > 0 && name_at > 0).then_some(name_at..name_end)))
}

fn open_layer(path: &Path, format: Format, below: Option<Layer>) -> Result<FormatAccess<File>, OpenError> {
    let opened = guarded(|| match format {
        // Its own file is the only one the permissive gate is asked for.
        Format::Raw => {
            RawDriver::<File>::builder_path(path).open(PermissiveImplicitOpenGate::default()).map(FormatAccess::new)
        }
        Format::Qcow2 => {
            let file = std::fs::File::open(path)?;
            let options = imago::StorageOpenOptions::new().filename(path);
            let file = File::from_open_file(file, options)?;
            Driver::<File>::builder(file).backing(below).open(DenyImplicitOpenGate::default()).map(FormatAccess::new)
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

/// Runs the library on hostile input: a panic in it is an error of this image.
fn guarded<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(io::Error::other("the image cannot be made sense of")))
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
        guarded(|| self.image.read(buf, offset))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let mut at = offset;
        while at < self.size {
            let window = MAPPING_WINDOW.min(self.size - at);
            let (data, length) = guarded(|| {
                let (mapping, length) = self.image.get_mapping(at, window)?;
                Ok((!matches!(mapping, Mapping::Zero { .. } | Mapping::Eof { .. }), length))
            })?;
            let end = at.saturating_add(length).min(self.size);
            if end <= at {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the image maps nothing where its disk goes on",
                ));
            }
            if data {
                return Ok(Some(at..end));
            }
            at = end;
        }
        Ok(None)
    }

    fn current_size(&self) -> io::Result<u64> {
        read_header(&self.path).map(|header| header.size).map_err(io::Error::other)
    }

    fn describe(&self) -> String {
        "qcow2".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(change: impl FnOnce(&mut [u8])) -> Result<Header, &'static str> {
        let mut bytes = [0_u8; HEADER];
        bytes[..4].copy_from_slice(&QCOW_MAGIC);
        bytes[7] = 3;
        bytes[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        bytes[103] = 112;
        change(&mut bytes);
        parse_header(&bytes, HEADER).map(|(header, _)| header)
    }

    #[test]
    fn what_the_library_does_not_read_is_seen_in_the_header() {
        let reason = |at: usize, value: u8| header(|bytes| bytes[at] = value).unwrap().unsupported;
        assert_eq!(header(|_| ()).unwrap(), Header { size: 1 << 30, backing: None, unsupported: None });
        assert_eq!(reason(7, 4), Some("its version"));
        assert_eq!(reason(35, 2), Some("it is encrypted"));
        assert_eq!(reason(79, 1), None);
        assert_eq!(reason(79, 4), Some("its data is in another file"));
        assert_eq!(reason(79, 16), Some("it has extended L2 entries"));
        assert_eq!(reason(72, 1), Some("it has unknown features"));
        let zstd = |bytes: &mut [u8]| {
            bytes[79] = 8;
            bytes[104] = 1;
        };
        assert_eq!(header(zstd).unwrap().unsupported, Some("its clusters are not compressed with zlib"));
    }

    #[test]
    fn a_backing_name_of_absurd_length_is_damage() {
        assert!(header(|bytes| bytes[16] = 1).is_err());
        assert!(has_protocol("nbd://host/x") && has_protocol("ssh:x") && !has_protocol("dir/a:b.raw"));
    }
}
