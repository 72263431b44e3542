//! One recovery: performs what [`super::state`] decides, and journals before it acts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blockstore::lease::{self, Surroundings};
use blockstore::overlay::{Overlay, Room};
use blockstore::{Lease, Progress, RecoveryPoint, Repository};
use hypervisor::{Hypervisor, Machine, QemuHypervisor};
use nbd_server::{ExportTable, Limits, Listen, Server};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::journal::Journal;
use super::state::{Action, Event, State};
use super::{DiskView, HypervisorKind, RecoverRequest, RecoveryView, Timings, watch};
use crate::admission::{Ask, Holder, host};
use crate::catalog::DiskSummary;
use crate::disks::{self, OpenOverlay};
use crate::exports::{FirstRead, OverlayExport};
use crate::problem::{Kind, Problem};
use crate::rehydrate::{self, LiveDisk, Opening, Plan, Stream, Watch};
use crate::state_dir::StateDir;
use crate::statistics::Served;

/// How long QEMU may take to end by itself when a recovery is discarded.
const QUIT_GRACE: Duration = Duration::from_secs(5);

/// What all recoveries of a process share.
#[derive(Debug)]
pub struct Context {
    /// Where the recovery points are.
    pub repository: Arc<Repository>,
    /// Where recoveries are kept.
    pub state: StateDir,
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

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub(super) enum Record {
    /// The first line.
    Created { version: u32, definition: Box<Definition> },
    /// QEMU is about to be started like this.
    Vm { machine: Box<hypervisor::MachineDefinition> },
    /// Its disks are being moved like this; `held`: why nothing is copied for now.
    Move { plan: Box<Plan>, held: Option<String> },
    /// What the guest had written became this recovery point. All of it was durable in the overlays before.
    Committed { point: String },
    /// The state was entered.
    State { state: State, problem: Option<String> },
}

/// The journal's version.
const VERSION: u32 = 1;

/// A recovery.
#[derive(Debug)]
pub struct Recovery {
    pub(super) context: Arc<Context>,
    pub(super) definition: Definition,
    dir: PathBuf,
    asked: Instant,
    first_read: Arc<FirstRead>,
    /// What may change while it is looked at.
    shown: Mutex<Shown>,
    /// Held by whoever changes the recovery.
    pub(super) driver: tokio::sync::Mutex<Driver>,
}

#[derive(Debug)]
pub(super) struct Shown {
    pub(super) state: State,
    pub(super) problem: Option<String>,
    accelerator: Option<String>,
    pub(super) vm: Option<String>,
    pub(super) pid: Option<u32>,
    uris: Vec<String>,
    pub(super) disks: Vec<Arc<LiveDisk>>,
    pub(super) plan: Option<Plan>,
    pub(super) moving: Option<Watch>,
    /// How far a commit is, to cancel it.
    pub(super) committing: Option<Arc<Progress>>,
    table: Option<Arc<ExportTable>>,
    pub(super) timings: Timings,
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) journal: Journal,
    pub(super) state: State,
    pub(super) machine: Option<hypervisor::MachineDefinition>,
    pub(super) vm: Option<Arc<dyn Machine>>,
    serving: Option<Serving>,
    /// Keeps what the overlays stand on, even if the point is forgotten.
    pub(super) lease: Option<Lease>,
    /// What is or was moved, and where to.
    pub(super) plan: Option<Plan>,
    /// Why nothing is copied for now.
    pub(super) held: Option<String>,
    /// The last recovery point that was made of it.
    pub(super) committed: Option<String>,
    pub(super) stream: Option<Stream>,
    pub(super) watchers: Vec<JoinHandle<()>>,
}

