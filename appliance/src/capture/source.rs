//! The sources of a backup: image files, block devices and NBD exports.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use blockstore::Source;
use nbd_server::export::ExtentKind;
use nbd_server::{BlockingClient, ClientOptions, NbdUri};

use super::{SourceSpec, check_name};
use crate::blocks;
use crate::exports::ImageSource;
use crate::problem::Problem;
use crate::qemu_nbd;

/// Bytes whose allocation is asked for at a time.
const STATUS_WINDOW: u64 = 1 << 30;
/// Largest read sent to a server that names no maximum.
const READ_MAX: usize = 4 << 20;

/// Sources from the command line: `SOURCE` or `NAME=SOURCE`; the ones without a name are `disk0`, `disk1`...
pub fn parse_sources(sources: &[String]) -> Result<Vec<SourceSpec>, Problem> {
    let mut specs = Vec::with_capacity(sources.len());
    for (number, source) in sources.iter().enumerate() {
        let (disk, location) = parse_source(source)?;
        specs.push(SourceSpec { disk: disk.unwrap_or_else(|| format!("disk{number}")), location });
    }
    Ok(specs)
}

/// The disk that a source is named for, if it is, and where it is.
pub fn parse_source(source: &str) -> Result<(Option<String>, String), Problem> {
    let named = source.split_once('=').filter(|(name, _)| check_name("disk", name).is_ok() && !is_uri(source));
    let (disk, location) = match named {
        // A file whose own name has an equals sign is meant as it stands.
        Some(_) if Path::new(source).exists() => (None, source),
        Some((name, location)) => (Some(name.to_owned()), location),
        None => (None, source),
    };
    if location.is_empty() {
        return Err(Problem::usage(format!("source `{source}` names no file")));
    }
    let location = if is_uri(location) {
        absolute_certificates(location)?
    } else {
        refuse_live(location)?;
        let path = std::path::absolute(location)
            .map_err(|error| Problem::failed(format!("cannot back up {location}"), &error))?;
        path.to_str().ok_or_else(|| Problem::usage(format!("the path of {} is not UTF-8", path.display())))?.to_owned()
    };
    Ok((disk, location))
}

/// Whether this is the URI of an NBD export.
pub fn is_uri(text: &str) -> bool {
    ["nbd://", "nbd+unix://", "nbds://", "nbds+unix://"].iter().any(|scheme| text.starts_with(scheme))
}

/// The folder of certificates is this process's, and another may do the work.
pub(crate) fn absolute_certificates(location: &str) -> Result<String, Problem> {
    // What cannot be read is refused where it is used.
    let Ok(mut uri) = location.parse::<NbdUri>() else { return Ok(location.to_owned()) };
    let Some(folder) = uri.tls.as_mut().and_then(|tls| tls.certificates.as_mut()) else {
        return Ok(location.to_owned());
    };
    *folder =
        std::path::absolute(&folder).map_err(|error| Problem::failed(format!("cannot back up {location}"), &error))?;
    Ok(uri.to_string())
}

/// Live machines are not disks.
fn refuse_live(location: &str) -> Result<(), Problem> {
    for (scheme, what) in [("libvirt:", "a libvirt domain"), ("qmp:", "a running QEMU")] {
        if location.starts_with(scheme) && !Path::new(location).exists() {
            return Err(Problem::usage(format!("cannot back up {what} by its name ({location})"))
                .hint("a libvirt domain is backed up by itself: lifeboat backup libvirt:DOMAIN; else name disk images or NBD URIs"));
        }
    }
    Ok(())
}

/// Opens a source whose format is known, whatever it is; `None` for an export.
pub fn open_known(spec: &SourceSpec, format: Option<&str>) -> Result<Box<dyn Source>, Problem> {
    match format {
        None | Some("raw" | "qcow2") => open(spec, format),
        // The others cannot be taken for anything else.
        Some(_) => open(spec, None),
    }
}

