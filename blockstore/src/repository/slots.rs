//! Key slots: list, add, remove, rotate. No pack is touched. Specification: docs/format/keys.md

use std::io;
use std::sync::{MutexGuard, PoisonError};
use std::time::SystemTime;

use tracing::info;

use super::Repository;
use super::open::{OpenError, read_slot};
use crate::format::FormatError;
use crate::format::config::Config;
use crate::format::slot::{SLOT_LEN, Slot, Stretch};
use crate::id::SlotId;
use crate::keys::{MasterKey, Secret, Unwrapped, random};
use crate::storage::{Object, ObjectKind};

/// Longest label in bytes.
const LABEL_MAX: usize = 64;

/// What opens a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// A passphrase, stretched by Argon2id.
    Passphrase,
    /// A key file.
    KeyFile,
}

/// What is known of a slot without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    /// Well-formed.
    Intact {
        /// What opens it.
        kind: SlotKind,
        /// When it was made, seconds since 1970 UTC.
        created_unix_s: u64,
        /// A name for people.
        label: String,
    },
    /// Nothing opens it.
    Damaged(FormatError),
}

/// A key slot as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySlot {
    /// Its name.
    pub id: SlotId,
    /// Whether it is whole.
    pub state: SlotState,
    /// Whether its secret opened this repository.
    pub in_use: bool,
}

/// What a rotation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotated {
    /// The new secret's slot.
    pub added: SlotId,
    /// The slot that is gone.
    pub removed: SlotId,
}

/// Why key slots cannot be listed or changed.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There are no keys.
    #[error("the repository is not encrypted: it has no keys")]
    NotEncrypted,
    /// An empty passphrase, or a key file that is too short or too long.
    #[error("the new passphrase is empty, or the new key file does not have 32 to 65536 bytes")]
    WeakSecret,
    /// A label that does not fit.
    #[error("label {label:?} is longer than {LABEL_MAX} bytes or holds control characters")]
    Label {
        /// The label.
        label: String,
    },
    /// The secret has a slot already.
    #[error("this passphrase or key file opens slot {slot} already")]
    Known {
        /// That slot.
        slot: SlotId,
    },
    /// There is no such slot.
    #[error("there is no key slot {slot}")]
    NoSuchSlot {
        /// The slot asked for.
        slot: SlotId,
    },
    /// Without it nothing would open the repository.
    #[error("slot {slot} is the last that can open the repository")]
    LastSlot {
        /// The slot asked for.
        slot: SlotId,
    },
    /// The new slot was written and is not what was written.
    #[error("{object} was written and does not read back")]
    Unsound {
        /// The slot.
        object: Object,
    },
    /// Another process holds the repository's lock.
    #[error("another process is changing the repository")]
    Busy(#[source] io::Error),
    /// Storage or the system's randomness failed.
    #[error("cannot read or write {object}")]
    Io {
        /// What could not be read or written.
        object: String,
        /// Why.
        source: io::Error,
    },
}

/// A slot's name and, if it is whole, what it holds.
type ReadSlot = (SlotId, Result<Slot, FormatError>);

impl KeyError {
    fn io(object: impl ToString) -> impl FnOnce(io::Error) -> KeyError {
        move |source| KeyError::Io { object: object.to_string(), source }
    }
}

impl Repository {
    /// All key slots, by their ids; none without encryption.
    pub fn key_slots(&self) -> Result<Vec<KeySlot>, KeyError> {
        let in_use = *self.opened_by();
        let slots = self.read_slots()?.into_iter().map(|(id, slot)| KeySlot {
            id,
            state: match slot {
                Ok(slot) => SlotState::Intact {
                    kind: match slot.stretch {
                        Stretch::Passphrase { .. } => SlotKind::Passphrase,
                        Stretch::KeyFile => SlotKind::KeyFile,
                    },
                    created_unix_s: slot.created_unix_s,
                    label: slot.label,
                },
                Err(error) => SlotState::Damaged(error),
            },
            in_use: in_use == Some(id),
        });
        Ok(slots.collect())
    }

