//! A service that dies at a chosen moment.

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus, Stdio};

use crate::{Sandbox, wait_until};

/// A service that ends itself right before or after it has written the journal's record with this text in it.
#[derive(Debug)]
pub struct Doomed(Child);

impl Doomed {
    /// Starts it in place of whoever owns the state folder. `point` is `before:TEXT` or `after:TEXT`.
    #[track_caller]
    pub fn start(sandbox: &Sandbox, point: &str) -> Doomed {
        if sandbox.owner().is_some() {
            sandbox.kill_owner();
        }
        let mut command = sandbox.command(&["serve"]);
        command.env("LIFEBOAT_TEST_CRASH", point).stdout(Stdio::null()).stderr(Stdio::null());
        let mut spawn = || command.spawn().unwrap_or_else(|error| panic!("cannot start lifeboat: {error}"));
        let mut doomed = Doomed(spawn());
        let socket = sandbox.path("state/lifeboat.sock");
        wait_until("the service answers, or is at its end already", || match ended(&mut doomed.0) {
            Some(status) if status.code() == Some(5) => {
                // Threads of the one before it were still at their end, and held the state folder.
                doomed.0 = spawn();
                false
            }
            Some(_) => true,
            None => sandbox.owner() == Some(doomed.0.id()) && UnixStream::connect(&socket).is_ok(),
        });
        doomed
    }

    /// Waits until it has.
    #[track_caller]
    pub fn wait(mut self, point: &str) {
        let mut status = None;
        wait_until(&format!("the service has ended {point}"), || {
            status = ended(&mut self.0);
            status.is_some()
        });
        assert_eq!(status.and_then(|status| status.signal()), Some(9), "{point}");
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ended(child: &mut Child) -> Option<ExitStatus> {
    child.try_wait().unwrap_or_else(|error| panic!("cannot wait for lifeboat: {error}"))
}
