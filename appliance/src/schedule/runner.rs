//! Begins runs of policies when they are due, and looks after what somebody has to know.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::alerts;
use super::plan::Verdict;
use super::rounds::Rounds;
use super::{Run, RunResult, ScheduleView, Schedules};
use crate::app::App;
use crate::problem::Problem;

/// The clock may be set, so nobody sleeps for longer.
const LOOK: Duration = Duration::from_secs(30);
/// How often machines and file systems are looked after.
const WATCH: Duration = Duration::from_secs(60);
/// Runs what is due, for as long as it is polled.
pub async fn run(schedules: Arc<Schedules>, app: Arc<App>) {
    let watch = async {
        loop {
            alerts::watch(&schedules.alerts, &schedules.policies, &app, Utc::now()).await;
            tokio::time::sleep(WATCH).await;
        }
    };
    let work = async {
        loop {
            let now = schedules.clock.now();
            let names: Vec<String> = schedules.policies.keys().cloned().collect();
            let waits = names.iter().map(|name| step(&schedules, &app, name, now));
            let wait = schedules.clock.real(waits.min().unwrap_or(LOOK)).min(LOOK);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = schedules.changed.notified() => {}
            }
        }
    };
    tokio::join!(watch, work);
}

/// Begins or skips what is due, and returns how long there is nothing to do.
fn step(schedules: &Arc<Schedules>, app: &Arc<App>, name: &str, now: DateTime<Utc>) -> Duration {
    let Some(policy) = schedules.policies.get(name) else { return LOOK };
    loop {
        let verdict = {
            let kept = schedules.lock();
            let Some(kept) = kept.get(name) else { return LOOK };
            policy.plan.decide(name, kept.past(), kept.is_running(), now)
        };
        match verdict {
            Verdict::Wait(until) => return (until - now).to_std().unwrap_or_default().max(Duration::from_millis(10)),
            Verdict::Never => return LOOK,
            Verdict::Run(due) => {
                // It runs already only if somebody was faster.
                let _ = begin(schedules, app, name, Some(due));
                return Duration::from_millis(10);
            }
            Verdict::Skip(due, why) => {
                tracing::warn!(policy = name, %due, why, "skipped");
                schedules.change(name, |kept| {
                    kept.handled = due;
                    kept.skipped = Some((due, why.to_owned()));
                });
            }
        }
    }
}

/// Begins a run: for a time that is due, or because somebody asks for it.
pub fn begin(
    schedules: &Arc<Schedules>,
    app: &Arc<App>,
    name: &str,
    due: Option<DateTime<Utc>>,
) -> Result<ScheduleView, Problem> {
    let Some(policy) = schedules.policies.get(name).cloned() else { return Err(Schedules::missing(name)) };
    let now = schedules.clock.now();
    let begun = schedules.change(name, |kept| {
        if kept.is_running() {
            return false;
        }
        kept.handled_before = Some(kept.handled);
        kept.handled = due.unwrap_or(kept.handled);
        kept.last = Some(Run { due, started: now, ended: None, result: RunResult::Running, steps: Vec::new() });
        true
    });
    if begun != Some(true) {
        return Err(Problem::refused(format!("policy {name} runs already"))
            .hint("`lifeboat schedule list` shows how far it is"));
    }
    tracing::info!(policy = name, ?due, "a run begins");
    tokio::spawn(Rounds::new(schedules, app, name, policy).run());
    schedules.view(name)
}