    /// Lets another secret open the repository. Durable when it returns. Refuses a secret that opens a slot already.
    pub fn add_key(&self, secret: &Secret, label: &str) -> Result<SlotId, KeyError> {
        let master = self.master()?;
        if label.len() > LABEL_MAX || label.chars().any(char::is_control) {
            return Err(KeyError::Label { label: label.to_owned() });
        }
        if !secret.is_usable() {
            return Err(KeyError::WeakSecret);
        }
        let config = &self.fetcher().config;
        for (id, slot) in self.read_slots()? {
            if let Ok(slot) = slot
                && !matches!(MasterKey::unwrap(config, &slot, secret), Unwrapped::Wrong)
            {
                return Err(KeyError::Known { slot: id });
            }
        }
        let slot = new_slot(config, master, secret, label).map_err(KeyError::io("random keys"))?;
        let slot = slot.ok_or(KeyError::WeakSecret)?; // only an over-long passphrase (4 GiB) fails
        let (object, bytes) = (Object::KeySlot(slot.id), slot.encode());
        // Parsed back and opened before anybody relies on it.
        let parsed = Slot::decode(&bytes).map_err(|_| KeyError::Unsound { object })?;
        match MasterKey::unwrap(config, &parsed, secret) {
            Unwrapped::Open(found) if found.is(master) => {}
            _ => return Err(KeyError::Unsound { object }),
        }
        self.storage().put(&object, &bytes).map_err(KeyError::io(object))?;
        let stored = self.storage().get(&object, SLOT_LEN as u64).map_err(KeyError::io(object))?;
        if stored != bytes[..] {
            return Err(KeyError::Unsound { object });
        }
        info!(slot = %slot.id, label, "key slot added");
        Ok(slot.id)
    }

    /// Takes a secret's way in. Never the last intact slot, whoever removes others at the same time.
    ///
    /// Order, under the repository's lock: (1) a slot that stays is put again: whoever wrote it may have been killed
    /// before its name was durable; (2) the slot is deleted. The other way round a power cut could leave none.
    pub fn remove_key(&self, slot: SlotId) -> Result<(), KeyError> {
        self.master()?;
        let storage = self.storage();
        let _held = storage.hold().map_err(busy)?;
        let slots = self.read_slots()?;
        if !slots.iter().any(|(id, _)| *id == slot) {
            return Err(KeyError::NoSuchSlot { slot });
        }
        let stays = slots.into_iter().filter(|(id, _)| *id != slot).find_map(|(_, slot)| slot.ok());
        let stays = stays.ok_or(KeyError::LastSlot { slot })?;
        let object = Object::KeySlot(stays.id);
        storage.put(&object, &stays.encode()).map_err(KeyError::io(object))?;
        let object = Object::KeySlot(slot);
        storage.delete(&object).map_err(KeyError::io(object))?;
        info!(%slot, "key slot removed");
        Ok(())
    }

    /// Puts a secret in the place of the one that opened this repository: adds, then removes. A crash in between
    /// leaves both.
    pub fn rotate_key(&self, secret: &Secret, label: &str) -> Result<Rotated, KeyError> {
        let mut opened_by = self.opened_by();
        let removed = opened_by.ok_or(KeyError::NotEncrypted)?;
        if !self.read_slots()?.iter().any(|(id, _)| *id == removed) {
            return Err(KeyError::NoSuchSlot { slot: removed });
        }
        let added = self.add_key(secret, label)?;
        self.remove_key(removed)?;
        *opened_by = Some(added);
        Ok(Rotated { added, removed })
    }

    fn opened_by(&self) -> MutexGuard<'_, Option<SlotId>> {
        self.opened_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn master(&self) -> Result<&MasterKey, KeyError> {
        self.fetcher().keyring.master().ok_or(KeyError::NotEncrypted)
    }

    /// Every slot and whether it is whole. One that is removed meanwhile is left out.
    fn read_slots(&self) -> Result<Vec<ReadSlot>, KeyError> {
        let (storage, config) = (self.storage(), &self.fetcher().config);
        let mut slots = Vec::new();
        for listed in storage.list(ObjectKind::KeySlot).map_err(KeyError::io("key slots"))? {
            let Object::KeySlot(id) = listed.object else { continue };
            match read_slot(storage, config, id) {
                Ok(slot) => slots.push((id, Ok(slot))),
                Err(OpenError::Damaged { source, .. } | OpenError::UnknownVersion(source)) => {
                    slots.push((id, Err(source)));
                }
                Err(OpenError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(OpenError::Io { object, source }) => return Err(KeyError::Io { object, source }),
                Err(error) => return Err(KeyError::io(listed.object)(io::Error::other(error))),
            }
        }
        slots.sort_unstable_by_key(|(id, _)| *id);
        Ok(slots)
    }
}

fn busy(error: io::Error) -> KeyError {
    match error.kind() {
        io::ErrorKind::ResourceBusy => KeyError::Busy(error),
        _ => KeyError::io("the repository's lock")(error),
    }
}

/// A slot in which `secret` wraps `master`; none if the secret cannot be stretched. The error is the randomness's.
pub(super) fn new_slot(config: &Config, master: &MasterKey, secret: &Secret, label: &str) -> io::Result<Option<Slot>> {
    let id = SlotId(random()?);
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    Ok(master.wrap(config, secret, id, &random()?, created, label))
}
