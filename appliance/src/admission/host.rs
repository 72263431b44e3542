//! Reads the host.

use std::fs;
use std::path::Path;

use super::{Host, cgroup};
use crate::problem::Problem;

/// The host at present, with the free space of folder `overlays`.
pub fn read(overlays: &Path) -> Result<Host, Problem> {
    let cannot = |error: &std::io::Error| Problem::failed("cannot read the host's memory from /proc/meminfo", error);
    let text = fs::read_to_string("/proc/meminfo").map_err(|error| cannot(&error))?;
    let field = |name: &str| kib(&text, name).ok_or_else(|| cannot(&std::io::Error::other(format!("no {name} in it"))));
    let stat = rustix::fs::statvfs(overlays).ok();
    let limit = cgroup::read(Path::new("/"));
    let within =
        |memory: u64, of: fn(&cgroup::Limit) -> u64| limit.as_ref().map_or(memory, |limit| memory.min(of(limit)));
    let total = field("MemTotal")?;
    Ok(Host {
        memory_total: within(total, |limit| limit.total),
        memory_available: within(field("MemAvailable")?, |limit| limit.available),
        memory_limit: limit.map(|limit| limit.total).filter(|limit| *limit < total),
        swap_total: kib(&text, "SwapTotal").unwrap_or(0),
        swap_free: kib(&text, "SwapFree").unwrap_or(0),
        cores: std::thread::available_parallelism().map_or(1, |cores| u32::try_from(cores.get()).unwrap_or(u32::MAX)),
        space: stat.map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize)),
    })
}

/// Memory that a process has touched; 0 for one that is gone.
pub fn resident(pid: u32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/status")).ok().and_then(|text| kib(&text, "VmRSS")).unwrap_or(0)
}

/// The bytes of a line such as `MemTotal:  24684084 kB`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_understood() {
        let text = "MemTotal:       24684084 kB\nMemFree:  x kB\nMemAvailable:   2 kB\nHuge: 99999999999999999999 kB\n";
        assert_eq!(kib(text, "MemAvailable"), Some(2048));
        assert_eq!([kib(text, "MemFree"), kib(text, "Mem"), kib(text, "Huge")], [None; 3]);
        assert!(read(Path::new("/")).is_ok_and(|host| host.memory_available <= host.memory_total && host.cores > 0));
    }
}
