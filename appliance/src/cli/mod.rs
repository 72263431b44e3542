//! The command line: turns arguments into requests of the API and prints the answers.

mod args;
mod audit;
mod backup;
mod client;
mod collect;
mod connect;
mod cp;
mod drill;
mod export;
mod extract;
mod files;
mod hardware;
mod host;
mod keys;
mod mount;
mod points;
mod progress;
mod recover;
mod rehydrate;
mod render;
mod restore;
mod retention;
mod schedule;
mod serve;
mod tls;
mod token;
mod verify;
mod watch;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;

pub use args::parse_size;
use args::{Cli, Command};
pub use client::segment;
pub use collect::parse_duration;
use connect::Door;
pub use render::{bytes, count};

use crate::app;
use crate::config::ConfigFile;
use crate::log::Talk;
use crate::problem::{Handling, Kind, Problem};
use crate::signals;

/// How long a request is offered to one owner of the state folder after another.
const ASKING_MAX: Duration = Duration::from_secs(15);

/// Runs the program: parses arguments, does the command, prints one error if there is one.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    let voice = match &cli.command {
        Command::Serve(serve) if serve.background => Voice::Background,
        _ if cli.global.json => Voice::Json,
        _ => Voice::Plain,
    };
    raise_open_files();
    let config = match &cli.command {
        Command::Serve(args::Serve { config: Some(path), .. }) => match ConfigFile::read(path) {
            Ok(config) => Some(config),
            Err(problem) => return report(&problem, voice),
        },
        _ => None,
    };
    let talk = match cli.command {
        Command::Serve(_) => Talk::Service,
        Command::Export(_) => Talk::Server,
        _ => Talk::Command,
    };
    crate::log::init(talk, config.as_ref().map(|file| &file.config.log));
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&Problem::failed("cannot start", &error), voice),
    };
    let result = runtime.block_on(async {
        signals::listen()?;
        run(cli, config).await
    });
    // A thread that still blocks (a cancelled read of a dead network file) must not keep the program from ending.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => report(&problem, voice),
    }
}

/// Lets the process have as many open files as it may: clients, packs and index runs want more than the usual 1,024.
fn raise_open_files() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    // What cannot be raised stays: then clients are turned away earlier.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

/// To whom an error is told.
#[derive(Debug, Clone, Copy)]
enum Voice {
    /// A person.
    Plain,
    /// A program that asked for JSON.
    Json,
    /// The command that started this service, which reads the log.
    Background,
}

/// Prints what clap says: help and version, or what is wrong with the arguments.
fn misused(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && std::env::args_os().any(|arg| arg == "--json") {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        render::json(&Problem::usage(first.strip_prefix("error: ").unwrap_or(first)));
    }
    // Nothing is left to say it with when this fails.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn report(problem: &Problem, voice: Voice) -> ExitCode {
    match voice {
        Voice::Plain => {}
        Voice::Json if problem.handling == Handling::AnswerTold => {}
        Voice::Json => render::json(problem),
        Voice::Background => render::complain(&serde_json::to_string(problem).unwrap_or_default()),
    }
    if !matches!(voice, Voice::Background) {
        render::complain(&format!("lifeboat: {problem}"));
    }
    ExitCode::from(problem.kind.exit_status())
}

async fn run(cli: Cli, config: Option<ConfigFile>) -> Result<(), Problem> {
    let Cli { global, command } = cli;
    match command {
        Command::Init(init) => return initialise(&global, &init),
        Command::Tls(args) => return tls::run(&global, &args),
        Command::Serve(args) => return serve::run(&global, &args, config).await,
        Command::Recoveries(ref args) if args.watch => return watch::all(&global).await,
        Command::Collect(ref args) if collect::is_keyless(&global, args).await? => {
            return collect::run_keyless(&global);
        }
        _ => {}
    }
    let since = Instant::now();
    loop {
        let door = Door::open(&global, &command).await?;
        let result = perform(&door, &global, &command).await;
        let closed = door.close(&global).await;
        match result {
            // Who was to answer has ended before it took the request.
            Err(problem) if problem.handling == Handling::AskAgain && since.elapsed() < ASKING_MAX => {}
            result => return result.and(closed),
        }
    }
}

