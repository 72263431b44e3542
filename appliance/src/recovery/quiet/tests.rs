use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

use super::*;

/// A machine whose agent goes by a script: what it is asked next, and its answer.
#[derive(Debug)]
struct Scripted {
    script: Mutex<VecDeque<(&'static str, Result<Value, ()>)>>,
    /// Whether the machine has ended.
    ended: bool,
}

fn vm(ended: bool, script: &[(&'static str, Result<u64, ()>)]) -> (Arc<Scripted>, Arc<Scripted>) {
    let script = script.iter().map(|(command, answer)| (*command, answer.map(Value::from))).collect();
    let vm = Arc::new(Scripted { script: Mutex::new(script), ended });
    (vm.clone(), vm)
}

impl Scripted {
    fn left(&self) -> usize {
        self.script.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Guest for Scripted {
    fn ask(&self, command: &'static str, _deadline: Duration) -> Pending<'_, Result<Value, AgentError>> {
        let next = self.script.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let (expected, answer) = next.unwrap_or_else(|| panic!("asked for {command} after the end of the script"));
        assert_eq!(command, expected);
        Box::pin(async move { answer.map_err(|()| AgentError::Silent { waited: ANSWER }) })
    }

    fn ended(&self) -> Pending<'_, ()> {
        match self.ended {
            true => Box::pin(async {}),
            false => Box::pin(std::future::pending()),
        }
    }
}

const PING: (&str, Result<u64, ()>) = ("guest-ping", Ok(0));
const FREEZE_OK: (&str, Result<u64, ()>) = ("guest-fsfreeze-freeze", Ok(2));
const FREEZE_SILENT: (&str, Result<u64, ()>) = ("guest-fsfreeze-freeze", Err(()));
const THAW_OK: (&str, Result<u64, ()>) = ("guest-fsfreeze-thaw", Ok(2));
const THAW_SILENT: (&str, Result<u64, ()>) = ("guest-fsfreeze-thaw", Err(()));

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

async fn until_gone(mark: &Path) {
    while mark.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_guest_is_marked_before_it_is_frozen_and_until_it_is_thawed() {
    let dir = dir();
    let (script, vm) = vm(false, &[PING, FREEZE_OK, THAW_OK]);
    let quiet = Quiet::begin(dir.path(), &vm).await.unwrap();
    assert_eq!((quiet.file_systems, dir.path().join(MARK).exists()), (2, true));
    quiet.end().await;
    assert_eq!((script.left(), dir.path().join(MARK).exists()), (0, false));
}

#[tokio::test]
async fn a_guest_without_an_agent_is_not_touched() {
    let dir = dir();
    let (_, vm) = vm(false, &[("guest-ping", Err(()))]);
    assert!(Quiet::begin(dir.path(), &vm).await.unwrap_err().contains("does not answer"));
    assert!(!dir.path().join(MARK).exists());
}

#[tokio::test]
async fn whatever_becomes_of_the_freeze_the_guest_is_thawed() {
    for script in [
        &[PING, FREEZE_SILENT, THAW_OK][..],
        &[PING, FREEZE_SILENT, THAW_SILENT, THAW_SILENT, THAW_OK],
        &[PING, ("guest-fsfreeze-freeze", Ok(0)), THAW_OK],
    ] {
        let dir = dir();
        let (script, vm) = vm(false, script);
        Quiet::begin(dir.path(), &vm).await.unwrap_err();
        until_gone(&dir.path().join(MARK)).await;
        assert_eq!(script.left(), 0);
    }
}

#[tokio::test]
async fn a_commit_that_is_dropped_or_cannot_thaw_at_once_thaws_later() {
    let dir = dir();
    let mark = dir.path().join(MARK);
    let (script, vm_dropped) = vm(false, &[PING, FREEZE_OK, THAW_OK]);
    drop(Quiet::begin(dir.path(), &vm_dropped).await.unwrap());
    until_gone(&mark).await;
    assert_eq!(script.left(), 0);
    let (script, vm) = vm(false, &[PING, FREEZE_OK, THAW_SILENT, THAW_SILENT, THAW_OK]);
    Quiet::begin(dir.path(), &vm).await.unwrap().end().await;
    assert!(mark.exists());
    until_gone(&mark).await;
    assert_eq!(script.left(), 0);
}

#[tokio::test]
async fn a_restart_thaws_a_guest_that_is_marked_and_leaves_others_alone() {
    let dir = dir();
    let mark = dir.path().join(MARK);
    let (_, untouched) = vm(false, &[]);
    after_restart(dir.path(), &untouched);
    put_mark(&mark).unwrap();
    let (script, vm_marked) = vm(false, &[THAW_SILENT, THAW_OK]);
    after_restart(dir.path(), &vm_marked);
    until_gone(&mark).await;
    assert_eq!(script.left(), 0);
    // One that has ended is not waited for.
    put_mark(&mark).unwrap();
    let (_, ended) = vm(true, &[THAW_SILENT]);
    after_restart(dir.path(), &ended);
    until_gone(&mark).await;
}
