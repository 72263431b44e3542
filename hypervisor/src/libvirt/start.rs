//! Domains are defined, started, found again and taken away.
//!
//! Order of a start: a transient domain is created in one call; a persistent one is defined, then started, and undefined
//! again if that fails. Whoever journals the definition before the start finds the domain by its UUID afterwards,
//! whatever step a crash came after.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use super::connection::Connection;
use super::error::LibvirtError;
use super::ffi::Fault;
use super::machine::{CALL_DEADLINE, LibvirtMachine, gone, look_up};
use super::xml::{self, XmlError};
use crate::definition::{Accelerator, Domain as Definition, Keep, MachineDefinition};
use crate::machine::{Hypervisor, Machine, Pending};
use crate::qemu::probe::{self, Acceleration};
use crate::qemu::{AdoptError, START_DEADLINE, StartError};

/// Domains, each of the libvirt that its definition names.
#[derive(Debug, Clone, Copy, Default)]
pub struct LibvirtHypervisor;

impl Hypervisor for LibvirtHypervisor {
    fn start<'a>(&'a self, machine: &'a MachineDefinition) -> Pending<'a, Result<Arc<dyn Machine>, StartError>> {
        Box::pin(async move {
            let started = start(machine).await;
            started.map_err(|source| StartError::Libvirt { name: machine.name.clone(), source })
        })
    }

    fn adopt<'a>(
        &'a self,
        machine: &'a MachineDefinition,
    ) -> Pending<'a, Result<Option<Arc<dyn Machine>>, AdoptError>> {
        Box::pin(async move { adopt(machine).await.map_err(|source| failed(machine, source)) })
    }

    fn redefine<'a>(&'a self, machine: &'a MachineDefinition) -> Pending<'a, Result<(), AdoptError>> {
        Box::pin(async move { redefine(machine).await.map_err(|source| failed(machine, source)) })
    }

    fn forget<'a>(&'a self, machine: &'a MachineDefinition) -> Pending<'a, Result<(), AdoptError>> {
        Box::pin(async move { forget(machine).await.map_err(|source| failed(machine, source)) })
    }
}

fn failed(machine: &MachineDefinition, source: LibvirtError) -> AdoptError {
    AdoptError::Libvirt { name: machine.name.clone(), source }
}

fn definition(machine: &MachineDefinition) -> Result<&Definition, LibvirtError> {
    machine.domain.as_ref().ok_or_else(|| LibvirtError::NoDefinition { name: machine.name.clone() })
}

async fn start(machine: &MachineDefinition) -> Result<Arc<dyn Machine>, LibvirtError> {
    let domain = definition(machine)?;
    let connection = Connection::to(&domain.uri)?;
    let (description, acceleration) = describe(machine, domain, &connection).await?;
    let (name, uuid, keep) = (machine.name.clone(), domain.uuid.clone(), domain.keep);
    let (uri, owner, began) = (domain.uri.clone(), owner(machine, domain), Instant::now());
    let outcome = connection
        .call("start a domain", START_DEADLINE, move |connect| {
            let found = found(connect, &name, &uuid)?;
            if let Some(domain) = found.stranger(&owner) {
                return Ok(Err(LibvirtError::NotOurs { uuid, domain }));
            }
            if found.name_taken {
                return Ok(Err(LibvirtError::NameTaken { domain: name, uri }));
            }
            bring_up(connect, &description, keep).map_err(|fault| explained(connect, &description, fault))?;
            Ok(Ok(()))
        })
        .await;
    outcome??;
    info!(domain = machine.name, uri = domain.uri, seconds = began.elapsed().as_secs_f64(), "domain started");
    let Acceleration { kvm, reason } = acceleration;
    Ok(Arc::new(LibvirtMachine::new(connection, machine, domain, kvm, &reason)))
}

/// What a domain is known as its recovery's by.
fn owner(machine: &MachineDefinition, domain: &Definition) -> String {
    let console = &machine.files.console;
    let folder = || console.parent().unwrap_or(console).to_string_lossy().into_owned();
    domain.owner.clone().unwrap_or_else(folder)
}

/// The description a domain is started with.
async fn describe(
    machine: &MachineDefinition,
    domain: &Definition,
    connection: &Connection,
) -> Result<(String, Acceleration), LibvirtError> {
    let wrong = |source: XmlError| LibvirtError::Xml { domain: machine.name.clone(), source };
    let sources = domain.targets.iter().map(String::as_str).zip(machine.disks.iter().map(|disk| &disk.source));
    let description = xml::with_sources(&domain.xml, sources).map_err(wrong)?;
    let description = xml::with_owner(&description, &owner(machine, domain), domain.keep).map_err(wrong)?;
    // The recovery's folder goes, and the console's file with it.
    let description = match domain.keep {
        Keep::Production => xml::without_console_file(&description).map_err(wrong)?,
        Keep::Transient | Keep::Persistent => description,
    };
    // What another host can is for its description to say.
    let acceleration = match (machine.accelerator, connection.is_local()) {
        (Accelerator::Auto, false) => {
            Acceleration { kvm: xml::uses_kvm(&description), reason: "as the domain was".to_owned() }
        }
        (wanted, _) => probe::accelerator(machine.binary(), wanted).await,
    };
    let description = xml::with_accelerator(&description, acceleration.kvm).map_err(wrong)?;
    Ok((description, acceleration))
}

