//! `/api/v1/events`: what happens, as it happens. Whoever listens is told of running jobs and of recoveries once, then of
//! each change. Each event has an id; whoever comes back with the last one as `Last-Event-ID` is told what he has missed,
//! or, if that is not known any more, `reset` and then how all stands now.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Shared;
use super::contract::EVENTS;
use super::extract::LastEvent;
use super::table::{Reach, Row, VIEWER};
use crate::access::Caller;
use crate::app::App;
use crate::events::{Following, Happened, Topic};
use crate::jobs::Outcome;
use crate::signals;

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::get("/api/v1/events", VIEWER, Reach::Judged, follow)
            .sends(EVENTS, "Tells what happens to jobs and recoveries, as it happens"),
    ]
}

/// A listener: who it is, how far it has been told, and what it is to be told next.
struct Listener {
    app: Arc<App>,
    caller: Caller,
    told: u64,
    newest: watch::Receiver<u64>,
    waiting: VecDeque<Event>,
}

/// Which jobs somebody is told of who knows nothing yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Jobs {
    Running,
    All,
}

impl Listener {
    fn sees(&self, event: &Happened) -> bool {
        self.caller.sees_any(event.machine.as_deref())
    }

    fn push(&mut self, number: u64, name: &str, thing: &Value) {
        let event = Event::default().id(self.app.events.id(number)).event(name).data(thing.to_string());
        self.waiting.push_back(event);
    }

    /// How all stands.
    fn begin(&mut self, jobs: Jobs) {
        // What changes while it is looked at is told twice.
        self.told = self.app.events.newest();
        let (recoveries, listed) = (self.app.recoveries.list(), self.app.jobs.list());
        for view in recoveries.into_iter().filter(|view| self.caller.sees(&view.machine)).collect::<Vec<_>>() {
            self.push(self.told, Topic::Recovery.name(), &serde_json::to_value(view).unwrap_or_default());
        }
        let wanted = |outcome: &Outcome| jobs == Jobs::All || *outcome == Outcome::Running;
        for view in listed.into_iter().filter(|view| wanted(&view.outcome)) {
            if self.caller.sees_any(view.machine.as_deref()) {
                self.push(self.told, Topic::Job.name(), &serde_json::to_value(view).unwrap_or_default());
            }
        }
    }

    fn reset(&mut self) {
        self.push(self.app.events.newest(), "reset", &json!({}));
        self.begin(Jobs::All);
    }

    /// What has happened since it was told last.
    fn go_on(&mut self) {
        match self.app.events.after(self.told) {
            Following::Lost => self.reset(),
            Following::All(events) => {
                for event in events {
                    self.told = event.number;
                    if self.sees(&event) {
                        self.push(event.number, event.topic.name(), &event.thing);
                    }
                }
            }
        }
    }
}

async fn follow(State(app): Shared, caller: Caller, LastEvent(last): LastEvent) -> Response {
    let newest = app.events.watch();
    let last = last.map(|id| app.events.number(&id));
    let mut listener = Listener { app, caller, told: 0, newest, waiting: VecDeque::new() };
    match last {
        None => listener.begin(Jobs::Running),
        Some(None) => listener.reset(),
        Some(Some(number)) => {
            listener.told = number;
            listener.go_on();
        }
    }
    let events = stream::unfold(listener, |mut listener| async move {
        loop {
            if let Some(event) = listener.waiting.pop_front() {
                return Some((Ok::<_, Infallible>(event), listener));
            }
            tokio::select! {
                // The sender is the application's, and outlives its listeners.
                changed = listener.newest.changed() => changed.ok()?,
                () = signals::stop_signal() => return None,
            }
            listener.go_on();
        }
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(10))).into_response()
}
