//! Server-sent events: the progress of a job, and exports that serve as long as somebody listens.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;

use crate::files::MountHold;
use crate::jobs::{Job, Outcome};
use crate::publish::Hold;

/// How often progress is told.
const INTERVAL: Duration = Duration::from_millis(200);

fn event(name: &'static str, data: &impl Serialize) -> Event {
    Event::default().event(name).json_data(data).unwrap_or_else(|_| Event::default().event("broken"))
}

/// `progress` events with the job as it stands, then one `ended`.
pub fn follow(job: Arc<Job>) -> Response {
    let outcome = job.watch();
    let events = stream::unfold(Some((job, outcome, false)), |state| async move {
        let (job, mut outcome, begun) = state?;
        if begun {
            // Either it is time to tell, or there is more to tell than progress.
            let _ = tokio::time::timeout(INTERVAL, outcome.wait_for(|outcome| *outcome != Outcome::Running)).await;
        }
        let view = job.view();
        if view.outcome == Outcome::Running {
            return Some((Ok::<_, Infallible>(event("progress", &view)), Some((job, outcome, true))));
        }
        Some((Ok(event("ended", &view)), None))
    });
    Sse::new(events).into_response()
}

/// One `mounted` event; then nothing until the folder is unmounted, by somebody else or because the listener goes away.
pub fn mounted(hold: MountHold) -> Response {
    let events = stream::unfold((hold, false), |(hold, told)| async move {
        if told {
            while !hold.has_ended() {
                tokio::time::sleep(INTERVAL).await;
            }
            return None;
        }
        let event = event("mounted", &hold.dir);
        Some((Ok::<_, Infallible>(event), (hold, true)))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(5))).into_response()
}

/// One `serving` event; then nothing for as long as the export serves, which is until the listener goes away.
pub fn hold(hold: Hold) -> Response {
    let events = stream::unfold((hold, false), |(hold, told)| async move {
        if told {
            return std::future::pending().await;
        }
        let event = event("serving", &hold.served);
        Some((Ok::<_, Infallible>(event), (hold, true)))
    });
    // A written line is how a dead listener is noticed.
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(5))).into_response()
}
