//! The API's network listener: HTTPS, or HTTP on loopback for those who ask for it. Everything that a stranger can make
//! it hold is bounded: connections by number, handshakes and headers by time and size, bodies by both (see `extract`).

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use nbd_server::tls::{ClientCertificates, TlsServer, pki};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::login::Peer;
use crate::problem::{Kind, Problem};

/// Clients at once. Further ones wait until one goes, which an idle one does after [`HEADERS`].
const CONNECTIONS_MAX: usize = 1024;
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a client may take until its request's headers are there, from its last answer on.
const HEADERS: Duration = Duration::from_secs(20);
/// Bytes of headers.
const HEADERS_LEN_MAX: usize = 64 << 10;
/// How long to wait when the system has no descriptor for a client at present.
const BREATHER: Duration = Duration::from_millis(100);
/// What the service calls itself in the certificates that it makes.
const OWN_NAME: &str = "lifeboat";

/// Where to listen, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkOptions {
    /// The address.
    pub listen: SocketAddr,
    /// How it is protected.
    pub security: Security,
}

/// How what goes over the network is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Security {
    /// TLS.
    Tls {
        /// A folder of certificates; the service's own if absent.
        folder: Option<PathBuf>,
        /// Whether clients must have a certificate of the same authority, besides their token.
        clients: ClientCertificates,
    },
    /// None, on loopback.
    Plain,
}

/// A socket that listens and a certificate that can be used; nobody is answered yet.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<TlsServer>,
}

impl Bound {
    /// Takes the address. Certificates that the service makes for itself lie in `own`.
    pub async fn new(options: &NetworkOptions, own: &Path) -> Result<Bound, Problem> {
        let address = options.listen;
        let tls = match &options.security {
            Security::Plain if !address.ip().to_canonical().is_loopback() => {
                return Err(Problem::refused(format!(
                    "without TLS the API is served on loopback only, not on {address}"
                ))
                .hint("leave --insecure-http out, or listen on 127.0.0.1"));
            }
            Security::Plain => None,
            Security::Tls { folder, clients } => {
                let folder = match folder {
                    Some(folder) => folder.clone(),
                    None => own_certificates(own, address.ip())?,
                };
                let server = match clients {
                    ClientCertificates::Required => TlsServer::from_folder(&folder, *clients),
                    ClientCertificates::Waived => TlsServer::one_sided(&folder),
                };
                let server = server.map_err(|error| Problem::from_tls(&folder, &error))?;
                Some(server)
            }
        };
        let cannot = |error: std::io::Error| {
            let kind = if error.kind() == std::io::ErrorKind::AddrInUse { Kind::Refused } else { Kind::Failed };
            Problem::because(kind, format!("cannot listen on {address}"), &error)
        };
        let listener = TcpListener::bind(address).await.map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        Ok(Bound { listener, address, tls })
    }

    /// Where clients find it.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls.is_some() { "https" } else { "http" }, self.address)
    }

    /// Begins to answer.
    pub fn serve(self, router: Router) -> Network {
        let (closing, watched) = watch::channel(false);
        Network { closing, task: tokio::spawn(accept(self, router, watched)) }
    }
}

/// Finds or makes the certificates of this service: an authority, and a host under it.
fn own_certificates(folder: &Path, address: IpAddr) -> Result<PathBuf, Problem> {
    let cannot = |error: pki::PkiError| Problem::from_pki(folder, &error);
    match pki::create(folder) {
        Ok(()) | Err(pki::PkiError::Exists(_)) => {}
        Err(error) => return Err(cannot(error)),
    }
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let mut names = vec![OWN_NAME.to_owned(), "localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    if !address.is_unspecified() && !address.is_loopback() {
        names.push(address.to_string());
    }
    let usual = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    let hostname = hostname.trim();
    if !hostname.is_empty() && hostname.bytes().all(usual) && !names.iter().any(|name| name == hostname) {
        names.push(hostname.to_owned());
    }
    match pki::add_host(folder, &names.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(host) => {
            tracing::info!(folder = %host.display(), ?names, "made certificates; clients believe them by ca-cert.pem");
            Ok(host)
        }
        Err(pki::PkiError::HostExists(host)) => Ok(host),
        Err(error) => Err(cannot(error)),
    }
}

/// The API being served on the network.
#[derive(Debug)]
pub struct Network {
    closing: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Network {
    /// Takes no more clients and no more requests, and returns when those taken are answered.
    pub async fn finish(self) {
        self.closing.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the network listener ended badly");
        }
    }
}

async fn accept(bound: Bound, router: Router, mut closing: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            accepted = async {
                // It is never closed.
                let permit = room.clone().acquire_owned().await.ok();
                (permit, bound.listener.accept().await)
            } => accepted,
            _ = closing.wait_for(|closing| *closing) => break,
        };
        match accepted {
            (Some(permit), Ok((stream, peer))) => {
                let client =
                    Client { peer: peer.ip(), router: router.clone(), watcher: graceful.watcher(), _permit: permit };
                tokio::spawn(client.welcome(stream, bound.tls.clone()));
            }
            (_, Err(error)) => {
                tracing::warn!(%error, "cannot take a client of the API");
                tokio::time::sleep(BREATHER).await;
            }
            (None, Ok(_)) => break,
        }
    }
    drop(bound);
    graceful.shutdown().await;
}

struct Client {
    peer: IpAddr,
    router: Router,
    watcher: Watcher,
    _permit: OwnedSemaphorePermit,
}

impl Client {
    async fn welcome(self, stream: TcpStream, tls: Option<TlsServer>) {
        // Answers are small or streams; either way they are not to wait for more.
        let _ = stream.set_nodelay(true);
        let peer = self.peer;
        let Some(tls) = tls else { return self.answer(stream).await };
        // It looks at the files: certificates that change count without a restart.
        let Ok(config) = tokio::task::spawn_blocking(move || tls.config()).await else { return };
        match tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(config).accept(stream)).await {
            Ok(Ok(stream)) => self.answer(stream).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
        }
    }

    async fn answer(self, stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
        let Client { peer, router, watcher, _permit } = self;
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            router.clone().oneshot(request.map(Body::new))
        });
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(HEADERS_LEN_MAX);
        // A client that goes away is no error of ours.
        if let Err(error) = watcher.watch(server.serve_connection(TokioIo::new(stream), service)).await {
            tracing::debug!(%peer, %error, "a client went away");
        }
    }
}
