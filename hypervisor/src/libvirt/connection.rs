//! A connection to libvirt, shared by all that use the same URI.
//!
//! Every call of libvirt blocks, some for as long as a guest or a network likes. So each runs in a thread of its own,
//! which outlives a caller that no longer waits: what was begun is finished or refused by libvirt, never half done by
//! us. A connection that broke is opened again by the next call.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{broadcast, oneshot};
use tracing::{error, info, warn};
use virt::connect::Connect;

use super::error::LibvirtError;
use super::ffi::{self, Fault, Happening};

/// Calls that hang before new ones are refused.
const MAX_CALLS: usize = 64;
/// Seconds between two signs of life from a daemon that is silent, and how many may be missing.
const KEEP_ALIVE: (i32, u32) = (5, 4);
const EVENTS_MAX: usize = 1024;

/// A connection to libvirt.
#[derive(Debug)]
pub struct Connection {
    uri: String,
    open: Mutex<Option<Arc<Open>>>,
    events: broadcast::Sender<(String, Happening)>,
    calls: AtomicUsize,
}

/// An open connection; dropped, it is closed.
#[derive(Debug)]
struct Open {
    connect: Connect,
    subscriptions: ffi::Subscriptions,
}

impl Connection {
    /// The connection to `uri`, which is opened by the first call.
    pub fn to(uri: &str) -> Result<Arc<Connection>, LibvirtError> {
        static KNOWN: OnceLock<Mutex<HashMap<String, Weak<Connection>>>> = OnceLock::new();
        let uri = check(uri)?;
        let mut known = KNOWN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, connection| connection.strong_count() > 0);
        if let Some(connection) = known.get(&uri).and_then(Weak::upgrade) {
            return Ok(connection);
        }
        let connection = Arc::new(Connection {
            uri: uri.clone(),
            open: Mutex::new(None),
            events: broadcast::channel(EVENTS_MAX).0,
            calls: AtomicUsize::new(0),
        });
        known.insert(uri, Arc::downgrade(&connection));
        Ok(connection)
    }

    /// Where it goes.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Whether libvirt runs on this host, and so sees the same files and sockets.
    pub fn is_local(&self) -> bool {
        is_local(&self.uri)
    }

    /// What happens to all domains from now on, by their UUIDs.
    pub fn events(&self) -> broadcast::Receiver<(String, Happening)> {
        self.events.subscribe()
    }

    /// Runs `work`, which is called `what` in errors, in a thread of its own.
    pub async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        what: &'static str,
        deadline: Duration,
        work: impl FnOnce(&Connect) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let calls = self.calls.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(self.clone());
        if calls >= MAX_CALLS {
            return Err(LibvirtError::Busy { uri: self.uri.clone(), calls });
        }
        let (sender, answer) = oneshot::channel();
        let spawned = std::thread::Builder::new().name("libvirt".to_owned()).spawn(move || {
            let this = &counted.0;
            let result = this.open().and_then(|open| {
                work(&open.connect).map_err(|Fault { reason, message }| LibvirtError::Refused { what, reason, message })
            });
            // Nobody may wait any more.
            drop(sender.send(result));
            drop(counted);
        });
        if let Err(error) = spawned {
            return Err(LibvirtError::Connect { uri: self.uri.clone(), message: format!("no thread: {error}") });
        }
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(result)) => result,
            // The thread panicked, which the binding does on arguments that are refused before they come here.
            Ok(Err(_)) => {
                Err(LibvirtError::Connect { uri: self.uri.clone(), message: "the call broke off".to_owned() })
            }
            Err(_) => Err(LibvirtError::Silent { uri: self.uri.clone(), what, waited: deadline }),
        }
    }

    /// The open connection, opened again if it broke. Blocks.
    fn open(&self) -> Result<Arc<Open>, LibvirtError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = open.as_ref().filter(|open| open.connect.is_alive().unwrap_or(false)) {
            return Ok(open.clone());
        }
        if open.take().is_some() {
            info!(uri = self.uri, "connection to libvirt broke, opening it again");
        }
        run_event_loop();
        let connect = Connect::open(Some(&self.uri))
            .map_err(|error| LibvirtError::Connect { uri: self.uri.clone(), message: error.message().to_owned() })?;
        if let Err(error) = connect.set_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1) {
            // Drivers that live in this process have no daemon that could be silent.
            info!(uri = self.uri, error = error.message(), "this libvirt is not watched for signs of life");
        }
        let events = self.events.clone();
        let subscriptions = ffi::subscribe(&connect, move |uuid, happening| {
            // An error only says that nobody listens at the moment.
            drop(events.send((uuid, happening)));
        });
        let opened = Arc::new(Open { connect, subscriptions });
        *open = Some(opened.clone());
        Ok(opened)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        ffi::unsubscribe(&self.connect, &self.subscriptions);
        if let Err(error) = self.connect.close() {
            warn!(error = error.message(), "cannot close a connection to libvirt");
        }
    }
}

