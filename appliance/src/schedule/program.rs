//! Programs of the operator: hooks and alerts. Each has an environment of its own, what it is told on standard input, and
//! a deadline, after which its process group is killed.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::policy::Program;
use crate::problem::{Kind, Problem};

/// So much of what it says is told.
const SAID_MAX: u64 = 4096;

/// Runs a program to its end. `what` is what a person calls it.
pub async fn run(
    what: &str,
    Program(words): &Program,
    environment: &[(&str, String)],
    input: &str,
    deadline: Duration,
) -> Result<(), Problem> {
    let Some((program, arguments)) = words.split_first() else { return Ok(()) };
    let cannot = |error: std::io::Error| Problem::failed(format!("cannot run {what} {program}"), &error);
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    // What this process knows of secrets is not for it.
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.process_group(0).kill_on_drop(true);
    let mut child = command.spawn().map_err(cannot)?;
    let group = child.id();
    let (mut stdin, mut stderr) = (child.stdin.take(), child.stderr.take());
    let talk = async {
        if let Some(mut stdin) = stdin.take() {
            // A program that does not want to know may close it.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(stderr) = stderr.as_mut() {
            let _ = stderr.take(SAID_MAX).read_to_end(&mut said).await;
            let _ = tokio::io::copy(stderr, &mut tokio::io::sink()).await;
        }
        (child.wait().await, String::from_utf8_lossy(&said).trim().replace('\n', "; "))
    };
    let ended = tokio::time::timeout(deadline, talk).await;
    let Ok((status, said)) = ended else {
        if let Some(group) = group.and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let seconds = deadline.as_secs();
        return Err(Problem::new(
            Kind::Failed,
            format!("{what} {program} did not end within {seconds} s; it was killed"),
        ));
    };
    let status = status.map_err(cannot)?;
    if status.success() {
        return Ok(());
    }
    let said = if said.is_empty() { String::new() } else { format!(": {said}") };
    Err(Problem::new(Kind::Failed, format!("{what} {program} ended with {status}{said}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Program {
        Program(vec!["/bin/sh".into(), "-c".into(), script.into()])
    }

    #[tokio::test]
    async fn a_program_gets_its_environment_and_its_input_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("cat > {0}; env >> {0}", out.display());
        let environment = [("LIFEBOAT_MACHINE", "web01".to_owned())];
        run("hook", &sh(&script), &environment, "told", Duration::from_secs(60)).await.unwrap();
        let text = std::fs::read_to_string(out).unwrap();
        assert!(
            text.starts_with("told") && text.contains("LIFEBOAT_MACHINE=web01") && !text.contains("HOME="),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_failure_says_what_the_program_said_and_a_hang_is_ended() {
        let deadline = Duration::from_secs(60);
        let problem = run("hook", &sh("echo no room >&2; exit 3"), &[], "", deadline).await.unwrap_err();
        assert!(problem.title.contains("no room") && problem.title.contains('3'), "{problem}");
        let problem = run("hook", &sh("sleep 1000 & wait"), &[], "", Duration::from_millis(200)).await.unwrap_err();
        assert!(problem.title.contains("did not end"), "{problem}");
        // More than a pipe holds keeps nobody waiting.
        run("hook", &sh("head -c 300000 /dev/zero >&2"), &[], "", deadline).await.unwrap();
        let missing = Program(vec!["/no/such/program".into()]);
        assert!(run("hook", &missing, &[], "", deadline).await.unwrap_err().title.contains("/no/such/program"));
    }
}
