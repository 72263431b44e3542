//! Making and opening a repository: configuration and key slots. Specification: docs/format/repository.md, keys.md

use std::io;
use std::sync::Arc;

use tracing::warn;

use super::Repository;
use super::slots::new_slot;
use crate::error::ReadError;
use crate::format::config::{Config, is_chunk_size};
use crate::format::slot::{SLOT_LEN, Slot};
use crate::format::{Encryption, FormatError};
use crate::id::{RepositoryId, SlotId};
use crate::index::Index;
use crate::keys::{Keyring, MasterKey, Protection, Secret, Unwrapped, check_slot, random};
use crate::pack::damaged::DamagedPacks;
use crate::pack::fetch::Fetcher;
use crate::storage::{Object, ObjectKind, Storage};

/// More than any layout of the configuration will need.
const CONFIG_MAX: u64 = 64 << 10;
/// Chunk cache of a repository just made.
const INIT_CACHE_BYTES: u64 = 64 << 20;

/// Why a repository cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is one.
    #[error("there is a repository already")]
    Exists,
    /// There is something else.
    #[error("the place is not empty")]
    NotEmpty,
    /// No power of two from 16 KiB to 4 MiB.
    #[error("chunk size {0} is not a power of two from 16 KiB to 4 MiB")]
    ChunkSize(u32),
    /// An empty passphrase, or a key file that is too short or too long.
    #[error("the secret is empty, or the key file does not have 32 to 65536 bytes")]
    WeakSecret,
    /// Storage or the system's randomness failed.
    #[error("cannot write {object}")]
    Io {
        /// What could not be written.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// What was just made does not open.
    #[error("the new repository does not open")]
    Open(#[source] OpenError),
}

/// Why a repository cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No configuration there.
    #[error("there is no repository")]
    NotARepository,
    /// Made by a later program.
    #[error("the repository was made by a later version of this program")]
    UnknownVersion(#[source] FormatError),
    /// An object it needs is damaged.
    #[error("{object} is damaged")]
    Damaged {
        /// Which object.
        object: Object,
        /// What is wrong with it.
        source: FormatError,
    },
    /// It is encrypted, and nothing holds its keys.
    #[error("it is encrypted and no key slot is left in `keys/`: nothing opens it")]
    NoKeySlot,
    /// It is encrypted and no secret was given.
    #[error("the repository is encrypted: a passphrase or key file is needed")]
    SecretNeeded,
    /// The secret opens no key slot.
    #[error("wrong passphrase or key file")]
    WrongKey,
    /// Storage failed.
    #[error("cannot read {object}")]
    Io {
        /// What could not be read.
        object: String,
        /// Why.
        source: io::Error,
    },
    /// The index cannot be read.
    #[error("cannot open the index")]
    Index(#[source] ReadError),
}

impl OpenError {
    fn io(object: &Object, source: io::Error) -> OpenError {
        OpenError::Io { object: object.to_string(), source }
    }

    fn format(object: Object, source: FormatError) -> OpenError {
        match source {
            FormatError::UnknownVersion { .. } | FormatError::UnknownFeatures { .. } => {
                OpenError::UnknownVersion(source)
            }
            source => OpenError::Damaged { object, source },
        }
    }
}

impl Repository {
    /// Makes a repository where nothing is yet, and opens it.
    ///
    /// Order: (1) the key slot, (2) the configuration; of several at once, one does both and the others get
    /// [`InitError::Exists`]. From 2 on the repository exists; a crash before leaves a slot
    /// that the next init removes. The other way round a crash would leave a repository without a key.
    pub fn init(storage: Arc<dyn Storage>, chunk_size: u32, protection: Protection) -> Result<Repository, InitError> {
        if !is_chunk_size(chunk_size) {
            return Err(InitError::ChunkSize(chunk_size));
        }
        let io = |object: &str| {
            let object = object.to_owned();
            move |source| InitError::Io { object, source }
        };
        let exists = || match storage.len(&Object::Config) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io("the repository")(error)),
        };
        if exists()? {
            return Err(InitError::Exists);
        }
        if !storage.is_vacant().map_err(io("the repository"))? {
            // Perhaps because another init was faster.
            return Err(if exists()? { InitError::Exists } else { InitError::NotEmpty });
        }
        let encryption = match protection {
            Protection::None => Encryption::None,
            Protection::Secret(_) => Encryption::Aes256Gcm,
        };
        let repository = RepositoryId(random().map_err(io("a random id"))?);
        let config = Config { repository, chunk_size, encryption };
        let slot = match &protection {
            Protection::None => None,
            Protection::Secret(secret) => {
                let slot = first_slot(&config, secret)?;
                Some((Object::KeySlot(slot.id), slot.encode()))
            }
        };
        let slot = slot.as_ref().map(|(object, bytes)| (object, &bytes[..]));
        storage.init(slot, &config.encode()).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => InitError::Exists,
            _ => io("the repository's configuration and key slot")(source),
        })?;
        let secret = match &protection {
            Protection::None => None,
            Protection::Secret(secret) => Some(secret),
        };
        Repository::open(storage, secret, INIT_CACHE_BYTES).map_err(InitError::Open)
    }

    /// Opens a repository. `cache_bytes` bounds the chunk cache all its disks share.
    pub fn open(storage: Arc<dyn Storage>, secret: Option<&Secret>, cache_bytes: u64) -> Result<Repository, OpenError> {
        let config = read_config(&*storage)?;
        let slots = storage.list(ObjectKind::KeySlot);
        let slots = slots.map_err(|source| OpenError::Io { object: "key slots".to_owned(), source })?;
        let mut slots: Vec<SlotId> = slots
            .into_iter()
            .filter_map(|listed| match listed.object {
                Object::KeySlot(id) => Some(id),
                _ => None,
            })
            .collect();
        slots.sort_unstable();
        let (keyring, opened_by) = match (config.encryption, secret) {
            (Encryption::None, _) if slots.is_empty() => (Keyring::plain(), None),
            (Encryption::None, _) => {
                let source = FormatError::Field { field: "encryption" };
                return Err(OpenError::Damaged { object: Object::Config, source });
            }
            (Encryption::Aes256Gcm, None) => return Err(OpenError::SecretNeeded),
            (Encryption::Aes256Gcm, Some(secret)) => {
                let (slot, master) = unlock(&*storage, &config, &slots, secret)?;
                (Keyring::derive(&master), Some(slot))
            }
        };
        let index = Index::open(storage.clone(), config.repository).map_err(OpenError::Index)?;
        let damaged = DamagedPacks::default();
        let fetcher = Fetcher { storage, keyring: Arc::new(keyring), index: Arc::new(index), config, damaged };
        Ok(Repository::of(fetcher, cache_bytes, opened_by))
    }
}

