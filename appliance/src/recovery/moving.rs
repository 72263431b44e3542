//! A recovery's way back to production storage: rehydration and cutover. The rules: docs/design/rehydration.md

use std::sync::Arc;
use std::time::Duration;

use hypervisor::{DiskSource, Keep, MachineDefinition};
use nbd_server::{Endpoint, NbdUri};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::HypervisorKind;
use super::one::{Driver, Recovery};
use super::record::Record;
use super::state::{Event, State};
use crate::problem::Problem;
use crate::rehydrate::{Mirror, Mirrored, Mode, Move, Opening, Phase, Place, Plan, RehydrateRequest, Stream};

/// How often the copying is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// A recovery that was ready is no longer when the copying has been behind for this many looks.
const BEHIND: u32 = 50;

const PAUSED: &str = "paused by its user";

/// What can be told to a rehydration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
            (Phase::Copying | Phase::Comparing | Phase::Retrying(_), State::ReadyForCutover) if behind < BEHIND => {
                behind += 1;
                continue;
            }
            (Phase::Copying | Phase::Comparing | Phase::Retrying(_) | Phase::Held(_), State::ReadyForCutover) => {
                Event::FellBehind
            }
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

/// Who copies.
#[derive(Debug)]
pub(super) enum Moving {
    /// Lifeboat.
    Stream(Stream),
    /// QEMU.
    Mirror(Mirror),
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
        let mode = match (request.mode, self.no_mirror(&driver).await) {
            (Some(Mode::Stream), _) => Mode::Stream,
            (Some(Mode::Mirror), Some(why)) => {
                return Err(Problem::refused(format!("the disks of recovery {name} cannot be mirrored: {why}"))
                    .hint("`--mode stream` copies them for whoever uses them"));
            }
            (Some(Mode::Mirror) | None, None) => Mode::Mirror,
            (None, Some(why)) => {
                tracing::info!(recovery = %name, why, "the disks are streamed, not mirrored");
                Mode::Stream
            }
        };
        let plan = Plan::make(&self.definition.disks, request, mode)?;
        self.check_targets(&plan)?;
        let opening = if request.overwrite { Opening::Overwrite } else { Opening::New };
        let opened = self.open(&driver, &plan, opening).await?;
        driver.plan = Some(plan);
        let mut begun = self.note_move(&mut driver, None);
        if begun.is_ok() {
            begun = self.enter(&mut driver, Event::RehydrateRequested, None).map(drop);
        }
        if begun.is_ok() {
            begun = self.begin(&mut driver, opened).await;
        }
        if let Err(problem) = begun {
            if driver.state == State::Rehydrating && self.cancel_mirror(&mut driver).await.is_ok() {
                self.enter(&mut driver, Event::RehydrationCancelled, None)?;
            }
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
                match &mut driver.moving {
                    Some(Moving::Stream(stream)) => tokio::task::block_in_place(|| stream.hold(PAUSED)),
                    Some(Moving::Mirror(mirror)) => mirror.hold(PAUSED).await.map_err(|error| cannot_copy(&error))?,
                    None => {}
                }
                if driver.state == State::ReadyForCutover {
                    self.enter(&mut driver, Event::FellBehind, None)?;
                }
                self.note_move(&mut driver, Some(PAUSED.to_owned()))?;
            }
            Order::Resume => {
                self.note_move(&mut driver, None)?;
                match &mut driver.moving {
                    Some(Moving::Stream(stream)) => {
                        tokio::task::block_in_place(|| stream.go_on()).map_err(|error| cannot_copy(&error))?
                    }
                    // The VM may be another one by now.
                    Some(Moving::Mirror(_)) | None => {
                        self.stop_copying(&mut driver).await;
                        self.move_on(&mut driver).await?;
                    }
                }
            }
            Order::Cancel => {
                if driver.mirrors() {
                    if let Some(disk) = self.moved(&driver).iter().position(|moved| *moved) {
                        let name = self.definition.disks.get(disk).map_or("", |disk| &disk.name);
                        return Err(Problem::refused(format!("disk {name} is on production storage already"))
                            .hint(format!("`lifeboat rehydrate {} --resume` moves the others, too", self.name())));
                    }
                    self.cancel_mirror(&mut driver).await?;
                }
                self.stop_copying(&mut driver).await;
                self.enter(&mut driver, Event::RehydrationCancelled, None)?;
                self.forget_targets(&mut driver);
            }
        }
        self.watch(&mut driver);
        Ok(())
    }

    /// After a restart: copies on from where it was, unless that is held.
    pub(super) async fn move_on(self: &Arc<Self>, driver: &mut Driver) -> Result<(), Problem> {
        if driver.state == State::CuttingOver {
            self.enter(driver, Event::SwitchFailed, None)?;
        } else if driver.state == State::ReadyForCutover {
            self.enter(driver, Event::FellBehind, None)?;
        }
        self.leave_moved_behind(driver);
        self.show(|shown| shown.problem = driver.held.clone());
        if driver.held.is_some() || driver.moving.is_some() {
            return Ok(());
        }
        let Some(plan) = driver.plan.clone() else {
            return self.enter(driver, Event::RehydrationCancelled, None).map(drop);
        };
        if plan.mode == Mode::Mirror && self.is_unreachable() {
            let why = "the VM cannot be asked how its disks stand; the move goes on when it can".to_owned();
            self.show(|shown| shown.problem = Some(why));
            return Ok(());
        }
        let begun = match self.open(driver, &plan, Opening::Again).await {
            Ok(opened) => self.begin(driver, opened).await,
            Err(problem) => Err(problem),
        };
        match begun {
            Ok(()) => Ok(()),
            // The guest needs no target; somebody has to look at this one.
            Err(problem) => self.note_move(driver, Some(problem.to_string())),
        }
    }

    async fn open(&self, driver: &Driver, plan: &Plan, opening: Opening) -> Result<Opened, Problem> {
        match plan.mode {
            Mode::Stream => self.open_targets(plan, opening).await.map(Opened::Stream),
            Mode::Mirror => self.open_mirrored(driver, plan, opening).await.map(Opened::Mirror),
        }
    }

    async fn begin(&self, driver: &mut Driver, opened: Opened) -> Result<(), Problem> {
        match opened {
            Opened::Stream(moves) => self.begin_stream(driver, moves),
            Opened::Mirror(disks) => self.begin_mirror(driver, disks).await,
        }
    }

    /// Journals the plan and whether it is held.
    pub(super) fn note_move(&self, driver: &mut Driver, held: Option<String>) -> Result<(), Problem> {
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

    /// Copies no more. What QEMU copies it copies on.
    pub(super) async fn stop_copying(&self, driver: &mut Driver) {
        driver.stop_watchers();
        match driver.moving.take() {
            Some(Moving::Stream(stream)) => tokio::task::block_in_place(|| stream.end()),
            Some(Moving::Mirror(mut mirror)) => mirror.detach().await,
            None => {}
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
                driver.vm.is_some() && machine.disks.iter().any(|disk| self.uses_export(disk))
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
        super::mirroring::on_targets(machine, plan)?;
        if let Some(domain) = machine.domain.as_mut().filter(|domain| domain.keep == Keep::Persistent) {
            domain.keep = Keep::Production;
        }
        Ok(())
    }
}

/// Targets that are open.
enum Opened {
    Stream(Vec<Move>),
    Mirror(Vec<Mirrored>),
}

/// How QEMU reaches a place.
pub(super) fn source_of(place: &Place) -> Result<DiskSource, Problem> {
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
                Endpoint::Tcp { host, port } => DiskSource::Remote { host, port, export, tls: parsed.tls.is_some() },
                Endpoint::Unix(socket) => DiskSource::Export { socket, export },
            }
        }
    })
}

/// Why a target cannot be opened.
pub(super) fn target_problem(place: &Place, disk: &str, error: &std::io::Error) -> Problem {
    match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Problem::refused(format!("{place} exists")).hint("give another target, or --overwrite to replace it")
        }
        std::io::ErrorKind::ResourceBusy => Problem::refused(format!("{place} is in use: {error}")),
        _ => Problem::failed(format!("cannot rehydrate disk {disk} to {place}"), error),
    }
}

/// Removes the files that were made for a plan.
pub(super) fn remove_made(plan: &Plan) {
    for path in plan.disks.iter().filter(|disk| disk.made).filter_map(|disk| disk.place.path()) {
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(target = %path.display(), %error, "cannot remove what a rehydration began");
        }
    }
}

pub(super) fn cannot_copy(error: &(dyn std::error::Error + 'static)) -> Problem {
    Problem::failed("cannot copy", error)
}
