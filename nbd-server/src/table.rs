//! [`ExportTable`]: which exports exist, by name, and the end of each.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::control::Registry;
use crate::export::{BlockSize, Export};
use crate::limits::{MAX_CONTEXTS, MAX_PAYLOAD};
use crate::name::{ExportName, MAX_NAME};
use crate::statistics::Statistics;
use crate::stream::Stream;
use crate::tls::{ClientName, Session};
use crate::transmission::HeaderStyle;
use crate::wire::{BASE_ALLOCATION, transmission_flag};

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// The exports of one or several servers. Exports come and go while connections live.
#[derive(Default)]
pub struct ExportTable {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    exports: BTreeMap<ExportName, Arc<Published>>,
    default: Option<ExportName>,
}

/// Why an export cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// The name is taken.
    #[error("an export named '{0}' exists already")]
    Exists(ExportName),
    /// The block sizes contradict each other or the protocol.
    #[error("export '{name}' has impossible block sizes {sizes:?}")]
    BlockSize {
        /// The export.
        name: ExportName,
        /// What it asked for.
        sizes: BlockSize,
    },
    /// A metadata context has no namespace, is too long, or repeats.
    #[error("export '{name}' offers the metadata context '{context}', which is not a valid one")]
    Context {
        /// The export.
        name: ExportName,
        /// The context.
        context: String,
    },
}

/// Who may see and open an export.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Access {
    /// Whoever may connect to the server.
    #[default]
    Everyone,
    /// Only clients with TLS whose certificate is for one of these names. To others the export does not exist.
    Clients(Vec<ClientName>),
}

/// An export as connections see it: what never changes is asked once.
pub(crate) struct Published {
    /// Tells exports of this process apart, whatever their table and name.
    pub(crate) number: u64,
    pub(crate) name: ExportName,
    pub(crate) export: Arc<dyn Export>,
    access: Access,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    pub(crate) block_size: BlockSize,
    pub(crate) fast_zeroes: bool,
    pub(crate) contexts: Vec<String>,
    pub(crate) statistics: Arc<Statistics>,
    pub(crate) connections: Arc<Registry>,
}

/// An export that is no longer in the table, while connections may still end.
pub struct Retirement {
    published: Arc<Published>,
}

impl std::fmt::Debug for ExportTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.list()).finish()
    }
}

impl ExportTable {
    /// An empty table.
    pub fn new() -> ExportTable {
        ExportTable::default()
    }

    /// Adds an export; clients can open it from now on.
    pub fn add(&self, name: ExportName, export: Arc<dyn Export>) -> Result<(), AddError> {
        self.add_for(name, export, Access::Everyone)
    }

    /// Adds an export that not everybody may see.
    pub fn add_for(&self, name: ExportName, export: Arc<dyn Export>, access: Access) -> Result<(), AddError> {
        let published = Arc::new(Published::new(name.clone(), export, access)?);
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if inner.exports.contains_key(&name) {
            return Err(AddError::Exists(name));
        }
        inner.exports.insert(name, published);
        Ok(())
    }

    /// Takes an export out of the table. Nobody can open it any more; its connections finish the requests in flight,
    /// answer `ESHUTDOWN` to those that waited, and close. [`Retirement::finished`] tells when that is done.
    pub fn remove(&self, name: &ExportName) -> Option<Retirement> {
        let published = {
            let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
            if inner.default.as_ref() == Some(name) {
                inner.default = None;
            }
            inner.exports.remove(name)?
        };
        published.connections.close();
        Some(Retirement { published })
    }

    /// Names the export that clients get who ask for none; `None` goes back to the rule that a table with a single
    /// export has a default. False if there is no such export.
    pub fn set_default(&self, name: Option<&ExportName>) -> bool {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        if name.is_some_and(|name| !inner.exports.contains_key(name)) {
            return false;
        }
        inner.default = name.cloned();
        true
    }

    /// All names in order.
    pub fn list(&self) -> Vec<ExportName> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).exports.keys().cloned().collect()
    }

    /// Counters of an export.
    pub fn statistics(&self, name: &ExportName) -> Option<Arc<Statistics>> {
        self.find(name).map(|published| Arc::clone(&published.statistics))
    }

    /// How many connections use an export now.
    pub fn connections(&self, name: &ExportName) -> Option<usize> {
        self.find(name).map(|published| published.connections.len())
    }

    /// The export of that name, or the default export for the empty name.
    pub(crate) fn find(&self, name: &ExportName) -> Option<Arc<Published>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(published) = inner.exports.get(name) {
            return Some(Arc::clone(published));
        }
        if !name.is_default() {
            return None;
        }
        match &inner.default {
            Some(default) => inner.exports.get(default).cloned(),
            None if inner.exports.len() == 1 => inner.exports.values().next().cloned(),
            None => None,
        }
    }

    /// All exports with their descriptions, for `NBD_OPT_LIST`.
    pub(crate) fn published(&self) -> Vec<Arc<Published>> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).exports.values().cloned().collect()
    }
}