/// Reads the configuration.
pub(crate) fn read_config(storage: &dyn Storage) -> Result<Config, OpenError> {
    let object = Object::Config;
    let bytes = storage.get(&object, CONFIG_MAX).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => OpenError::NotARepository,
        io::ErrorKind::FileTooLarge => {
            OpenError::Damaged { object, source: FormatError::Length { part: "the repository's configuration" } }
        }
        _ => OpenError::io(&object, source),
    })?;
    Config::decode(&bytes).map_err(|source| OpenError::format(object, source))
}

/// Reads a slot and checks that it belongs here.
pub(crate) fn read_slot(storage: &dyn Storage, config: &Config, id: SlotId) -> Result<Slot, OpenError> {
    let object = Object::KeySlot(id);
    let bytes = storage.get(&object, SLOT_LEN as u64).map_err(|source| match source.kind() {
        io::ErrorKind::FileTooLarge => {
            OpenError::Damaged { object, source: FormatError::Length { part: "the key slot" } }
        }
        _ => OpenError::io(&object, source),
    })?;
    let slot = Slot::decode(&bytes).and_then(|slot| check_slot(&slot, id, config).map(|()| slot));
    slot.map_err(|source| OpenError::format(object, source))
}

/// Tries the secret on every slot. A damaged slot is an error only if no other one was there to try.
fn unlock(
    storage: &dyn Storage,
    config: &Config,
    slots: &[SlotId],
    secret: &Secret,
) -> Result<(SlotId, MasterKey), OpenError> {
    let mut failure = None;
    let mut tried = false;
    for id in slots {
        let object = Object::KeySlot(*id);
        match read_slot(storage, config, *id) {
            Ok(slot) => match MasterKey::unwrap(config, &slot, secret) {
                Unwrapped::Open(master) => return Ok((*id, master)),
                Unwrapped::Wrong => tried = true,
                Unwrapped::Changed => {
                    warn!(%object, "the secret is right, but the slot or the configuration was changed");
                    return Err(OpenError::Damaged { object, source: FormatError::Seal });
                }
            },
            Err(error) => {
                warn!(%object, error = %error, "key slot skipped");
                failure.get_or_insert(error);
            }
        }
    }
    match failure {
        _ if tried => Err(OpenError::WrongKey),
        Some(failure) => Err(failure),
        None => Err(OpenError::NoKeySlot),
    }
}

/// The slot of a new repository's first secret, around a new master key.
fn first_slot(config: &Config, secret: &Secret) -> Result<Slot, InitError> {
    if !secret.is_usable() {
        return Err(InitError::WeakSecret);
    }
    let random_error = |source| InitError::Io { object: "random keys".to_owned(), source };
    let master = MasterKey::new(random().map_err(random_error)?);
    let slot = new_slot(config, &master, secret, "").map_err(random_error)?;
    slot.ok_or(InitError::WeakSecret) // only an over-long passphrase (4 GiB) fails
}
