//! A recovery's way back to production storage: rehydration and cutover. The rules: docs/design/rehydration.md

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use blockstore::overlay::Overlay;
use hypervisor::{DiskSource, Keep, MachineDefinition};
use nbd_server::{Endpoint, NbdUri};
use serde::{Deserialize, Serialize};

use super::HypervisorKind;
use super::journal::{Journal, JournalError};
use super::one::{Driver, NBD_SOCKET, Recovery};
use super::record::Record;
use super::state::{Event, State};
use crate::problem::Problem;
use crate::rehydrate::{
    self, CopyError, LiveDisk, Move, Opening, Phase, Place, Plan, Regions, RehydrateRequest, Stream,
};

/// How often the copying is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// A recovery that was ready is no longer when the copying has been behind for this many looks.
const BEHIND: u32 = 50;
/// How often a journal that cannot be written is tried again while the guest waits.
const JOURNAL_RETRY: Duration = Duration::from_secs(1);

const PAUSED: &str = "paused by its user";

/// What can be told to a rehydration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Copy nothing for now.
    Pause,
    /// Copy again.
    Resume,
    /// Give it up; the recovery stays on its overlay.
    Cancel,
}

/// Follows the copying: enters ready-for-cutover, notes what holds it.
pub(super) async fn watch(recovery: Arc<Recovery>) {
    let mut behind = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(moving) = recovery.lock().moving.clone() else { return };
        let phase = moving.progress().phase;
        let state = recovery.lock().state;
        let event = match (&phase, state) {
            (Phase::Ready, State::Rehydrating) => Event::FullyHydrated,
            (Phase::Copying | Phase::Retrying(_), State::ReadyForCutover) if behind < BEHIND => {
                behind += 1;
                continue;
            }
            (Phase::Copying | Phase::Retrying(_) | Phase::Held(_), State::ReadyForCutover) => Event::FellBehind,
            (Phase::Held(_), State::Rehydrating) => Event::FellBehind,
            _ => {
                behind = 0;
                recovery.show(|shown| {
                    shown.problem = match &phase {
                        Phase::Retrying(why) => Some(format!("{why}; trying again")),
                        _ => None,
                    };
                });
                continue;
            }
        };
        behind = 0;
        let mut driver = recovery.driver.lock().await;
        if driver.state != state {
            continue;
        }
        let entered = match event {
            Event::FellBehind if state == State::Rehydrating => Ok(()),
            event => recovery.enter(&mut driver, event, None).map(drop),
        };
        let noted = match &phase {
            Phase::Held(why) => entered.and_then(|()| recovery.note_move(&mut driver, Some(why.clone()))),
            _ => entered,
        };
        if let Err(problem) = noted {
            tracing::error!(recovery = %recovery.name(), %problem, "cannot note how the rehydration stands");
            return;
        }
        if matches!(phase, Phase::Held(_)) {
            return; // a resume watches anew
        }
    }
}

