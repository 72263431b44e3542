//! What tests that cross crates share: a place of their own, the real program, foreign tools, and the test guest.

mod console;
mod data;
mod doomed;
mod foreign;
mod guest;
mod libvirtd;
mod machine;
mod random;
pub mod raw;
mod room;
mod sandbox;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

pub use console::{Console, number_after};
pub use data::{assert_same_bytes, copy_sparse};
pub use doomed::Doomed;
pub use foreign::Foreign;
pub use guest::{Guest, guest};
pub use libvirtd::{Libvirtd, free_port, wait_for_domain};
pub use machine::{Firmware, Machine, holds_all};
pub use random::{Random, rounds, seed};
pub use room::SmallRoom;
pub use sandbox::{Running, Sandbox, kill};

/// Long enough for anything that happens at all, on a machine with two busy cores and an emulated processor.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Whether all of `tools` are installed. A test that needs them says what it skips and returns; in CI that is a failure.
#[must_use]
pub fn have(tools: &[&str]) -> bool {
    let missing: Vec<&&str> = tools.iter().filter(|tool| which(tool).is_none()).collect();
    assert!(missing.is_empty() || std::env::var_os("CI").is_none(), "missing in CI: {missing:?}; run `make deps`");
    if !missing.is_empty() {
        report(&format!("{missing:?} not installed; run `make deps`"));
    }
    missing.is_empty()
}

/// Says that a test cannot run here, and why; in CI that is a failure.
pub fn skip(reason: &str) {
    assert!(std::env::var_os("CI").is_none(), "cannot run in CI: {reason}");
    report(reason);
}

fn report(reason: &str) {
    // Past the test runner, which keeps to itself what a passing test prints; tests/run.sh counts these lines.
    let _ = writeln!(std::io::stderr(), "\nskipped: {reason}");
}

fn which(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let more = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
    std::env::split_paths(&path).chain(more).map(|dir| dir.join(tool)).find(|path| path.is_file())
}

/// Runs a foreign tool that has to succeed, and returns what it says.
pub fn tool(program: &str, args: &[&str]) -> String {
    let output = tool_output(program, args);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?} failed ({}):\n{said}{complained}", output.status);
    said
}

/// Runs a foreign tool, whatever comes of it.
pub fn tool_output(program: &str, args: &[&str]) -> Output {
    let program = which(program).unwrap_or_else(|| program.into());
    Command::new(&program).args(args).output().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

/// Waits until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The repository's root folder.
fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Bytes that look random, always the same for a seed, and compress by about a third.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&(state & 0x3f3f_ffff_3f3f_ffff).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
