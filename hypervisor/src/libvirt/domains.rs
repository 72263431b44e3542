//! The domains of a libvirt: listed, and described for a backup.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use super::connection::Connection;
use super::error::{LibvirtError, Reason};
use super::ffi::Fault;
use super::machine::{CALL_DEADLINE, DESTROY_DEADLINE, gone};
use super::start::{LIST_DEADLINE, undefine};
use super::xml::{self, CapturedDisk};

/// A domain, as it is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundDomain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Whether it is running, or paused: not shut off.
    pub active: bool,
    /// Whether its definition stays when it ends.
    pub persistent: bool,
    /// Its description: of a running domain as it runs, else as it would start.
    pub xml: String,
}

impl FoundDomain {
    /// Its disks, without removable media.
    pub fn disks(&self) -> Result<Vec<CapturedDisk>, LibvirtError> {
        xml::disks(&self.xml).map_err(|source| LibvirtError::Xml { domain: self.name.clone(), source })
    }
}

/// The domains of one libvirt.
#[derive(Debug, Clone)]
pub struct Domains {
    connection: Arc<Connection>,
}

impl Domains {
    /// Those at `uri`. Nothing is connected yet.
    pub fn at(uri: &str) -> Result<Domains, LibvirtError> {
        Ok(Domains { connection: Connection::to(uri)? })
    }

    /// Whether libvirt runs on this host, and so sees the same files and sockets.
    pub fn are_local(&self) -> bool {
        self.connection.is_local()
    }

    /// The connection they are reached through.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// All domains, by name.
    pub async fn list(&self) -> Result<Vec<FoundDomain>, LibvirtError> {
        self.connection
            .call("list its domains", LIST_DEADLINE, |connect| {
                let mut all = Vec::new();
                for domain in connect.list_all_domains(0)? {
                    match found(&domain) {
                        Ok(domain) => all.push(domain),
                        // It went while the list was made.
                        Err(fault) if fault.reason == Reason::NoDomain => {}
                        Err(fault) => return Err(fault),
                    }
                }
                all.sort_by(|a, b| a.name.cmp(&b.name));
                Ok(all)
            })
            .await
    }

    /// The user that QEMU runs as, if libvirt gives it one other than `us`.
    pub async fn other_user(&self, us: u32) -> Result<Option<u32>, LibvirtError> {
        let asked =
            self.connection.call("tell what it can do", CALL_DEADLINE, |connect| Ok(connect.get_capabilities()?));
        Ok(xml::qemu_user(&asked.await?).filter(|user| *user != us && *user != 0))
    }

    /// Ends and undefines the domains that carry `owner`, but for those that have left it. Returns their names.
    pub async fn end_those_of(&self, owner: &str) -> Result<Vec<String>, LibvirtError> {
        let owner = owner.to_owned();
        self.connection
            .call("end the domains of a recovery", DESTROY_DEADLINE, move |connect| {
                let mut ended = Vec::new();
                for domain in connect.list_all_domains(0)? {
                    match end_one_of(&domain, &owner) {
                        Ok(Some(name)) => ended.push(name),
                        Ok(None) => {}
                        // It went meanwhile.
                        Err(fault) if fault.reason == Reason::NoDomain => {}
                        Err(fault) => return Err(fault),
                    }
                }
                Ok(ended)
            })
            .await
    }

    /// One domain, by its name.
    pub async fn find(&self, name: &str) -> Result<FoundDomain, LibvirtError> {
        let missing = || LibvirtError::NoDomain { domain: name.to_owned(), uri: self.connection.uri().to_owned() };
        if name.contains('\0') {
            return Err(missing());
        }
        let wanted = name.to_owned();
        let looked = self
            .connection
            .call("describe a domain", CALL_DEADLINE, move |connect| found(&by_name(connect, &wanted)?))
            .await;
        looked.map_err(|error| if gone(&error) { missing() } else { error })
    }
}

/// The domain called `name`, which has no zero byte.
pub(super) fn by_name(connect: &Connect, name: &str) -> Result<Domain, Fault> {
    Ok(Domain::lookup_by_name(connect, name)?)
}

fn end_one_of(domain: &Domain, owner: &str) -> Result<Option<String>, Fault> {
    let description = domain.get_xml_desc(0)?;
    if xml::owner(&description).as_deref() != Some(owner) || xml::is_in_production(&description) {
        return Ok(None);
    }
    let (name, persistent) = (domain.get_name()?, domain.is_persistent()?);
    if domain.is_active()? {
        domain.destroy()?;
    }
    if persistent {
        undefine(domain)?;
    }
    Ok(Some(name))
}

fn found(domain: &Domain) -> Result<FoundDomain, Fault> {
    let active = domain.is_active()?;
    // Without what only the running process has: aliases, process ids, labels.
    let flags = if active { sys::VIR_DOMAIN_XML_MIGRATABLE } else { sys::VIR_DOMAIN_XML_INACTIVE };
    Ok(FoundDomain {
        name: domain.get_name()?,
        uuid: domain.get_uuid_string()?,
        active,
        persistent: domain.is_persistent()?,
        xml: domain.get_xml_desc(flags)?,
    })
}
