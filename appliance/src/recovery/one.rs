//! One recovery: performs what [`super::state`] decides, and journals before it acts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use blockstore::{Lease, Progress, Repository};
use hypervisor::{Keep, Machine};
use nbd_server::{ExportTable, Server};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use super::journal::Journal;
use super::moving::Moving;
use super::record::Record;
use super::schedule::{self, Commits};
use super::serving::Serving;
use super::state::{Action, Event, State};
use super::{DomainView, RecoverRequest, Timings, watch};
use crate::admission::{Ask, Holder, host};
use crate::catalog::DiskSummary;
use crate::disks::OpenOverlay;
use crate::events::{Events, Topic};
use crate::exports::FirstRead;
use crate::jobs::Jobs;
use crate::problem::Problem;
use crate::rehydrate::{LiveDisk, Mode, Plan, Watch};
use crate::state_dir::StateDir;

/// The socket of a recovery's NBD server.
pub(super) const NBD_SOCKET: &str = "nbd.sock";

/// What all recoveries of a process share.
#[derive(Debug)]
pub struct Context {
    /// Where the recovery points are.
    pub repository: Arc<Repository>,
    /// Where recoveries are kept.
    pub state: StateDir,
    /// The server whose limits all of them share.
    pub server: Server,
    /// Long work.
    pub jobs: Arc<Jobs>,
    /// What happens.
    pub events: Arc<Events>,
}

/// What a recovery is, fixed when it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    /// Its name.
    pub name: String,
    /// The recovery point's id.
    pub point: String,
    /// The machine that the point is of.
    pub machine: String,
    /// The point's disks.
    pub disks: Vec<DiskSummary>,
    /// How it was asked for.
    pub request: RecoverRequest,
}

/// A recovery.
#[derive(Debug)]
pub struct Recovery {
    pub(super) context: Arc<Context>,
    pub(super) definition: Definition,
    pub(super) dir: PathBuf,
    pub(super) asked: Instant,
    pub(super) first_read: Arc<FirstRead>,
    /// What may change while it is looked at.
    pub(super) shown: Mutex<Shown>,
    /// Held by whoever changes the recovery.
    pub(super) driver: tokio::sync::Mutex<Driver>,
}

#[derive(Debug)]
pub(super) struct Shown {
    pub(super) state: State,
    pub(super) problem: Option<String>,
    pub(super) accelerator: Option<String>,
    pub(super) vm: Option<String>,
    pub(super) pid: Option<u32>,
    pub(super) uris: Vec<String>,
    pub(super) disks: Vec<Arc<LiveDisk>>,
    pub(super) plan: Option<Plan>,
    pub(super) moving: Option<Arc<dyn Watch>>,
    /// How far a commit is, to cancel it.
    pub(super) committing: Option<Arc<Progress>>,
    pub(super) commits: Commits,
    pub(super) table: Option<Arc<ExportTable>>,
    pub(super) timings: Timings,
    pub(super) domain: Option<DomainView>,
    /// What of a domain is not as the original was.
    pub(super) changes: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) journal: Journal,
    pub(super) state: State,
    pub(super) machine: Option<hypervisor::MachineDefinition>,
    pub(super) vm: Option<Arc<dyn Machine>>,
    pub(super) serving: Option<Serving>,
    /// Keeps what the overlays stand on, even if the point is forgotten.
    pub(super) lease: Option<Lease>,
    /// What is or was moved, and where to.
    pub(super) plan: Option<Plan>,
    /// Why nothing is copied for now.
    pub(super) held: Option<String>,
    /// Who copies, while somebody does.
    pub(super) moving: Option<Moving>,
    pub(super) watchers: Vec<JoinHandle<()>>,
}

impl Recovery {
    /// Publishes the disks and starts the VM. On failure the recovery has failed, and says why.
    pub async fn bring_up(self: &Arc<Self>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        if let Err(problem) = self.publish(&mut driver, OpenOverlay::Create).await {
            return Err(self.fail(&mut driver, Event::PublishFailed, problem).await);
        }
        self.show(|shown| shown.timings.export_ms = Some(self.millis()));
        let (state, actions) = driver.state.apply(Event::Published);
        driver.state = state;
        if actions.contains(&Action::StartVm)
            && let Err(problem) = self.start_vm(&mut driver).await
        {
            return Err(self.fail(&mut driver, Event::VmStartFailed, problem).await);
        }
        self.enter(&mut driver, Event::VmStarted, None)?;
        self.watch(&mut driver);
        if driver.vm.is_some() {
            driver.watchers.push(tokio::spawn(watch::console(self.clone())));
        }
        Ok(())
    }

