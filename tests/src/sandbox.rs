//! A repository and a state folder of a test's own, and the real program run on them.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::{PATIENCE, skip, wait_until};

/// Lifeboat needs the rest of a socket's path below its state folder.
const PARENT_LEN_MAX: usize = 24;

/// A place of a test's own. Dropped, it ends every process that was started in it.
#[derive(Debug)]
pub struct Sandbox {
    dir: TempDir,
    passphrase: Option<&'static str>,
    key_file: Option<String>,
    user: Option<u32>,
}

/// The program beside the test's own: `target/PROFILE/lifeboat`.
fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("LIFEBOAT_BIN") {
        return path.into();
    }
    let test = std::env::current_exe().unwrap_or_default();
    let path = test.ancestors().nth(2).map(|dir| dir.join("lifeboat")).unwrap_or_default();
    assert!(path.is_file(), "{} is not built; run `make test`, or `cargo build` first", path.display());
    path
}

impl Default for Sandbox {
    fn default() -> Sandbox {
        Sandbox::new()
    }
}

impl Sandbox {
    /// An empty place with a short path: the path of a socket has room for 107 bytes.
    pub fn new() -> Sandbox {
        let mut parent = std::env::temp_dir();
        if parent.as_os_str().len() > PARENT_LEN_MAX {
            parent = PathBuf::from("/tmp");
        }
        let dir = tempfile::Builder::new().prefix("lb-").tempdir_in(parent);
        let dir = dir.unwrap_or_else(|error| panic!("no temporary folder: {error}"));
        Sandbox { dir, passphrase: Some("correct horse"), key_file: None, user: None }
    }

    /// A place whose repository is not encrypted: commands do not spend their time on a passphrase.
    pub fn with_plain_repository(chunk_size: &str) -> Sandbox {
        let mut sandbox = Sandbox::new();
        sandbox.passphrase = None;
        sandbox.ok(&["init", "--no-encryption", "--chunk-size", chunk_size]);
        sandbox
    }

    /// A place whose repository is encrypted and opens by the key file `name` in this place, which costs no time either.
    pub fn with_key_file(name: &str, chunk_size: &str) -> Sandbox {
        let mut sandbox = Sandbox::new();
        sandbox.use_key_file(name);
        sandbox.ok(&["init", "--chunk-size", chunk_size]);
        sandbox
    }

    /// From now on commands open the repository by this key file.
    pub fn use_key_file(&mut self, name: &str) {
        (self.passphrase, self.key_file) = (None, Some(self.name(name)));
    }

    /// A place with a plain repository of a user who is not root, as whom everything here runs; only root can make one.
    pub fn of_a_user(chunk_size: &str) -> Option<Sandbox> {
        const NOBODY: u32 = 65534;
        let mut sandbox = Sandbox::new();
        sandbox.passphrase = None;
        if !is_root() {
            skip("only root can run something as another user");
            return None;
        }
        // Wherever it was built may be closed to others.
        let copied = std::fs::copy(program(), sandbox.path("lifeboat"));
        copied.unwrap_or_else(|error| panic!("cannot copy lifeboat: {error}"));
        std::os::unix::fs::chown(sandbox.path(""), Some(NOBODY), Some(NOBODY))
            .unwrap_or_else(|error| panic!("cannot give a folder away: {error}"));
        sandbox.user = Some(NOBODY);
        sandbox.ok(&["init", "--no-encryption", "--chunk-size", chunk_size]);
        Some(sandbox)
    }

    /// The user as whom everything here runs, if it is another one.
    pub fn user(&self) -> Option<u32> {
        self.user
    }

    /// A place with an encrypted repository.
    pub fn with_repository() -> Sandbox {
        let sandbox = Sandbox::new();
        sandbox.ok(&["init"]);
        sandbox
    }