/// Opens a source. A format that the image library does not read goes through qemu-nbd.
pub fn open(spec: &SourceSpec, format: Option<&str>) -> Result<Box<dyn Source>, Problem> {
    let cannot = |error: &(dyn std::error::Error + 'static)| {
        Problem::failed(format!("cannot open disk {} from {}", spec.disk, spec.location), error)
    };
    if is_uri(&spec.location) {
        let uri: NbdUri = spec.location.parse().map_err(|error| {
            Problem::usage(format!("`{}` is not an NBD URI that can be read: {error}", spec.location))
        })?;
        return Ok(Box::new(NbdSource::connect(&uri).map_err(|error| cannot(&error))?));
    }
    let path = Path::new(&spec.location);
    let options = images::OpenOptions {
        format: match format {
            None => None,
            Some("raw") => Some(images::Format::Raw),
            Some("qcow2") => Some(images::Format::Qcow2),
            Some(other) => {
                return Err(Problem::usage(format!("cannot read images of format `{other}`")).hint("use raw or qcow2"));
            }
        },
        backing_files: images::BackingFiles::Follow,
    };
    match images::open(path, &options) {
        Ok(image) => Ok(Box::new(ImageSource(image))),
        Err(images::OpenError::Unsupported { format, reason, .. }) => {
            tracing::info!(image = %path.display(), %format, %reason, "read through qemu-nbd");
            Ok(Box::new(qemu_nbd::open(path, &format).map_err(|error| cannot(&error))?))
        }
        Err(error) => Err(Problem::from_image(&format!("cannot back up disk {}", spec.disk), &error)),
    }
}

fn connect(uri: &NbdUri) -> io::Result<BlockingClient> {
    BlockingClient::connect(uri, &ClientOptions::default()).map_err(io::Error::other)
}

/// An NBD export.
pub struct NbdSource {
    uri: NbdUri,
    size: u64,
    /// Connections nobody reads through at the moment.
    idle: Mutex<Vec<BlockingClient>>,
}

impl NbdSource {
    /// Connects once, to learn the size; more connections follow as more threads read.
    pub fn connect(uri: &NbdUri) -> io::Result<NbdSource> {
        let client = connect(uri)?;
        Ok(NbdSource { uri: uri.clone(), size: client.size(), idle: Mutex::new(vec![client]) })
    }

    fn with_client<T>(&self, work: impl FnOnce(&BlockingClient) -> io::Result<T>) -> io::Result<T> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let client = match idle {
            Some(client) => client,
            None => connect(&self.uri)?,
        };
        // A connection that failed is not used again.
        let result = work(&client)?;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(client);
        Ok(result)
    }
}

impl Source for NbdSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.with_client(|client| {
            let mut at = offset;
            for part in buf.chunks_mut(READ_MAX) {
                blocks::read(client, at, part)?;
                at += part.len() as u64;
            }
            Ok(())
        })
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let mut at = offset;
        while at < self.size {
            let window = STATUS_WINDOW.min(self.size - at);
            let extents = self.with_client(|client| client.block_status(at, window).map_err(io::Error::other))?;
            for extent in extents {
                let end = (at + extent.length).min(self.size);
                if extent.kind == ExtentKind::Data && end > at {
                    return Ok(Some(at..end));
                }
                at = end;
            }
        }
        Ok(None)
    }

    fn current_size(&self) -> io::Result<u64> {
        connect(&self.uri).map(|client| client.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(sources: &[&str]) -> Vec<(String, String)> {
        let sources: Vec<String> = sources.iter().map(|source| (*source).to_owned()).collect();
        parse_sources(&sources).unwrap().into_iter().map(|spec| (spec.disk, spec.location)).collect()
    }

    #[test]
    fn disks_are_named_or_numbered_by_their_place() {
        let pair = |disk: &str, location: &str| (disk.to_owned(), location.to_owned());
        assert_eq!(
            parsed(&["/a.raw", "data=/b.qcow2", "nbd://h/x?a=b", "c=nbd+unix:///d?socket=/s"]),
            [
                pair("disk0", "/a.raw"),
                pair("data", "/b.qcow2"),
                pair("disk2", "nbd://h/x?a=b"),
                pair("c", "nbd+unix:///d?socket=/s")
            ]
        );
        assert!(parse_sources(&["x=".to_owned()]).is_err());
        assert!(parse_sources(&["libvirt:web01".to_owned()]).is_err());
    }
}
