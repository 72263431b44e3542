//! A key slot, 256 bytes: the master key wrapped by one secret. Specification: docs/format/keys.md

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, check_features, check_magic, head};
use crate::id::{RepositoryId, SlotId};

/// First bytes of the object.
pub const MAGIC: [u8; 8] = *b"LBOATKS1";
/// Length of the object.
pub const SLOT_LEN: usize = 256;
/// A slot may not ask for more memory than this (KiB).
pub const MAX_MEMORY_KIB: u32 = 1 << 20;
/// Nor for more passes.
pub const MAX_PASSES: u32 = 16;
/// Nor for more lanes.
pub const MAX_LANES: u32 = 16;
/// Nor for more memory times passes (KiB).
pub const MAX_WORK_KIB: u64 = 4 << 20;
const SEALED: std::ops::Range<usize> = 128..176;
const PART: &str = "the key slot";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSlot {
    magic: [u8; 8],
    incompat: U32,
    kind: u8,
    reserved: [u8; 3],
    slot: [u8; 16],
    repository: [u8; 16],
    created: U64,
    memory_kib: U32,
    passes: U32,
    lanes: U32,
    salt: [u8; 32],
    check: [u8; 16],
    nonce: [u8; 12],
    sealed: [u8; 48],
    label: [u8; 64],
    reserved_end: [u8; 12],
    crc32c: U32,
}
const _: () = assert!(size_of::<RawSlot>() == SLOT_LEN);

/// How a secret becomes a wrapping key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stretch {
    /// Argon2id of a passphrase.
    Passphrase {
        /// Memory in KiB.
        memory_kib: u32,
        /// Passes over the memory.
        passes: u32,
        /// Lanes.
        lanes: u32,
    },
    /// BLAKE3 of a key file.
    KeyFile,
}

/// A key slot whose fields are within bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The slot's name.
    pub id: SlotId,
    /// Whose master key it wraps.
    pub repository: RepositoryId,
    /// When it was made, seconds since 1970 UTC.
    pub created_unix_s: u64,
    /// How the secret is stretched.
    pub stretch: Stretch,
    /// Salt of the stretching.
    pub salt: [u8; 32],
    /// Tells a wrong secret from a changed slot.
    pub check: [u8; 16],
    /// Nonce of the seal.
    pub nonce: [u8; 12],
    /// The sealed master key and its tag.
    pub sealed: [u8; 48],
    /// A name for people, at most 64 bytes.
    pub label: String,
}

impl Slot {
    /// The object's bytes. A label beyond 64 bytes is cut at a character.
    pub fn encode(&self) -> [u8; SLOT_LEN] {
        let (kind, memory_kib, passes, lanes) = match self.stretch {
            Stretch::Passphrase { memory_kib, passes, lanes } => (1, memory_kib, passes, lanes),
            Stretch::KeyFile => (2, 0, 0, 0),
        };
        let mut label = [0; 64];
        let mut end = self.label.len().min(label.len());
        while !self.label.is_char_boundary(end) {
            end -= 1;
        }
        for (to, from) in label.iter_mut().zip(self.label.as_bytes().iter().take(end)) {
            *to = *from;
        }
        let mut raw = RawSlot {
            magic: MAGIC,
            incompat: U32::ZERO,
            kind,
            reserved: [0; 3],
            slot: self.id.0,
            repository: self.repository.0,
            created: U64::new(self.created_unix_s),
            memory_kib: U32::new(memory_kib),
            passes: U32::new(passes),
            lanes: U32::new(lanes),
            salt: self.salt,
            check: self.check,
            nonce: self.nonce,
            sealed: self.sealed,
            label,
            reserved_end: [0; 12],
            crc32c: U32::ZERO,
        };
        raw.crc32c = U32::new(raw.checksum());
        zerocopy::transmute!(raw)
    }

    /// The slot in an object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Slot, FormatError> {
        let raw: &RawSlot = head(bytes, PART)?;
        check_magic(&raw.magic, &MAGIC, PART)?;
        if bytes.len() != SLOT_LEN {
            return Err(FormatError::Length { part: PART });
        }
        if raw.checksum() != raw.crc32c.get() {
            return Err(FormatError::Checksum { part: PART });
        }
        check_features(raw.incompat.get(), 0, PART)?;
        let stretch = match raw.kind {
            1 => check_cost(raw.memory_kib.get(), raw.passes.get(), raw.lanes.get())?,
            2 => Stretch::KeyFile,
            _ => return Err(FormatError::Field { field: "slot kind" }),
        };
        let label = raw.label.split(|byte| *byte == 0).next().unwrap_or_default();
        let label = std::str::from_utf8(label).map_err(|_| FormatError::Field { field: "slot label" })?;
        Ok(Slot {
            id: SlotId(raw.slot),
            repository: RepositoryId(raw.repository),
            created_unix_s: raw.created.get(),
            stretch,
            salt: raw.salt,
            check: raw.check,
            nonce: raw.nonce,
            sealed: raw.sealed,
            label: label.to_owned(),
        })
    }

    /// The slot's part of the seal's associated data: everything but the sealed key and the checksum.
    pub fn associated_data(&self) -> Vec<u8> {
        let bytes = self.encode();
        let mut data = Vec::with_capacity(SLOT_LEN);
        for (at, byte) in bytes.iter().enumerate() {
            if !SEALED.contains(&at) && at < SLOT_LEN - 4 {
                data.push(*byte);
            }
        }
        data
    }
}

