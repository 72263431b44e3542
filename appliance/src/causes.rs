//! From the libraries' errors to problems: which kind each is, on which object, and what to do about it.

use std::io::ErrorKind;
use std::path::Path;

use blockstore::error::ReadError;
use blockstore::overlay::OverlayError;
use blockstore::{
    BackupError, CollectError, InitError, KeyError, LeaseError, OpenError, RepairError, RestoreError, VerifyError,
};
use images::TargetError;
use nbd_server::tls::pki::PkiError;
use nbd_server::{ListenError, TlsError};

use crate::problem::{Kind, Problem};

/// What to do about a full repository.
const MAKE_ROOM: &str = "make room there and try again; what is stored already is whole";
/// What to do about damage.
const VERIFY: &str = "`lifeboat verify --read-data` names all that is damaged; other recovery points may be whole";

impl Problem {
    /// Reading what the store keeps.
    pub fn from_read(title: &str, error: &ReadError) -> Problem {
        match error {
            ReadError::Damaged { .. } | ReadError::CorruptChunk { .. } | ReadError::MissingChunk { .. } => {
                Problem::because(Kind::Damage, title, error).hint(VERIFY)
            }
            // An object that is shorter than it was, or gone.
            ReadError::Io { source, .. } if matches!(source.kind(), ErrorKind::UnexpectedEof | ErrorKind::NotFound) => {
                Problem::because(Kind::Damage, title, error).hint(VERIFY)
            }
            ReadError::NoSuchPoint { .. } | ReadError::NoSuchDisk { .. } => {
                Problem::because(Kind::NotFound, title, error)
            }
            ReadError::OutOfRange { .. } => Problem::because(Kind::Usage, title, error),
            ReadError::Io { .. } | ReadError::Cancelled => Problem::failed(title, error),
        }
    }

    /// Backing up a machine.
    pub fn from_backup(machine: &str, error: &BackupError) -> Problem {
        let title = format!("cannot back up machine {machine}");
        let problem = Problem::failed(&title, error);
        match error {
            BackupError::Source { .. } => problem.hint("no recovery point was made; see to the source and try again"),
            BackupError::SourceChanged { .. } => {
                problem.hint("no recovery point was made; back it up again when nobody resizes it")
            }
            BackupError::SourceDiffers { .. } => problem.hint(
                "no recovery point was made; back up a snapshot, or the machine when it is off, and see to the disk if nobody writes to it",
            ),
            BackupError::Unreadable { source, .. } => Problem::from_read(&format!("{title}: {error}"), source),
            BackupError::NoSpace { .. } => problem.hint(MAKE_ROOM),
            BackupError::Index(cause) => Problem::from_read(&format!("{title}: {error}"), cause),
            BackupError::Disk { .. } => problem.with_kind(Kind::Usage),
            BackupError::Lease(LeaseError::Lapsed { .. }) => {
                problem.hint("no recovery point was made; what is stored is found again, so the next backup is short")
            }
            BackupError::Cancelled => {
                Problem::new(Kind::Failed, format!("the backup of machine {machine} was cancelled"))
                    .hint("no recovery point was made")
            }
            BackupError::Storage { .. }
            | BackupError::Point(_)
            | BackupError::Lease(_)
            | BackupError::Randomness(_)
            | BackupError::Threads(_)
            | BackupError::Failed => problem,
        }
    }

    /// Listening for NBD clients.
    pub fn from_listen(error: &ListenError) -> Problem {
        let title = "cannot serve over NBD";
        match error {
            ListenError::Syntax(_) | ListenError::PathTooLong { .. } | ListenError::NotASocket { .. } => {
                Problem::because(Kind::Usage, title, error)
            }
            ListenError::NotLoopback(_) => Problem::because(Kind::Refused, title, error)
                .hint("listen on unix:PATH or tcp:127.0.0.1:PORT, serve with TLS (--tls-dir), or give --insecure-tcp"),
            ListenError::AddressInUse(_) => Problem::because(Kind::Refused, title, error)
                .hint("choose another path or port; port 0 takes a free one"),
            ListenError::Io { .. } => Problem::failed(title, error),
        }
    }

    /// Opening or making an overlay.
    pub fn from_overlay(title: &str, error: &OverlayError) -> Problem {
        match error {
            OverlayError::Busy { .. } => {
                Problem::because(Kind::Refused, title, error).hint("another process serves it; stop that one first")
            }
            OverlayError::Mismatch { .. } | OverlayError::Exists { .. } => {
                Problem::because(Kind::Refused, title, error).hint("name another folder for this overlay")
            }
            OverlayError::Damaged { .. } => Problem::because(Kind::Damage, title, error),
            OverlayError::NoSpace { .. } => Problem::failed(title, error).hint("make room on its file system"),
            OverlayError::Base(cause) => Problem::from_read(title, cause),
            OverlayError::Missing { .. } => Problem::because(Kind::NotFound, title, error),
            OverlayError::Poisoned { .. }
            | OverlayError::Io { .. }
            | OverlayError::BaseSize { .. }
            | OverlayError::Limits
            | OverlayError::Unsupported { .. }
            | OverlayError::OutOfRange { .. } => Problem::failed(title, error),
        }
    }

