//! `/api/v1/events`: what happens, as it happens. Whoever listens is told of running jobs and of recoveries once, then of
//! each change of their state.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};

use super::Shared;
use super::table::{Reach, Row, VIEWER};
use crate::access::Caller;
use crate::app::App;
use crate::jobs::Outcome;
use crate::signals;

/// How often is looked.
const LOOK: Duration = Duration::from_millis(500);

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![Row::get("/api/v1/events", VIEWER, Reach::Judged, follow)]
}

/// What was told last: of each thing its state, by name of the event and of the thing.
#[derive(Debug, Default)]
struct Told(BTreeMap<(&'static str, String), String>);

/// A thing now: name of the event, name of the thing, its state, all of it.
type Now = (&'static str, String, String, Value);

impl Told {
    /// What has changed. Things that are gone are told as such.
    fn changes(&mut self, now: Vec<Now>) -> Vec<(&'static str, Value)> {
        let mut changes = Vec::new();
        let mut before = std::mem::take(&mut self.0);
        for (event, name, state, value) in now {
            let known = before.remove(&(event, name.clone()));
            if known.as_ref() != Some(&state) {
                changes.push((event, value));
            }
            self.0.insert((event, name), state);
        }
        // Jobs that are no longer listed ended long ago.
        let gone = before.into_keys().filter(|(event, _)| *event == "recovery");
        changes.extend(gone.map(|(event, name)| (event, json!({ "name": name, "state": "gone" }))));
        changes
    }
}

fn look(app: &App, caller: &Caller) -> Vec<Now> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let recoveries = app.recoveries.list().into_iter().filter(|view| caller.sees(&view.machine)).map(|view| {
        let name = view.name.clone();
        let vm = view.vm.clone().unwrap_or_default();
        let value = serde_json::to_value(view).unwrap_or_default();
        ("recovery", name, format!("{} {vm}", text(&value["state"])), value)
    });
    let jobs = app.jobs.list().into_iter().filter(|view| caller.sees_any(view.machine.as_deref()));
    let jobs = jobs.map(|view| {
        let id = view.id.to_string();
        let value = serde_json::to_value(view).unwrap_or_default();
        ("job", id, text(&value["state"]), value)
    });
    recoveries.chain(jobs).collect()
}

async fn follow(State(app): Shared, caller: Caller) -> Response {
    let mut told = Told::default();
    // What ended before somebody listened is in the list of jobs.
    for job in app.jobs.list().into_iter().filter(|job| job.outcome != Outcome::Running) {
        let state =
            serde_json::to_value(&job.outcome).map(|value| value["state"].as_str().unwrap_or_default().to_owned());
        told.0.insert(("job", job.id.to_string()), state.unwrap_or_default());
    }
    let begin = told.changes(look(&app, &caller));
    let waiting: VecDeque<(&'static str, Value)> = begin.into();
    let events = stream::unfold((app, caller, told, waiting), |(app, caller, mut told, mut waiting)| async move {
        loop {
            if let Some((name, value)) = waiting.pop_front() {
                let event = Event::default().event(name).data(value.to_string());
                return Some((Ok::<_, Infallible>(event), (app, caller, told, waiting)));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = signals::stop_signal() => return None,
            }
            waiting.extend(told.changes(look(&app, &caller)));
        }
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(10))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(things: &[(&'static str, &str, &str)]) -> Vec<Now> {
        things.iter().map(|(event, name, state)| (*event, (*name).into(), (*state).into(), json!(state))).collect()
    }

    #[test]
    fn only_changes_are_told_and_what_goes() {
        let mut told = Told::default();
        let both = [("job", "1", "running"), ("recovery", "web01", "running")];
        assert_eq!(told.changes(now(&both)).len(), 2);
        assert_eq!(told.changes(now(&both)), []);
        let done = [("job", "1", "done"), ("recovery", "web01", "running")];
        assert_eq!(told.changes(now(&done)), [("job", json!("done"))]);
        let gone = told.changes(now(&[]));
        assert_eq!(gone, [("recovery", json!({ "name": "web01", "state": "gone" }))]);
    }
}