    /// Goes on after a restart of Lifeboat: serves the same exports again and adopts the VM.
    pub async fn take_up(self: &Arc<Self>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        match driver.state {
            State::Running => {
                self.serve_again(&mut driver).await?;
                self.adopt(&mut driver).await;
                self.watch(&mut driver);
            }
            State::Rehydrating | State::ReadyForCutover | State::CuttingOver => {
                self.serve_again(&mut driver).await?;
                self.adopt(&mut driver).await;
                if driver.state == State::CuttingOver && driver.mirrors() {
                    self.let_go_on(&mut driver).await?;
                }
                self.move_on(&mut driver).await?;
                self.watch(&mut driver);
            }
            State::CutOver => {
                self.adopt(&mut driver).await;
                if driver.mirrors() {
                    self.finish_cut_over(&mut driver).await?;
                }
                if self.needs_exports(&driver) {
                    self.serve_again(&mut driver).await?;
                }
                self.redefine_vm(&mut driver).await;
                self.remove_overlays();
                self.release_lease(&mut driver);
                self.watch(&mut driver);
            }
            State::Publishing => {
                let lives = driver.machine.is_some() && {
                    self.adopt(&mut driver).await;
                    driver.vm.is_some()
                };
                if lives {
                    self.publish(&mut driver, OpenOverlay::Existing).await?;
                    self.enter(&mut driver, Event::VmStarted, None)?;
                    self.watch(&mut driver);
                } else {
                    let why = "Lifeboat was stopped before the VM ran; discard it and recover again".to_owned();
                    self.enter(&mut driver, Event::Interrupted, Some(why))?;
                }
            }
            State::Discarding => self.take_away(&mut driver).await?,
            State::Failed | State::Discarded => {}
        }
        let stays = driver.state == State::Failed || driver.held.is_some() || self.is_unreachable();
        self.show(|shown| shown.problem = shown.problem.take().filter(|_| stays));
        Ok(())
    }

    /// Says in the listing why the recovery is not served at present.
    pub fn note_problem(&self, problem: &Problem) {
        self.show(|shown| shown.problem = Some(problem.to_string()));
    }

    /// Stops the VM and takes away everything the recovery holds.
    pub async fn discard(self: &Arc<Self>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        if driver.state == State::CutOver {
            self.adopt(&mut driver).await;
            if driver.vm.is_some() && !driver.in_production() {
                let name = &self.definition.name;
                return Err(Problem::refused(format!("recovery {name} is cut over, and its VM is in production"))
                    .hint("shut the VM down first; its disks stay where they are"));
            }
        }
        let copying = matches!(driver.state, State::Rehydrating | State::ReadyForCutover);
        if copying && self.moved(&driver).contains(&true) {
            let name = &self.definition.name;
            return Err(Problem::refused(format!("recovery {name} is cut over half way, and its VM is in production"))
                .hint(format!("`lifeboat rehydrate {name} --resume` and `lifeboat cutover {name}` move the rest")));
        }
        self.enter(&mut driver, Event::DiscardRequested, None)?;
        if copying {
            // Nobody runs on the copy, and it ends in the middle: nothing of it stays, as after a cancel.
            self.stop_copying(&mut driver).await;
            self.forget_targets(&mut driver);
        }
        self.take_away(&mut driver).await
    }

    /// Stops serving and leaves everything as it is, for the next process to take up.
    pub async fn leave(&self) {
        let mut driver = self.driver.lock().await;
        driver.stop_watchers();
        self.stop_copying(&mut driver).await;
        self.retire(&mut driver).await;
    }

    /// Journals the state after `event`, then makes it the present one.
    pub(super) fn enter(
        &self,
        driver: &mut Driver,
        event: Event,
        problem: Option<String>,
    ) -> Result<Vec<Action>, Problem> {
        let (state, actions) = driver.state.apply(event);
        let name = &self.definition.name;
        if actions.contains(&Action::Refuse) {
            return Err(Problem::refused(format!("recovery {name} is {state}; this cannot be done with it now")));
        }
        driver
            .journal
            .append(&Record::State { state, problem: problem.clone() })
            .map_err(|error| Problem::failed(format!("cannot note that recovery {name} is {state}"), &error))?;
        tracing::info!(recovery = %name, from = %driver.state, to = %state, "recovery changed");
        driver.state = state;
        self.show(|shown| {
            shown.state = state;
            shown.problem = problem;
        });
        Ok(actions)
    }

    pub(super) async fn fail(&self, driver: &mut Driver, event: Event, problem: Problem) -> Problem {
        // The journal may be what failed; the state then stays `publishing`, which a restart takes for interrupted.
        if let Err(second) = self.enter(driver, event, Some(problem.to_string())) {
            tracing::error!(recovery = %self.definition.name, problem = %second, "cannot note a failure");
        }
        self.stop_vm(driver).await;
        self.retire(driver).await;
        problem
    }

