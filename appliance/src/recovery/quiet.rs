//! The guest's file systems, held still for the instant of a commit. Whatever goes wrong, they are let go again. The rules:
//! docs/design/commit.md

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hypervisor::qemu::guest_agent::AgentError;
use hypervisor::{Machine, Pending};
use serde_json::Value;

use crate::problem::chain;

/// An agent that is there answers within milliseconds; an emulated guest takes longer.
const ANSWER: Duration = Duration::from_secs(3);
/// A guest has to write out what it holds first.
const FREEZE: Duration = Duration::from_secs(20);
/// Letting go writes nothing.
const THAW: Duration = Duration::from_secs(5);
/// How soon a guest that could not be let go is tried again.
const AGAIN: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });
/// In a recovery's folder: its guest may be held still.
const MARK: &str = "guest-is-quiet";

/// What of a machine is needed here.
pub trait Guest: Send + Sync + 'static {
    /// Has the guest's agent run a command.
    fn ask(&self, command: &'static str, deadline: Duration) -> Pending<'_, Result<Value, AgentError>>;

    /// Returns when the machine is gone.
    fn ended(&self) -> Pending<'_, ()>;
}

impl Guest for dyn Machine {
    fn ask(&self, command: &'static str, deadline: Duration) -> Pending<'_, Result<Value, AgentError>> {
        self.ask_agent(command, deadline)
    }

    fn ended(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            self.wait_exit().await;
        })
    }
}

/// A guest whose file systems are held still, or may be. Dropped, they are let go in the background.
pub struct Quiet<G: Guest + ?Sized> {
    vm: Option<Arc<G>>,
    mark: PathBuf,
    /// How many file systems hold still.
    pub file_systems: u64,
}

impl<G: Guest + ?Sized> fmt::Debug for Quiet<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quiet").field("mark", &self.mark).field("file_systems", &self.file_systems).finish()
    }
}

impl<G: Guest + ?Sized> Quiet<G> {
    /// Has the guest write out what it holds and hold still. An error says why it does not; it is then let go.
    pub async fn begin(dir: &Path, vm: &Arc<G>) -> Result<Quiet<G>, String> {
        vm.ask("guest-ping", ANSWER).await.map_err(|error| chain(&error))?;
        let mut quiet = Quiet { vm: Some(vm.clone()), mark: dir.join(MARK), file_systems: 0 };
        // From here on a restart of Lifeboat lets the guest go.
        put_mark(&quiet.mark).map_err(|error| format!("cannot note that the guest is held still: {error}"))?;
        let answer = vm.ask("guest-fsfreeze-freeze", FREEZE).await.map_err(|error| chain(&error))?;
        quiet.file_systems = answer.as_u64().unwrap_or(0);
        match quiet.file_systems {
            0 => Err("the guest agent has found no file system to freeze".to_owned()),
            _ => Ok(quiet),
        }
    }

    /// Lets the guest go, at once if it can be done at once.
    pub async fn end(mut self) {
        if let Some(vm) = self.vm.take()
            && !let_go(&vm, &self.mark).await
        {
            tokio::spawn(insist(vm, self.mark.clone()));
        }
    }
}

impl<G: Guest + ?Sized> Drop for Quiet<G> {
    fn drop(&mut self) {
        // Without a runtime this process is ending: the next one lets the guest go.
        if let (Some(vm), Ok(runtime)) = (self.vm.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(insist(vm, self.mark.clone()));
        }
    }
}

/// Lets the guest of a recovery go whose Lifeboat was killed while it was held still.
pub fn after_restart<G: Guest + ?Sized>(dir: &Path, vm: &Arc<G>) {
    let mark = dir.join(MARK);
    if mark.exists() {
        tracing::warn!(folder = %dir.display(), "the guest's file systems may be frozen since a commit was killed");
        tokio::spawn(insist(vm.clone(), mark));
    }
}

/// A guest that starts anew holds nothing still.
pub fn forget(dir: &Path) {
    let _ = fs::remove_file(dir.join(MARK));
}

/// Tries until it is done or the VM has ended.
async fn insist<G: Guest + ?Sized>(vm: Arc<G>, mark: PathBuf) {
    while !let_go(&vm, &mark).await {
        if tokio::time::timeout(AGAIN, vm.ended()).await.is_ok() {
            // A guest that starts anew is not frozen.
            let _ = fs::remove_file(&mark);
            return;
        }
    }
}

/// An agent carries out one command after the other: what it does after a freeze that took too long, it does then.
async fn let_go<G: Guest + ?Sized>(vm: &Arc<G>, mark: &Path) -> bool {
    match vm.ask("guest-fsfreeze-thaw", THAW).await {
        Ok(_) => {
            // One that stays makes a restart let go once more, which does no harm.
            let _ = fs::remove_file(mark);
            true
        }
        Err(error) => {
            tracing::error!(error = chain(&error), "the guest's file systems cannot be thawed; trying again");
            false
        }
    }
}

fn put_mark(mark: &Path) -> io::Result<()> {
    File::create(mark)?.sync_all()?;
    mark.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests;