impl Recovery {
    /// Begins to move the disks.
    pub async fn rehydrate(self: &Arc<Self>, request: &RehydrateRequest) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        let name = self.name();
        if driver.state != State::Running {
            return Err(Problem::refused(format!("recovery {name} is {}, and cannot be rehydrated", driver.state))
                .hint(format!("`lifeboat recovery {name}` shows what can be done")));
        }
        let plan = Plan::make(&self.definition.disks, request)?;
        let opening = if request.overwrite { Opening::Overwrite } else { Opening::New };
        let moves = self.open_targets(&plan, opening).await?;
        driver.plan = Some(plan);
        let begun = self.note_move(&mut driver, None).and_then(|()| {
            self.enter(&mut driver, Event::RehydrateRequested, None)?;
            self.begin(&mut driver, moves)
        });
        if let Err(problem) = begun {
            if driver.state == State::Running {
                self.forget_targets(&mut driver);
            }
            return Err(problem);
        }
        self.watch(&mut driver);
        Ok(())
    }

    /// Pauses, resumes or cancels the copying.
    pub async fn steer(self: &Arc<Self>, order: Order) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        if !matches!(driver.state, State::Rehydrating | State::ReadyForCutover) {
            return Err(Problem::refused(format!(
                "recovery {} is {}, and not being rehydrated",
                self.name(),
                driver.state
            )));
        }
        match order {
            Order::Pause => {
                if let Some(stream) = &mut driver.stream {
                    tokio::task::block_in_place(|| stream.hold(PAUSED));
                }
                if driver.state == State::ReadyForCutover {
                    self.enter(&mut driver, Event::FellBehind, None)?;
                }
                self.note_move(&mut driver, Some(PAUSED.to_owned()))?;
            }
            Order::Resume => {
                self.note_move(&mut driver, None)?;
                match &mut driver.stream {
                    Some(stream) => {
                        tokio::task::block_in_place(|| stream.go_on()).map_err(|error| cannot_copy(&error))?
                    }
                    None => self.move_on(&mut driver).await?,
                }
            }
            Order::Cancel => {
                self.stop_copying(&mut driver).await;
                self.enter(&mut driver, Event::RehydrationCancelled, None)?;
                self.forget_targets(&mut driver);
            }
        }
        self.watch(&mut driver);
        Ok(())
    }

    /// Moves the guest onto the copy. The order: docs/design/rehydration.md
    pub async fn cut_over(self: &Arc<Self>) -> Result<(), Problem> {
        let mut driver = self.driver.lock().await;
        let name = self.name().to_owned();
        if driver.state == State::Rehydrating {
            return Err(Problem::refused(format!("not everything of recovery {name} is on production storage yet"))
                .hint(format!("`lifeboat recovery {name}` shows how far it is")));
        }
        let problem = |error: &CutoverError| {
            Problem::failed(format!("recovery {name} is not cut over, its guest runs on as before"), error)
        };
        self.enter(&mut driver, Event::CutoverRequested, None)?;
        driver.stop_watchers();
        let Some(mut stream) = driver.stream.take() else {
            self.enter(&mut driver, Event::SwitchFailed, None)?;
            return Err(Problem::refused(format!("recovery {name} is not being copied"))
                .hint(format!("`lifeboat rehydrate {name} --resume`")));
        };
        let journal = &mut driver.journal;
        let outcome = tokio::task::block_in_place(|| stream.cut_over(|| decide(journal)));
        match outcome {
            Ok(pause) => {
                // The journal has it already.
                (driver.state, _) = driver.state.apply(Event::Switched);
                let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
                tracing::info!(recovery = %name, pause_ms = millis, "recovery cut over");
                self.show(|shown| {
                    shown.state = State::CutOver;
                    shown.problem = None;
                    shown.moving = None;
                    shown.timings.cutover_pause_ms = Some(millis);
                });
                drop(stream);
                self.redefine_vm(&mut driver).await;
                self.remove_overlays();
                self.release_lease(&mut driver);
                self.watch(&mut driver);
                Ok(())
            }
            Err(error) => {
                let problem = problem(&error);
                driver.stream = Some(stream);
                self.enter(&mut driver, Event::SwitchFailed, None)?;
                self.note_move(&mut driver, Some(crate::problem::chain(&error)))?;
                self.watch(&mut driver);
                Err(problem.hint(format!("when the cause is gone: `lifeboat rehydrate {name} --resume`")))
            }
        }
    }

    /// After a restart: copies on from where it was, unless that is held.
    pub(super) async fn move_on(self: &Arc<Self>, driver: &mut Driver) -> Result<(), Problem> {
        if driver.state == State::CuttingOver {
            self.enter(driver, Event::SwitchFailed, None)?;
        } else if driver.state == State::ReadyForCutover {
            self.enter(driver, Event::FellBehind, None)?;
        }
        self.show(|shown| shown.problem = driver.held.clone());
        if driver.held.is_some() || driver.stream.is_some() {
            return Ok(());
        }
        let Some(plan) = driver.plan.clone() else {
            return self.enter(driver, Event::RehydrationCancelled, None).map(drop);
        };
        match self.open_targets(&plan, Opening::Again).await {
            Ok(moves) => self.begin(driver, moves),
            // The guest needs no target; somebody has to look at this one.
            Err(problem) => self.note_move(driver, Some(problem.to_string())),
        }
    }

    async fn open_targets(&self, plan: &Plan, opening: Opening) -> Result<Vec<Move>, Problem> {
        let disks = self.lock().disks.clone();
        let (plan, summaries) = (plan.clone(), self.definition.disks.clone());
        let notes = self.dir().join("disks");
        let open = move || {
            let mut moves: Vec<Move> = Vec::new();
            for ((planned, disk), live) in plan.disks.iter().zip(&summaries).zip(disks) {
                let checkpoint = notes.join(&disk.name).join("hydrated");
                match open_one(&planned.place, &disk.name, disk.size, live, checkpoint, opening) {
                    Ok(one) => moves.push(one),
                    Err(problem) => {
                        if opening != Opening::Again {
                            remove_made(&Plan { disks: plan.disks[..moves.len()].to_vec(), ..plan.clone() });
                        }
                        return Err(problem);
                    }
                }
            }
            Ok(moves)
        };
        tokio::task::spawn_blocking(open).await.map_err(|error| cannot_copy(&error))?
    }

    fn begin(&self, driver: &mut Driver, moves: Vec<Move>) -> Result<(), Problem> {
        let limit = driver.plan.as_ref().and_then(|plan| plan.limit);
        let stream =
            tokio::task::block_in_place(|| Stream::start(moves, limit)).map_err(|error| cannot_copy(&error))?;
        let (watch, plan) = (stream.watch(), driver.plan.clone());
        self.show(|shown| {
            shown.moving = Some(watch);
            shown.plan = plan;
        });
        driver.stream = Some(stream);
        Ok(())
    }

    /// Journals the plan and whether it is held.
    fn note_move(&self, driver: &mut Driver, held: Option<String>) -> Result<(), Problem> {
        let Some(plan) = driver.plan.clone() else { return Ok(()) };
        driver
            .journal
            .append(&Record::Move { plan: Box::new(plan.clone()), held: held.clone() })
            .map_err(|error| Problem::failed(format!("cannot note how recovery {} moves", self.name()), &error))?;
        driver.held = held.clone();
        self.show(|shown| {
            shown.plan = Some(plan);
            shown.problem = held;
        });
        Ok(())
    }

    pub(super) async fn stop_copying(&self, driver: &mut Driver) {
        driver.stop_watchers();
        if let Some(stream) = driver.stream.take() {
            tokio::task::block_in_place(|| stream.end());
        }
        self.show(|shown| shown.moving = None);
    }

    /// Removes the files that a cancelled rehydration made.
    pub(super) fn forget_targets(&self, driver: &mut Driver) {
        if let Some(plan) = driver.plan.take() {
            remove_made(&plan);
            for disk in &plan.disks {
                let _ = std::fs::remove_file(self.dir().join("disks").join(&disk.disk).join("hydrated"));
            }
        }
        self.show(|shown| {
            shown.plan = None;
            shown.problem = None;
        });
    }

    /// Removes what the guest wrote here, once it is on production storage.
    pub(super) fn remove_overlays(&self) {
        let disks = self.dir().join("disks");
        if let Err(error) = std::fs::remove_dir_all(&disks)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(recovery = %self.name(), folder = %disks.display(), %error, "overlays not removed");
        }
    }

    /// Whether somebody still reaches the disks through Lifeboat: any client, or a VM that was started on its exports.
    pub(super) fn needs_exports(&self, driver: &Driver) -> bool {
        match (&self.definition.request.on, &driver.machine) {
            (HypervisorKind::None, _) | (_, None) => true,
            (HypervisorKind::Qemu | HypervisorKind::Libvirt(_), Some(machine)) => {
                driver.vm.is_some() && uses_exports(machine, &self.socket(NBD_SOCKET))
            }
        }
    }

    /// Before a VM that was cut over is started anew: from now on it uses production storage alone.
    pub(super) async fn leave_exports(
        &self,
        driver: &mut Driver,
        machine: &mut MachineDefinition,
    ) -> Result<(), Problem> {
        self.retire(driver).await;
        self.name_production(driver, machine)?;
        self.note_machine(driver, machine)
    }

    /// Lets a machine's definition name production storage alone.
    pub(super) fn name_production(&self, driver: &Driver, machine: &mut MachineDefinition) -> Result<(), Problem> {
        let Some(plan) = &driver.plan else { return Ok(()) };
        for (disk, planned) in machine.disks.iter_mut().zip(&plan.disks) {
            disk.source = source_of(&planned.place)?;
        }
        if let Some(domain) = machine.domain.as_mut().filter(|domain| domain.keep == Keep::Persistent) {
            domain.keep = Keep::Production;
        }
        Ok(())
    }
}

