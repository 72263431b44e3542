//! TLS as NBD has it: both sides begin in the clear, and change to TLS before anything is said about exports.
//!
//! Certificates lie in a folder under the names that QEMU and libnbd use. A server that has TLS serves nothing without
//! it, and by default nobody without a certificate of its authority. One crypto library: aws-lc through rustls.

pub mod pki;
mod server;
mod session;

pub use server::TlsServer;
pub(crate) use session::Session;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, InvalidDnsNameError, PrivateKeyDer, ServerName};
use rustls::server::VerifierBuilderError;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use webpki::EndEntityCert;

/// Certificate of the authority that the other side's certificate must come from.
pub const CA_CERT: &str = "ca-cert.pem";
/// Certificates that the authority has revoked; may be missing.
pub const CA_CRL: &str = "ca-crl.pem";
/// A server's certificate, then perhaps the ones between it and the authority's.
pub const SERVER_CERT: &str = "server-cert.pem";
/// The key of a server's certificate.
pub const SERVER_KEY: &str = "server-key.pem";
/// A client's certificate; a client that has none shows none.
pub const CLIENT_CERT: &str = "client-cert.pem";
/// The key of a client's certificate.
pub const CLIENT_KEY: &str = "client-key.pem";

/// Largest of these files: a chain of a few certificates takes some KiB, a list of revoked ones more.
const FILE_MAX: u64 = 4 << 20;

/// Why a folder of certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} does not hold a {what} in PEM form")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What should be there.
        what: &'static str,
        /// Why.
        source: pem::Error,
    },
    /// Certificate and key do not go together, or are not usable.
    #[error("cannot use the certificate {path}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The authority's certificate, or its list of revoked ones, cannot be used.
    #[error("cannot check certificates by {path}")]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        source: VerifierBuilderError,
    },
    /// Not a host that a certificate could be for.
    #[error("'{name}' is neither the name nor the address of a host")]
    HostName {
        /// As given.
        name: String,
        /// Why.
        source: InvalidDnsNameError,
    },
}

/// Who may connect to a server that has TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Whoever has a certificate of the server's authority.
    Required,
    /// Everybody; who shows a certificate must have a good one.
    Waived,
}

/// What a client needs for TLS.
#[derive(Debug, Clone)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
}

/// The name that a client's certificate must be for: a host name or an address, one of its subject alternative names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ClientName(ServerName<'static>);

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

impl TlsClient {
    /// From a folder with [`CA_CERT`] and perhaps [`CA_CRL`], [`CLIENT_CERT`] and [`CLIENT_KEY`].
    pub fn from_folder(folder: &Path) -> Result<TlsClient, TlsError> {
        let (roots, revoked) = authority(folder)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .with_crls(revoked)
            .only_check_end_entity_revocation()
            .build()
            .map_err(|source| TlsError::Authority { path: folder.join(CA_CERT), source })?;
        let failed = |source| TlsError::Certificate { path: folder.join(CLIENT_CERT), source };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(failed)?
            .with_webpki_verifier(verifier);
        let config = if folder.join(CLIENT_CERT).exists() {
            let (chain, key, path) = identity(folder, CLIENT_CERT, CLIENT_KEY)?;
            builder.with_client_auth_cert(chain, key).map_err(|source| TlsError::Certificate { path, source })?
        } else {
            builder.with_no_client_auth()
        };
        Ok(TlsClient { config: Arc::new(config) })
    }

    pub(crate) fn connection(&self, host: ServerName<'static>) -> Result<ClientConnection, rustls::Error> {
        ClientConnection::new(Arc::clone(&self.config), host)
    }
}

/// The name or address that a certificate must be for.
pub(crate) fn host_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|source| TlsError::HostName { name: name.to_owned(), source })
}

impl ClientName {
    /// Checks a string.
    pub fn new(name: &str) -> Result<ClientName, TlsError> {
        host_name(name).map(ClientName)
    }

    /// Whether a certificate is for this name: one of its subject alternative names. A common name does not count.
    pub(crate) fn is_of(&self, certificate: &CertificateDer<'_>) -> bool {
        EndEntityCert::try_from(certificate)
            .is_ok_and(|certificate| certificate.verify_is_valid_for_subject_name(&self.0).is_ok())
    }

    /// For whom a certificate is that is not for this name.
    pub(crate) fn presented(&self, certificate: &CertificateDer<'_>) -> Vec<String> {
        let checked = EndEntityCert::try_from(certificate)
            .and_then(|certificate| certificate.verify_is_valid_for_subject_name(&self.0));
        match checked {
            Err(webpki::Error::CertNotValidForName(context)) => {
                context.presented.iter().map(|name| plain(name)).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// The name in `DnsName("NAME")` or `IpAddress(NAME)`; an address in its usual form.
fn plain(name: &str) -> String {
    let inside = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    let name = inside.map_or(name, |inside| inside.trim_matches('"'));
    name.parse::<std::net::IpAddr>().map_or_else(|_| name.to_owned(), |address| address.to_string())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    use std::io::Read;
    let read = || {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path)?;
        if file.take(FILE_MAX + 1).read_to_end(&mut bytes)? as u64 > FILE_MAX {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    };
    read().map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

/// All items of one kind in a file, at least one.
fn items<T: PemObject>(path: &Path, what: &'static str) -> Result<Vec<T>, TlsError> {
    let failed = |source| TlsError::Pem { path: path.to_owned(), what, source };
    let bytes = read(path)?;
    let items: Vec<T> = T::pem_slice_iter(&bytes).collect::<Result<_, _>>().map_err(failed)?;
    if items.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(items) }
}

/// The authority's certificates, and those it has revoked.
fn authority(folder: &Path) -> Result<(Arc<RootCertStore>, Vec<CertificateRevocationListDer<'static>>), TlsError> {
    let path = folder.join(CA_CERT);
    let mut roots = RootCertStore::empty();
    for certificate in items::<CertificateDer<'static>>(&path, "certificate")? {
        roots.add(certificate).map_err(|source| TlsError::Certificate { path: path.clone(), source })?;
    }
    let revoked = folder.join(CA_CRL);
    let revoked = if revoked.exists() { items(&revoked, "certificate revocation list")? } else { Vec::new() };
    Ok((Arc::new(roots), revoked))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, PathBuf);

fn identity(folder: &Path, certificate: &str, key: &str) -> Result<Identity, TlsError> {
    let (certificate, key) = (folder.join(certificate), folder.join(key));
    let chain = items(&certificate, "certificate")?;
    let bytes = read(&key)?;
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|source| TlsError::Pem {
        path: key,
        what: "private key",
        source,
    })?;
    Ok((chain, key, certificate))
}
