//! Times in reports: seconds since 1970 UTC in memory, RFC 3339 in JSON. For `#[serde(with)]`.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

fn time(seconds: u64) -> DateTime<Utc> {
    let time = i64::try_from(seconds).ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0));
    time.unwrap_or(DateTime::<Utc>::MAX_UTC) // further away than any calendar
}

fn seconds(time: DateTime<Utc>) -> u64 {
    time.timestamp().try_into().unwrap_or(0)
}

pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    time(*value).serialize(serializer)
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    DateTime::deserialize(deserializer).map(seconds)
}

/// The same of a time that may be missing.
pub mod option {
    use super::{DateTime, Deserialize, Deserializer, Serialize, Serializer, Utc, seconds, time};

    pub fn serialize<S: Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(time).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
        Option::<DateTime<Utc>>::deserialize(deserializer).map(|value| value.map(seconds))
    }
}