struct Counted(Arc<Connection>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Starts the loop that all connections get their events and signs of life through. It has to be there before the first
/// is opened, and lives as long as the process.
fn run_event_loop() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| {
        virt::error::clear_error_callback(); // it would write to standard error
        if let Err(error) = virt::event::event_register_default_impl() {
            error!(error = error.message(), "libvirt's events cannot be had; domains are asked instead");
            return;
        }
        let looping = std::thread::Builder::new().name("libvirt-events".to_owned()).spawn(|| {
            loop {
                if let Err(error) = virt::event::event_run_default_impl() {
                    error!(error = error.message(), "libvirt's event loop stumbles");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        });
        if let Err(error) = looping {
            error!(%error, "libvirt's events cannot be had; domains are asked instead");
        }
    });
}

/// Accepts a URI of QEMU's driver, and keeps ssh from asking a person who is not there.
fn check(uri: &str) -> Result<String, LibvirtError> {
    let wrong = || LibvirtError::Uri { uri: uri.to_owned() };
    let (scheme, rest) = uri.split_once("://").ok_or_else(wrong)?;
    let transport = match scheme.split_once('+') {
        None if scheme == "qemu" => "",
        Some(("qemu", transport)) => transport,
        _ => return Err(wrong()),
    };
    if rest.is_empty() || uri.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(wrong());
    }
    if matches!(transport, "ssh" | "libssh" | "libssh2") && !rest.contains("no_tty=") {
        let joint = if rest.contains('?') { '&' } else { '?' };
        return Ok(format!("{uri}{joint}no_tty=1"));
    }
    Ok(uri.to_owned())
}

fn is_local(uri: &str) -> bool {
    let Some((_, rest)) = uri.split_once("://") else { return false };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match host.rsplit_once(':') {
        Some((host, port)) if port.chars().all(|c| c.is_ascii_digit()) => host,
        _ => host,
    };
    matches!(host, "" | "localhost" | "127.0.0.1" | "[::1]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uris_of_the_qemu_driver_are_taken() {
        for uri in ["qemu:///system", "qemu:///session?socket=/x", "qemu+tcp://h:1/system", "qemu+unix:///system"] {
            assert_eq!(check(uri).ok().as_deref(), Some(uri));
        }
        assert_eq!(check("qemu+ssh://r@h/system").ok().as_deref(), Some("qemu+ssh://r@h/system?no_tty=1"));
        assert_eq!(
            check("qemu+ssh://h/system?socket=/s").ok().as_deref(),
            Some("qemu+ssh://h/system?socket=/s&no_tty=1")
        );
        for uri in ["", "qemu", "xen:///", "qemu://", "test:///default", "qemu:///a b", "qemu:///\n", "qemux:///system"]
        {
            assert!(check(uri).is_err(), "{uri}");
        }
    }

    #[test]
    fn a_host_in_the_uri_is_another_host() {
        for uri in [
            "qemu:///system",
            "qemu+ssh://root@localhost:22/system",
            "qemu+tcp://[::1]:16509/system",
            "qemu+unix:///session?socket=/x",
        ] {
            assert!(is_local(uri), "{uri}");
        }
        for uri in ["qemu+ssh://web/system", "qemu+tcp://10.0.0.1/system", "qemu+tls://[fe80::1]/system"] {
            assert!(!is_local(uri), "{uri}");
        }
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_an_error_that_names_it() {
        let connection = Connection::to("qemu+unix:///system?socket=/nowhere/libvirt-sock").expect("it is a URI");
        let refused = connection.call("list", Duration::from_secs(20), |_| Ok(())).await;
        let text = refused.expect_err("there is none").to_string();
        assert!(text.contains("/nowhere/libvirt-sock"), "{text}");
    }

    #[tokio::test]
    async fn a_call_that_hangs_is_given_up() {
        let connection = Connection::to("qemu+unix:///system?socket=/nowhere/hang").expect("it is a URI");
        // Another call that hangs has the connection.
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (holding, (begins, mut begun)) = (connection.clone(), broadcast::channel(1));
        let hanging = std::thread::spawn(move || {
            let _open = holding.open.lock().expect("nobody panicked");
            drop(begins.send(()));
            held.recv()
        });
        begun.recv().await.expect("it says so");
        let waited = connection.call("list", Duration::from_millis(20), |_| Ok(())).await;
        assert!(matches!(waited, Err(LibvirtError::Silent { .. })), "{waited:?}");
        assert_eq!(connection.calls.load(Ordering::Relaxed), 1);
        drop(release);
        drop(hanging.join());
        while connection.calls.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
