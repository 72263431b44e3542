//! SIGINT and SIGTERM, counted from the start of the program on, so that none is missed between two waits.

use std::sync::OnceLock;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::problem::Problem;

static STOPS: OnceLock<watch::Receiver<u64>> = OnceLock::new();

/// Begins to count. From here on the signals no longer end the program by themselves.
pub fn listen() -> Result<(), Problem> {
    let cannot = |error: std::io::Error| Problem::failed("cannot listen for signals", &error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let (count, stops) = watch::channel(0);
    if STOPS.set(stops).is_err() {
        return Ok(());
    }
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            count.send_modify(|count| *count += 1);
        }
    });
    Ok(())
}

/// How many signals have come.
pub fn count() -> u64 {
    STOPS.get().map_or(0, |stops| *stops.borrow())
}

/// Waits until more than `seen` signals have come.
pub async fn more_than(seen: u64) {
    let Some(mut stops) = STOPS.get().cloned() else { return std::future::pending().await };
    if stops.wait_for(|count| *count > seen).await.is_err() {
        std::future::pending().await
    }
}

/// Waits until the program is told to stop, or returns at once if it was.
pub async fn stop_signal() {
    more_than(0).await;
}