fn uses_exports(machine: &MachineDefinition, ours: &Path) -> bool {
    machine.disks.iter().any(|disk| matches!(&disk.source, DiskSource::Export { socket, .. } if socket == ours))
}

/// How QEMU reaches a place.
fn source_of(place: &Place) -> Result<DiskSource, Problem> {
    use std::os::unix::fs::FileTypeExt;
    Ok(match place {
        Place::Qcow2(path) => DiskSource::Qcow2(path.clone()),
        Place::Raw(path) if std::fs::metadata(path).is_ok_and(|there| there.file_type().is_block_device()) => {
            DiskSource::Device(path.clone())
        }
        Place::Raw(path) => DiskSource::Raw(path.clone()),
        Place::Nbd(uri) => {
            let parsed: NbdUri = uri.parse().map_err(|error| Problem::failed(format!("cannot use {uri}"), &error))?;
            let export = parsed.export.to_string();
            match parsed.endpoint {
                Endpoint::Tcp { host, port } => DiskSource::Remote { host, port, export },
                Endpoint::Unix(socket) => DiskSource::Export { socket, export },
            }
        }
    })
}

fn open_one(
    place: &Place,
    name: &str,
    size: u64,
    disk: Arc<LiveDisk>,
    checkpoint: PathBuf,
    opening: Opening,
) -> Result<Move, Problem> {
    let target = rehydrate::open(place, size, opening).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Problem::refused(format!("{place} exists")).hint("give another target, or --overwrite to replace it")
        }
        std::io::ErrorKind::ResourceBusy => Problem::refused(format!("{place} is in use: {error}")),
        _ => Problem::failed(format!("cannot rehydrate disk {name} to {place}"), &error),
    })?;
    let regions = match (opening, disk.overlay()) {
        (Opening::Again, Some(export)) => {
            let written = rehydrate::written_before(&checkpoint, size);
            forget_changed(&export.overlay, &written);
            Regions::resumed(size, written)
        }
        _ => Regions::all_open(size),
    };
    Ok(Move {
        name: name.to_owned(),
        size,
        disk,
        place: place.clone(),
        target: target.into(),
        regions: Arc::new(regions),
        checkpoint,
        copied: AtomicU64::new(0),
        data: AtomicU64::new(0),
        busy: AtomicU64::new(0),
        differences: AtomicU64::new(0),
    })
}

