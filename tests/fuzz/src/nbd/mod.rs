//! Both sides of the NBD protocol, over real sockets, and NBD URIs.

pub(crate) mod client;
pub(crate) mod server;

use std::cell::RefCell;
use std::future::Future;

use nbd_server::{ExportName, Listen, NbdUri};
use tokio::runtime::Runtime;

/// Runs to its end on this thread's own runtime, which keeps what was spawned on it.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    thread_local! {
        static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) };
    }
    RUNTIME.with_borrow_mut(|runtime| {
        let make = || tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.get_or_insert_with(|| make().unwrap_or_else(|error| panic!("no runtime: {error}")));
        runtime.block_on(future)
    })
}

fn name() -> ExportName {
    ExportName::new("disk").unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) fn uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(uri) = text.parse::<NbdUri>() {
        let written = uri.to_string();
        assert_eq!(written.parse().as_ref(), Ok(&uri), "{text:?} is written as {written:?}");
    }
    if let Ok(listen) = text.parse::<Listen>() {
        let written = listen.to_string();
        assert_eq!(written.parse::<Listen>().ok(), Some(listen), "{text:?} is written as {written:?}");
    }
    let _ = ExportName::new(text);
}

pub(crate) fn uri_seeds() -> Vec<Vec<u8>> {
    let good = [
        "nbd://localhost:10809/disk%200?x=y#z",
        "nbd://user@[::1]/",
        "nbd+unix:///disk0?socket=/run/a%20b.sock&x=1",
        "unix:/run/nbd.sock",
        "tcp:127.0.0.1:10809",
        "tcp:[::1]:1",
        "nbds://host/x",
    ];
    good.into_iter().map(|text| text.as_bytes().to_vec()).collect()
}