impl Published {
    fn new(name: ExportName, export: Arc<dyn Export>, access: Access) -> Result<Published, AddError> {
        let sizes = export.block_size();
        let block_size = checked_sizes(sizes).ok_or_else(|| AddError::BlockSize { name: name.clone(), sizes })?;
        let contexts = export.contexts();
        for (at, context) in contexts.iter().enumerate() {
            let valid = context.len() <= MAX_NAME
                && context.split_once(':').is_some_and(|(space, leaf)| !space.is_empty() && !leaf.is_empty())
                && !context.starts_with("base:")
                && !context.contains('\0')
                && !contexts.iter().take(at).any(|earlier| earlier == context)
                && at + 1 < MAX_CONTEXTS;
            if !valid {
                return Err(AddError::Context { name, context: context.clone() });
            }
        }
        Ok(Published {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            name,
            access,
            size: export.size(),
            read_only: export.read_only(),
            block_size,
            fast_zeroes: export.fast_zeroes(),
            contexts,
            statistics: Arc::default(),
            connections: Arc::default(),
            export,
        })
    }

    /// Transmission flags for a connection: what needs structured replies is offered with them only, what needs extended
    /// headers and a selected context only with both.
    pub(crate) fn flags(&self, style: HeaderStyle, has_contexts: bool) -> u16 {
        use transmission_flag as flag;
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE | flag::CAN_MULTI_CONN;
        if self.read_only {
            flags |= flag::READ_ONLY;
        } else {
            flags |= flag::SEND_TRIM | flag::SEND_WRITE_ZEROES;
            if self.fast_zeroes {
                flags |= flag::SEND_FAST_ZERO;
            }
        }
        if style.is_structured() {
            flags |= flag::SEND_DF;
        }
        if style == HeaderStyle::Extended && has_contexts {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }

    /// Whether a client that is at the other end of `stream` may know of this export.
    pub(crate) fn admits(&self, stream: &Stream) -> bool {
        match &self.access {
            Access::Everyone => true,
            Access::Clients(names) => {
                let certificate = stream.tls().and_then(Session::peer_certificate);
                certificate.is_some_and(|certificate| names.iter().any(|name| name.is_of(&certificate)))
            }
        }
    }

    /// The names in the certificate of a client that is not admitted; `None` if it has shown none.
    pub(crate) fn stranger(&self, stream: &Stream) -> Option<Vec<String>> {
        let certificate = stream.tls().and_then(Session::peer_certificate)?;
        match &self.access {
            Access::Clients(names) => names.first().map(|name| name.presented(&certificate)),
            Access::Everyone => None,
        }
    }

    /// All contexts a client may select, `base:allocation` first.
    pub(crate) fn context_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(BASE_ALLOCATION).chain(self.contexts.iter().map(String::as_str))
    }
}

impl Retirement {
    /// Returns once no connection uses the export: no operation of it runs and none will start.
    pub async fn finished(&self) {
        self.published.connections.emptied().await;
    }

    /// Counters as they stand.
    pub fn statistics(&self) -> Arc<Statistics> {
        Arc::clone(&self.published.statistics)
    }
}

/// Protocol, "Block size constraints": powers of two, minimum at most 64 KiB, preferred at least 512 and the minimum.
/// The maximum is cut to what this server takes.
fn checked_sizes(sizes: BlockSize) -> Option<BlockSize> {
    let BlockSize { minimum, preferred, maximum } = sizes;
    let fits = minimum.is_power_of_two()
        && minimum <= 64 << 10
        && preferred.is_power_of_two()
        && preferred >= minimum.max(512)
        && preferred <= MAX_PAYLOAD
        && maximum >= preferred
        && maximum % minimum == 0;
    fits.then(|| BlockSize { maximum: maximum.min(MAX_PAYLOAD), ..sizes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryExport;

    fn name(text: &str) -> ExportName {
        ExportName::new(text).expect("a valid name")
    }

    #[test]
    fn a_single_export_is_the_default_and_two_have_none_until_one_is_named() {
        let table = ExportTable::new();
        assert!(table.find(&name("")).is_none());
        table.add(name("a"), Arc::new(MemoryExport::new(4096))).expect("free name");
        assert_eq!(table.find(&name("")).expect("the only one").name, name("a"));
        table.add(name("b"), Arc::new(MemoryExport::new(4096))).expect("free name");
        assert!(table.find(&name("")).is_none());
        assert!(!table.set_default(Some(&name("c"))));
        assert!(table.set_default(Some(&name("b"))));
        assert_eq!(table.find(&name("")).expect("the named one").name, name("b"));
        assert!(table.remove(&name("b")).is_some());
        assert!(table.remove(&name("b")).is_none());
        assert_eq!(table.find(&name("")).expect("the only one again").name, name("a"));
        assert_eq!(table.list(), [name("a")]);
    }

    #[test]
    fn a_name_is_used_once() {
        let table = ExportTable::new();
        table.add(name("a"), Arc::new(MemoryExport::new(4096))).expect("free name");
        let again = table.add(name("a"), Arc::new(MemoryExport::new(4096)));
        assert_eq!(again, Err(AddError::Exists(name("a"))));
    }

    #[test]
    fn block_sizes_are_checked_and_the_maximum_is_cut() {
        let sizes = |minimum, preferred, maximum| checked_sizes(BlockSize { minimum, preferred, maximum });
        assert_eq!(sizes(1, 4096, u32::MAX).map(|s| s.maximum), Some(MAX_PAYLOAD));
        assert_eq!(sizes(512, 4096, 1 << 20).map(|s| s.maximum), Some(1 << 20));
        for bad in
            [(0, 4096, 8192), (3, 4096, 8192), (1, 256, 8192), (8192, 4096, 8192), (1, 4096, 512), (512, 512, 1000)]
        {
            assert_eq!(sizes(bad.0, bad.1, bad.2), None, "{bad:?}");
        }
    }
}