impl RawSlot {
    fn checksum(&self) -> u32 {
        let covered = self.as_bytes().split_last_chunk::<4>().map_or(&[][..], |(covered, _)| covered);
        crc32c::crc32c(covered)
    }
}

/// A hostile slot must not make the reader allocate a terabyte or work for a week.
fn check_cost(memory_kib: u32, passes: u32, lanes: u32) -> Result<Stretch, FormatError> {
    let fits = (1..=MAX_LANES).contains(&lanes)
        && (1..=MAX_PASSES).contains(&passes)
        && (8 * lanes..=MAX_MEMORY_KIB).contains(&memory_kib)
        && u64::from(memory_kib) * u64::from(passes) <= MAX_WORK_KIB;
    if fits {
        Ok(Stretch::Passphrase { memory_kib, passes, lanes })
    } else {
        Err(FormatError::Field { field: "cost of the passphrase" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Slot {
        Slot {
            id: SlotId([1; 16]),
            repository: RepositoryId([2; 16]),
            created_unix_s: 1_700_000_000,
            stretch: Stretch::Passphrase { memory_kib: 65536, passes: 3, lanes: 1 },
            salt: [3; 32],
            check: [4; 16],
            nonce: [5; 12],
            sealed: [6; 48],
            label: "spare key, Zürich".into(),
        }
    }

    #[test]
    fn the_bytes_are_the_documented_ones() {
        let bytes = sample().encode();
        let mut expected = Vec::from(*b"LBOATKS1\0\0\0\0\x01\0\0\0");
        expected.extend([1; 16]);
        expected.extend([2; 16]);
        expected.extend(1_700_000_000u64.to_le_bytes());
        expected.extend([0, 0, 1, 0, 3, 0, 0, 0, 1, 0, 0, 0]);
        expected.extend([3; 32]);
        expected.extend([4; 16]);
        expected.extend([5; 12]);
        expected.extend([6; 48]);
        expected.extend("spare key, Zürich".as_bytes());
        expected.resize(252, 0);
        expected.extend(crc32c::crc32c(&expected).to_le_bytes());
        assert_eq!(bytes.as_slice(), expected);
        assert_eq!(Slot::decode(&bytes), Ok(sample()));
        assert_eq!(sample().associated_data().len(), 204);
    }

    #[test]
    fn a_slot_that_asks_for_too_much_is_refused() {
        for (memory_kib, passes, lanes) in
            [(u32::MAX, 1, 1), (1 << 20, 5, 1), (1 << 16, 17, 1), (1 << 16, 1, 17), (7, 1, 1), (64, 0, 1), (64, 1, 0)]
        {
            let slot = Slot { stretch: Stretch::Passphrase { memory_kib, passes, lanes }, ..sample() };
            let refused = Slot::decode(&slot.encode());
            assert_eq!(refused, Err(FormatError::Field { field: "cost of the passphrase" }));
        }
    }

    #[test]
    fn a_long_label_is_cut_at_a_character() {
        let slot = Slot { label: "ä".repeat(40), ..sample() };
        assert_eq!(Slot::decode(&slot.encode()).expect("valid").label, "ä".repeat(32));
    }

    proptest! {
        #[test]
        fn every_damage_is_noticed(at in 0usize..256, flip in 1u8..=255, cut in 0usize..256) {
            let mut bytes = sample().encode();
            prop_assert!(Slot::decode(&bytes[..cut]).is_err());
            bytes[at] ^= flip;
            prop_assert!(Slot::decode(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic_behind_a_good_checksum(mut bytes in proptest::collection::vec(any::<u8>(), 256)) {
            bytes[..8].copy_from_slice(&MAGIC);
            bytes[8..12].fill(0);
            let crc = crc32c::crc32c(&bytes[..252]).to_le_bytes();
            bytes[252..].copy_from_slice(&crc);
            let _ = Slot::decode(&bytes);
        }
    }
}
