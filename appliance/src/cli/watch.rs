//! `recovery NAME --watch` and `recoveries --watch`: follow until interrupted. On a terminal the picture is drawn in
//! place; else every change is a line. A restart of the service in between is said and waited for.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use axum::http::Method;
use chrono::Local;

use super::args::{Command, Global, Recoveries};
use super::connect::{Door, NOTHING};
use super::{recover, render};
use crate::problem::{Handling, Kind, Problem};
use crate::recovery::{RecoveryView, State};
use crate::signals::stop_signal;
use crate::state_dir::StateDir;

/// How often the recoveries are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How long a service may take to come back by itself, as in an upgrade, before this command starts one as any other
/// command would.
const COMEBACK: Duration = Duration::from_secs(10);

/// Said when a service that was away is back.
const BACK: &str = "the service answers again";

/// Follows one recovery until it is gone.
pub async fn one(door: &Door, global: &Global, name: &str) -> Result<(), Problem> {
    let mut last = recover::get(door, name).await?;
    let state = StateDir::new(global.options()?.state);
    let mut source = Source::new(global);
    let mut screen = Screen::open(global.json);
    loop {
        screen.show(&last, || recover::lines(&last), || vec![recover::summary(&last)]);
        if last.state == State::Discarded || pause().await {
            break;
        }
        let asked = tokio::select! {
            asked = source.ask(door, |door| async move { recover::get(door, name).await }) => asked,
            () = stop_signal() => break,
        };
        match asked {
            Ok(view) => last = view,
            Err(problem) if problem.kind == Kind::NotFound => last = gone(last),
            // The service ends when its last recovery is gone.
            Err(_) if !state.recovery_names().iter().any(|there| there == name) => last = gone(last),
            Err(problem) => screen.away(&source.excuse(&problem)?),
        }
    }
    if screen.close() {
        recover::describe(&last);
    }
    Ok(())
}

fn gone(last: RecoveryView) -> RecoveryView {
    RecoveryView { state: State::Discarded, vm: None, pid: None, rehydration: None, next: Vec::new(), ..last }
}

/// Follows all recoveries. Where there is none, nobody is asked and nothing is opened: this command must keep no other
/// from the state folder.
pub async fn all(global: &Global) -> Result<(), Problem> {
    let state = StateDir::new(global.options()?.state);
    let mut source = Source::new(global);
    let mut screen = Screen::open(global.json);
    let (mut door, mut views) = (None, Vec::new());
    loop {
        let none = state.recovery_names().is_empty();
        if none {
            (door, views) = (None, Vec::new());
        } else if door.is_none() {
            door = service(global).await?;
        }
        let asked = match &door {
            None => Ok(Vec::new()),
            Some(door) => tokio::select! {
                asked = source.ask(door, |door| async move { list(door).await }) => asked,
                () = stop_signal() => break,
            },
        };
        match asked {
            Ok(now) => {
                views = now;
                let summaries = || match views.as_slice() {
                    [] => vec!["no recoveries".to_owned()],
                    views => views.iter().map(recover::summary).collect(),
                };
                screen.show(&views, || recover::list_lines(&views), summaries);
            }
            // The service has ended with its last recovery, which the next look shows.
            Err(_) if state.recovery_names().is_empty() => continue,
            Err(problem) => screen.away(&source.excuse(&problem)?),
        }
        if pause().await {
            break;
        }
    }
    if screen.close() {
        render::lines(&recover::list_lines(&views));
    }
    Ok(())
}

/// The way to the service that serves the recoveries; `None` if the last of them went in this moment.
async fn service(global: &Global) -> Result<Option<Door>, Problem> {
    let door = Door::open(global, &Command::Recoveries(Recoveries { watch: true })).await?;
    if door.is_host() {
        door.close(global).await?;
        return Ok(None);
    }
    Ok(Some(door))
}

async fn list(door: &Door) -> Result<Vec<RecoveryView>, Problem> {
    door.client.call(Method::GET, "/api/v1/recoveries", NOTHING).await
}

/// Waits for the next look; says whether the user has seen enough.
async fn pause() -> bool {
    tokio::select! {
        () = tokio::time::sleep(LOOK) => false,
        () = stop_signal() => true,
    }
}

/// Who is asked: the door that was opened first, or another after it has led nowhere for a while.
struct Source<'a> {
    global: &'a Global,
    other: Option<Door>,
    away: Option<Instant>,
}

