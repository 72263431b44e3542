//! A recovery whose disks its own QEMU copies, and moves to their targets. The rules: docs/design/rehydration.md

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hypervisor::{Machine, MachineDefinition, MachineError, MirrorState, Status};

use super::HypervisorKind;
use super::cutover::{CutoverError, decide, insist};
use super::moving::{Moving, cannot_copy, remove_made, source_of, target_problem};
use super::one::{Driver, Recovery};
use super::record::Record;
use super::state::State;
use crate::disks;
use crate::problem::{Problem, chain};
use crate::rehydrate::{self, Mirror, Mirrored, Opening, Plan, Regions};

/// How often a VM that was held is told to go on, until it does.
const RESUME_RETRY: Duration = Duration::from_millis(500);

impl Recovery {
    /// Why the hypervisor cannot copy the disks, if it cannot.
    pub(super) async fn no_mirror(&self, driver: &Driver) -> Option<String> {
        if self.definition.request.on == HypervisorKind::None {
            return Some("it has no VM of Lifeboat's".to_owned());
        }
        match &driver.vm {
            None => return Some("its VM does not run".to_owned()),
            Some(vm) => match vm.status().await {
                Ok(_) => {}
                Err(MachineError::Gone { .. }) => return Some("its VM does not run".to_owned()),
                Err(error) => return Some(chain(&error)),
            },
        }
        // What others write QEMU does not see, and after the cutover the disks are served no more.
        self.used_by_others().map(|disk| format!("another NBD client uses disk {disk}"))
    }

    /// A disk that somebody but the VM is connected to.
    fn used_by_others(&self) -> Option<String> {
        let table = self.table()?;
        let used = |disk: &&str| {
            disks::export_name(disk).ok().and_then(|name| table.connections(&name)).is_some_and(|count| count > 1)
        };
        self.definition.disks.iter().map(|disk| disk.name.as_str()).find(used).map(str::to_owned)
    }

    /// Opens the targets beside QEMU, makes the files that are to be made.
    pub(super) async fn open_mirrored(
        &self,
        driver: &Driver,
        plan: &Plan,
        opening: Opening,
    ) -> Result<Vec<Mirrored>, Problem> {
        let disks = self.lock().disks.clone();
        let (plan, summaries, moved) = (plan.clone(), self.definition.disks.clone(), self.moved(driver));
        let open = move || {
            let mut all: Vec<Mirrored> = Vec::new();
            for (at, ((planned, disk), live)) in plan.disks.iter().zip(&summaries).zip(disks).enumerate() {
                let place = &planned.place;
                let opened = rehydrate::open_readback(place, disk.size, opening)
                    .map_err(|error| target_problem(place, &disk.name, &error))
                    .and_then(|target| Ok((target, source_of(place)?)));
                let (target, source) = match opened {
                    Ok(opened) => opened,
                    Err(problem) => {
                        if opening != Opening::Again {
                            remove_made(&Plan { disks: plan.disks[..all.len()].to_vec(), ..plan.clone() });
                        }
                        return Err(problem);
                    }
                };
                all.push(Mirrored {
                    at,
                    name: disk.name.clone(),
                    size: disk.size,
                    disk: live,
                    place: place.clone(),
                    source,
                    target,
                    regions: Arc::new(Regions::all_open(disk.size)),
                    moved: moved.get(at).copied().unwrap_or(false),
                    compared: AtomicU64::new(0),
                    busy: AtomicU64::new(0),
                    suspects: Mutex::default(),
                });
            }
            Ok(all)
        };
        tokio::task::spawn_blocking(open).await.map_err(|error| cannot_copy(&error))?
    }

    /// Has QEMU copy, on from where it was or anew.
    pub(super) async fn begin_mirror(&self, driver: &mut Driver, disks: Vec<Mirrored>) -> Result<(), Problem> {
        let Some(vm) = driver.vm.clone() else {
            return Err(Problem::refused(format!("the VM of recovery {} does not run", self.name()))
                .hint(format!("`lifeboat start {}` starts it on what it has written", self.name())));
        };
        let limit = driver.plan.as_ref().and_then(|plan| plan.limit);
        let mirror = Mirror::start(vm, disks, limit).await.map_err(|error| cannot_copy(&error))?;
        let (watch, plan) = (mirror.watch(), driver.plan.clone());
        self.show(|shown| {
            shown.moving = Some(watch);
            shown.plan = plan;
        });
        driver.moving = Some(Moving::Mirror(mirror));
        Ok(())
    }

