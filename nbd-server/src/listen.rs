//! Where a server listens: [`Listen`], and opening the socket without leaving a moment in which others could connect.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{TcpListener, UnixListener};

/// Connections the kernel keeps until they are accepted.
const BACKLOG: i32 = 128;

/// Longest path of a Unix socket that the kernel takes, in bytes.
pub const MAX_SOCKET_PATH: usize = 107;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A Unix socket, made for its owner only (mode 0600).
    Unix(PathBuf),
    /// An address; without TLS a loopback one. Port 0 takes a free one.
    Tcp(SocketAddr),
}

/// From where TCP connections without TLS may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlainTcp {
    Loopback,
    Everyone,
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The text is not `unix:PATH` or `tcp:HOST:PORT`.
    #[error("'{0}' is neither unix:PATH nor tcp:ADDRESS:PORT")]
    Syntax(String),
    /// NBD in the clear stays on this machine.
    #[error("{0} is not a loopback address; without TLS an export is served on this machine only")]
    NotLoopback(SocketAddr),
    /// The kernel bounds the length of a socket's path.
    #[error("the socket path {path} has {} bytes, at most {MAX_SOCKET_PATH} are possible", path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("{0} is in use by another server")]
    AddressInUse(Listen),
    /// There is a file that is not a socket; it is not touched.
    #[error("{path} exists and is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on {listen}")]
    Io {
        /// Where.
        listen: Listen,
        /// Why.
        source: io::Error,
    },
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Listen, ListenError> {
        let syntax = || ListenError::Syntax(text.to_owned());
        match text.split_once(':').ok_or_else(syntax)? {
            ("unix", path) if !path.is_empty() => Ok(Listen::Unix(PathBuf::from(path))),
            ("tcp", address) => {
                // The one name whose meaning does not depend on a resolver.
                let numeric = match address.strip_prefix("localhost:") {
                    Some(port) => format!("127.0.0.1:{port}"),
                    None => address.to_owned(),
                };
                Ok(Listen::Tcp(numeric.parse().map_err(|_| syntax())?))
            }
            _ => Err(syntax()),
        }
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
            Listen::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Socket {
    Unix { listener: UnixListener, _file: SocketFile },
    Tcp(TcpListener),
}

/// The socket's name in the file system; unlinked when dropped, unless somebody has put another in its place.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path); // it may be gone already
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some((found.dev(), found.ino()))
}

pub(crate) async fn open(listen: &Listen, plain_tcp: PlainTcp) -> Result<(Socket, Listen), ListenError> {
    match listen {
        Listen::Unix(path) => {
            let socket = unix(listen, path)?;
            Ok((socket, listen.clone()))
        }
        Listen::Tcp(address) => {
            if plain_tcp == PlainTcp::Loopback && !address.ip().is_loopback() {
                return Err(ListenError::NotLoopback(*address));
            }
            let failed = |source: io::Error| match source.kind() {
                io::ErrorKind::AddrInUse => ListenError::AddressInUse(listen.clone()),
                _ => ListenError::Io { listen: listen.clone(), source },
            };
            let socket = TcpListener::bind(address).await.map_err(failed)?;
            let local = Listen::Tcp(socket.local_addr().map_err(failed)?);
            Ok((Socket::Tcp(socket), local))
        }
    }
}

fn unix(listen: &Listen, path: &Path) -> Result<Socket, ListenError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(ListenError::PathTooLong { path: path.to_owned() });
    }
    let failed = |source: io::Error| ListenError::Io { listen: listen.clone(), source };
    remove_stale(listen, path)?;
    // Bound, made private, and only then open for connections: at no time can somebody else connect.
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|e| failed(e.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
    rustix::net::bind(&socket, &address).map_err(|error| match error {
        rustix::io::Errno::ADDRINUSE => ListenError::AddressInUse(listen.clone()),
        error => failed(error.into()),
    })?;
    let file = SocketFile { path: path.to_owned(), identity: identity(path) };
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(|e| failed(e.into()))?;
    rustix::net::listen(&socket, BACKLOG).map_err(|e| failed(e.into()))?;
    let listener = UnixListener::from_std(std::os::unix::net::UnixListener::from(socket)).map_err(failed)?;
    Ok(Socket::Unix { listener, _file: file })
}

/// Removes a socket file on which nobody listens, as a killed server leaves it.
fn remove_stale(listen: &Listen, path: &Path) -> Result<(), ListenError> {
    let failed = |source: io::Error| ListenError::Io { listen: listen.clone(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(ListenError::NotASocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(failed(error)),
        // A connection, or a queue that is full: somebody is there.
        _ => Err(ListenError::AddressInUse(listen.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        let unix: Listen = "unix:/run/a b.sock".parse().expect("unix");
        assert_eq!(
            (unix.clone(), unix.to_string().as_str()),
            (Listen::Unix("/run/a b.sock".into()), "unix:/run/a b.sock")
        );
        let tcp: Listen = "tcp:127.0.0.1:0".parse().expect("tcp");
        assert_eq!(tcp.to_string(), "tcp:127.0.0.1:0");
        assert_eq!("tcp:localhost:7".parse::<Listen>().expect("name").to_string(), "tcp:127.0.0.1:7");
        assert_eq!("tcp:[::1]:7".parse::<Listen>().expect("v6").to_string(), "tcp:[::1]:7");
        for bad in ["", "unix:", "/run/x", "tcp:127.0.0.1", "tcp:example.org:1", "udp:127.0.0.1:1"] {
            assert!(matches!(bad.parse::<Listen>(), Err(ListenError::Syntax(_))), "{bad}");
        }
    }

    #[tokio::test]
    async fn only_loopback_is_served_in_the_clear() {
        let listen = Listen::Tcp("0.0.0.0:0".parse().expect("an address"));
        assert!(matches!(open(&listen, PlainTcp::Loopback).await, Err(ListenError::NotLoopback(_))));
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket that nobody serves"));
        assert!(path.exists());
        let listen = Listen::Unix(path.clone());
        let (live, _) = open(&listen, PlainTcp::Loopback).await.expect("replaces it");
        assert!(matches!(open(&listen, PlainTcp::Loopback).await, Err(ListenError::AddressInUse(_))));
        let mode = std::fs::metadata(&path).expect("there").mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(live);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_file_in_the_way_is_kept_and_a_long_path_is_said_to_be_long() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("precious");
        std::fs::write(&path, "data").expect("written");
        assert!(matches!(
            open(&Listen::Unix(path.clone()), PlainTcp::Loopback).await,
            Err(ListenError::NotASocket { .. })
        ));
        assert!(path.exists());
        let long = folder.path().join("x".repeat(120));
        assert!(matches!(open(&Listen::Unix(long), PlainTcp::Loopback).await, Err(ListenError::PathTooLong { .. })));
    }

    #[tokio::test]
    async fn a_socket_put_in_our_place_survives_our_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("s");
        let (ours, _) = open(&Listen::Unix(path.clone()), PlainTcp::Loopback).await.expect("free");
        std::fs::remove_file(&path).expect("removed by somebody");
        let _other = std::os::unix::net::UnixListener::bind(&path).expect("free again");
        drop(ours);
        assert!(path.exists());
    }
}