impl<'a> Source<'a> {
    fn new(global: &'a Global) -> Source<'a> {
        Source { global, other: None, away: None }
    }

    async fn ask<'d, T, F, W>(&'d mut self, door: &'d Door, question: F) -> Result<T, Problem>
    where
        F: Fn(&'d Door) -> W,
        W: Future<Output = Result<T, Problem>>,
    {
        let state = StateDir::new(self.global.options()?.state);
        if self.away.is_some_and(|since| since.elapsed() > COMEBACK) && !state.recovery_names().is_empty() {
            // There are recoveries: this starts a service, or finds one, and hosts nothing in this process.
            self.other = service(self.global).await?;
        }
        let answer = question(self.other.as_ref().unwrap_or(door)).await;
        if answer.is_ok() {
            self.away = None;
        }
        answer
    }

    /// Whether the service is only away for now; then since when, for people.
    fn excuse(&mut self, problem: &Problem) -> Result<String, Problem> {
        if problem.kind != Kind::Failed && problem.handling != Handling::AskAgain && self.away.is_none() {
            return Err(problem.clone());
        }
        let since = *self.away.get_or_insert_with(Instant::now);
        Ok(format!(
            "the service is away for {}; guests wait for their disks; trying again",
            render::duration(since.elapsed().as_secs())
        ))
    }
}

/// Where changes are shown.
enum Screen {
    /// A terminal, drawn anew each time, on a page of its own; what was drawn last.
    Terminal { last: Vec<String> },
    /// A line for each change; what was shown last.
    Lines { last: Vec<String>, away: bool },
    /// A document for each change; what was shown last.
    Json { last: String, away: bool },
}

impl Screen {
    fn open(json: bool) -> Screen {
        if json {
            return Screen::Json { last: String::new(), away: false };
        }
        if !std::io::stdout().is_terminal() {
            return Screen::Lines { last: Vec::new(), away: false };
        }
        draw("\x1b[?1049h\x1b[?25l");
        Screen::Terminal { last: Vec::new() }
    }

    fn show(
        &mut self,
        value: &impl serde::Serialize,
        picture: impl FnOnce() -> Vec<String>,
        summary: impl FnOnce() -> Vec<String>,
    ) {
        match self {
            Screen::Terminal { last } => {
                *last = picture();
                page(last, None);
            }
            Screen::Lines { last, away } => {
                let now = summary();
                if *away {
                    render::line(&format!("{} {BACK}", clock()));
                }
                for text in now.iter().filter(|text| !last.contains(text)) {
                    render::line(&format!("{} {text}", clock()));
                }
                (*last, *away) = (now, false);
            }
            Screen::Json { last, away } => {
                let now = serde_json::to_string(value).unwrap_or_default();
                if *away {
                    render::note(BACK);
                }
                if now != *last {
                    render::line(&now);
                }
                (*last, *away) = (now, false);
            }
        }
    }

    /// Says, once unless on a terminal, that nobody answers.
    fn away(&mut self, excuse: &str) {
        match self {
            Screen::Terminal { last } => page(last, Some(excuse)),
            Screen::Lines { away, last } if !*away => {
                render::line(&format!("{} {excuse}", clock()));
                last.clear();
                *away = true;
            }
            // Standard output holds documents only.
            Screen::Json { away, .. } if !*away => {
                render::note(excuse);
                *away = true;
            }
            Screen::Lines { .. } | Screen::Json { .. } => {}
        }
    }

    /// Gives the terminal back; says whether what was shown has gone with the page.
    fn close(self) -> bool {
        matches!(self, Screen::Terminal { .. })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if matches!(self, Screen::Terminal { .. }) {
            draw("\x1b[?25h\x1b[?1049l");
        }
    }
}

fn clock() -> String {
    Local::now().format("%H:%M:%S").to_string()
}

/// Draws the lines that fit on the terminal; `notice` instead of the time.
fn page(lines: &[String], notice: Option<&str>) {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok().filter(|size| size.ws_col > 0 && size.ws_row > 1);
    let (width, height) = size.map_or((80, 24), |size| (usize::from(size.ws_col), usize::from(size.ws_row)));
    let foot = notice
        .map_or_else(|| format!("{}  every second; Ctrl-C ends this, the recovery goes on", clock()), str::to_owned);
    let mut text = String::from("\x1b[H");
    let shown = lines.iter().take(height.saturating_sub(2)).map(String::as_str);
    for line in shown.chain(["", &foot]) {
        // A name may hold what a terminal takes for an order.
        text.extend(line.chars().filter(|c| !c.is_control()).take(width));
        text.push_str("\x1b[K\r\n");
    }
    text.truncate(text.len() - 2);
    text.push_str("\x1b[J");
    draw(&text);
}

fn draw(text: &str) {
    let mut out = std::io::stdout().lock();
    // A terminal that has gone away ends this by a signal.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
