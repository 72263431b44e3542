//! What a client needs before it can ask for TLS.

use std::sync::Arc;

use rustls::ClientConnection;

use super::ClientError;
use crate::tls::{TlsClient, TlsError, host_name};
use crate::uri::{Endpoint, NbdUri, UriTls};

/// The name that a server on a Unix socket must prove where the URI gives none.
const UNIX_HOST: &str = "localhost";

/// Reads the certificates that a URI names; `None` if it does not ask for TLS.
pub(super) async fn prepare(uri: &NbdUri) -> Result<Option<ClientConnection>, ClientError> {
    let Some(UriTls { certificates, hostname }) = &uri.tls else { return Ok(None) };
    let unusable = |source: TlsError| ClientError::Tls { uri: uri.to_string(), source: Arc::new(source) };
    let folder = certificates.clone().ok_or_else(|| ClientError::NoCertificates { uri: uri.to_string() })?;
    let host = match (hostname, &uri.endpoint) {
        (Some(name), _) => name,
        (None, Endpoint::Tcp { host, .. }) => host,
        (None, Endpoint::Unix(_)) => UNIX_HOST,
    };
    let host = host_name(host).map_err(unusable)?;
    let path = folder.join(crate::tls::CLIENT_CERT);
    let client = tokio::task::spawn_blocking(move || TlsClient::from_folder(&folder))
        .await
        .map_err(|error| ClientError::Lost(Some(Arc::new(error.into()))))?
        .map_err(unusable)?;
    client.connection(host).map(Some).map_err(|source| unusable(TlsError::Certificate { path, source }))
}
