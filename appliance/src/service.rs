//! `serve`: one long-running process that takes up the recoveries of its state folder and answers the API.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::api::network::{Bound, NetworkOptions};
use crate::app::{App, Options};
use crate::problem::{Handling, Problem};
use crate::schedule::alerts::Alerts;
use crate::schedule::clock::Clock;
use crate::schedule::policy::{AlertsConfig, HooksConfig, Policy};
use crate::schedule::{Schedules, hooks, runner};
use crate::signals;

/// A service that another command started ends when it has had nothing to serve for this long.
const IDLE: Duration = Duration::from_secs(10);

/// How long a service in the background waits for its turn.
const TURN_MAX: Duration = Duration::from_secs(5);

/// How long requests may take to be answered when the service ends.
const GOODBYE: Duration = Duration::from_secs(2);

/// What a service is told.
#[derive(Debug, Clone, Default)]
pub struct ServiceOptions {
    /// Another command started it: it ends when there is nothing left to serve.
    pub background: bool,
    /// Where it listens besides its socket.
    pub network: Option<NetworkOptions>,
    /// What it does by itself.
    pub policies: BTreeMap<String, Policy>,
    /// Who is told what somebody has to know.
    pub alerts: AlertsConfig,
    /// Which programs are told of what happens.
    pub hooks: HooksConfig,
    /// How many times faster than the host's the clock of policies runs.
    pub clock_speed: u32,
}

/// Serves until told to stop, or, in the background, until there is nothing left to serve. `tell` is told where clients
/// find it on the network.
pub async fn serve(options: &Options, service: &ServiceOptions, tell: impl FnOnce(&str)) -> Result<(), Problem> {
    let background = service.background;
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
    let bound = match &service.network {
        Some(network) => Some(Bound::new(network, &app.state.tls()).await?),
        None => None,
    };
    // Exports first: guests wait for their disks, everybody else can wait a moment.
    let begin = app.events.newest();
    app.recoveries.take_up().await;
    let hooks = tokio::spawn(hooks::run(app.clone(), service.hooks.clone(), begin));
    let schedules = schedules(&app, service);
    let mut listening = app.listen()?;
    tracing::info!(
        repository = %app.location.display(), socket = %app.state.socket().display(), pid = std::process::id(),
        "serving"
    );
    let network = bound.map(|bound| {
        tracing::info!(url = bound.url(), "serving on the network");
        tell(&bound.url());
        bound.serve(crate::api::strangers(&app))
    });
    tokio::select! {
        () = signals::stop_signal() => tracing::info!("told to stop"),
        () = idle(&app), if background => tracing::info!("nothing left to serve"),
    }
    if let Some(schedules) = schedules {
        schedules.abort();
    }
    hooks.abort();
    for job in app.jobs.running() {
        job.cancel();
    }
    // An export's listener does not go by itself.
    app.exports.close().await;
    let finished = async {
        let network = async {
            if let Some(network) = network {
                network.finish().await;
            }
        };
        tokio::join!(listening.finish(), network);
    };
    if tokio::time::timeout(GOODBYE, finished).await.is_err() {
        tracing::warn!("some requests were not answered");
    }
    if app.recoveries.any_live() {
        tracing::warn!("recoveries stay as they are; their guests wait until Lifeboat runs again");
    }
    app.close().await;
    Ok(())
}

/// Begins to run policies.
fn schedules(app: &Arc<App>, service: &ServiceOptions) -> Option<tokio::task::JoinHandle<()>> {
    if service.policies.is_empty() && service.alerts == AlertsConfig::default() {
        return None;
    }
    let (policies, alerts) = (service.policies.clone(), Alerts::new(service.alerts.clone()));
    let clock = Clock::new(service.clock_speed);
    let schedules = Arc::new(Schedules::open(policies, alerts, app.state.schedules(), clock));
    let schedules = app.schedules.get_or_init(|| schedules).clone();
    Some(tokio::spawn(runner::run(schedules, app.clone())))
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
