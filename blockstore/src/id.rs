//! Names of what the repository keeps: newtypes over hashes and random numbers, written in hexadecimal.

use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is not the hexadecimal form of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an id of {digits} lower-case hexadecimal digits")]
pub struct ParseIdError {
    digits: usize,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// The bytes of the id.
            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(out, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<$name, ParseIdError> {
                let mut bytes = [0; $len];
                parse_hex(text, &mut bytes).ok_or(ParseIdError { digits: $len * 2 })?;
                Ok($name(bytes))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(
    /// The (keyed) hash of a chunk, or of a manifest node.
    ChunkId,
    32
);
id!(
    /// The name of a pack: the hash of its bytes.
    PackId,
    32
);
id!(
    /// The name of an index run: the hash of its bytes.
    RunId,
    32
);
id!(
    /// The name of a list of verified packs: the hash of its bytes.
    VerifiedId,
    32
);
id!(
    /// The name of a recovery point: the hash of its sealed bytes.
    RecoveryPointId,
    32
);
id!(
    /// The random identity of a repository, carried by all its objects.
    RepositoryId,
    16
);
id!(
    /// The random name of a key slot.
    SlotId,
    16
);

id!(
    /// The name of a lease.
    LeaseId,
    16
);

id!(
    /// The random name of a batch of packs in quarantine.
    BatchId,
    16
);

/// The name of a drill's result: the point, and when the drill began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DrillId {
    /// The recovery point that was booted.
    pub point: RecoveryPointId,
    /// When, in milliseconds since 1970 UTC.
    pub time_unix_ms: u64,
}

impl fmt::Display for DrillId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}-{:016x}", self.point, self.time_unix_ms)
    }
}

impl FromStr for DrillId {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<DrillId, ParseIdError> {
        let (point, time) = text.split_once('-').ok_or(ParseIdError { digits: 80 })?;
        let mut bytes = [0; 8];
        parse_hex(time, &mut bytes).ok_or(ParseIdError { digits: 16 })?;
        Ok(DrillId { point: point.parse()?, time_unix_ms: u64::from_be_bytes(bytes) })
    }
}

impl ChunkId {
    /// The reserved id of the chunk, or subtree, that is all zeroes. Nothing is stored for it.
    pub const ZERO: ChunkId = ChunkId([0; 32]);

    /// Whether this is [`ChunkId::ZERO`].
    pub fn is_zero(&self) -> bool {
        *self == ChunkId::ZERO
    }

    /// The first eight bytes as a number: uniformly distributed, so good for interpolation and for hash tables.
    pub(crate) fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

fn parse_hex(text: &str, out: &mut [u8]) -> Option<()> {
    if text.len() != out.len() * 2 {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let [high, low] = pair else { return None };
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(())
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        _ => None,
    }
}

/// Hashes a [`ChunkId`] by taking eight of its bytes, which are a hash already.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct IdHash(u64);

impl Hasher for IdHash {
    fn write(&mut self, bytes: &[u8]) {
        if let Some((_, last)) = bytes.split_last_chunk::<8>() {
            self.0 ^= u64::from_le_bytes(*last); // the end: the beginning already picked the shard
        }
    }
    fn write_usize(&mut self, _length: usize) {} // the length prefix of an array adds nothing
    fn finish(&self) -> u64 {
        self.0
    }
}

impl BuildHasher for IdHash {
    type Hasher = IdHash;
    fn build_hasher(&self) -> IdHash {
        IdHash(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_from_its_text_and_nothing_else_does() {
        let id = SlotId([0xa5; 16]);
        assert_eq!(id.to_string(), "a5".repeat(16));
        assert_eq!(id.to_string().parse::<SlotId>(), Ok(id));
        for bad in ["", "a5", &"A5".repeat(16), &"a5".repeat(17), &"g5".repeat(16), &"é".repeat(16)] {
            assert!(bad.parse::<SlotId>().is_err(), "{bad}");
        }
    }
}
