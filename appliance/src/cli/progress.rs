//! Follows a job: a progress bar on a terminal, nothing elsewhere; an interrupt cancels it.

use std::io::IsTerminal;
use std::time::Duration;

use axum::http::Method;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::client::Client;
use super::connect::NOTHING;
use super::render;
use crate::jobs::{JobView, Outcome, ProgressView};
use crate::problem::{Kind, Problem};
use crate::signals::stop_signal;

/// Starts a job and follows it to its result.
pub async fn run(client: &Client, path: &str, request: &impl Serialize) -> Result<serde_json::Value, Problem> {
    let job: JobView = client.call(Method::POST, path, Some(request)).await?;
    let path = format!("/api/v1/jobs/{}", job.id);
    let mut events = client.stream(Method::GET, &format!("{path}/events"), NOTHING).await?;
    let bar = bar(&job.kind);
    let mut begun = false;
    let mut cancelled = false;
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            () = stop_signal(), if !cancelled => {
                cancelled = true;
                let _: JobView = client.call(Method::DELETE, &path, NOTHING).await?;
                continue;
            }
        };
        let Some((_, data)) = event else {
            return Err(Problem::new(Kind::Failed, format!("the service went away during the {}", job.kind)));
        };
        let view: JobView =
            serde_json::from_str(&data).map_err(|error| Problem::failed("cannot read the job's progress", &error))?;
        if view.progress.total > 0 {
            if !begun {
                bar.enable_steady_tick(Duration::from_millis(200));
                begun = true;
            }
            show(&bar, view.progress);
        }
        match view.outcome {
            Outcome::Running => {}
            Outcome::Done { result } => {
                bar.finish_and_clear();
                return Ok(result);
            }
            Outcome::Interrupted => {
                bar.finish_and_clear();
                let title = format!("job {} ({} of {}) was interrupted", view.id, view.kind, view.subject);
                return Err(Problem::new(Kind::Failed, title).hint("start it again"));
            }
            Outcome::Failed { problem } => {
                bar.finish_and_clear();
                return Err(problem);
            }
        }
    }
}

fn bar(kind: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(0).with_message(kind.to_owned());
    let style = "{msg} [{bar:30}] {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left  {prefix}";
    match ProgressStyle::with_template(style) {
        Ok(style) => bar.set_style(style.progress_chars("=> ")),
        Err(error) => tracing::debug!(%error, "the progress bar's style is wrong"),
    }
    bar
}

fn show(bar: &ProgressBar, progress: ProgressView) {
    bar.set_length(progress.total);
    bar.set_position(progress.done);
    bar.set_prefix(format!("read {}, stored {}", render::bytes(progress.read), render::bytes(progress.stored)));
}
