//! Watches over a recovery: what its VM does, its first words on the console, and the room for what it writes.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypervisor::{Machine, Status};

use super::one::Recovery;

/// How often the console file is looked at while it is empty.
const CONSOLE_POLL: Duration = Duration::from_millis(10);
/// After this long an empty console is no longer waited for.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(600);
/// How often a running VM and the overlay's file system are looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// A guest whose disk goes on failing is let go on this seldom at the most.
const RESUME_INTERVAL_MAX: Duration = Duration::from_secs(15);
/// Free bytes that let a guest stopped by a full file system go on.
const ROOM_TO_RESUME: u64 = 64 << 20;
/// Free bytes below which the operator is warned.
const ROOM_TO_WARN: u64 = 2 << 30;

/// Keeps what is shown of the VM true until it ends, and lets it go on when its disk can be written again.
pub(super) async fn vm(recovery: Arc<Recovery>, vm: Arc<dyn Machine>) {
    let mut pause = WATCH_INTERVAL;
    // Listened for all the while: an end that falls between two looks is not missed.
    let mut end = vm.wait_exit();
    loop {
        let exited = tokio::time::timeout(pause, &mut end).await.is_ok();
        if exited {
            tracing::info!(recovery = %recovery.name(), "the VM has ended");
            recovery.show(|shown| {
                shown.vm = Some("shut-off".to_owned());
                shown.pid = None;
            });
            return;
        }
        let Ok(status) = vm.status().await else { continue };
        let stopped = status == Status::IoError;
        recovery.show(|shown| shown.vm = Some(status.to_string()));
        if !stopped {
            pause = WATCH_INTERVAL;
        } else if free_bytes(recovery.dir()).is_some_and(|free| free > ROOM_TO_RESUME) {
            if pause == WATCH_INTERVAL {
                tracing::warn!(recovery = %recovery.name(), "the VM waits on a disk error; trying to let it go on");
            }
            if let Err(error) = vm.resume().await {
                tracing::error!(recovery = %recovery.name(), error = %crate::problem::chain(&error), "it does not");
            }
            // The request that failed is repeated and may fail again: not too often.
            pause = (pause * 2).min(RESUME_INTERVAL_MAX);
        }
    }
}

/// Looks for a VM that could not be asked, until it is found or known to have ended.
pub(super) async fn unreachable(recovery: Arc<Recovery>) {
    loop {
        tokio::time::sleep(WATCH_INTERVAL).await;
        if recovery.reach_again().await {
            return;
        }
    }
}

/// Notes when the guest first writes to its console.
pub(super) async fn console(recovery: Arc<Recovery>) {
    let since = Instant::now();
    let console = recovery.dir().join("console.log");
    while since.elapsed() < CONSOLE_PATIENCE {
        if fs::metadata(&console).is_ok_and(|file| file.len() > 0) {
            recovery.show(|shown| shown.timings.first_console_ms = Some(recovery.millis()));
            return;
        }
        tokio::time::sleep(CONSOLE_POLL).await;
    }
}

/// Warns when little room is left for the overlays.
pub(super) async fn room(recovery: Arc<Recovery>) {
    let mut warned = false;
    loop {
        tokio::time::sleep(WATCH_INTERVAL).await;
        let low = free_bytes(recovery.dir()).is_some_and(|free| free < ROOM_TO_WARN);
        if low && !warned {
            tracing::warn!(recovery = %recovery.name(), folder = %recovery.dir().display(), "little room is left for what the guest writes");
        }
        warned = low;
    }
}

fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}
