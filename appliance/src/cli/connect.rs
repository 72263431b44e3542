//! Finds who answers a command: a process that owns the state folder already, a service started for it, or this
//! process itself.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Method;
use blockstore::Repository;

use super::args::{Command, Global};
use super::client::Client;
use super::render;
use crate::api::Health;
use crate::api::keyless::{self, KeylessApp};
use crate::api::listener::Listening;
use crate::app::{App, Options, storage};
use crate::problem::{Handling, Kind, Problem};
use crate::signals;
use crate::state_dir::{StateDir, create_private_dir};

/// How long an owner of the state folder may take until it answers.
const PATIENCE: Duration = Duration::from_secs(15);

/// No body.
pub const NOTHING: Option<&()> = None;

/// The way to the API, and what to tidy up behind it.
#[derive(Debug)]
pub struct Door {
    /// Speaks the API.
    pub client: Client,
    own: Option<Own>,
}

/// What this process hosts itself.
#[derive(Debug)]
struct Own {
    app: Arc<App>,
    listening: Listening,
}

impl Door {
    /// Opens the way for `command`.
    ///
    /// A recovery outlives the command that begins it, so it needs a service; one is started if none answers. So
    /// does any command on a state folder whose recoveries nobody serves at present.
    pub async fn open(global: &Global, command: &Command) -> Result<Door, Problem> {
        let options = global.options()?;
        let state = StateDir::new(options.state.clone());
        let since = Instant::now();
        loop {
            if let Some(health) = ask(&state).await {
                return Door::to_service(global, &state, &health);
            }
            if let Some(client) = without_key(command, &options)? {
                return Ok(Door { client, own: None });
            }
            if matches!(command, Command::Recover(_)) || !state.recovery_names().is_empty() {
                start_service(global, &state).await?;
                let health = wait_for_service(&state).await?;
                return Door::to_service(global, &state, &health);
            }
            let (opening, name) = (options.clone(), describe(command));
            let opened = tokio::task::spawn_blocking(move || App::open(&opening, &name))
                .await
                .map_err(|error| Problem::failed("cannot open the repository", &error))?;
            match opened {
                Ok(app) => {
                    let listening = app.listen()?;
                    let client = Client::Router(crate::api::owners(&app));
                    return Ok(Door { client, own: Some(Own { app, listening }) });
                }
                // Somebody owns the state folder who did not answer: it has only just begun, or is about to end.
                Err(problem) if problem.handling == Handling::AskAgain && since.elapsed() < PATIENCE => {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
                Err(problem) => return Err(problem),
            }
        }
    }

    /// Whether a service answers that has opened the repository already.
    pub async fn is_served(global: &Global) -> Result<bool, Problem> {
        Ok(ask(&StateDir::new(global.options()?.state)).await.is_some())
    }

    /// Whether this process owns the state folder and answers others.
    pub fn is_host(&self) -> bool {
        self.own.is_some()
    }

    fn to_service(global: &Global, state: &StateDir, health: &Health) -> Result<Door, Problem> {
        let options = global.options()?;
        if options.repository.as_ref().is_some_and(|location| !location.is_empty()) {
            let ours = options.repository_path()?;
            if !same_folder(&ours, &health.repository) {
                return Err(Problem::refused(format!(
                    "state folder {} serves repository {}, not {}",
                    state.root().display(),
                    health.repository.display(),
                    ours.display()
                ))
                .hint("name another folder with --state"));
            }
        }
        Ok(Door { client: Client::socket(state.socket()), own: None })
    }

    /// Ends what this process hosts. Work that others began here is waited for, and recoveries are handed to a
    /// service.
    pub async fn close(self, global: &Global) -> Result<(), Problem> {
        let Some(Own { app, listening }) = self.own else { return Ok(()) };
        let (since, mut told) = (Instant::now(), false);
        let stops = signals::count();
        let mut listening = listening;
        loop {
            let others = app.busy_with();
            if others.is_empty() {
                // Requests that were taken before are answered; one of them may have begun something.
                tokio::select! {
                    () = listening.finish() => {}
                    () = signals::more_than(stops) => break,
                }
                if app.busy_with().is_empty() {
                    break;
                }
                listening = app.listen()?;
                continue;
            }
            if !told && since.elapsed() > Duration::from_secs(1) {
                render::note(&format!("waiting for work that others began here: {}", others.join(", ")));
                told = true;
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
                () = signals::more_than(stops) => break,
            }
        }
        let hand_over = app.recoveries.any_live();
        app.close().await;
        let state = app.state.clone();
        drop(self.client);
        // Whoever still holds it gives it up within a moment; the state folder is free only then.
        let mut last = Some(app);
        for _ in 0..200 {
            match last.take().map(Arc::try_unwrap) {
                Some(Err(shared)) => last = Some(shared),
                _ => break,
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if hand_over {
            drop(last);
            start_service(global, &state).await?;
            wait_for_service(&state).await?;
        }
        Ok(())
    }
}

/// What answers a command that needs no key if none is given. It owns nothing and is seen by nobody else.
fn without_key(command: &Command, options: &Options) -> Result<Option<Client>, Problem> {
    if !matches!(command, Command::Verify(_)) || options.secret()?.is_some() {
        return Ok(None);
    }
    let location = options.repository_path()?;
    let repository =
        Repository::open_keyless(storage(&location)).map_err(|error| Problem::from_open(&location, &error))?;
    // One without encryption opens in full.
    Ok(repository.encrypted().then(|| Client::Router(keyless::router(KeylessApp::new(repository)))))
}

/// Who keeps out other commands, as they are told: the command's name.
fn describe(command: &Command) -> String {
    match command {
        Command::Init(_) => "init".to_owned(),
        Command::Backup(args) => format!("backup {}", args.machine),
        Command::Machines(_) => "machines".to_owned(),
        Command::Points(_) => "points".to_owned(),
        Command::Show(args) => format!("show {}", args.point),
        Command::Protect(args) => format!("protect {}", args.point),
        Command::Unprotect(args) => format!("unprotect {}", args.point),
        Command::Forget(args) => format!("forget {}", args.point),
        Command::Prune(_) => "prune".to_owned(),
        Command::Restore(args) => format!("restore {}", args.point),
        Command::Verify(_) => "verify".to_owned(),
        Command::Key(_) => "key".to_owned(),
        Command::Collect(_) => "collect".to_owned(),
        Command::Export(args) => format!("export {}", args.point),
        Command::Ls(args) => format!("ls {}", args.place),
        Command::Cp(args) => format!("cp {}", args.places.first().map_or("", String::as_str)),
        Command::Mount(args) => format!("mount {}", args.places.first().map_or("", String::as_str)),
        Command::Find(args) => format!("find {}", args.place),
        Command::Recover(args) => format!("recover {}", args.point),
        Command::Status => "status".to_owned(),
        Command::Recoveries(_) => "recoveries".to_owned(),
        Command::Recovery(args) => format!("recovery {}", args.name),
        Command::Start(args) => format!("start {}", args.name),
        Command::Rehydrate(args) => format!("rehydrate {}", args.name),
        Command::Cutover(args) => format!("cutover {}", args.name),
        Command::Commit(args) => format!("commit {}", args.name),
        Command::Discard(args) => format!("discard {}", args.name),
        Command::Token(_) => "token".to_owned(),
        Command::Audit(_) => "audit".to_owned(),
        Command::Schedule(_) => "schedule".to_owned(),
        Command::Drill(args) => format!("drill {}", args.points.first().map_or("", String::as_str)),
        Command::Drills(_) => "drills".to_owned(),
        Command::Serve(_) => "serve".to_owned(),
        Command::Tls(_) => "tls".to_owned(),
    }
}

fn same_folder(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    }
}

/// Who answers on the state folder's socket, if anybody does.
async fn ask(state: &StateDir) -> Option<Health> {
    let client = Client::socket(state.socket());
    let asked = client.call(Method::GET, "/healthz", NOTHING);
    tokio::time::timeout(Duration::from_secs(5), asked).await.ok()?.ok()
}

async fn wait_for_service(state: &StateDir) -> Result<Health, Problem> {
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if let Some(health) = ask(state).await {
            return Ok(health);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Problem::refused(format!("the process that owns state folder {} does not answer", state.root().display()))
        .hint(format!("see {}", state.service_log().display())))
}

/// Starts `lifeboat serve` detached from this process, and returns once it answers or has failed.
async fn start_service(global: &Global, state: &StateDir) -> Result<(), Problem> {
    let cannot = |error: &std::io::Error| Problem::failed("cannot start the Lifeboat service", error);
    let program = std::env::current_exe().map_err(|error| cannot(&error))?;
    create_private_dir(state.root()).map_err(|error| cannot(&error))?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(state.service_log())
        .map_err(|error| cannot(&error))?;
    let log_start = log.metadata().map_err(|error| cannot(&error))?.len();
    let mut command = std::process::Command::new(program);
    command.arg("serve").arg("--background").arg("--state").arg(state.root());
    if let Some(cache) = global.cache {
        command.arg("--cache").arg(cache.to_string());
    }
    if let Some(repo) = &global.repo {
        command.arg("--repo").arg(repo);
    }
    if let Some(file) = &global.passphrase_file {
        command.arg("--passphrase-file").arg(file);
    }
    if let Some(file) = &global.key_file {
        command.arg("--key-file").arg(file);
    }
    // A process group of its own: an interrupt at the terminal is for this command, not for the service.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    let mut child = command.spawn().map_err(|error| cannot(&error))?;
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if ask(state).await.is_some() {
            return Ok(());
        }
        if let Some(status) = child.try_wait().map_err(|error| cannot(&error))? {
            return Err(ended_early(state, log_start, status));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Err(Problem::new(Kind::Failed, "the Lifeboat service was started and does not answer")
        .hint(format!("see {}", state.service_log().display())))
}

/// The service's own last words are the error.
fn ended_early(state: &StateDir, log_start: u64, status: std::process::ExitStatus) -> Problem {
    let log = std::fs::read(state.service_log()).unwrap_or_default();
    let said = log.get(usize::try_from(log_start).unwrap_or(0)..).unwrap_or_default();
    let said = String::from_utf8_lossy(said);
    if let Some(problem) = said.lines().rev().find_map(|line| serde_json::from_str::<Problem>(line).ok()) {
        return problem;
    }
    Problem::new(Kind::Failed, format!("the Lifeboat service ended at once ({status})"))
        .hint(format!("see {}", state.service_log().display()))
}
