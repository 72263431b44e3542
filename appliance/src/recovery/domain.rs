//! The libvirt domain of a recovery, and which driver a recovery's VM has.

use hypervisor::libvirt::{self, Domains, LibvirtError, LibvirtHypervisor, Reason, xml};
use hypervisor::{DiskSource, Domain, Hypervisor, Keep, MachineDefinition, Network, QemuHypervisor};

use super::one::{NBD_SOCKET, Recovery};
use super::{DomainView, HypervisorKind, Identity, RecoverRequest};
use crate::problem::{Kind, Problem};

/// The word for a domain's own networks.
pub const ORIGINAL: &str = "original";

impl HypervisorKind {
    /// From the command line's `--on`.
    pub fn parse(text: &str) -> Result<HypervisorKind, Problem> {
        match (text, text.strip_prefix("libvirt:")) {
            ("qemu", _) => Ok(HypervisorKind::Qemu),
            ("none", _) => Ok(HypervisorKind::None),
            (_, Some(uri)) if !uri.is_empty() => {
                Domains::at(uri).map_err(|error| problem(&format!("cannot recover on `{text}`"), &error))?;
                Ok(HypervisorKind::Libvirt(uri.to_owned()))
            }
            _ => Err(Problem::usage(format!("cannot recover on `{text}`"))
                .hint("use --on qemu, --on none, or --on libvirt:URI such as libvirt:qemu:///system")),
        }
    }
}

impl TryFrom<String> for HypervisorKind {
    type Error = Problem;

    fn try_from(text: String) -> Result<HypervisorKind, Problem> {
        HypervisorKind::parse(&text)
    }
}

impl From<HypervisorKind> for String {
    fn from(kind: HypervisorKind) -> String {
        match kind {
            HypervisorKind::Qemu => "qemu".to_owned(),
            HypervisorKind::None => "none".to_owned(),
            HypervisorKind::Libvirt(uri) => format!("libvirt:{uri}"),
        }
    }
}

impl Recovery {
    /// What runs its VM.
    pub(super) fn hypervisor(&self) -> &'static dyn Hypervisor {
        match self.definition.request.on {
            HypervisorKind::Libvirt(_) => &LibvirtHypervisor,
            HypervisorKind::Qemu | HypervisorKind::None => &QemuHypervisor,
        }
    }

    /// The libvirt that its VM is on.
    pub(super) fn libvirt(&self) -> Option<&str> {
        match &self.definition.request.on {
            HypervisorKind::Libvirt(uri) => Some(uri),
            HypervisorKind::Qemu | HypervisorKind::None => None,
        }
    }

    /// Lets the user that QEMU runs as reach the disks.
    pub(super) fn open_socket(&self) -> Result<(), Problem> {
        let Some(user) = self.definition.request.runs_as else { return Ok(()) };
        let socket = self.socket(NBD_SOCKET);
        std::os::unix::fs::chown(&socket, Some(user), None).map_err(|error| {
            let what = format!("cannot give {} to user {user}, who libvirt's QEMU runs as", socket.display());
            Problem::failed(what, &error)
        })
    }
}

/// What is shown of the domain that a machine is.
pub(super) fn view(machine: &MachineDefinition) -> Option<DomainView> {
    let domain = machine.domain.as_ref()?;
    Some(DomainView { name: machine.name.clone(), uuid: domain.uuid.clone(), keep: domain.keep })
}

/// Asks libvirt what has to be known before anything exists.
pub(super) async fn prepare(name: &str, request: &mut RecoverRequest) -> Result<(), Problem> {
    request.runs_as = None;
    let title = format!("cannot recover {name} on {}", String::from(request.on.clone()));
    super::remote::prepare(&title, request)?;
    let HypervisorKind::Libvirt(uri) = &request.on else { return Ok(()) };
    let refused = |error: &LibvirtError| problem(&title, error);
    let domains = Domains::at(uri).map_err(|error| refused(&error))?;
    if domains.are_local() {
        let us = rustix::process::geteuid().as_raw();
        request.runs_as = domains.other_user(us).await.map_err(|error| refused(&error))?;
    }
    match domains.find(name).await {
        Ok(_) => Err(refused(&LibvirtError::NameTaken { domain: name.to_owned(), uri: uri.clone() })),
        Err(LibvirtError::NoDomain { .. }) => Ok(()),
        Err(error) => Err(refused(&error)),
    }
}

