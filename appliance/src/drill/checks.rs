//! The checks of a drill, each a task that looks until it has seen what it wants.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::qemu::guest_agent::{AgentError, GuestAgent};
use regex::{Regex, RegexBuilder};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::DrillRequest;
use super::course::{Event, Planned, Stage};
use super::screen::Screen;
use super::signs;
use super::watch::{self, Lab};
use crate::problem::Problem;

/// How long one question may take.
const QUESTION: Duration = Duration::from_secs(2);
/// How often a check looks.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long a service may take to say its first words, if it speaks first.
const BANNER: Duration = Duration::from_millis(500);
/// How long a screen must show the same.
const STILL: Duration = Duration::from_secs(3);
const SCREEN_INTERVAL: Duration = Duration::from_secs(1);
/// A guest that has written to its disks is up when it has read nothing new for so long.
const QUIET: u64 = 5_000;
/// One that has not, which may wait for a disk that does not come, is only up after so long.
const QUIET_WITHOUT_WRITES: u64 = 60_000;
/// Writes that are more than a boot loader's notes.
const WRITES: u64 = 3;

/// A check.
#[derive(Debug, Clone)]
pub(super) enum Check {
    Agent,
    Console(Regex),
    Port(u16),
    Screen,
    Command(String),
    /// What is checked when nothing is asked for.
    Up,
}

impl Check {
    /// The checks of a request, in the order in which they are shown.
    pub fn all(request: &DrillRequest) -> Result<Vec<Check>, Problem> {
        let mut checks = Vec::new();
        if request.agent {
            checks.push(Check::Agent);
        }
        for text in &request.expect {
            // A guest's text is matched in linear time whatever the expression, which itself is bounded.
            let expression = RegexBuilder::new(text).multi_line(true).size_limit(1 << 20).build();
            let expression = expression.map_err(|error| {
                Problem::usage(format!("`{text}` cannot be expected: {error}"))
                    .hint("write a regular expression, such as --expect 'login:'")
            })?;
            checks.push(Check::Console(expression));
        }
        checks.extend(request.ports.iter().map(|port| Check::Port(*port)));
        if request.screenshot {
            checks.push(Check::Screen);
        }
        checks.extend(request.command.iter().map(|command| Check::Command(command.clone())));
        if checks.is_empty() {
            checks.push(Check::Up);
        }
        Ok(checks)
    }

    /// What the course needs to know.
    pub fn planned(&self) -> Planned {
        let (name, proves_kernel) = match self {
            Check::Agent => ("guest agent".to_owned(), true),
            Check::Console(expression) => (format!("console `{expression}`"), false),
            Check::Port(port) => (format!("port {port}"), true),
            Check::Screen => ("screen".to_owned(), false),
            Check::Command(command) => (format!("command `{command}`"), true),
            Check::Up => ("guest is up".to_owned(), true),
        };
        Planned { name, proves_kernel }
    }
}

/// Starts every check's task.
pub(super) fn start(lab: &Arc<Lab>, checks: &[Check], tasks: &mut JoinSet<()>) {
    let numbered = || checks.iter().enumerate();
    let expected = numbered().filter_map(|(number, check)| match check {
        Check::Console(expression) => Some((number, expression.clone())),
        _ => None,
    });
    tasks.spawn(watch::console(lab.clone(), expected.collect()));
    let agent = numbered().find(|(_, check)| matches!(check, Check::Agent)).map(|(number, _)| number);
    let command = numbered().find_map(|(number, check)| match check {
        Check::Command(command) => Some((number, command.clone())),
        _ => None,
    });
    if agent.is_some() || command.is_some() {
        // The agent's channel has one client at a time.
        tasks.spawn(with_agent(lab.clone(), agent, command));
    }
    for (number, check) in numbered() {
        match check {
            Check::Port(port) => drop(tasks.spawn(open_port(lab.clone(), number, *port))),
            Check::Screen => drop(tasks.spawn(still_screen(lab.clone(), number))),
            Check::Up => drop(tasks.spawn(up(lab.clone(), number))),
            Check::Agent | Check::Console(_) | Check::Command(_) => {}
        }
    }
}

