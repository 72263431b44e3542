//! [`Server`] and [`Listener`]: accepting connections and ending in order.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use tracing::Instrument;

use crate::control::{Control, HalfOpen, Membership, Registry};
use crate::handshake::negotiate;
use crate::limits::Limits;
use crate::listen::{self, Listen, ListenError, PlainTcp, Socket};
use crate::name::ExportName;
use crate::stream::Stream;
use crate::table::ExportTable;
use crate::tls::TlsServer;
use crate::transmission::{self, Connection, Shared};
use crate::uri::{NbdUri, UriTls};

/// Pause after a failed accept: out of file descriptors, it would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A client that has gone without a word is noticed after this long, so that it does not keep its place for ever. One
/// that is there and asks for nothing may stay: a guest can be idle for days.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

/// Serves the exports of a table. One server may listen on several sockets; its limits hold for all of them together,
/// but for the number of connections, which counts for each listener.
#[derive(Clone)]
pub struct Server {
    table: Arc<ExportTable>,
    shared: Arc<Shared>,
    tls: Option<TlsServer>,
    plain_tcp: PlainTcp,
}

/// A socket on which a server listens. It serves once [`Listener::serve`] runs; dropped before, it is closed and its
/// file removed.
pub struct Listener {
    server: Server,
    socket: Socket,
    local: Listen,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("exports", &self.table).finish_non_exhaustive()
    }
}

impl Server {
    /// A server for the exports of a table, which may change at any time.
    pub fn new(table: Arc<ExportTable>, limits: Limits) -> Server {
        Server { table, shared: Arc::new(Shared::new(limits)), tls: None, plain_tcp: PlainTcp::Loopback }
    }

    /// A server for another table that shares the limits of this one: what exports of one cost, those of the other do
    /// without, each within its share. TLS and addresses are its own.
    pub fn beside(&self, table: Arc<ExportTable>) -> Server {
        Server { table, shared: Arc::clone(&self.shared), tls: None, plain_tcp: PlainTcp::Loopback }
    }

    /// Serves nothing without TLS, on any socket.
    pub fn with_tls(self, tls: TlsServer) -> Server {
        Server { tls: Some(tls), ..self }
    }

    /// Lets other machines connect without TLS. Who can reach the address can read and write every export, and who can
    /// listen on the network sees all that travels.
    pub fn with_plain_tcp_for_everyone(self) -> Server {
        Server { plain_tcp: PlainTcp::Everyone, ..self }
    }

    /// Opens a socket. Clients can connect from now on and are served when [`Listener::serve`] runs.
    pub async fn bind(&self, listen: &Listen) -> Result<Listener, ListenError> {
        let (socket, local) =
            listen::open(listen, if self.tls.is_some() { PlainTcp::Everyone } else { self.plain_tcp }).await?;
        Ok(Listener { server: self.clone(), socket, local })
    }
}

impl Listener {
    /// Where it listens; the port is the real one.
    pub fn local(&self) -> &Listen {
        &self.local
    }

    /// The URI of an export on this listener.
    pub fn uri(&self, export: &ExportName) -> String {
        let uri = match &self.local {
            Listen::Unix(path) => NbdUri::unix(&std::path::absolute(path).unwrap_or_else(|_| path.clone()), export),
            Listen::Tcp(address) => NbdUri::tcp(address.ip().to_string(), address.port(), export),
        };
        let uri = match &self.server.tls {
            Some(_) => uri.with_tls(UriTls::default()),
            None => uri,
        };
        uri.to_string()
    }

