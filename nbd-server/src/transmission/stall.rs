//! [`StallWatch`]: when a client has taken nothing for too long.

use std::pin::Pin;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// Notices that a client has taken nothing for a while.
pub(super) struct StallWatch {
    period: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
    written: u64,
}

impl StallWatch {
    pub(super) fn new(period: Duration) -> StallWatch {
        StallWatch { period, sleep: None, written: 0 }
    }

    /// Returns each time a period has passed in which `written` did not change.
    pub(super) async fn expired(&mut self, written: u64) {
        if self.sleep.is_none() || self.written != written {
            self.written = written;
            self.sleep = None;
        }
        let deadline = Instant::now() + self.period;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        sleep.as_mut().await;
        self.sleep = None;
    }
}
