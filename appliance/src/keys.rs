//! Key slots: which secrets open the repository, for the API.

use std::fmt;

use blockstore::{KeySlot, Repository, Secret, SlotId, SlotKind, SlotState};
use chrono::{DateTime, Local, Utc};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::spec::short_id;
use crate::problem::Problem;

/// Shortest beginning of a slot's id that is taken for one.
const PREFIX_MIN: usize = 4;

/// A key slot as `key list` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeyView {
    /// 32 hexadecimal digits.
    pub slot: String,
    /// `passphrase` or `key-file`; absent if damaged.
    pub kind: Option<String>,
    /// When it was made.
    pub created: Option<DateTime<Utc>>,
    /// A name for people.
    pub label: String,
    /// Whether its secret opened the repository for the process that answers.
    pub in_use: bool,
    /// What is wrong with it, if it opens nothing.
    pub damaged: Option<String>,
}

/// A secret on its way to a new slot.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NewSecret {
    /// A passphrase.
    Passphrase(String),
    /// A key file's bytes, in hexadecimal digits.
    KeyFile(String),
}

impl fmt::Debug for NewSecret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("NewSecret")
    }
}

/// What `key add` and `key rotate` ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewKeyRequest {
    /// The new secret.
    pub secret: NewSecret,
    /// A name for people, at most 64 bytes.
    #[serde(default)]
    pub label: String,
}

/// What a change of the slots did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeyChange {
    /// The new slot.
    pub added: Option<String>,
    /// The slot that is gone.
    pub removed: Option<String>,
    /// Whether the removed slot had opened the repository for the process that answers.
    pub removed_in_use: bool,
    /// Intact slots there are now.
    pub left: usize,
    /// The process that answers.
    pub pid: u32,
}

impl NewSecret {
    /// The bytes of a key file.
    pub fn key_file(bytes: &[u8]) -> NewSecret {
        NewSecret::KeyFile(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn secret(&self) -> Result<Secret, Problem> {
        match self {
            NewSecret::Passphrase(text) => Ok(Secret::passphrase(text.clone())),
            NewSecret::KeyFile(digits) => {
                // `from_str_radix` takes a sign, too.
                let digits = if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) { digits } else { "x" };
                let byte = |at| digits.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
                let bytes: Option<Vec<u8>> = (0..digits.len()).step_by(2).map(byte).collect();
                let bytes = bytes.ok_or_else(|| Problem::usage("the key file is not given in hexadecimal digits"))?;
                Ok(Secret::key_file(bytes))
            }
        }
    }
}

/// All slots.
pub fn list(repository: &Repository) -> Result<Vec<KeyView>, Problem> {
    Ok(slots(repository)?.iter().map(view).collect())
}

/// Refuses the label of another slot for a new one: `key remove LABEL` could not tell them apart.
pub fn check_label<'a>(slots: impl IntoIterator<Item = &'a KeyView>, label: &str) -> Result<(), Problem> {
    let mut named = slots.into_iter().filter(|slot| !label.is_empty() && slot.label == label);
    match named.next() {
        None => Ok(()),
        Some(slot) => Err(Problem::refused(format!("key slot {} is called `{label}` already", slot.slot))
            .hint("give another --label, or remove that slot first with `lifeboat key remove`")),
    }
}

/// Lets another secret open the repository.
pub fn add(repository: &Repository, request: &NewKeyRequest) -> Result<KeyChange, Problem> {
    check_label(&list(repository)?, &request.label)?;
    let added = repository
        .add_key(&request.secret.secret()?, &request.label)
        .map_err(|error| Problem::from_keys("cannot add a key", &error))?;
    change(repository, Some(added), None)
}

/// Removes the slot named by a beginning of its id, or by its label.
pub fn remove(repository: &Repository, name: &str) -> Result<KeyChange, Problem> {
    let slots = slots(repository)?;
    let slot = find(&slots, name)?;
    repository
        .remove_key(slot.id)
        .map_err(|error| Problem::from_keys(&format!("cannot remove key slot {}", slot.id), &error))?;
    let removed = change(repository, None, Some(slot.id))?;
    Ok(KeyChange { removed_in_use: slot.in_use, ..removed })
}

/// Puts a secret in the place of the one in use, whose label it may take over.
pub fn rotate(repository: &Repository, request: &NewKeyRequest) -> Result<KeyChange, Problem> {
    check_label(list(repository)?.iter().filter(|slot| !slot.in_use), &request.label)?;
    let rotated = repository
        .rotate_key(&request.secret.secret()?, &request.label)
        .map_err(|error| Problem::from_keys("cannot rotate the key", &error))?;
    let rotated = change(repository, Some(rotated.added), Some(rotated.removed))?;
    Ok(KeyChange { removed_in_use: true, ..rotated })
}