    /// Serves until `shutdown` resolves, then stops accepting, lets every connection finish the requests it has in
    /// flight, flushes the exports that can be written to, removes the socket's file, and returns.
    pub async fn serve(self, shutdown: impl Future) {
        let connections: Arc<Registry> = Arc::default();
        let half_open: Arc<HalfOpen> = Arc::default();
        let Listener { server, socket, local } = self;
        tracing::info!(listen = %local, "serving NBD");
        {
            tokio::pin!(shutdown);
            let mut number = 0_u64;
            loop {
                let accepted = tokio::select! {
                    _ = &mut shutdown => break,
                    accepted = accept(&socket) => accepted,
                };
                match accepted {
                    Ok(stream) => {
                        number += 1;
                        server.start(stream, &connections, &half_open, number);
                    }
                    Err(error) => {
                        tracing::warn!(listen = %local, %error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
        drop(socket);
        connections.close();
        connections.emptied().await;
        server.flush().await;
        tracing::info!(listen = %local, "stopped serving NBD");
    }
}

impl Server {
    /// A new client takes the place of the oldest that is still in its handshake, if there is no other: whoever only
    /// connects keeps nobody out.
    fn start(&self, stream: Stream, connections: &Arc<Registry>, half_open: &Arc<HalfOpen>, number: u64) {
        let control = Arc::new(Control::default());
        let max = self.shared.limits.connections;
        let membership = connections.join(&control, max).or_else(|| {
            tracing::warn!(max, "too many connections, closing the oldest that is still in its handshake");
            // What is told to end does so at once; the bound is for the moment until then.
            half_open.end_oldest().then(|| connections.join(&control, max.saturating_mul(2))).flatten()
        });
        let Some(membership) = membership else {
            tracing::warn!(max, "too many connections, closing the newest");
            return;
        };
        let opening = half_open.enter(number, &control);
        let span = tracing::info_span!("nbd", connection = number);
        let server = self.clone();
        tokio::spawn(async move { server.connection(stream, control, membership, opening).await }.instrument(span));
    }

    async fn connection(
        self,
        mut stream: Stream,
        control: Arc<Control>,
        membership: Membership,
        opening: crate::control::Opening,
    ) {
        let negotiated = tokio::select! {
            () = self.out_of_time(&control) => return,
            negotiated = tokio::time::timeout(
                self.shared.limits.handshake,
                negotiate(&mut stream, self.tls.as_ref(), &self.table, &control),
            ) => negotiated,
        };
        let outcome = match negotiated {
            Ok(Ok(Some(outcome))) => outcome,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => {
                tracing::debug!(error = %chain(&error), "handshake failed");
                return;
            }
            Err(_) => {
                tracing::debug!("handshake took too long");
                return;
            }
        };
        drop(opening);
        let name = outcome.negotiated.published.name.clone();
        tracing::debug!(export = %name, style = ?outcome.negotiated.style, "connected");
        let connection = Connection::new(stream, control, outcome.negotiated);
        transmission::run(connection, self.shared, outcome.membership).await;
        tracing::debug!(export = %name, "disconnected");
        drop(membership);
    }

    /// When a handshake is cut off: at once for somebody else's sake, and at the end of the server after it has had time
    /// to refuse the option in hand.
    async fn out_of_time(&self, control: &Control) {
        control.stopped().await;
        if !control.is_evicted() {
            tokio::time::sleep(self.shared.limits.goodbye).await;
        }
    }

    /// Makes durable what was written, so that the end of a server is as good as a FLUSH.
    async fn flush(&self) {
        let exports = self.table.published();
        let flushed = tokio::task::spawn_blocking(move || {
            for published in exports.iter().filter(|published| !published.read_only) {
                if let Err(error) = published.export.flush() {
                    tracing::error!(export = %published.name, %error, "cannot flush an export at the end of its server");
                }
            }
        });
        if flushed.await.is_err() {
            tracing::error!("an export panicked in its last flush");
        }
    }
}

async fn accept(socket: &Socket) -> io::Result<Stream> {
    match socket {
        Socket::Unix { listener, .. } => Ok(Stream::unix(listener.accept().await?.0)),
        Socket::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            sockopt::set_socket_keepalive(&stream, true)?;
            sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
            sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_INTERVAL)?;
            sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
            Stream::tcp(stream)
        }
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