    /// Opening an image to back it up.
    pub fn from_image(title: &str, error: &images::OpenError) -> Problem {
        match error {
            images::OpenError::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
                Problem::because(Kind::NotFound, title, error)
            }
            images::OpenError::NotAnImage { .. } => Problem::because(Kind::Usage, title, error),
            images::OpenError::BackingFile { .. } => Problem::because(Kind::Refused, title, error),
            images::OpenError::Uncertain { .. } => Problem::because(Kind::Refused, title, error)
                .hint("give --format raw if it is the disk of a guest; if it was made as an image, --format qcow2 or a name with its ending"),
            images::OpenError::Io { .. }
            | images::OpenError::Unsupported { .. }
            | images::OpenError::Damaged { .. } => Problem::failed(title, error),
        }
    }

    /// Reading the certificates for TLS.
    pub fn from_tls(dir: &Path, error: &TlsError) -> Problem {
        let title = format!("cannot use the certificates in {}", dir.display());
        match error {
            TlsError::Read { source, .. } if source.kind() == ErrorKind::NotFound => {
                Problem::because(Kind::NotFound, title, error).hint(
                    "--tls-dir needs ca-cert.pem, server-cert.pem and server-key.pem; `lifeboat tls DIR --host NAME` makes them",
                )
            }
            TlsError::Read { .. } => Problem::failed(title, error),
            TlsError::Pem { .. } | TlsError::Certificate { .. } | TlsError::Authority { .. } => {
                Problem::because(Kind::Usage, title, error)
            }
            TlsError::HostName { .. } => Problem::because(Kind::Usage, title, error),
        }
    }

    /// Making certificates.
    pub fn from_pki(dir: &Path, error: &PkiError) -> Problem {
        let title = format!("cannot make certificates in {}", dir.display());
        match error {
            PkiError::Exists(_) => Problem::because(Kind::Refused, title, error),
            PkiError::HostExists(_) => Problem::because(Kind::Refused, title, error)
                .hint("remove its folder first if it is to have new certificates; the old ones stay good"),
            PkiError::NoAuthority(_) | PkiError::HostName(_) => Problem::because(Kind::Usage, title, error),
            PkiError::Io { .. } | PkiError::Certificate(_) => Problem::failed(title, error),
        }
    }

    /// Making the target of a restore.
    pub fn from_target(what: &str, error: &TargetError) -> Problem {
        let title = format!("cannot restore {what}");
        match error {
            TargetError::Exists { .. } => Problem::because(Kind::Refused, title, error).hint("--overwrite replaces it"),
            TargetError::TooSmall { .. } => Problem::because(Kind::Refused, title, error),
            TargetError::Unfit { .. } => Problem::because(Kind::Usage, title, error),
            TargetError::Io { .. } => Problem::failed(title, error),
        }
    }

    /// Making a repository.
    pub fn from_init(location: &Path, error: &InitError) -> Problem {
        let title = format!("cannot make repository {}", location.display());
        match error {
            InitError::Exists => {
                Problem::because(Kind::Refused, title, error).hint("use it as it is, or name another folder")
            }
            InitError::NotEmpty => {
                Problem::because(Kind::Refused, title, error).hint("name a folder that is empty or does not exist")
            }
            InitError::ChunkSize(_) | InitError::WeakSecret => Problem::because(Kind::Usage, title, error),
            InitError::Io { .. } | InitError::Open(_) => Problem::failed(title, error),
        }
    }

    /// Opening a repository.
    pub fn from_open(location: &Path, error: &OpenError) -> Problem {
        let title = format!("cannot open repository {}", location.display());
        match error {
            OpenError::NotARepository => {
                Problem::because(Kind::NotFound, title, error).hint("check --repo, or make one with `lifeboat init`")
            }
            OpenError::UnknownVersion(_) => Problem::because(Kind::Refused, title, error)
                .hint("use the version of lifeboat that made it, or a later one"),
            OpenError::Damaged { .. } => Problem::because(Kind::Damage, title, error)
                .hint("put the object back from a copy of the repository; nothing was changed"),
            OpenError::NoKeySlot => Problem::because(Kind::Damage, title, error)
                .hint("put an object of `keys/` back from a copy of the repository; without one its data is lost"),
            OpenError::SecretNeeded => Problem::because(Kind::Refused, title, error)
                .hint("set LIFEBOAT_PASSPHRASE, or give --passphrase-file or --key-file"),
            OpenError::WrongKey => Problem::because(Kind::Refused, title, error)
                .hint("check LIFEBOAT_PASSPHRASE, --passphrase-file or --key-file"),
            OpenError::Io { .. } => Problem::failed(title, error),
            OpenError::Index(cause) => Problem::from_read(&title, cause),
        }
    }

    /// Listing or changing key slots.
    pub fn from_keys(title: &str, error: &KeyError) -> Problem {
        match error {
            KeyError::NotEncrypted => Problem::because(Kind::Refused, title, error),
            KeyError::WeakSecret | KeyError::Label { .. } => Problem::because(Kind::Usage, title, error),
            KeyError::Known { .. } => Problem::because(Kind::Refused, title, error).hint("give another one"),
            KeyError::NoSuchSlot { .. } => {
                Problem::because(Kind::NotFound, title, error).hint("`lifeboat key list` lists them")
            }
            KeyError::LastSlot { .. } => Problem::because(Kind::Refused, title, error)
                .hint("add another one first with `lifeboat key add`; damaged slots do not count"),
            KeyError::Busy(_) => Problem::because(Kind::Refused, title, error).hint("try again in a moment"),
            KeyError::Unsound { .. } => {
                Problem::failed(title, error).hint("check the repository's storage; the other keys open it as before")
            }
            KeyError::Io { .. } => Problem::failed(title, error),
        }
    }

    /// Restoring a disk.
    pub fn from_restore(what: &str, error: &RestoreError) -> Problem {
        let title = format!("cannot restore {what}");
        match error {
            RestoreError::Read { offset, source } => {
                Problem::from_read(&format!("{title}: at offset {offset}"), source)
            }
            RestoreError::Target { .. } | RestoreError::Threads(_) => Problem::failed(title, error),
            RestoreError::Cancelled => Problem::new(Kind::Failed, format!("the restore of {what} was cancelled")),
        }
    }

    /// Freeing space.
    pub fn from_collect(error: &CollectError) -> Problem {
        let title = "cannot collect";
        match error {
            CollectError::Read(cause) => Problem::from_read(title, cause),
            CollectError::Write { .. } => {
                Problem::failed(title, error).hint("what points need is untouched; the next collect goes on from here")
            }
            CollectError::Lease(_) => Problem::failed(title, error),
            CollectError::InUse { .. } => Problem::because(Kind::Refused, title, error)
                .hint("wait for it to end; if it is on a host that is gone, its lease ends by itself within 15 minutes"),
            CollectError::Blocked(_) => Problem::because(Kind::Damage, title, error).hint(
                "`lifeboat verify` says more; dropping a point that is beyond repair with `lifeboat forget` frees the rest; \
                 a lease that cannot be read may be deleted when nobody works in the repository",
            ),
            CollectError::NoSuchPack { .. } => Problem::because(Kind::NotFound, title, error)
                .hint("`lifeboat collect --explain` lists the packs that are not needed in full"),
            CollectError::Ambiguous { .. } => Problem::because(Kind::Usage, title, error).hint("give more digits"),
            CollectError::Cancelled => Problem::new(Kind::Failed, "the collect was cancelled")
                .hint("what points need is untouched; the next collect goes on from here"),
        }
    }

    /// Repairing the repository.
    pub fn from_repair(error: &RepairError) -> Problem {
        let title = "cannot repair the repository";
        match error {
            RepairError::Verify(error) => Problem::from_verify(error),
            RepairError::Copy(OpenError::NotARepository) => Problem::because(Kind::NotFound, title, error)
                .hint("--copy names the folder of a copy of this repository"),
            RepairError::NoSuchDisk { known, .. } => Problem::because(Kind::Usage, title, error).hint(format!(
                "the disks there are: {}; give an image without a name to have it tried for every disk",
                known.join(", ")
            )),
            RepairError::OtherRepository => Problem::because(Kind::Refused, title, error)
                .hint("--copy takes copies of this repository only; give what another one restores as --source"),
            RepairError::Write { source, .. } if source.kind() == ErrorKind::StorageFull => {
                Problem::failed(title, error).hint(MAKE_ROOM)
            }
            RepairError::Lease(_) | RepairError::Copy(_) | RepairError::Image { .. } | RepairError::Write { .. } => {
                Problem::failed(title, error)
            }
        }
    }

    /// Verifying the repository.
    pub fn from_verify(error: &VerifyError) -> Problem {
        match error {
            VerifyError::Read(cause) => Problem::from_read("cannot verify the repository", cause),
            VerifyError::Cancelled => Problem::new(Kind::Failed, "the verification was cancelled"),
        }
    }
}