    /// Gives up every copy that QEMU makes, whether somebody follows it or not.
    pub(super) async fn cancel_mirror(&self, driver: &mut Driver) -> Result<(), Problem> {
        if let Some(Moving::Mirror(mut mirror)) = driver.moving.take() {
            mirror.detach().await;
        }
        let Some(vm) = &driver.vm else { return Ok(()) };
        for (at, disk) in self.definition.disks.iter().enumerate() {
            match vm.mirror_cancel(at).await {
                Ok(()) | Err(hypervisor::MirrorError::Machine(MachineError::Gone { .. })) => {}
                Err(error) => {
                    return Err(Problem::failed(format!("cannot give up the copy of disk {}", disk.name), &error));
                }
            }
        }
        Ok(())
    }

    /// Which disks the guest has left its overlays of, by where the definition says they are.
    pub(super) fn moved(&self, driver: &Driver) -> Vec<bool> {
        let disks = driver.machine.iter().flat_map(|machine| &machine.disks);
        disks.map(|disk| !self.uses_export(disk)).collect()
    }

    /// The cutover proper. On an error the guest runs on its overlays, but for disks that are moved: see `fall_back`.
    pub(super) async fn switch(&self, driver: &mut Driver, mirror: &mut Mirror) -> Result<Duration, CutoverError> {
        mirror.approach().await?;
        if let Some(disk) = self.used_by_others() {
            return Err(CutoverError::InUse(disk));
        }
        let Some(vm) = driver.vm.clone() else { return Err(CutoverError::NotRunning(Status::Shutdown)) };
        let status = vm.status().await?;
        if status != Status::Running {
            return Err(CutoverError::NotRunning(status));
        }
        let began = Instant::now();
        let held = match vm.pause().await {
            Ok(()) => mirror.arrive().await.map_err(CutoverError::from),
            // It may still take effect.
            Err(error) => Err(CutoverError::from(error)),
        };
        let held = held.and_then(|()| tokio::task::block_in_place(|| decide(&mut driver.journal)));
        if let Err(error) = held {
            self.go_on(&*vm).await;
            return Err(error);
        }
        match self.pivot_all(driver, &*vm).await {
            Ok(()) => {
                self.go_on(&*vm).await;
                Ok(began.elapsed())
            }
            Err(error) => {
                self.fall_back(driver, &*vm).await;
                Err(error)
            }
        }
    }

    /// Moves every disk that is not moved yet. The guest is held, and the targets hold what it sees.
    async fn pivot_all(&self, driver: &Driver, vm: &dyn Machine) -> Result<(), CutoverError> {
        let moved = self.moved(driver);
        for (at, disk) in self.definition.disks.iter().enumerate().filter(|(at, _)| moved.get(*at) == Some(&false)) {
            vm.mirror_pivot(at)
                .await
                .map_err(|source| CutoverError::Pivot { disk: disk.name.clone(), source: Box::new(source) })?;
        }
        Ok(())
    }

    /// A disk could not be moved although all was decided. Both sides of every disk are equal: the guest goes on where
    /// each disk is.
    ///
    /// Order: (1) the definition names where each disk is, (2) the state is `cutting-over` again, (3) the guest goes on.
    /// Without 1 a VM that is started anew would not find what it writes after 3; and a restart before 3 finds in 2
    /// that the guest is held.
    async fn fall_back(&self, driver: &mut Driver, vm: &dyn Machine) {
        let mut machine = driver.machine.clone();
        if let (Some(machine), Some(plan)) = (&mut machine, &driver.plan) {
            for (at, (disk, planned)) in machine.disks.iter_mut().zip(&plan.disks).enumerate() {
                if let (Ok(MirrorState::Pivoted { .. }), Ok(source)) =
                    (vm.mirror_state(at).await, source_of(&planned.place))
                {
                    disk.source = source;
                }
            }
        }
        if let Some(machine) = machine {
            let record = Record::Vm { machine: Box::new(machine.clone()) };
            tokio::task::block_in_place(|| insist(driver, &record));
            driver.machine = Some(machine);
        }
        let record = Record::State { state: State::CuttingOver, problem: None };
        tokio::task::block_in_place(|| insist(driver, &record));
        self.leave_moved_behind(driver);
        self.go_on(vm).await;
    }