/// Takes out of `written` what the overlay holds: nobody knows whether that was copied before or after it changed.
fn forget_changed(overlay: &Overlay, written: &rehydrate::RegionSet) {
    let mut at = 0;
    while at < overlay.size() {
        for extent in overlay.changed(at, overlay.size() - at, 1024) {
            if extent.changed {
                for region in rehydrate::touched(at, extent.length) {
                    written.remove(region);
                }
            }
            at += extent.length;
        }
    }
}

fn remove_made(plan: &Plan) {
    for path in plan.disks.iter().filter(|disk| disk.made).filter_map(|disk| disk.place.path()) {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(target = %path.display(), %error, "cannot remove what a rehydration began");
        }
    }
}

fn cannot_copy(error: &(dyn std::error::Error + 'static)) -> Problem {
    Problem::failed("cannot copy", error)
}

/// Why a guest was not moved.
#[derive(Debug, thiserror::Error)]
enum CutoverError {
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("the journal cannot be written")]
    Journal(#[source] JournalError),
}

/// Journals that the guest is on production storage. If that fails, nobody knows which of the two the journal says, and
/// going on on either could lose what the guest writes: it waits until the journal can be read and says.
fn decide(journal: &mut Journal) -> Result<(), CutoverError> {
    let record = Record::State { state: State::CutOver, problem: None };
    let Err(first) = journal.append(&record) else { return Ok(()) };
    tracing::error!(error = %first, "the journal cannot be written in the middle of a cutover; the guest waits");
    loop {
        match Journal::open::<Record>(journal.path()) {
            Ok((reopened, records)) => {
                *journal = reopened;
                // It says nothing of it, and what was half written is cut off durably.
                if !matches!(records.last(), Some(Record::State { state: State::CutOver, .. })) {
                    return Err(CutoverError::Journal(first));
                }
                // What is read need not be durable: it is said again.
                if journal.append(&record).is_ok() {
                    return Ok(());
                }
            }
            Err(error) => tracing::error!(%error, "the journal cannot be read either; the guest waits on"),
        }
        std::thread::sleep(JOURNAL_RETRY);
    }
}