/// What has the name or the UUID that a domain is to have.
struct Found {
    name_taken: bool,
    /// The domain with the UUID: its name, and whose it is.
    same: Option<(String, Option<String>)>,
}

impl Found {
    /// The name of a domain with our UUID that is not ours.
    fn stranger(&self, wanted: &str) -> Option<String> {
        let (name, owner) = self.same.as_ref()?;
        (owner.as_deref() != Some(wanted)).then(|| name.clone())
    }
}

fn found(connect: &Connect, name: &str, uuid: &str) -> Result<Found, Fault> {
    let mut result = Found { name_taken: false, same: None };
    for domain in connect.list_all_domains(0)? {
        let its_name = domain.get_name()?;
        if domain.get_uuid_string()? == uuid {
            result.same = Some((its_name, xml::owner(&domain.get_xml_desc(0)?)));
        } else if its_name == name {
            result.name_taken = true;
        }
    }
    Ok(result)
}

fn bring_up(connect: &Connect, description: &str, keep: Keep) -> Result<(), Fault> {
    match keep {
        Keep::Transient => {
            Domain::create_xml(connect, description, 0)?;
        }
        Keep::Persistent | Keep::Production => {
            let domain = Domain::define_xml(connect, description)?;
            if let Err(error) = domain.create() {
                if keep == Keep::Persistent
                    && let Err(second) = undefine(&domain)
                {
                    warn!(error = second.message, "a domain that did not start stays defined");
                }
                return Err(error.into());
            }
        }
    }
    Ok(())
}

/// What libvirt says of a machine type that it does not know is of no help to anybody.
fn explained(connect: &Connect, description: &str, fault: Fault) -> Fault {
    let machine = xml::summary(description).ok().and_then(|summary| summary.machine_type);
    let Some(machine) = machine else { return fault };
    match connect.get_domain_capabilities(None, Some("x86_64"), Some(&machine), None, 0) {
        Ok(_) => fault,
        Err(error) => Fault { message: format!("{} ({})", error.message(), fault.message), ..fault },
    }
}

async fn adopt(machine: &MachineDefinition) -> Result<Option<Arc<dyn Machine>>, LibvirtError> {
    let domain = definition(machine)?;
    let connection = Connection::to(&domain.uri)?;
    let uuid = domain.uuid.clone();
    let found = connection
        .call("find a domain", CALL_DEADLINE, move |connect| {
            let found = look_up(connect, &uuid)?;
            Ok((found.get_name()?, found.is_active()?, found.get_xml_desc(0)?))
        })
        .await;
    let (name, description) = match found {
        Ok((name, true, description)) => (name, description),
        Ok((_, false, _)) => return Ok(None),
        Err(error) if gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    if xml::owner(&description) != Some(owner(machine, domain)) {
        return Err(LibvirtError::NotOurs { uuid: domain.uuid.clone(), domain: name });
    }
    let (kvm, why) = (xml::uses_kvm(&description), "chosen when the domain was started");
    Ok(Some(Arc::new(LibvirtMachine::new(connection, machine, domain, kvm, why))))
}

async fn redefine(machine: &MachineDefinition) -> Result<(), LibvirtError> {
    let domain = definition(machine)?;
    if domain.keep == Keep::Transient {
        return Ok(());
    }
    let connection = Connection::to(&domain.uri)?;
    let (description, _) = describe(machine, domain, &connection).await?;
    connection
        .call("define a domain", CALL_DEADLINE, move |connect| Ok(Domain::define_xml(connect, &description).map(drop)?))
        .await
}

async fn forget(machine: &MachineDefinition) -> Result<(), LibvirtError> {
    let domain = definition(machine)?;
    let connection = Connection::to(&domain.uri)?;
    let (uuid, owner) = (domain.uuid.clone(), owner(machine, domain));
    let forgotten = connection
        .call("undefine a domain", CALL_DEADLINE, move |connect| {
            let found = look_up(connect, &uuid)?;
            let description = found.get_xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)?;
            let ours = xml::owner(&description) == Some(owner) && !xml::is_in_production(&description);
            if ours && found.is_persistent()? { undefine(&found) } else { Ok(()) }
        })
        .await;
    match forgotten {
        Err(error) if gone(&error) => Ok(()),
        other => other,
    }
}

pub(super) fn undefine(domain: &Domain) -> Result<(), Fault> {
    let everything = sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
        | sys::VIR_DOMAIN_UNDEFINE_NVRAM;
    Ok(domain.undefine_flags(everything)?)
}

/// How long a whole listing may take.
pub(super) const LIST_DEADLINE: Duration = Duration::from_secs(30);