    /// What the overlay of a moved disk holds is of no use to anybody any more.
    pub(super) fn leave_moved_behind(&self, driver: &Driver) {
        if !driver.mirrors() {
            return;
        }
        let live = self.lock().disks.clone();
        for (disk, _) in live.iter().zip(self.moved(driver)).filter(|(_, moved)| *moved) {
            disk.leave_behind();
        }
    }

    /// After a restart in the middle of a cutover that was not decided: the guest goes on.
    pub(super) async fn let_go_on(&self, driver: &mut Driver) -> Result<(), Problem> {
        self.reachable()?;
        if let Some(vm) = driver.vm.clone()
            && vm.status().await.is_ok_and(|status| status == Status::Paused)
        {
            self.go_on(&*vm).await;
        }
        Ok(())
    }

    /// After a restart: a cutover that was decided is brought to its end.
    pub(super) async fn finish_cut_over(self: &Arc<Self>, driver: &mut Driver) -> Result<(), Problem> {
        self.reachable()?;
        if let Some(vm) = driver.vm.clone() {
            let mut states = Vec::new();
            for at in 0..self.definition.disks.len() {
                let state = vm.mirror_state(at).await;
                states.push(state.map_err(|error| Problem::failed("cannot see where the disks are", &error))?);
            }
            let moved = self.moved(driver);
            let left = |(at, state): (usize, &MirrorState)| {
                moved.get(at) == Some(&false) && !matches!(state, MirrorState::Pivoted { .. })
            };
            if states.iter().enumerate().any(left) {
                // QEMU may still look at where its disks were.
                self.serve_again(driver).await?;
                if let Err(error) = self.pivot_all(driver, &*vm).await {
                    self.fall_back(driver, &*vm).await;
                    driver.state = State::CuttingOver;
                    self.enter(driver, super::state::Event::SwitchFailed, None)?;
                    self.note_move(driver, Some(chain(&error)))?;
                    return Err(Problem::failed(format!("recovery {} is not cut over", self.name()), &error));
                }
            }
            // Who noted where the disks are had let the guest go on before.
            if moved.contains(&false) && vm.status().await.is_ok_and(|status| status == Status::Paused) {
                self.go_on(&*vm).await;
            }
        }
        self.leave_overlays(driver).await
    }

    /// The guest is on production storage: QEMU lets go of the exports, the definition names production storage, and
    /// nothing is served any more.
    pub(super) async fn leave_overlays(&self, driver: &mut Driver) -> Result<(), Problem> {
        if let Some(vm) = &driver.vm {
            for (at, disk) in self.definition.disks.iter().enumerate() {
                match vm.mirror_release(at).await {
                    Ok(()) | Err(hypervisor::MirrorError::Machine(MachineError::Gone { .. })) => {}
                    Err(error) => {
                        let error = chain(&error);
                        tracing::warn!(recovery = %self.name(), disk = disk.name, error, "QEMU holds its old source");
                    }
                }
            }
        }
        match driver.machine.clone().filter(|_| self.moved(driver).contains(&false)) {
            Some(mut machine) => self.leave_exports(driver, &mut machine).await,
            None => {
                self.retire(driver).await;
                Ok(())
            }
        }
    }

    /// Lets a VM that was held run, however long it takes until it can be told: whoever stopped here would leave a guest
    /// stopped that nobody lets go.
    async fn go_on(&self, vm: &dyn Machine) {
        while let Err(error) = vm.resume().await {
            // Whatever else it is, it is not held by us: it has ended, or waits for its disk.
            match vm.status().await {
                Ok(Status::Paused) => {}
                Err(MachineError::Gone { .. }) | Ok(_) => return,
                Err(_) => {}
            }
            let why =
                format!("the VM was held for a cutover and cannot be told to go on: {}; trying again", chain(&error));
            tracing::error!(recovery = %self.name(), why);
            self.show(|shown| shown.problem = Some(why));
            tokio::time::sleep(RESUME_RETRY).await;
        }
    }

    /// Refuses where a VM may live that cannot be asked.
    fn reachable(&self) -> Result<(), Problem> {
        if self.is_unreachable() {
            return Err(Problem::failed(
                format!("the VM of recovery {} lives and does not answer", self.name()),
                &std::io::Error::from(std::io::ErrorKind::NotConnected),
            ));
        }
        Ok(())
    }
}

/// Names production storage as the source of every disk.
pub(super) fn on_targets(machine: &mut MachineDefinition, plan: &Plan) -> Result<(), Problem> {
    for (disk, planned) in machine.disks.iter_mut().zip(&plan.disks) {
        disk.source = source_of(&planned.place)?;
    }
    Ok(())
}
