//! Values that are checked where they are read, so that a mistake has its line.

use std::path::PathBuf;

use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// A path that means the same wherever the service is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbsolutePath(pub PathBuf);

/// A size with a unit: `512M`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

/// Where a repository is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location(pub String);

/// What to log, in tracing's syntax.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFilter(pub String);

impl<'de> Deserialize<'de> for AbsolutePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let path = PathBuf::from(String::deserialize(deserializer)?);
        match path.is_absolute() {
            true => Ok(AbsolutePath(path)),
            false => Err(D::Error::custom(format!("`{}` is not an absolute path", path.display()))),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::cli::parse_size(&String::deserialize(deserializer)?).map(Size).map_err(D::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Location {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let location = String::deserialize(deserializer)?;
        crate::app::repository_path(&location).map_err(|problem| D::Error::custom(problem.to_string()))?;
        match location.starts_with('/') || location.contains("://") {
            true => Ok(Location(location)),
            false => Err(D::Error::custom(format!("`{location}` is not an absolute path"))),
        }
    }
}

impl<'de> Deserialize<'de> for LogFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let filter = String::deserialize(deserializer)?;
        match tracing_subscriber::EnvFilter::try_new(&filter) {
            Ok(_) => Ok(LogFilter(filter)),
            Err(error) => Err(D::Error::custom(format!("`{filter}` is not a filter of the log: {error}"))),
        }
    }
}