async fn with_agent(lab: Arc<Lab>, ping: Option<usize>, command: Option<(usize, String)>) {
    let mut agent = loop {
        if let Ok(mut agent) = GuestAgent::connect(&lab.files.guest_agent, QUESTION).await
            && agent.ping(QUESTION).await.is_ok()
        {
            break agent;
        }
        sleep(INTERVAL).await;
    };
    if let Some(number) = ping {
        lab.tell(Event::Passed(number, "it answers".to_owned())).await;
    }
    let Some((number, command)) = command else { return };
    let event = match run(&mut agent, &command).await {
        Ok((0, output)) => Event::Passed(number, said("it succeeded", &output)),
        Ok((status, output)) => Event::Refused(number, said(&format!("it ended with status {status}"), &output)),
        Err(error) => Event::Refused(number, crate::problem::chain(&error)),
    };
    lab.tell(event).await;
}

fn said(what: &str, output: &str) -> String {
    let output: String = output.trim().chars().filter(|c| !c.is_control() || *c == '\n').take(500).collect();
    if output.is_empty() { what.to_owned() } else { format!("{what} and said: {output}") }
}

/// Runs a command line in the guest: its exit status, and what it wrote.
async fn run(agent: &mut GuestAgent, command: &str) -> Result<(i64, String), AgentError> {
    let windows = match agent.call("guest-get-osinfo", Value::Null, QUESTION).await {
        Ok(system) => system.get("id").and_then(Value::as_str) == Some("mswindows"),
        Err(AgentError::Refused { .. }) => false,
        Err(error) => return Err(error),
    };
    let (shell, option) = if windows { ("cmd.exe", "/c") } else { ("/bin/sh", "-c") };
    let arguments = json!({ "path": shell, "arg": [option, command], "capture-output": true });
    let begun = agent.call("guest-exec", arguments, QUESTION).await?;
    let unexpected = || AgentError::Unexpected { command: "guest-exec".to_owned() };
    let pid = begun.get("pid").and_then(Value::as_i64).ok_or_else(unexpected)?;
    loop {
        let state = agent.call("guest-exec-status", json!({ "pid": pid }), QUESTION).await?;
        if state.get("exited").and_then(Value::as_bool) == Some(true) {
            // A process that a signal ended has no status.
            let status = state.get("exitcode").and_then(Value::as_i64).unwrap_or(-1);
            let output = ["out-data", "err-data"].map(|key| {
                let data = state.get(key).and_then(Value::as_str).unwrap_or_default();
                String::from_utf8_lossy(&from_base64(data)).into_owned()
            });
            return Ok((status, output.concat()));
        }
        sleep(INTERVAL).await;
    }
}

/// The bytes of a base64 text, up to the first character that is none.
fn from_base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let mut bytes = Vec::new();
    let (mut bits, mut held) = (0_u32, 0_u32);
    for six in text.bytes().map_while(value) {
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held).to_le_bytes()[0]);
            bits &= (1 << held) - 1;
        }
    }
    bytes
}

/// Connects through a port of the loopback interface until the guest accepts.
async fn open_port(lab: Arc<Lab>, number: usize, guest_port: u16) {
    let port = match lab.vm.forward_port(guest_port).await {
        Ok(port) => port,
        Err(error) => {
            let why = format!("it cannot be forwarded: {}", crate::problem::chain(&error));
            return lab.tell(Event::Refused(number, why)).await;
        }
    };
    loop {
        if let Ok(Ok(mut stream)) = timeout(QUESTION, TcpStream::connect(("127.0.0.1", port))).await {
            let mut banner = [0; 200];
            // QEMU takes the connection before it has asked the guest, and drops it when the guest refuses.
            let read = timeout(BANNER, stream.read(&mut banner)).await;
            let spoke = match read {
                Ok(Ok(0) | Err(_)) => None,
                Ok(Ok(length)) => Some(length),
                Err(_) if lab.vm.has_accepted(port).await.unwrap_or(false) => Some(0),
                Err(_) => None,
            };
            if let Some(length) = spoke {
                let words = String::from_utf8_lossy(banner.get(..length).unwrap_or_default()).into_owned();
                return lab.tell(Event::Passed(number, said("it accepts connections", &words))).await;
            }
        }
        sleep(INTERVAL).await;
    }
}