    /// A path in this place.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same, as text.
    pub fn name(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The program with arguments, on this place's repository.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = match self.user {
            None => Command::new(program()),
            Some(user) => {
                let mut command = Command::new(self.path("lifeboat"));
                command.uid(user).gid(user);
                command
            }
        };
        command
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.dir.path())
            .env("LIFEBOAT_REPO", self.path("repo"))
            .env("LIFEBOAT_STATE", self.path("state"))
            .env("LIFEBOAT_ACCEL", "tcg")
            .stdin(Stdio::null());
        if let Some(passphrase) = self.passphrase {
            command.env("LIFEBOAT_PASSPHRASE", passphrase);
        }
        if let Some(key_file) = &self.key_file {
            command.env("LIFEBOAT_KEY_FILE", key_file);
        }
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        finish(self.command(args), args)
    }

    /// Runs it; it has to succeed. Returns what it prints.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "lifeboat {args:?} failed:\n{}", both(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs it with `--json`; it has to succeed.
    pub fn json(&self, args: &[&str]) -> Value {
        let said = self.ok(&[args, &["--json"]].concat());
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("lifeboat {args:?}: {error} in {said:?}"))
    }

    /// Runs it; it has to fail with exit status `status` and without a panic. Returns what it complains.
    pub fn fails(&self, status: i32, args: &[&str]) -> String {
        check_failure(status, args, &self.run(args))
    }

    /// The same for a prepared command.
    pub fn command_fails(&self, status: i32, command: Command) -> String {
        let args: Vec<String> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        check_failure(status, &args, &finish(command, &args))
    }

    /// Starts it and goes on.
    pub fn start(&self, args: &[&str]) -> Running {
        let mut command = self.command(args);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start lifeboat: {error}"));
        let (sender, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                // The test may be over before the program is.
                BufReader::new(stdout).lines().map_while(Result::ok).all(|line| sender.send(line).is_ok())
            });
        }
        Running { child, lines }
    }

    /// Exports a point on a Unix socket in this place, and returns the running export and its first disk's URI.
    pub fn export(&self, args: &[&str]) -> (Running, String) {
        let listen = format!("unix:{}", self.name("nbd.sock"));
        let export = self.start(&[&["export"], args, &["--listen", &listen]].concat());
        let uri = export.line();
        (export, uri)
    }

    /// The process that owns the state folder, if one does.
    pub fn owner(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.path("state/lock")).ok()?;
        text.strip_prefix("process ")?.split_whitespace().next()?.parse().ok()
    }

    /// Every process but this one that was started for this place, by its path in their arguments or variables. Machines
    /// that Lifeboat detached are among them.
    pub fn processes(&self) -> Vec<u32> {
        let place = self.dir.path().as_os_str().as_encoded_bytes();
        let names_it = |pid: u32, file: &str| {
            let text = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            text.windows(place.len()).any(|part| part == place)
        };
        std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != std::process::id() && (names_it(*pid, "cmdline") || names_it(*pid, "environ")))
            .collect()
    }

    /// `kill -9` of the process that owns the state folder; returns when it is dead.
    pub fn kill_owner(&self) {
        kill(self.owner().unwrap_or_else(|| panic!("nobody owns the state folder")));
    }

    /// Waits until a recovery has a problem that says so. After a kill it is known from before, or, if it was not noted
    /// by then, found anew.
    #[track_caller]
    pub fn wait_for_problem(&self, recovery: &str, says: &str) {
        wait_until(&format!("recovery {recovery} says `{says}`"), || {
            self.json(&["recovery", recovery])["problem"].as_str().is_some_and(|problem| problem.contains(says))
        });
    }
}

/// Whether this process is root's.
pub(crate) fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

fn finish(mut command: Command, args: &[&str]) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.unwrap_or_else(|error| panic!("cannot start lifeboat: {error}"));
    let pid = child.id();
    let (sender, done) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    match done.recv_timeout(PATIENCE) {
        Ok(output) => output.unwrap_or_else(|error| panic!("cannot wait for lifeboat: {error}")),
        Err(_) => {
            send_kill(pid);
            panic!("lifeboat {args:?} does not end");
        }
    }
}

fn check_failure(status: i32, args: &[&str], output: &Output) -> String {
    let said = both(output);
    assert_eq!(output.status.code(), Some(status), "lifeboat {args:?}:\n{said}");
    assert!(!said.contains("panicked"), "lifeboat {args:?}:\n{said}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// `kill -9`; returns when it is dead and has let go of its files. One that is gone already is as dead.
#[track_caller]
pub fn kill(pid: u32) {
    send_kill(pid);
    wait_until("the killed process is gone", || !is_alive(pid));
}

fn send_kill(pid: u32) {
    let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
}

/// Whether a process runs, or one of its threads, which hold its files; one that waits to be buried does not.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, state)) = stat.rsplit_once(')') else { return false };
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    !state.trim_start().starts_with('Z') || threads > 1
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Twice: what was killed first may have been about to start another.
        for _ in 0..2 {
            for pid in self.processes() {
                send_kill(pid);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A program at work, killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    /// The next line it prints.
    pub fn line(&self) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("lifeboat prints nothing: {error}"))
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        kill(self.child.id());
        self.wait();
    }

    /// SIGTERM, then waits for its end.
    pub fn stop(&mut self) -> ExitStatus {
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("lifeboat ends", || {
            status = self.child.try_wait().unwrap_or_else(|error| panic!("cannot wait: {error}"));
            status.is_some()
        });
        status.unwrap_or_else(|| unreachable!("waited for it"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_was_started_survives_the_sandbox() {
        let sandbox = Sandbox::new();
        let path = sandbox.path("");
        // Detached as a machine is: its parent has ended, its session is its own, only a variable names the place.
        let script = "setsid sleep 300 >/dev/null 2>&1 & echo $!";
        let output = Command::new("sh").args(["-c", script]).env("LIFEBOAT_STATE", sandbox.path("state")).output();
        let output = output.expect("there is a shell");
        let pid: u32 = String::from_utf8_lossy(&output.stdout).trim().parse().expect("the shell prints a number");
        wait_until("the sleeper runs", || sandbox.processes().contains(&pid));
        drop(sandbox);
        assert!(!path.exists());
        wait_until("the sleeper is gone", || !is_alive(pid));
    }
}
