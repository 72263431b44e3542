//! `serve`: one long-running process that takes up the recoveries of its state folder and answers the API.

use std::time::{Duration, Instant};

use crate::app::{App, Options};
use crate::problem::{Handling, Problem};
use crate::signals;

/// A service that another command started ends when it has had nothing to serve for this long.
const IDLE: Duration = Duration::from_secs(10);

/// How long a service in the background waits for its turn.
const TURN_MAX: Duration = Duration::from_secs(5);

/// How long requests may take to be answered when the service ends.
const GOODBYE: Duration = Duration::from_secs(2);

/// Serves until told to stop, or, in the background, until there is nothing left to serve.
pub async fn serve(options: &Options, background: bool) -> Result<(), Problem> {
    let since = Instant::now();
    let app = loop {
        let opening = options.clone();
        let opened = tokio::task::spawn_blocking(move || App::open(&opening, "serve"))
            .await
            .map_err(|error| Problem::failed("cannot open the repository", &error))?;
        match opened {
            // A command that hosted the API is about to end.
            Err(problem) if background && problem.handling == Handling::AskAgain && since.elapsed() < TURN_MAX => {
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
            opened => break opened?,
        }
    };
    // Exports first: guests wait for their disks, everybody else can wait a moment.
    app.recoveries.take_up().await;
    let mut listening = app.listen()?;
    tracing::info!(
        repository = %app.location.display(), socket = %app.state.socket().display(), pid = std::process::id(),
        "serving"
    );
    tokio::select! {
        () = signals::stop_signal() => tracing::info!("told to stop"),
        () = idle(&app), if background => tracing::info!("nothing left to serve"),
    }
    for job in app.jobs.running() {
        job.cancel();
    }
    // An export's listener does not go by itself.
    app.exports.close().await;
    if tokio::time::timeout(GOODBYE, listening.finish()).await.is_err() {
        tracing::warn!("some requests were not answered");
    }
    if app.recoveries.any_live() {
        tracing::warn!("recoveries stay as they are; their guests wait until Lifeboat runs again");
    }
    app.close().await;
    Ok(())
}

async fn idle(app: &App) {
    let mut since = Instant::now();
    while since.elapsed() < IDLE {
        tokio::time::sleep(Duration::from_millis(250)).await;
        if app.recoveries.any_live() || !app.busy_with().is_empty() {
            since = Instant::now();
        }
    }
}