async fn perform(door: &Door, global: &args::Global, command: &Command) -> Result<(), Problem> {
    match command {
        Command::Backup(args) => backup::run(door, global, args).await,
        Command::Machines(args) => backup::machines(door, global, args).await,
        Command::Points(args) => points::list(door, global, args).await,
        Command::Show(args) => points::show(door, global, args).await,
        Command::Protect(args) => retention::protect(door, global, args).await,
        Command::Unprotect(args) => retention::unprotect(door, global, args).await,
        Command::Forget(args) => retention::forget(door, global, args).await,
        Command::Prune(args) => retention::prune(door, global, args).await,
        Command::Restore(args) => restore::run(door, global, args).await,
        Command::Verify(args) => verify::run(door, global, args).await,
        Command::Key(args) => keys::run(door, global, args).await,
        Command::Collect(args) => collect::run(door, global, args).await,
        Command::Export(args) => export::run(door, global, args).await,
        Command::Ls(args) => files::ls(door, global, args).await,
        Command::Find(args) => files::find(door, global, args).await,
        Command::Mount(args) => mount::run(door, global, args).await,
        Command::Cp(args) => cp::run(door, global, args).await,
        Command::Schedule(args) => schedule::run(door, global, args).await,
        Command::Audit(args) => audit::run(door, global, args).await,
        Command::Token(args) => token::run(door, global, args).await,
        Command::Recover(args) => recover::run(door, global, args).await,
        Command::Status => host::show(door, global).await,
        Command::Recoveries(_) => recover::list(door, global).await,
        Command::Recovery(args) if args.watch => watch::one(door, global, &args.name).await,
        Command::Recovery(args) => recover::show(door, global, args).await,
        Command::Start(args) => recover::start(door, global, args).await,
        Command::Rehydrate(args) => rehydrate::run(door, global, args).await,
        Command::Cutover(args) => rehydrate::cut_over(door, global, args).await,
        Command::Commit(args) => backup::commit(door, global, args).await,
        Command::Drill(args) => drill::run(door, global, args).await,
        Command::Drills(args) => drill::list(door, global, args).await,
        Command::Discard(args) => recover::discard(door, global, args).await,
        Command::Init(_) | Command::Serve(_) | Command::Tls(_) => Ok(()),
    }
}

fn initialise(global: &args::Global, init: &args::Init) -> Result<(), Problem> {
    let options = global.options()?;
    let encryption = if init.no_encryption { app::Encryption::None } else { app::Encryption::Aes256Gcm };
    if let (Some(path), app::Encryption::None) = (&options.key_file, encryption) {
        return Err(Problem::usage(format!("a repository without encryption has no use for {}", path.display()))
            .hint("leave out --no-encryption or --key-file"));
    }
    let chunk_size = u32::try_from(init.chunk_size)
        .map_err(|_| Problem::new(Kind::Usage, format!("a chunk of {} bytes is too large", init.chunk_size)))?;
    let id = app::init(&options, chunk_size, encryption)?;
    let location = options.repository_path()?;
    if global.json {
        render::json(&serde_json::json!({
            "repository": location, "id": id.to_string(), "chunk_size": chunk_size, "encrypted": !init.no_encryption,
        }));
        return Ok(());
    }
    let how = match (encryption, &options.key_file) {
        (app::Encryption::None, _) => "not encrypted".to_owned(),
        (_, Some(path)) => format!("encrypted; without {} it cannot be read", path.display()),
        (_, None) => "encrypted; without its passphrase it cannot be read".to_owned(),
    };
    render::line(&format!("made repository {} ({how})", location.display()));
    Ok(())
}
