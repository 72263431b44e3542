//! Recoveries whose journal cannot be read. What they are of is not known, but they are listed, and can be ended.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use hypervisor::libvirt::Domains;
use hypervisor::{Hypervisor, MachineDefinition, QemuHypervisor};

use super::one::Context;
use super::record::Record;
use super::remote::owner_of;
use super::state::State;
use super::{HypervisorKind, RecoveryView, Timings, domain, machine};
use crate::journal::read_good;
use crate::problem::Problem;

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

/// Stops its VM, if one lives, removes its folder, and lets go of its recovery point. `libvirts`: where recoveries have domains; the journal may not be
/// able to say it any more.
pub async fn discard(context: &Context, name: &str, libvirts: BTreeSet<String>) -> Result<(), Problem> {
    let state = &context.state;
    let dir = state.recoveries().join(name);
    end_domains(name, &dir, libvirts).await?;
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
    fs::remove_dir_all(&dir)
        .map_err(|error| Problem::failed(format!("cannot remove all of recovery {name}"), &error))?;
    if let Err(error) = context.repository.release_recovery(&owner_of(&dir)) {
        tracing::warn!(recovery = name, %error, "its lease stays in the repository");
    }
    Ok(())
}

/// Ends the libvirt domains that carry the recovery's folder. Where its own journal still names a libvirt, that has to
/// answer; another is asked besides.
async fn end_domains(name: &str, dir: &Path, others: BTreeSet<String>) -> Result<(), Problem> {
    let named: BTreeSet<String> = read_good(&dir.join("journal")).iter().filter_map(libvirt_of).collect();
    for uri in named.union(&others) {
        let ended = match Domains::at(uri) {
            Ok(domains) if domains.are_local() => domains.end_those_of(&dir.to_string_lossy()).await,
            Ok(domains) => domains.end_those_of(&owner_of(dir)).await,
            Err(error) => Err(error),
        };
        match ended {
            Ok(domains) if domains.is_empty() => {}
            Ok(domains) => tracing::info!(recovery = name, uri, ?domains, "domains ended"),
            Err(error) if named.contains(uri) => {
                let title = format!("cannot end the domain of recovery {name} on libvirt:{uri}");
                return Err(domain::problem(&title, &error).hint("discard it again when the cause is gone"));
            }
            Err(error) => tracing::warn!(recovery = name, uri, %error, "not asked for domains of the recovery"),
        }
    }
    Ok(())
}

/// The libvirt that a record speaks of.
fn libvirt_of(record: &Record) -> Option<String> {
    match record {
        Record::Created { definition, .. } => match &definition.request.on {
            HypervisorKind::Libvirt(uri) => Some(uri.clone()),
            HypervisorKind::Qemu | HypervisorKind::None => None,
        },
        Record::Vm { machine } => machine.domain.as_ref().map(|domain| domain.uri.clone()),
        Record::Move { .. } | Record::Committed(_) | Record::Schedule { .. } | Record::State { .. } => None,
    }
}
