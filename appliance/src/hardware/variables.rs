//! The content of a UEFI variable store, in JSON as base64.

use std::fmt;

use base64ct::{Base64, Encoding};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// No OVMF build's store is larger.
pub const VARIABLES_MAX: usize = 4 << 20;
/// Their base64.
const TEXT_MAX: usize = VARIABLES_MAX.div_ceil(3) * 4;

/// A UEFI variable store.
#[derive(Clone, PartialEq, Eq)]
pub struct Variables(pub Vec<u8>);

impl fmt::Debug for Variables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Variables({} bytes)", self.0.len())
    }
}

impl Serialize for Variables {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Base64::encode_string(&self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Variables {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Variables, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(deserializer)?;
        if text.is_empty() || text.len() > TEXT_MAX {
            return Err(D::Error::custom("uefi_vars is empty or longer than 4 MiB"));
        }
        Base64::decode_vec(&text).map(Variables).map_err(|_| D::Error::custom("uefi_vars is not base64"))
    }
}
