//! [`Keyless`]: a repository without its secret. What names and checksums prove can be checked, by a host that must not
//! read the data; nothing that needs a key can be called.

mod verify;

#[cfg(test)]
mod tests;

pub use verify::KeylessReport;

use std::sync::Arc;

use crate::format::Encryption;
use crate::format::config::Config;
use crate::id::RepositoryId;
use crate::repository::{OpenError, Repository, read_config};
use crate::storage::Storage;

/// A repository opened without a secret. It never writes.
#[derive(Debug, Clone)]
pub struct Keyless {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) config: Config,
}

impl Repository {
    /// Opens a repository without a secret, encrypted or not.
    pub fn open_keyless(storage: Arc<dyn Storage>) -> Result<Keyless, OpenError> {
        let config = read_config(&*storage)?;
        Ok(Keyless { storage, config })
    }
}

impl Keyless {
    /// The repository's identity.
    pub fn id(&self) -> RepositoryId {
        self.config.repository
    }

    /// Whether chunks and recovery points are sealed.
    pub fn encrypted(&self) -> bool {
        self.config.encryption == Encryption::Aes256Gcm
    }
}