/// Makes a machine a domain, if it is to run on libvirt. Says besides what of the original is changed.
pub(super) fn define(
    machine: MachineDefinition,
    request: &RecoverRequest,
    owner: Option<String>,
) -> Result<(MachineDefinition, Vec<String>), Problem> {
    let HypervisorKind::Libvirt(uri) = &request.on else { return Ok((machine, Vec::new())) };
    let title = format!("cannot recover {} on libvirt:{uri}", machine.name);
    let refused = |error: &LibvirtError| problem(&title, error);
    // What another user runs cannot reach into the recovery's folder; what libvirt keeps lies where it likes.
    let own_folder = owner.is_none() && request.runs_as.is_none() && request.keep == Keep::Transient;
    let uefi_vars = machine.files.uefi_vars.to_str().filter(|_| own_folder);
    let named = || machine.disks.iter().map(|disk| (disk.name.clone(), disk.source.clone()));
    let (xml, uuid, changes, targets) = match &request.hardware.domain_xml {
        None => {
            let uuid = xml::random_uuid(libvirt::random());
            let targets = machine.disks.iter().enumerate().map(|(index, disk)| xml::target(disk.bus, index)).collect();
            (xml::create(&machine, &uuid, uefi_vars), uuid, Vec::new(), targets)
        }
        Some(captured) => {
            let disks: Vec<_> = named().collect();
            let how = recasting(&machine, request, captured, &disks, uefi_vars)?;
            let made = xml::recast(captured, &how).map_err(|source| {
                refused(&LibvirtError::Xml { domain: machine.name.clone(), source })
                    .hint("recover with --on qemu, or give the disks to a domain of your own with --on none")
            })?;
            (made.xml, made.uuid, made.changes, disks.into_iter().map(|(target, _)| target).collect())
        }
    };
    let mut changes = changes;
    if request.hardware.uefi_vars.is_some() && !own_folder {
        changes.push("its UEFI variables begin anew, as libvirt keeps them in a place of its own".to_owned());
    }
    // Another host does not reach the console's file.
    let xml = match owner {
        Some(_) => xml::without_console_file(&xml)
            .map_err(|source| refused(&LibvirtError::Xml { domain: machine.name.clone(), source }))?,
        None => xml,
    };
    let domain = Domain { uri: uri.clone(), uuid, xml, targets, keep: request.keep, owner };
    Ok((MachineDefinition { domain: Some(domain), ..machine }, changes))
}

/// How a captured domain becomes the recovery's.
fn recasting<'a>(
    machine: &'a MachineDefinition,
    request: &'a RecoverRequest,
    captured: &str,
    disks: &'a [(String, DiskSource)],
    uefi_vars: Option<&'a str>,
) -> Result<xml::Recast<'a>, Problem> {
    // What the command line says goes before what the domain had.
    let (memory, cpus) = xml::size(captured).unwrap_or((0, 0));
    let network = match (request.network.as_str(), &machine.network) {
        (ORIGINAL, _) => xml::Network::Original,
        (_, Network::None | Network::Isolated) => xml::Network::None,
        (_, Network::User) => xml::Network::User,
        (_, Network::Bridge(bridge)) => xml::Network::Bridge(bridge.clone()),
    };
    let console = machine.files.console.to_str();
    Ok(xml::Recast {
        name: &machine.name,
        uuid: match request.identity {
            Identity::Fresh => xml::Uuid::Fresh,
            Identity::Keep => xml::Uuid::Keep,
        },
        macs: match (request.identity, request.mac.as_deref()) {
            (Identity::Keep, _) | (_, Some("keep")) => xml::Macs::Keep,
            (_, Some(mac)) => xml::Macs::First(mac.to_owned()),
            (_, None) => xml::Macs::Fresh,
        },
        random: libvirt::random,
        disks,
        network,
        console: console.ok_or_else(|| Problem::usage("the state folder's path is not UTF-8"))?,
        uefi_vars,
        memory: request.hardware.memory.filter(|asked| *asked != memory),
        cpus: request.hardware.cpus.filter(|asked| *asked != cpus),
        has_program: |path| std::path::Path::new(path).is_file(),
    })
}

/// What libvirt says, as a problem.
pub fn problem(title: &str, error: &LibvirtError) -> Problem {
    let kind = match error {
        LibvirtError::Uri { .. } => Kind::Usage,
        _ => match error.reason() {
            Reason::NoDomain => Kind::NotFound,
            Reason::Exists => Kind::Refused,
            _ => Kind::Failed,
        },
    };
    let problem = Problem::because(kind, title, error);
    match error {
        LibvirtError::Connect { .. } => problem.hint("check that libvirt runs there and that you may use it"),
        LibvirtError::NameTaken { .. } => problem.hint("give the recovery another --name"),
        _ => problem,
    }
}
