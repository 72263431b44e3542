//! The log, on standard error. `LIFEBOAT_LOG` filters it (tracing's filter syntax), `LIFEBOAT_LOG_FORMAT=json`
//! makes it JSON; the configuration of a service may say both.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// How much is said by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Talk {
    /// A service: everything from `info` up.
    Service,
    /// A command that serves others until it is interrupted: what is odd about them too.
    Server,
    /// A command: what went wrong. It tells the failure of its own job itself.
    Command,
}

/// Begins to log.
pub fn init(talk: Talk, settings: Option<&Log>) {
    let usual = match talk {
        Talk::Service => "info",
        Talk::Server => "warn,lifeboat::jobs=off",
        Talk::Command => "error,lifeboat::jobs=off",
    };
    let usual = settings.and_then(Log::filter).unwrap_or(usual);
    let filter = EnvFilter::try_from_env("LIFEBOAT_LOG").unwrap_or_else(|_| EnvFilter::new(usual));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    let wanted = settings.is_some_and(|settings| settings.format == LogFormat::Json);
    let begun = if std::env::var("LIFEBOAT_LOG_FORMAT").map_or(wanted, |format| format == "json") {
        log.json().try_init()
    } else {
        log.try_init()
    };
    // A second start in one process (tests) goes on with the first's.
    drop(begun);
}
