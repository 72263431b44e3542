//! A recovery's VM: started, found again, started anew, stopped.

use std::sync::Arc;
use std::time::Duration;

use hypervisor::{Hypervisor, Machine, QemuHypervisor};

use super::HypervisorKind;
use super::one::{Definition, Driver, Recovery};
use super::quiet;
use super::record::Record;
use super::state::State;
use crate::problem::Problem;

/// How long QEMU may take to end by itself when a recovery is discarded.
const QUIT_GRACE: Duration = Duration::from_secs(5);

impl Recovery {
    pub(super) async fn start_vm(self: &Arc<Self>, driver: &mut Driver) -> Result<(), Problem> {
        if self.definition.request.on == HypervisorKind::None {
            return Ok(());
        }
        let first = self.lock().disks.first().and_then(|disk| disk.overlay());
        let overlay = first.map(|export| export.overlay.clone());
        let Definition { request, name, disks, .. } = &self.definition;
        let machine =
            super::machine::define(request, name, disks, overlay, self.dir(), |name| self.socket(name)).await?;
        self.note_machine(driver, &machine)?;
        let vm = QemuHypervisor.start(&machine).await.map_err(|error| {
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
        let vm = QemuHypervisor
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
        Ok(())
    }

    pub(super) async fn adopt(&self, driver: &mut Driver) {
        let Some(machine) = &driver.machine else { return };
        match QemuHypervisor.adopt(machine).await {
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
                let error = crate::problem::chain(&error);
                tracing::error!(recovery = %self.definition.name, error, "cannot reach the VM");
                self.show(|shown| shown.vm = Some("unreachable".to_owned()));
            }
        }
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