    /// The actions of a discard, in their order; each may have run before.
    async fn take_away(&self, driver: &mut Driver) -> Result<(), Problem> {
        if let Some(commit) = self.lock().committing.take() {
            commit.cancel();
        }
        self.stop_copying(driver).await;
        self.stop_vm(driver).await;
        self.forget_vm(driver).await?;
        self.retire(driver).await;
        let cannot = |error: &io::Error| {
            Problem::failed(format!("cannot remove all of recovery {}", self.definition.name), error)
                .hint(format!("see what is in the way in {} and discard it again", self.dir.display()))
        };
        for socket in super::machine::sockets(&self.dir, |name| self.socket(name)) {
            remove_file_if_there(&socket).map_err(|error| cannot(&error))?;
        }
        // The journal goes last: as long as it is there, a restart finishes what is begun here.
        for entry in fs::read_dir(&self.dir).map_err(|error| cannot(&error))?.flatten() {
            let path = entry.path();
            if entry.file_name() == "journal" {
                continue;
            }
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|error| cannot(&error))?;
        }
        fs::remove_dir_all(&self.dir).map_err(|error| cannot(&error))?;
        self.release_lease(driver);
        let (state, _) = driver.state.apply(Event::Removed);
        driver.state = state;
        self.show(|shown| shown.state = state);
        tracing::info!(recovery = %self.definition.name, "recovery discarded");
        Ok(())
    }

    pub(super) fn watch(self: &Arc<Self>, driver: &mut Driver) {
        driver.stop_watchers();
        if let Some(vm) = &driver.vm {
            driver.watchers.push(tokio::spawn(watch::vm(self.clone(), vm.clone())));
        } else if self.is_unreachable() {
            driver.watchers.push(tokio::spawn(watch::unreachable(self.clone())));
        }
        driver.watchers.push(tokio::spawn(watch::room(self.clone())));
        if driver.state.commits() && self.lock().commits.schedule.is_some() {
            driver.watchers.push(tokio::spawn(schedule::run(self.clone())));
        }
        if driver.moving.is_some() {
            driver.watchers.push(tokio::spawn(super::moving::watch(self.clone())));
        }
    }

    /// Where a socket of this recovery lies.
    pub(super) fn socket(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        match self.definition.request.runs_as {
            Some(_) if name == NBD_SOCKET => self.context.state.shared_path(path),
            _ => self.context.state.short_path(path),
        }
    }

    /// What its VM holds of the host, while it lives.
    pub(super) fn holds(&self) -> Option<Holder> {
        let pid = self.lock().pid?;
        Some(Holder { name: self.definition.name.clone(), ask: self.ask(), resident: host::resident(pid) })
    }

    /// What its VM takes.
    pub(super) fn ask(&self) -> Ask {
        self.definition.request.ask()
    }

    /// The recovery's folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.definition.name
    }

    /// Since it was asked for.
    pub(super) fn millis(&self) -> u64 {
        u64::try_from(self.asked.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Changes what the API shows, and tells listeners if it is another state, or another of the VM's.
    pub(super) fn show(&self, change: impl FnOnce(&mut Shown)) {
        let changed = {
            let mut shown = self.lock();
            let before = (shown.state, shown.vm.clone());
            change(&mut shown);
            before != (shown.state, shown.vm.clone())
        };
        if changed {
            self.tell();
        }
    }

    /// Tells listeners how it stands.
    pub(super) fn tell(&self) {
        self.context.events.tell(Topic::Recovery, Some(&self.definition.machine), &self.view());
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver {
    pub(super) fn new(journal: Journal, state: State) -> Driver {
        Driver {
            journal,
            state,
            machine: None,
            vm: None,
            serving: None,
            lease: None,
            plan: None,
            held: None,
            moving: None,
            watchers: Vec::new(),
        }
    }

    /// Whether its VM is a domain that has left the recovery.
    pub(super) fn in_production(&self) -> bool {
        self.machine
            .as_ref()
            .and_then(|machine| machine.domain.as_ref())
            .is_some_and(|domain| domain.keep == Keep::Production)
    }

    /// Whether its disks are moved by QEMU.
    pub(super) fn mirrors(&self) -> bool {
        self.plan.as_ref().is_some_and(|plan| plan.mode == Mode::Mirror)
    }

    pub(super) fn stop_watchers(&mut self) {
        for watcher in self.watchers.drain(..) {
            watcher.abort();
        }
    }
}

fn remove_file_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
