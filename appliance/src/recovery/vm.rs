//! A recovery's VM: started, found again, started anew, stopped.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::Machine;

use super::HypervisorKind;
use super::one::{Definition, Driver, Recovery};
use super::quiet;
use super::record::Record;
use super::state::State;
use crate::problem::Problem;

/// How long QEMU may take to end by itself when a recovery is discarded.
const QUIT_GRACE: Duration = Duration::from_secs(5);
/// What is shown of a VM that may live and cannot be asked.
const UNREACHABLE: &str = "unreachable";

impl Recovery {
    pub(super) async fn start_vm(self: &Arc<Self>, driver: &mut Driver) -> Result<(), Problem> {
        if self.definition.request.on == HypervisorKind::None {
            return Ok(());
        }
        let first = self.lock().disks.first().and_then(|disk| disk.overlay());
        let overlay = first.map(|export| export.overlay.clone());
        let Definition { request, name, disks, .. } = &self.definition;
        let mut machine =
            super::machine::define(request, name, disks, overlay, self.dir(), |name| self.socket(name)).await?;
        for disk in &mut machine.disks {
            disk.source = self.export_source(&disk.name)?;
        }
        let (machine, changes) = super::domain::define(machine, request, self.owner())?;
        self.note_machine(driver, &machine)?;
        self.show(|shown| shown.changes = changes);
        let vm = self.hypervisor().start(&machine).await.map_err(|error| {
            Problem::failed(format!("cannot start the VM of recovery {}", self.definition.name), &error)
        })?;
        self.have_vm(driver, vm);
        self.show(|shown| shown.timings.started_ms = Some(self.millis()));
        Ok(())
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
        quiet::forget(self.dir());
        if cut_over {
            self.leave_exports(&mut driver, &mut machine).await?;
        }
        let vm = self
            .hypervisor()
            .start(&machine)
            .await
            .map_err(|error| Problem::failed(format!("cannot start the VM of recovery {name}"), &error))?;
        self.have_vm(&mut driver, vm);
        self.watch(&mut driver);
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
        self.show(|shown| shown.domain = super::domain::view(machine));
        Ok(())
    }

    /// Takes away what the hypervisor keeps of a VM that has ended.
    pub(super) async fn forget_vm(&self, driver: &Driver) -> Result<(), Problem> {
        let Some(machine) = driver.machine.as_ref().filter(|_| !driver.in_production()) else { return Ok(()) };
        self.hypervisor().forget(machine).await.map_err(|error| {
            Problem::failed(format!("cannot take away the VM of recovery {}", self.definition.name), &error)
                .hint("discard it again when the cause is gone")
        })
    }

    /// After a cutover: whatever the hypervisor keeps of the VM names production storage alone from now on.
    pub(super) async fn redefine_vm(&self, driver: &mut Driver) {
        let Some(mut machine) = driver.machine.clone() else { return };
        let redefined = match self.name_production(driver, &mut machine) {
            Ok(()) => self.hypervisor().redefine(&machine).await.map_err(|error| crate::problem::chain(&error)),
            Err(problem) => Err(problem.to_string()),
        };
        let noted = match redefined {
            // As long as it runs on an export, it is what it was started as.
            Ok(()) if machine.domain.is_some() && !self.needs_exports(driver) => {
                self.note_machine(driver, &machine).map_err(|problem| problem.to_string())
            }
            other => other,
        };
        if let Err(error) = noted {
            let name = &self.definition.name;
            tracing::error!(recovery = %name, error, "the hypervisor does not know the VM's new disks");
            self.show(|shown| {
                shown.problem =
                    Some(format!("the VM runs on, but its definition does not name its new disks: {error}"));
            });
        }
    }

    pub(super) async fn adopt(&self, driver: &mut Driver) {
        let Some(machine) = &driver.machine else { return };
        match self.hypervisor().adopt(machine).await {
            Ok(Some(vm)) => {
                quiet::after_restart(self.dir(), &vm);
                self.have_vm(driver, vm);
            }
            Ok(None) => {
                driver.vm = None;
                self.show(|shown| {
                    shown.vm = Some("shut-off".to_owned());
                    shown.pid = None;
                });
            }
            Err(error) => {
                if !self.is_unreachable() {
                    let error = crate::problem::chain(&error);
                    tracing::error!(recovery = %self.definition.name, error, "cannot reach the VM");
                }
                self.show(|shown| shown.vm = Some(UNREACHABLE.to_owned()));
            }
        }
    }

    /// Whether it has a VM that may live and cannot be asked.
    pub(super) fn is_unreachable(&self) -> bool {
        self.lock().vm.as_deref() == Some(UNREACHABLE)
    }

    /// Tries to find a VM that could not be asked, and watches it from then on. Whether there is nothing more to try.
    pub(super) async fn reach_again(self: &Arc<Self>) -> bool {
        let mut driver = self.driver.lock().await;
        if self.is_unreachable() {
            self.adopt(&mut driver).await;
            if self.is_unreachable() {
                return false;
            }
            tracing::info!(recovery = %self.definition.name, "the VM can be asked again");
            if matches!(driver.state, State::Rehydrating)
                && let Err(problem) = self.move_on(&mut driver).await
            {
                tracing::error!(recovery = %self.definition.name, %problem, "the disks are not moved on");
                self.note_problem(&problem);
            }
            // Ends who calls this, so nothing comes after it.
            self.watch(&mut driver);
        }
        true
    }

    pub(super) fn have_vm(&self, driver: &mut Driver, vm: Arc<dyn Machine>) {
        self.show(|shown| {
            shown.vm = Some("running".to_owned());
            shown.pid = vm.pid();
            shown.accelerator = Some(vm.accelerator());
        });
        driver.vm = Some(vm);
    }

    pub(super) async fn stop_vm(&self, driver: &mut Driver) {
        driver.stop_watchers();
        if driver.vm.is_none() {
            self.adopt(driver).await;
        }
        // A domain that is in production is no longer ours to stop.
        if driver.in_production() {
            driver.vm = None;
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
}