/// Looks at the screen.
async fn look(lab: &Lab) -> Option<Screen> {
    let dump = lab.files.pid.with_file_name("screen.ppm");
    lab.vm.screen_pixels(&dump).await.ok()?;
    let loaded = tokio::task::spawn_blocking(move || Screen::load(&dump)).await.ok()?;
    loaded.inspect_err(|error| tracing::debug!(%error, "a screen was not understood")).ok()
}

async fn still_screen(lab: Arc<Lab>, number: usize) {
    let mut since: Option<(Screen, u64)> = None;
    loop {
        let now = lab.millis();
        let shown = look(&lab).await.filter(|screen| !screen.is_blank() && *lab.stage.borrow() >= Stage::BootLoader);
        since = match (shown, since) {
            (Some(shown), Some((first, since))) if shown.shows_the_same_as(&first) => Some((first, since)),
            (shown, _) => shown.map(|shown| (shown, now)),
        };
        if let Some((screen, since)) = &since
            && now.saturating_sub(*since) >= u64::try_from(STILL.as_millis()).unwrap_or(u64::MAX)
        {
            let saw = format!("{} pixels, not blank, and the same for {} s", screen.size(), STILL.as_secs());
            return lab.tell_at(Event::Passed(number, saw), *since).await;
        }
        sleep(SCREEN_INTERVAL).await;
    }
}

/// Waits until the guest runs a kernel, and neither wants more of its disks nor gives up.
async fn up(lab: Arc<Lab>, number: usize) {
    let mut stage = lab.stage.clone();
    if stage.wait_for(|stage| *stage >= Stage::Kernel).await.is_err() {
        return;
    }
    let kernel = lab.millis();
    loop {
        let quiet = lab.recorder.last_new().unwrap_or(0).max(kernel);
        let for_ms = lab.millis().saturating_sub(quiet);
        let writes = lab.sum(|served| served.writes + served.discards);
        let read = lab.sum(|served| served.read_bytes) >> 20;
        let saw = if lab.read_console(|console| signs::asks_for_login(console.text())) {
            Some((format!("its kernel runs, and its console asks for a login; {read} MiB were read"), lab.millis()))
        } else if writes >= WRITES && for_ms >= QUIET {
            let still = QUIET / 1000;
            Some((
                format!(
                    "its kernel runs, it wrote to its disks, and read nothing new for {still} s; {read} MiB were read"
                ),
                quiet,
            ))
        } else if for_ms >= QUIET_WITHOUT_WRITES && read > 0 {
            let still = QUIET_WITHOUT_WRITES / 1000;
            Some((
                format!(
                    "its kernel runs, and read nothing new for {still} s; {read} MiB were read, nothing was written"
                ),
                quiet,
            ))
        } else {
            None
        };
        if let Some((saw, at)) = saw {
            return lab.tell_at(Event::Passed(number, saw), at).await;
        }
        sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_wish_the_guest_has_to_be_up() {
        let names = |request: &DrillRequest| {
            let checks = Check::all(request).unwrap();
            checks.iter().map(|check| check.planned().name).collect::<Vec<_>>()
        };
        assert_eq!(names(&DrillRequest::default()), ["guest is up"]);
        let all = DrillRequest {
            agent: true,
            expect: vec!["login:".into()],
            ports: vec![22, 80],
            screenshot: true,
            command: Some("true".into()),
            ..DrillRequest::default()
        };
        let wanted = ["guest agent", "console `login:`", "port 22", "port 80", "screen", "command `true`"];
        assert_eq!(names(&all), wanted);
        for bad in ["(", "a{1000}{1000}{1000}"] {
            let refused = Check::all(&DrillRequest { expect: vec![bad.into()], ..DrillRequest::default() });
            assert!(refused.unwrap_err().to_string().contains(bad));
        }
    }

    #[test]
    fn what_a_command_wrote_is_taken_out_of_base64() {
        assert_eq!(from_base64("aGVsbG8="), b"hello");
        assert_eq!(from_base64("aGk="), b"hi");
        assert_eq!(from_base64("/+8A"), [0xff, 0xef, 0]);
        assert_eq!(from_base64(""), b"");
        assert_eq!(said("done", "a\u{7}b\n"), "done and said: ab");
    }
}