/// The NBD server of a recovery.
#[derive(Debug)]
struct Serving {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Recovery {
    /// Makes a recovery's folder and journal. Nothing else exists yet.
    pub fn create(context: Arc<Context>, definition: Definition) -> Result<Arc<Recovery>, Problem> {
        let dir = context.state.recoveries().join(&definition.name);
        let cannot = |error: &(dyn std::error::Error + 'static)| {
            Problem::failed(format!("cannot make recovery {} in {}", definition.name, dir.display()), error)
        };
        // A folder without a journal is what a finished discard may leave when the power goes.
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(&error)),
            _ => {}
        }
        crate::state_dir::create_private_dir(&dir.join("disks")).map_err(|error| cannot(&error))?;
        let mut journal = Journal::create(&dir.join("journal")).map_err(|error| cannot(&error))?;
        journal
            .append(&Record::Created { version: VERSION, definition: Box::new(definition.clone()) })
            .map_err(|error| cannot(&error))?;
        sync_dir(&context.state.recoveries()).map_err(|error| cannot(&error))?;
        let driver = Driver::new(journal, State::Publishing);
        Ok(Recovery::assemble(context, definition, dir, driver, None))
    }

    /// Reads back a recovery's journal. Nothing is served or changed yet. One that was never begun, because the power
    /// went before its first record was durable, is removed.
    pub fn load(context: Arc<Context>, name: &str) -> Result<Option<Arc<Recovery>>, Problem> {
        let dir = context.state.recoveries().join(name);
        let cannot = |error: &(dyn std::error::Error + 'static)| {
            Problem::because(Kind::Damage, format!("cannot take up recovery {name}"), error)
                .hint(format!("its overlays lie untouched in {}", dir.display()))
        };
        let (journal, records) = Journal::open::<Record>(&dir.join("journal")).map_err(|error| cannot(&error))?;
        let mut records = records.into_iter();
        let definition = match records.next() {
            Some(Record::Created { version: VERSION, definition }) => *definition,
            Some(Record::Created { version, .. }) => {
                return Err(cannot(&io::Error::other(format!(
                    "its journal has version {version}, this is for {VERSION}"
                ))));
            }
            Some(_) => return Err(cannot(&io::Error::other("its journal does not say what it is of"))),
            None => {
                fs::remove_dir_all(&dir).map_err(|error| cannot(&error))?;
                return Ok(None);
            }
        };
        let mut driver = Driver::new(journal, State::Publishing);
        let mut problem = None;
        for record in records {
            match record {
                Record::Created { .. } => return Err(cannot(&io::Error::other("its journal begins twice"))),
                Record::Vm { machine } => driver.machine = Some(*machine),
                Record::Move { plan, held } => {
                    driver.plan = Some(*plan);
                    driver.held = held;
                }
                Record::Committed { point } => driver.committed = Some(point),
                Record::State { state, problem: why } => {
                    driver.state = state;
                    problem = why;
                }
            }
        }
        Ok(Some(Recovery::assemble(context, definition, dir, driver, problem)))
    }

    fn assemble(
        context: Arc<Context>,
        definition: Definition,
        dir: PathBuf,
        driver: Driver,
        problem: Option<String>,
    ) -> Arc<Recovery> {
        let asked = Instant::now();
        Arc::new(Recovery {
            context,
            definition,
            dir,
            asked,
            first_read: FirstRead::since(asked),
            shown: Mutex::new(Shown {
                state: driver.state,
                problem,
                accelerator: None,
                vm: None,
                pid: None,
                uris: Vec::new(),
                disks: Vec::new(),
                plan: driver.plan.clone().filter(|_| driver.state.moves()),
                moving: None,
                committing: None,
                table: None,
                timings: Timings::default(),
            }),
            driver: tokio::sync::Mutex::new(driver),
        })
    }

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
                self.move_on(&mut driver).await?;
                self.watch(&mut driver);
            }
            State::CutOver => {
                self.adopt(&mut driver).await;
                if self.needs_exports(&driver) {
                    self.serve_again(&mut driver).await?;
                }
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
        let stays = driver.state == State::Failed || driver.held.is_some();
        self.show(|shown| shown.problem = shown.problem.take().filter(|_| stays));
        Ok(())
    }

    /// Says in the listing why the recovery is not served at present.
    pub fn note_problem(&self, problem: &Problem) {
        self.show(|shown| shown.problem = Some(problem.to_string()));
    }

    /// Starts the VM again on what it has written, after it has shut itself down or the host has crashed.
    pub async fn start_again(self: &Arc<Self>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        let name = &self.definition.name;
        let refuse = |why: &str| Err(Problem::refused(format!("the VM of recovery {name} cannot be started: {why}")));
        let cut_over = driver.state == State::CutOver;
        if !cut_over && (!driver.state.runs() || driver.serving.is_none()) {
            return refuse(&format!("the recovery is {}, and its disks are not served", driver.state));
        }
        let Some(mut machine) = driver.machine.clone() else { return refuse("it was recovered without one") };
        self.adopt(&mut driver).await;
        if self.lock().vm.as_deref() != Some("shut-off") {
            return refuse("it has not ended");
        }
        if cut_over {
            self.leave_exports(&mut driver, &mut machine).await?;
        }
        let vm = QemuHypervisor
            .start(&machine)
            .await
            .map_err(|error| Problem::failed(format!("cannot start the VM of recovery {name}"), &error))?;
        self.have_vm(&mut driver, vm);
        self.watch(&mut driver);
        Ok(())
    }

    /// Stops the VM and takes away everything the recovery holds.
    pub async fn discard(self: &Arc<Self>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        if driver.state == State::CutOver {
            self.adopt(&mut driver).await;
            if driver.vm.is_some() {
                let name = &self.definition.name;
                return Err(Problem::refused(format!("recovery {name} is cut over, and its VM is in production"))
                    .hint("shut the VM down first; its disks stay where they are"));
            }
        }
        self.enter(&mut driver, Event::DiscardRequested, None)?;
        self.take_away(&mut driver).await
    }

    /// Stops serving and leaves everything as it is, for the next process to take up.
    pub async fn leave(&self) {
        let mut driver = self.driver.lock().await;
        driver.stop_watchers();
        self.stop_copying(&mut driver).await;
        self.retire(&mut driver).await;
    }

    /// What the API shows.
    pub fn view(&self) -> RecoveryView {
        let shown = self.lock();
        let qemu = self.definition.request.on == HypervisorKind::Qemu;
        let path = |name: &str| qemu.then(|| self.dir.join(name).display().to_string());
        let socket = |name: &str| qemu.then(|| self.socket(name).display().to_string());
        let moves = shown.moving.as_ref().map_or(&[][..], |moving| moving.moves());
        let planned = |at: usize| shown.plan.as_ref().and_then(|plan| plan.disks.get(at));
        let disk = |(at, disk): (usize, &DiskSummary)| {
            let live = shown.disks.get(at).and_then(|disk| disk.overlay());
            let overlay = live.as_ref().map(|export| &export.overlay);
            let space = overlay.and_then(|overlay| overlay.space());
            DiskView {
                name: disk.name.clone(),
                nbd_uri: shown.uris.get(at).cloned(),
                size: disk.size,
                hydrated: match shown.state {
                    State::CutOver => disk.size,
                    _ => moves.get(at).map_or(0, |one| one.hydrated()),
                },
                target: planned(at).map(|planned| planned.place.to_string()),
                overlay: overlay.map_or(0, |overlay| overlay.usage().data_grains * 4096),
                free: space.map(|space| space.free),
                space_short: space.is_some_and(|space| space.room != Room::Enough),
                served: served(&shown, &disk.name),
            }
        };
        let mut timings = shown.timings;
        timings.first_read_ms = self.first_read.millis();
        RecoveryView {
            name: self.definition.name.clone(),
            point: self.definition.point.clone(),
            machine: self.definition.machine.clone(),
            state: shown.state,
            problem: shown.problem.clone(),
            hypervisor: self.definition.request.on,
            accelerator: shown.accelerator.clone(),
            vm: shown.vm.clone(),
            pid: shown.pid,
            console: path("console.log"),
            qmp: socket("qmp.sock"),
            guest_agent: socket("guest-agent.sock"),
            disks: self.definition.disks.iter().enumerate().map(disk).collect(),
            rehydration: super::moving::view(&shown),
            next: shown.state.next_steps().iter().map(|step| (*step).to_owned()).collect(),
            timings,
            warnings: Vec::new(),
        }
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

    async fn fail(&self, driver: &mut Driver, event: Event, problem: Problem) -> Problem {
        // The journal may be what failed; the state then stays `publishing`, which a restart takes for interrupted.
        if let Err(second) = self.enter(driver, event, Some(problem.to_string())) {
            tracing::error!(recovery = %self.definition.name, problem = %second, "cannot note a failure");
        }
        self.stop_vm(driver).await;
        self.retire(driver).await;
        problem
    }

    async fn publish(&self, driver: &mut Driver, open: OpenOverlay) -> Result<(), Problem> {
        let table = Arc::new(ExportTable::new());
        let (context, definition) = (self.context.clone(), self.definition.clone());
        let (dir, first_read) = (self.dir.clone(), self.first_read.clone());
        let (filled, lease_name) = (table.clone(), self.lease_name());
        let moved = driver.plan.clone().filter(|_| driver.state == State::CutOver);
        let (disks, lease) = tokio::task::spawn_blocking(move || {
            if let Some(plan) = moved {
                return Ok((fill_moved(&definition, &plan, &filled)?, None));
            }
            let point = disks::load_point(&context.repository, &definition.point)?;
            let owner = format!("recovery {}", definition.name);
            let lease = context
                .repository
                .hold_recovery(&lease_name, &owner, &point)
                .map_err(|error| Problem::from_read(&format!("cannot take a lease for {owner}"), &error))?;
            let disks = fill(&context.repository, &definition, &point, &dir, open, &first_read, &filled)?;
            Ok::<_, Problem>((disks, Some(lease)))
        })
        .await
        .map_err(|error| Problem::failed("cannot publish the disks", &error))??;
        driver.lease = lease;
        let socket = self.socket("nbd.sock");
        let listener = Server::new(table.clone(), Limits::default())
            .bind(&Listen::Unix(socket))
            .await
            .map_err(|error| Problem::from_listen(&error))?;
        let mut uris = Vec::new();
        for disk in &self.definition.disks {
            uris.push(listener.uri(&disks::export_name(&disk.name)?));
        }
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(listener.serve(async move {
            // A dropped sender is a stop too.
            let _ = stopped.await;
        }));
        driver.serving = Some(Serving { stop, task });
        self.show(|shown| {
            shown.uris = uris;
            shown.disks = disks;
            shown.table = Some(table);
        });
        Ok(())
    }

    /// What tells this recovery from all others that use the repository.
    fn lease_name(&self) -> String {
        format!("{}:{}", lease::System.process().host, self.dir.display())
    }

    /// The recovery no longer needs its point.
    pub(super) fn release_lease(&self, driver: &mut Driver) {
        driver.lease = None;
        if let Err(error) = self.context.repository.release_recovery(&self.lease_name()) {
            tracing::warn!(recovery = %self.definition.name, %error, "its lease stays until it expires");
        }
    }

    async fn serve_again(&self, driver: &mut Driver) -> Result<(), Problem> {
        match driver.serving {
            Some(_) => Ok(()),
            None => self.publish(driver, OpenOverlay::Existing).await,
        }
    }

    pub(super) async fn retire(&self, driver: &mut Driver) {
        if let Some(serving) = driver.serving.take() {
            let _ = serving.stop.send(());
            if let Err(error) = serving.task.await {
                tracing::error!(recovery = %self.definition.name, %error, "the NBD server ended badly");
            }
        }
        self.show(|shown| {
            shown.uris.clear();
            shown.disks.clear();
            shown.table = None;
        });
    }

    /// Its disks as they are at present; none while they are not served.
    pub fn disks(&self) -> Vec<(String, Arc<Overlay>)> {
        let live = self.lock().disks.clone();
        let named = self.definition.disks.iter().map(|disk| disk.name.clone()).zip(live);
        named.filter_map(|(name, disk)| Some((name, disk.overlay()?.overlay.clone()))).collect()
    }

    async fn start_vm(self: &Arc<Self>, driver: &mut Driver) -> Result<(), Problem> {
        if self.definition.request.on == HypervisorKind::None {
            return Ok(());
        }
        let first = self.lock().disks.first().and_then(|disk| disk.overlay());
        let overlay = first.map(|export| export.overlay.clone());
        let machine = super::machine::define(self, &self.definition, overlay).await?;
        self.note_machine(driver, &machine)?;
        let vm = QemuHypervisor.start(&machine).await.map_err(|error| {
            Problem::failed(format!("cannot start the VM of recovery {}", self.definition.name), &error)
        })?;
        self.have_vm(driver, vm);
        self.show(|shown| shown.timings.started_ms = Some(self.millis()));
        Ok(())
    }

    pub(super) fn note_machine(
        &self,
        driver: &mut Driver,
        machine: &hypervisor::MachineDefinition,
    ) -> Result<(), Problem> {
        driver
            .journal
            .append(&Record::Vm { machine: Box::new(machine.clone()) })
            .map_err(|error| Problem::failed("cannot note how the VM is started", &error))?;
        driver.machine = Some(machine.clone());
        Ok(())
    }

    async fn adopt(&self, driver: &mut Driver) {
        let Some(machine) = &driver.machine else { return };
        match QemuHypervisor.adopt(machine).await {
            Ok(Some(vm)) => self.have_vm(driver, vm),
            Ok(None) => {
                driver.vm = None;
                self.show(|shown| {
                    shown.vm = Some("shut-off".to_owned());
                    shown.pid = None;
                });
            }
            Err(error) => {
                let error = crate::problem::chain(&error);
                tracing::error!(recovery = %self.definition.name, error, "cannot reach the VM");
                self.show(|shown| shown.vm = Some("unreachable".to_owned()));
            }
        }
    }

    fn have_vm(&self, driver: &mut Driver, vm: Arc<dyn Machine>) {
        self.show(|shown| {
            shown.vm = Some("running".to_owned());
            shown.pid = vm.pid();
            shown.accelerator = Some(vm.accelerator());
        });
        driver.vm = Some(vm);
    }

    async fn stop_vm(&self, driver: &mut Driver) {
        driver.stop_watchers();
        if driver.vm.is_none() {
            self.adopt(driver).await;
        }
        if let Some(vm) = driver.vm.take()
            && let Err(error) = vm.quit(QUIT_GRACE).await
        {
            tracing::error!(recovery = %self.definition.name, error = %crate::problem::chain(&error), "cannot stop the VM");
        }
        self.show(|shown| {
            shown.vm = shown.vm.take().map(|_| "shut-off".to_owned());
            shown.pid = None;
        });
    }

    /// The actions of a discard, in their order; each may have run before.
    async fn take_away(&self, driver: &mut Driver) -> Result<(), Problem> {
        if let Some(commit) = self.lock().committing.take() {
            commit.cancel();
        }
        self.stop_copying(driver).await;
        self.stop_vm(driver).await;
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
        }
        driver.watchers.push(tokio::spawn(watch::room(self.clone())));
        if driver.stream.is_some() {
            driver.watchers.push(tokio::spawn(super::moving::watch(self.clone())));
        }
    }

    /// Where a socket of this recovery lies.
    pub(super) fn socket(&self, name: &str) -> PathBuf {
        self.context.state.short_path(self.dir.join(name))
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

    /// The exports, while they are served.
    pub(super) fn table(&self) -> Option<Arc<ExportTable>> {
        self.lock().table.clone()
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

    /// Changes what the API shows.
    pub(super) fn show(&self, change: impl FnOnce(&mut Shown)) {
        change(&mut self.lock());
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver {
    fn new(journal: Journal, state: State) -> Driver {
        Driver {
            journal,
            state,
            machine: None,
            vm: None,
            serving: None,
            lease: None,
            plan: None,
            held: None,
            committed: None,
            stream: None,
            watchers: Vec::new(),
        }
    }

    pub(super) fn stop_watchers(&mut self) {
        for watcher in self.watchers.drain(..) {
            watcher.abort();
        }
    }
}

fn served(shown: &Shown, disk: &str) -> Option<Served> {
    Served::of(shown.table.as_ref()?, &disks::export_name(disk).ok()?)
}

/// Opens every disk of a recovery and puts it into `table`.
fn fill(
    repository: &Repository,
    definition: &Definition,
    point: &RecoveryPoint,
    dir: &Path,
    open: OpenOverlay,
    first_read: &Arc<FirstRead>,
    table: &ExportTable,
) -> Result<Vec<Arc<LiveDisk>>, Problem> {
    let mut live = Vec::new();
    for disk in &definition.disks {
        let base = disks::open(repository, point, &disk.name)?;
        let overlay = disks::open_overlay(&dir.join("disks"), point, &disk.name, base, open)?;
        let description = format!("{} of {} in recovery {}", disk.name, definition.machine, definition.name);
        let export = OverlayExport { overlay, description, first_read: first_read.clone() };
        live.push(publish(table, &disk.name, LiveDisk::new(export))?);
    }
    Ok(live)
}

/// Opens every disk of a recovery that is cut over, on production storage.
fn fill_moved(definition: &Definition, plan: &Plan, table: &ExportTable) -> Result<Vec<Arc<LiveDisk>>, Problem> {
    let mut live = Vec::new();
    for (disk, planned) in definition.disks.iter().zip(&plan.disks) {
        let place = &planned.place;
        let target = rehydrate::open(place, disk.size, Opening::Again)
            .map_err(|error| Problem::failed(format!("cannot open {place}, where disk {} is", disk.name), &error))?;
        let description = format!("{} of {} on {place}", disk.name, definition.machine);
        live.push(publish(table, &disk.name, LiveDisk::cut_over(disk.size, target.into(), description))?);
    }
    Ok(live)
}

fn publish(table: &ExportTable, disk: &str, live: LiveDisk) -> Result<Arc<LiveDisk>, Problem> {
    let live = Arc::new(live);
    table
        .add(disks::export_name(disk)?, live.clone())
        .map_err(|error| Problem::failed(format!("cannot publish disk {disk}"), &error))?;
    Ok(live)
}

fn remove_file_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir)?.sync_all()
}
