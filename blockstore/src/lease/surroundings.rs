//! [`Surroundings`]: the clock, and who this process is among all processes of all hosts.

use std::fmt::Debug;
use std::fs;
use std::sync::OnceLock;
use std::time::SystemTime;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

/// A process of some host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The host's name.
    pub host: String,
    /// The kernel's boot id; empty where nobody knows.
    #[serde(default)]
    pub boot: String,
    /// The pid namespace: in two containers, one number is two processes.
    #[serde(default)]
    pub namespace: String,
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot: numbers are used again.
    #[serde(default)]
    pub process_started: u64,
}

/// What leases are judged by. The system's, but for simulations.
pub trait Surroundings: Send + Sync + Debug {
    /// The wall clock.
    fn now(&self) -> SystemTime;

    /// This process.
    fn process(&self) -> Process;

    /// Whether a process has certainly ended. One of another host, boot or container may live.
    fn is_gone(&self, process: &Process) -> bool;
}

/// The surroundings that the operating system tells.
#[derive(Debug, Clone, Copy, Default)]
pub struct System;

impl Surroundings for System {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn process(&self) -> Process {
        static THIS: OnceLock<Process> = OnceLock::new();
        THIS.get_or_init(this_process).clone()
    }

    fn is_gone(&self, process: &Process) -> bool {
        let this = self.process();
        let here = !this.boot.is_empty()
            && !this.namespace.is_empty()
            && this.boot == process.boot
            && this.namespace == process.namespace
            && this.host == process.host;
        if !here {
            return false;
        }
        let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else { return false };
        match test_kill_process(pid) {
            Err(Errno::SRCH) => true,
            // Somebody has this number; where the start cannot be read, it may be the one.
            _ => started(process.pid).is_some_and(|started| started != process.process_started),
        }
    }
}

fn this_process() -> Process {
    let text = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/pid");
    let pid = std::process::id();
    Process {
        host: text("/proc/sys/kernel/hostname"),
        boot: text("/proc/sys/kernel/random/boot_id"),
        namespace: namespace.map(|link| link.to_string_lossy().into_owned()).unwrap_or_default(),
        pid,
        process_started: started(pid).unwrap_or(0),
    }
}

/// Field 22 of `/proc/PID/stat`; the name before it may hold anything, a closing bracket too.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_one_that_has_ended_is_gone() {
        let this = System.process();
        assert!(this.process_started > 0 && !this.boot.is_empty() && !this.namespace.is_empty(), "{this:?}");
        assert!(!System.is_gone(&this));
        assert!(System.is_gone(&Process { process_started: this.process_started + 1, ..this.clone() }));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let ended = Process { pid: child.id(), process_started: started(child.id()).unwrap(), ..this.clone() };
        child.wait().unwrap();
        assert!(System.is_gone(&ended));
        for elsewhere in [
            Process { host: "elsewhere".into(), ..ended.clone() },
            Process { boot: "earlier".into(), ..ended.clone() },
            Process { namespace: "pid:[1]".into(), ..ended },
        ] {
            assert!(!System.is_gone(&elsewhere), "{elsewhere:?}");
        }
    }
}
