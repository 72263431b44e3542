//! Opens what a restore writes to.

use std::io;
use std::path::Path;

use images::{ImageTarget, Overwrite, Staging, TargetError, TargetFormat};
use nbd_server::export::ZeroMode;
use nbd_server::{BlockingClient, ClientOptions, NbdUri};

use super::Start;
use super::plan::{Format, Step};
use crate::blocks;
use crate::qemu_nbd::{self, Server};

/// The target, and whether it may hold something of the disk already.
pub(super) fn open(
    step: &Step,
    start: Start,
    overwrite: Overwrite,
) -> Result<(Box<dyn ImageTarget>, bool), TargetError> {
    let path = Path::new(&step.location);
    let foreign = |format, options: &[&str]| {
        Ok::<_, TargetError>((Box::new(Foreign::create(path, format, options, step.size, overwrite)?) as _, false))
    };
    match (step.format, start) {
        (Format::Export, start) => {
            let cannot = |source| TargetError::Io { path: path.to_owned(), source };
            let uri: NbdUri = step.location.parse().map_err(|error| cannot(io::Error::other(error)))?;
            let export = Export::connect(&uri).map_err(cannot)?;
            let available = export.client.size();
            if available < step.size {
                return Err(TargetError::TooSmall { path: path.to_owned(), available, needed: step.size });
            }
            Ok((Box::new(export), start != Start::New))
        }
        (Format::Raw, Start::InPlace) => images::open_in_place(path, step.size).map(|target| (target, true)),
        (Format::Raw, Start::Resume) => images::resume_target(path, step.size, overwrite),
        // Only raw disks are gone on with, as the plan has made sure.
        (Format::Raw, Start::New) => {
            images::create_target(path, TargetFormat::Raw, step.size, overwrite).map(|target| (target, false))
        }
        (Format::Qcow2, _) => {
            images::create_target(path, TargetFormat::Qcow2, step.size, overwrite).map(|target| (target, false))
        }
        (Format::Vmdk, _) => foreign("vmdk", &["subformat=monolithicSparse"]),
        (Format::Vhdx, _) => foreign("vhdx", &["subformat=dynamic"]),
        // Without this the size is rounded up to what cylinders, heads and sectors make.
        (Format::Vhd, _) => foreign("vpc", &["subformat=dynamic", "force_size=on"]),
        (Format::Vdi, _) => foreign("vdi", &[]),
    }
}

/// An NBD export, written as it is.
struct Export {
    client: BlockingClient,
}

impl Export {
    fn connect(uri: &NbdUri) -> io::Result<Export> {
        let client = BlockingClient::connect(uri, &ClientOptions::default()).map_err(io::Error::other)?;
        if client.read_only() {
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the export is read-only"));
        }
        Ok(Export { client })
    }
}

impl ImageTarget for Export {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        blocks::write(&self.client, offset, data)
    }

    fn starts_zeroed(&self) -> bool {
        false
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        blocks::read(&self.client, offset, buf)
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        blocks::zero(&self.client, offset, length, ZeroMode::MayPunch)
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        self.client.flush().map_err(io::Error::other)
    }
}

/// A file in a format that QEMU writes, through a qemu-nbd of its own.
struct Foreign {
    export: Export,
    server: Server,
    staging: Staging,
}

impl Foreign {
    fn create(
        path: &Path,
        format: &'static str,
        options: &[&str],
        size: u64,
        overwrite: Overwrite,
    ) -> Result<Foreign, TargetError> {
        let staging = Staging::create(path, format, overwrite)?;
        let start = || {
            qemu_nbd::create(staging.file(), format, options, size)?;
            let args = ["--cache".into(), "writeback".into(), "--format".into(), format.into(), staging.file().into()];
            Server::start(format, &args, Export::connect)
        };
        let (server, export) = start().map_err(|source| TargetError::Io { path: path.to_owned(), source })?;
        let available = export.client.size();
        if available < size {
            return Err(TargetError::TooSmall { path: path.to_owned(), available, needed: size });
        }
        Ok(Foreign { export, server, staging })
    }
}

impl ImageTarget for Foreign {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.export.write_at(offset, data)
    }

    fn starts_zeroed(&self) -> bool {
        true
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        let Foreign { export, server, staging } = *self;
        Box::new(export).finish()?;
        // Some formats write their tables when they are closed.
        server.end()?;
        staging.publish()
    }
}
