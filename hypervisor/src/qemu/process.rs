//! A process we did not start ourselves, held so that a recycled process id is never mistaken for it.
//!
//! A pidfd names the process, not the number. On kernels or sandboxes without pidfds the start time in
//! `/proc/PID/stat` stands in: it is compared before every signal.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A running process.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    start_time: u64,
    handle: Option<AsyncFd<OwnedFd>>,
}

impl Process {
    /// Takes hold of a process; `None` when there is none, or only its remains.
    pub fn open(pid: i32) -> io::Result<Option<Process>> {
        // rustix refuses negative numbers with a panic.
        let Some(pid) = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw) else { return Ok(None) };
        // First the handle, then the start time: read in this order they belong to the same process if it is alive after.
        let handle = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Some(watch(fd)?),
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(_) => None,
        };
        Ok(start_time(pid).map(|start_time| Process { pid, start_time, handle }))
    }

    /// Its number, for people.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Whether it still runs. One that waits only to be reaped does not.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Returns when it has ended.
    pub async fn wait(&self) {
        if let Some(handle) = &self.handle
            && handle.readable().await.is_ok()
        {
            return;
        }
        while self.is_alive() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Sends a signal. A process that is gone is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let sent = match &self.handle {
            Some(handle) => rustix::process::pidfd_send_signal(handle.get_ref(), signal),
            None if self.is_alive() => rustix::process::kill_process(self.pid, signal),
            None => Ok(()),
        };
        match sent {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => other.map_err(io::Error::from),
        }
    }

    /// Whether its command line has this text; the last resort to recognise a machine whose socket is gone.
    pub fn was_started_with(&self, text: &str) -> bool {
        was_started_with(self.pid, text)
    }
}

fn was_started_with(pid: Pid, text: &str) -> bool {
    let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
    let Ok(line) = std::fs::read(path) else { return false };
    !text.is_empty() && line.windows(text.len()).any(|window| window == text.as_bytes())
}

/// Kills a process if its command line has `text`, and blocks until it is gone. Whether there was such a process.
pub fn kill_if_started_with(pid: i32, text: &str, limit: Duration) -> io::Result<bool> {
    let Some(pid) = Some(pid).filter(|pid| *pid > 0).and_then(Pid::from_raw) else { return Ok(false) };
    let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty());
    let began = start_time(pid);
    if began.is_none() || !was_started_with(pid, text) {
        return Ok(false);
    }
    let killed = match &handle {
        Ok(handle) => rustix::process::pidfd_send_signal(handle, Signal::KILL),
        Err(_) => rustix::process::kill_process(pid, Signal::KILL),
    };
    match killed {
        Err(error) if error != rustix::io::Errno::SRCH => return Err(error.into()),
        _ => {}
    }
    let since = std::time::Instant::now();
    while start_time(pid) == began {
        if since.elapsed() > limit {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "a process that was killed does not go away"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(true)
}

#[expect(
    deprecated,
    reason = "deprecated for types that lie about their descriptor; an OwnedFd owns it until it is dropped"
)]
fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(pidfd, Interest::READABLE)
}

/// Field 22 of `/proc/PID/stat`; `None` if the process is gone or a zombie.
fn start_time(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The second field is the program's name in parentheses and may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::process::Command;

    fn raw(pid: Option<u32>) -> i32 {
        i32::try_from(pid.expect("a running child has an id")).expect("process ids are small")
    }

    #[tokio::test]
    async fn a_process_is_seen_ending_even_before_it_is_reaped() {
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep exists");
        let process = Process::open(raw(child.id())).expect("proc is readable").expect("it runs");
        assert!(process.is_alive());
        // The kernel shows the arguments a moment after the program has started.
        while !process.was_started_with("60") {
            assert!(process.is_alive());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!process.was_started_with("61"));
        process.signal(Signal::TERM).expect("it is ours");
        tokio::time::timeout(Duration::from_secs(10), process.wait()).await.expect("it ends");
        assert!(!process.is_alive());
        assert!(Process::open(raw(child.id())).expect("proc is readable").is_none());
        child.wait().await.expect("it is our child");
        process.signal(Signal::KILL).expect("a process that is gone is no error");
    }

    #[test]
    fn only_a_process_that_was_started_so_is_killed() {
        let mut child = std::process::Command::new("sleep").arg("61.5").spawn().expect("sleep exists");
        let pid = raw(Some(child.id()));
        while !was_started_with(Pid::from_raw(pid).expect("not zero"), "61.5") {
            std::thread::sleep(Duration::from_millis(1));
        }
        let kill = |pid, text| kill_if_started_with(pid, text, Duration::from_secs(10)).expect("it is ours");
        assert!(!kill(pid, "62.5") && !kill(0, "61.5") && !kill(-1, "61.5"));
        assert!(child.try_wait().expect("a child").is_none(), "it still runs");
        assert!(kill(pid, "61.5"));
        child.wait().expect("it has ended");
        assert!(!kill(pid, "61.5"));
    }

    #[tokio::test]
    async fn numbers_that_are_no_process_are_none() {
        for pid in [0, -1, i32::MAX] {
            assert!(Process::open(pid).expect("proc is readable").is_none(), "{pid}");
        }
    }
}
