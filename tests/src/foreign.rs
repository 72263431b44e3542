//! A foreign server.

use std::process::{Child, Command, Stdio};

/// A foreign server, ended when dropped.
#[derive(Debug)]
pub struct Foreign(Child);

impl Foreign {
    /// Starts it.
    #[track_caller]
    pub fn start(command: &mut Command) -> Foreign {
        let child = command.stdin(Stdio::null()).spawn();
        Foreign(child.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}; run `make deps`")))
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