fn slots(repository: &Repository) -> Result<Vec<KeySlot>, Problem> {
    if !repository.encrypted() {
        return Err(Problem::from_keys("cannot manage keys", &blockstore::KeyError::NotEncrypted));
    }
    repository.key_slots().map_err(|error| Problem::from_keys("cannot list the key slots", &error))
}

fn change(repository: &Repository, added: Option<SlotId>, removed: Option<SlotId>) -> Result<KeyChange, Problem> {
    let left = slots(repository)?.iter().filter(|slot| matches!(slot.state, SlotState::Intact { .. })).count();
    let text = |id: SlotId| id.to_string();
    let (added, removed) = (added.map(text), removed.map(text));
    Ok(KeyChange { added, removed, removed_in_use: false, left, pid: std::process::id() })
}

fn view(slot: &KeySlot) -> KeyView {
    let view = KeyView {
        slot: slot.id.to_string(),
        kind: None,
        created: None,
        label: String::new(),
        in_use: slot.in_use,
        damaged: None,
    };
    match &slot.state {
        SlotState::Intact { kind, created_unix_s, label } => KeyView {
            kind: Some(kind_name(*kind).to_owned()),
            created: i64::try_from(*created_unix_s).ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0)),
            label: label.clone(),
            ..view
        },
        SlotState::Damaged(error) => KeyView { damaged: Some(error.to_string()), ..view },
    }
}

fn kind_name(kind: SlotKind) -> &'static str {
    match kind {
        SlotKind::Passphrase => "passphrase",
        SlotKind::KeyFile => "key-file",
    }
}

fn find<'a>(slots: &'a [KeySlot], name: &str) -> Result<&'a KeySlot, Problem> {
    let labelled = |slot: &&KeySlot| matches!(&slot.state, SlotState::Intact { label, .. } if label == name);
    let mut found: Vec<&KeySlot> = slots.iter().filter(labelled).collect();
    if found.is_empty() && name.len() >= PREFIX_MIN {
        let prefix = name.to_ascii_lowercase();
        found = slots.iter().filter(|slot| slot.id.to_string().starts_with(&prefix)).collect();
    }
    match found.as_slice() {
        [slot] => Ok(slot),
        [] => Err(Problem::not_found(format!("no key slot is called `{name}`"))
            .hint(format!("`lifeboat key list` lists them; give a label, or at least {PREFIX_MIN} digits of an id"))),
        many => {
            let told: Vec<String> = many.iter().map(|slot| told(slot)).collect();
            Err(Problem::usage(format!("`{name}` is ambiguous: {} key slots are called so", many.len()))
                .hint(format!("give the beginning of the id of one of them: {}", told.join(", "))))
        }
    }
}

/// A slot for a person who has to choose.
fn told(slot: &KeySlot) -> String {
    let KeyView { slot, kind, created, damaged, .. } = view(slot);
    let kind = if damaged.is_some() { "damaged".to_owned() } else { kind.unwrap_or_default() };
    let made = created
        .map(|time| format!(" of {}", time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S")))
        .unwrap_or_default();
    format!("{} ({kind}{made})", short_id(&slot))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Kind;

    fn slot(byte: u8, label: &str) -> KeySlot {
        let state =
            SlotState::Intact { kind: SlotKind::Passphrase, created_unix_s: 1_700_000_000, label: label.to_owned() };
        KeySlot { id: SlotId([byte; 16]), state, in_use: false }
    }

    #[test]
    fn slots_are_found_by_label_and_by_the_beginning_of_their_id() {
        let slots = [slot(0xab, "spare"), slot(0xac, "spare"), slot(0x11, "11111111")];
        let found = |name: &str| find(&slots, name).map(|slot| slot.id.0[0]).map_err(|problem| problem.kind);
        assert_eq!(found("ABAB"), Ok(0xab));
        assert_eq!(found("11111111"), Ok(0x11));
        assert_eq!(found("spare"), Err(Kind::Usage));
        let hint = find(&slots, "spare").unwrap_err().to_string();
        assert!(hint.contains("abababababab (passphrase of ") && hint.contains("acacacacacac ("), "{hint}");
        assert_eq!(found("aba"), Err(Kind::NotFound));
        assert_eq!(found(""), Err(Kind::NotFound));
        assert_eq!(found("ffff"), Err(Kind::NotFound));
    }

    #[test]
    fn a_key_file_crosses_the_api_and_shows_in_no_log() {
        let secret = NewSecret::key_file(&[0, 255, 16]);
        assert_eq!(secret, NewSecret::KeyFile("00ff10".into()));
        assert_eq!(format!("{secret:?}"), "NewSecret");
        assert!(secret.secret().is_ok());
        for bad in ["0", "zz", "ä0", "+1"] {
            let bad = NewSecret::KeyFile(bad.into()).secret();
            assert!(bad.is_err_and(|problem| problem.kind == Kind::Usage));
        }
    }
}
