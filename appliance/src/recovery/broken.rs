//! Recoveries whose journal cannot be read. What they are of is not known, but they are listed, and can be ended.

use std::fs;
use std::time::Duration;

use hypervisor::{Hypervisor, MachineDefinition, QemuHypervisor};

use super::state::State;
use super::{HypervisorKind, RecoveryView, Timings, machine};
use crate::problem::Problem;
use crate::state_dir::StateDir;

/// How long QEMU may take to end by itself.
const QUIT_GRACE: Duration = Duration::from_secs(5);

/// What the API shows of it.
pub fn view(name: &str, problem: &Problem) -> RecoveryView {
    RecoveryView {
        name: name.to_owned(),
        point: String::new(),
        machine: String::new(),
        state: State::Failed,
        problem: Some(problem.to_string()),
        hypervisor: HypervisorKind::None,
        domain: None,
        accelerator: None,
        vm: None,
        pid: None,
        console: None,
        qmp: None,
        guest_agent: None,
        display: None,
        disks: Vec::new(),
        rehydration: None,
        commits: None,
        next: vec!["discard".to_owned()],
        timings: Timings::default(),
        warnings: Vec::new(),
    }
}

/// Stops its VM, if one lives, and removes its folder.
pub async fn discard(state: &StateDir, name: &str) -> Result<(), Problem> {
    let dir = state.recoveries().join(name);
    let files = machine::files(&dir, |socket| state.short_path(dir.join(socket)));
    let machine = MachineDefinition::new(name, files);
    match QemuHypervisor.adopt(&machine).await {
        Ok(None) => {}
        Ok(Some(vm)) => {
            vm.quit(QUIT_GRACE)
                .await
                .map_err(|error| Problem::failed(format!("cannot stop the VM of recovery {name}"), &error))?;
        }
        Err(error) => return Err(Problem::failed(format!("cannot reach the VM of recovery {name}"), &error)),
    }
    for socket in machine::sockets(&dir, |socket| state.short_path(dir.join(socket))) {
        // One that was never made is as gone.
        let _ = fs::remove_file(socket);
    }
    fs::remove_dir_all(&dir).map_err(|error| Problem::failed(format!("cannot remove all of recovery {name}"), &error))
}
