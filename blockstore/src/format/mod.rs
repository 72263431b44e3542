//! The bytes of every object: names, constants and checks. The layouts are described in docs/format/.
//!
//! `Raw*` types are untrusted bytes; their `check` is the only way to the value the rest of the crate works with.
//! Nothing here does I/O, and no decoder panics or allocates by a length it has not checked.

pub mod config;
pub mod drill;
pub mod note;
pub mod pack;
pub mod point;
pub mod protection;
pub mod run;
pub mod slot;
pub mod verified;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The object is shorter or longer than its own fields say.
    #[error("{part} does not have the length it should have")]
    Length {
        /// Which part.
        part: &'static str,
    },
    /// The bytes are something else.
    #[error("{part} does not begin with its magic")]
    Magic {
        /// Which part.
        part: &'static str,
    },
    /// A later layout.
    #[error("{part} has layout version {version:?}, which this program does not know")]
    UnknownVersion {
        /// Which part.
        part: &'static str,
        /// The version's character.
        version: char,
    },
    /// A later addition that must not be ignored.
    #[error("{part} needs features this program does not know (bits {bits:#x})")]
    UnknownFeatures {
        /// Which part.
        part: &'static str,
        /// The unknown bits.
        bits: u32,
    },
    /// A checksum does not fit.
    #[error("{part} fails its checksum")]
    Checksum {
        /// Which part.
        part: &'static str,
    },
    /// A field holds what it must not.
    #[error("{field} is not acceptable")]
    Field {
        /// Which field.
        field: &'static str,
    },
    /// The repository is encrypted, and nothing holds its keys.
    #[error("it asks for a passphrase or key file, but no key slot is left")]
    NoKeySlot,
    /// The object belongs to another repository.
    #[error("it belongs to another repository")]
    OtherRepository,
    /// The bytes do not hash to the object's name.
    #[error("its bytes do not match its name")]
    Name,
    /// The seal is broken: changed, or sealed with another key.
    #[error("its seal is broken")]
    Seal,
}

/// Reads the fixed-size structure at the start of `bytes`.
pub(crate) fn head<'a, T>(bytes: &'a [u8], part: &'static str) -> Result<&'a T, FormatError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_prefix(bytes).map(|(head, _)| head).map_err(|_| FormatError::Length { part })
}

/// Reads the fixed-size structure at the end of `bytes`.
pub(crate) fn tail<'a, T>(bytes: &'a [u8], part: &'static str) -> Result<&'a T, FormatError>
where
    T: FromBytes + KnownLayout + Immutable + Unaligned,
{
    T::ref_from_suffix(bytes).map(|(_, tail)| tail).map_err(|_| FormatError::Length { part })
}

/// Checks a magic whose last character is the layout's version.
pub(crate) fn check_magic(found: &[u8; 8], known: &[u8; 8], part: &'static str) -> Result<(), FormatError> {
    if found == known {
        return Ok(());
    }
    match (found, known) {
        ([start @ .., version], [name @ .., _]) if start == name && version.is_ascii_graphic() => {
            Err(FormatError::UnknownVersion { part, version: char::from(*version) })
        }
        _ => Err(FormatError::Magic { part }),
    }
}

/// Refuses feature bits that are not `known`.
pub(crate) fn check_features(found: u32, known: u32, part: &'static str) -> Result<(), FormatError> {
    match found & !known {
        0 => Ok(()),
        bits => Err(FormatError::UnknownFeatures { part, bits }),
    }
}

/// Whether an object is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encryption {
    /// Not sealed.
    None,
    /// AES-256-GCM.
    Aes256Gcm,
}

impl Encryption {
    pub(crate) fn to_byte(self) -> u8 {
        match self {
            Encryption::None => 0,
            Encryption::Aes256Gcm => 1,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Result<Encryption, FormatError> {
        match byte {
            0 => Ok(Encryption::None),
            1 => Ok(Encryption::Aes256Gcm),
            _ => Err(FormatError::Field { field: "encryption" }),
        }
    }
}

/// Bytes of an AES-GCM tag.
pub const TAG_LEN: u32 = 16;
