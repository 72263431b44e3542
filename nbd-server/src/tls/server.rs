//! [`TlsServer`]: a server's certificates, read again when their files change.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::server::WebPkiClientVerifier;
use rustls::{ServerConfig, ServerConnection};

use super::{CA_CERT, CA_CRL, ClientCertificates, SERVER_CERT, SERVER_KEY, TlsError, authority, identity, provider};

/// What a server needs for TLS. Clones share it.
///
/// Every handshake looks whether the files are what they were. If not they are read, and count from then on, for new
/// connections: those that are open stay. Files that cannot be used, as they are while they are being replaced, change
/// nothing: that is logged, and the next handshake tries again.
#[derive(Debug, Clone)]
pub struct TlsServer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    /// Who may connect; nobody is asked for a certificate if absent.
    clients: Option<ClientCertificates>,
    loaded: Mutex<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    /// The files that it is from.
    files: Files,
    /// Files that could not be used, and of which that has been said.
    unusable: Option<Files>,
}

/// What tells a file from the one that had its name before: device, inode, length, and when it was last written and
/// changed. `None`: it is not there.
type Identity = Option<(u64, u64, u64, (i64, i64), (i64, i64))>;

/// The files of a folder that matter to a server.
type Files = [Identity; 4];

fn files(folder: &Path) -> Files {
    [CA_CERT, CA_CRL, SERVER_CERT, SERVER_KEY].map(|name| {
        let file = std::fs::metadata(folder.join(name)).ok()?;
        let (written, changed) = ((file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec()));
        Some((file.dev(), file.ino(), file.len(), written, changed))
    })
}

impl TlsServer {
    /// From a folder with [`CA_CERT`], [`SERVER_CERT`], [`SERVER_KEY`] and perhaps [`CA_CRL`].
    pub fn from_folder(folder: &Path, clients: ClientCertificates) -> Result<TlsServer, TlsError> {
        TlsServer::open(folder, Some(clients))
    }

    /// From a folder with [`SERVER_CERT`] and [`SERVER_KEY`]: clients are not asked for certificates.
    pub fn one_sided(folder: &Path) -> Result<TlsServer, TlsError> {
        TlsServer::open(folder, None)
    }

    fn open(folder: &Path, clients: Option<ClientCertificates>) -> Result<TlsServer, TlsError> {
        let files = files(folder); // before they are read: what changes meanwhile is read again
        let config = load(folder, clients)?;
        let loaded = Mutex::new(Loaded { config, files, unusable: None });
        Ok(TlsServer { inner: Arc::new(Inner { folder: folder.to_owned(), clients, loaded }) })
    }

    /// For one handshake. Looks at the files, so it may block.
    pub(crate) fn connection(&self) -> Result<ServerConnection, rustls::Error> {
        ServerConnection::new(self.config())
    }

    /// The same for a protocol that is in TLS from the beginning on.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.inner.config()
    }
}

impl Inner {
    fn config(&self) -> Arc<ServerConfig> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let files = files(&self.folder);
        if files != loaded.files {
            let folder = self.folder.display();
            match load(&self.folder, self.clients) {
                Ok(config) => {
                    tracing::info!(%folder, "certificates have changed; new connections use the new ones");
                    *loaded = Loaded { config, files, unusable: None };
                }
                Err(_) if loaded.unusable == Some(files) => {}
                Err(error) => {
                    let error = crate::server::chain(&error);
                    tracing::error!(%folder, %error, "certificates have changed and cannot be used; the former ones stay");
                    loaded.unusable = Some(files);
                }
            }
        }
        Arc::clone(&loaded.config)
    }
}

fn load(folder: &Path, clients: Option<ClientCertificates>) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = clients.map(|clients| {
        let (roots, revoked) = authority(folder)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .with_crls(revoked)
            .only_check_end_entity_revocation();
        let verifier = match clients {
            ClientCertificates::Required => verifier,
            ClientCertificates::Waived => verifier.allow_unauthenticated(),
        };
        verifier.build().map_err(|source| TlsError::Authority { path: folder.join(CA_CERT), source })
    });
    let verifier = verifier.transpose()?;
    let (chain, key, path) = identity(folder, SERVER_CERT, SERVER_KEY)?;
    let failed = |source| TlsError::Certificate { path: path.clone(), source };
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let builder = builder.map_err(failed)?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key).map_err(failed)?;
    config.send_tls13_tickets = 0; // connections live for days: nobody resumes one
    Ok(Arc::new(config))
}
