//! The API's socket: one that can stop without losing a client that has connected already.

use std::future::pending;
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use rustix::io::Errno;
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

/// How long to wait when the system has no descriptor for a client at present.
const BREATHER: Duration = Duration::from_millis(100);

/// The API being served on a socket.
#[derive(Debug)]
pub struct Listening {
    closing: watch::Sender<bool>,
    task: JoinHandle<()>,
    socket: PathBuf,
}

impl Listening {
    /// Serves `router` to those who connect to `listener`, which listens on `socket`.
    pub fn start(listener: UnixListener, socket: &Path, router: Router) -> Listening {
        let (closing, watched) = watch::channel(false);
        let (drained, all_taken) = oneshot::channel::<()>();
        let door = Door { listener, closing: watched, drained: Some(drained) };
        let task = tokio::spawn(async move {
            let serving = axum::serve(door, router).with_graceful_shutdown(async move {
                // A listener that is gone has nobody waiting either.
                let _ = all_taken.await;
            });
            if let Err(error) = serving.await {
                tracing::error!(%error, "the API has ended");
            }
        });
        Listening { closing, task, socket: socket.to_owned() }
    }

    /// Takes no more clients, and returns when everybody who had connected is answered.
    pub async fn finish(&mut self) {
        // A socket that is gone already is as good.
        let _ = std::fs::remove_file(&self.socket);
        self.closing.send_replace(true);
        if let Err(error) = (&mut self.task).await {
            tracing::error!(%error, "the API ended badly");
        }
    }
}

/// Accepts clients. When it is told to close, it accepts those who wait already, and then says so.
struct Door {
    listener: UnixListener,
    closing: watch::Receiver<bool>,
    drained: Option<oneshot::Sender<()>>,
}

impl Door {
    /// A client who waits, asked of the kernel itself: the runtime may not have heard of him yet.
    fn waiting(&self) -> io::Result<Option<UnixStream>> {
        match rustix::net::accept(&self.listener) {
            Ok(client) => {
                let client = StdStream::from(client);
                client.set_nonblocking(true)?;
                UnixStream::from_std(client).map(Some)
            }
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Listener for Door {
    type Io = UnixStream;
    type Addr = Option<SocketAddr>;

    async fn accept(&mut self) -> (UnixStream, Option<SocketAddr>) {
        loop {
            let accepted: Option<io::Result<Option<UnixStream>>> = tokio::select! {
                accepted = self.listener.accept() => Some(accepted.map(|(client, _)| Some(client))),
                _ = self.closing.wait_for(|closing| *closing) => None,
            };
            let accepted = accepted.unwrap_or_else(|| self.waiting());
            match accepted {
                Ok(Some(client)) => return (client, None),
                Ok(None) => {
                    if let Some(drained) = self.drained.take() {
                        // Nobody listens any more if the server has ended.
                        let _ = drained.send(());
                    }
                    return pending().await;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot take a client of the API");
                    tokio::time::sleep(BREATHER).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        self.listener.local_addr().map(Some)
    }
}
