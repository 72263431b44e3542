//! The domains of libvirt as sources of a backup: what they are made of, and the content of their disks.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hypervisor::libvirt::xml::{self, CapturedDisk, CapturedSource};
use hypervisor::libvirt::{Backup, Domains, FoundDomain, Freeze, LibvirtError, Reason};
use hypervisor::{Bus, Card};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{SourceSpec, check_name};
use crate::hardware::{Attached, Hardware, Kind, VARIABLES_MAX, Variables};
use crate::problem::Problem;
use crate::recovery::domain::problem;

/// Where the folders of running backups lie: what the guest overwrites meanwhile is kept there, which may be much.
const FOLDERS: &str = "/var/tmp";
const FOLDER_PREFIX: &str = "lifeboat-backup-";

/// A domain to back up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DomainSpec {
    /// Which libvirt.
    pub uri: String,
    /// The domain's name.
    pub domain: String,
    /// Whether the guest's agent freezes its file systems for the instant.
    #[serde(default)]
    pub freeze: bool,
}

/// A domain as the API lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MachineView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// `running` or `shut-off`.
    pub state: String,
    /// Whether its definition stays when it ends.
    pub persistent: bool,
    /// The recovery that it is of, if it is Lifeboat's: its folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<String>,
    /// Its disks, without removable media.
    pub disks: Vec<MachineDiskView>,
}

/// A disk of a domain as the API lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MachineDiskView {
    /// What the domain calls it.
    pub name: String,
    /// Where it is.
    pub source: String,
    /// Its format.
    pub format: String,
}

/// Lists the domains of a libvirt.
pub async fn machines(uri: &str) -> Result<Vec<MachineView>, Problem> {
    let title = format!("cannot list the domains of libvirt:{uri}");
    let failed = |error: LibvirtError| problem(&title, &error);
    let found = Domains::at(uri).map_err(failed)?.list().await.map_err(failed)?;
    let view = |domain: FoundDomain| {
        let disk = |disk: CapturedDisk| MachineDiskView {
            name: disk.target,
            source: match disk.source {
                CapturedSource::Path(path) => path.display().to_string(),
                CapturedSource::Other(words) => words,
            },
            format: disk.format,
        };
        MachineView {
            state: if domain.active { "running" } else { "shut-off" }.to_owned(),
            persistent: domain.persistent,
            recovery: xml::owner(&domain.xml),
            // One that cannot be understood has no disks to show; a backup of it says why.
            disks: domain.disks().unwrap_or_default().into_iter().map(disk).collect(),
            name: domain.name,
            uuid: domain.uuid,
        }
    };
    Ok(found.into_iter().map(view).collect())
}

/// A domain whose disks can be read. It has to be let go with [`Captured::release`].
#[derive(Debug)]
pub struct Captured {
    /// Where its disks are read, by their targets.
    pub sources: Vec<SourceSpec>,
    /// The format of the sources that are image files, in the same order; exports have none.
    pub formats: Vec<Option<String>>,
    /// What it is made of.
    pub hardware: Hardware,
    backup: Option<Backup>,
    folder: Option<Folder>,
}

impl Captured {
    /// Ends what was begun to read it.
    pub async fn release(self) {
        if let Some(backup) = &self.backup {
            backup.end().await;
        }
        drop(self.folder);
    }
}

/// Takes hold of a domain: of one that runs as it is at this instant.
pub async fn capture(spec: &DomainSpec) -> Result<Captured, Problem> {
    let title = format!("cannot back up domain {} of libvirt:{}", spec.domain, spec.uri);
    let failed = |error: LibvirtError| with_hint(problem(&title, &error), &error);
    let domains = Domains::at(&spec.uri).map_err(failed)?;
    if !domains.are_local() {
        return Err(Problem::refused(format!("{title}: its disks are on another host"))
            .hint("run lifeboat on that host, or name NBD URIs that serve its disks"));
    }
    let found = domains.find(&spec.domain).await.map_err(failed)?;
    let disks = found.disks().map_err(failed)?;
    if disks.is_empty() {
        return Err(Problem::usage(format!("{title}: it has no disk")));
    }
    disks.iter().try_for_each(|disk| check_name("disk", &disk.target))?;
    let hardware = hardware(&found)?;
    if !found.active {
        if spec.freeze {
            return Err(
                Problem::usage(format!("{title}: it is shut off, and cannot be frozen")).hint("leave out --freeze")
            );
        }
        let (sources, formats) =
            disks.iter().map(|disk| resting(&title, disk)).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        return Ok(Captured { sources, formats, hardware, backup: None, folder: None });
    }
    let us = rustix::process::geteuid().as_raw();
    let folder = Folder::create(domains.other_user(us).await.map_err(failed)?)
        .map_err(|error| Problem::failed(format!("{title}: no folder for it"), &error))?;
    let targets: Vec<String> = disks.iter().map(|disk| disk.target.clone()).collect();
    let freeze = if spec.freeze { Freeze::Yes } else { Freeze::No };
    let backup = Backup::begin(&domains, &spec.domain, &targets, &folder.0, freeze).await.map_err(failed)?;
    let source = |(disk, location)| SourceSpec { disk, location };
    let sources: Vec<SourceSpec> = backup.sources().into_iter().map(source).collect();
    Ok(Captured { formats: vec![None; sources.len()], sources, hardware, backup: Some(backup), folder: Some(folder) })
}

fn with_hint(problem: Problem, error: &LibvirtError) -> Problem {
    match error.reason() {
        Reason::NoAgent => problem.hint("leave out --freeze, or see that qemu-guest-agent runs in the guest"),
        Reason::Unsupported => problem.hint("shut the domain off, or name NBD URIs that serve its disks"),
        Reason::NoDomain => problem.hint("`lifeboat machines --on libvirt:URI` lists them"),
        _ => problem,
    }
}

/// A disk of a domain that is shut off.
fn resting(title: &str, disk: &CapturedDisk) -> Result<(SourceSpec, Option<String>), Problem> {
    let refuse = |why: &str| {
        Problem::refused(format!("{title}: disk {} {why}", disk.target))
            .hint("start the domain and back it up while it runs")
    };
    if disk.encrypted {
        return Err(refuse("is encrypted by QEMU"));
    }
    let CapturedSource::Path(path) = &disk.source else { return Err(refuse("is not an image file or block device")) };
    let location = path.to_str().ok_or_else(|| refuse("has a path that is not UTF-8"))?.to_owned();
    Ok((SourceSpec { disk: disk.target.clone(), location }, Some(disk.format.clone())))
}

/// What of a domain is understood, with all of it.
fn hardware(found: &FoundDomain) -> Result<Hardware, Problem> {
    let known = xml::summary(&found.xml)
        .map_err(|error| Problem::failed(format!("cannot understand domain {}", found.name), &error))?;
    let bus = |(name, bus): (String, String)| {
        let bus = bus.parse::<Bus>().ok()?.to_string();
        Some(Attached { name, bus })
    };
    let fixed: Vec<String> = found.disks().unwrap_or_default().into_iter().map(|disk| disk.target).collect();
    let mut hardware = Hardware {
        kind: Kind::LibvirtXml,
        memory: known.memory,
        cpus: known.cpus,
        machine_type: known.machine_type,
        firmware: Some(if known.uefi { "uefi" } else { "bios" }.to_owned()),
        uefi_vars: known.uefi_vars.filter(|_| known.uefi).and_then(|path| variables(&path)),
        disks: known.buses.into_iter().filter_map(bus).collect(),
        domain_xml: Some(found.xml.clone()),
        ..Hardware::default()
    };
    hardware.keep_disks(fixed.iter().map(String::as_str));
    hardware.nic.model = known.card.filter(|card| card.parse::<Card>().is_ok());
    hardware.nic.mac = known.mac.filter(|mac| crate::hardware::check_mac(mac).is_ok());
    Ok(hardware)
}

/// A domain's UEFI variables, where they can be read.
fn variables(path: &Path) -> Option<Variables> {
    let mut bytes = Vec::new();
    let most = u64::try_from(VARIABLES_MAX).unwrap_or(u64::MAX);
    let read = std::fs::File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes));
    match read {
        Ok(_) if !bytes.is_empty() && bytes.len() <= VARIABLES_MAX => Some(Variables(bytes)),
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the UEFI variables are not in the backup");
            None
        }
    }
}

/// A folder that libvirt's QEMU may write to, and nobody else; removed when dropped.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn create(user: Option<u32>) -> std::io::Result<Folder> {
        use std::os::unix::fs::DirBuilderExt;
        static NEXT: AtomicU64 = AtomicU64::new(0);
        remove_left();
        let name = format!("{FOLDER_PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(FOLDERS).join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        let folder = Folder(path);
        std::os::unix::fs::chown(&folder.0, user, None)?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "left behind by a backup");
        }
    }
}

/// Removes the folders of processes that died.
fn remove_left() {
    let Ok(entries) = std::fs::read_dir(FOLDERS) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|name| name.strip_prefix(FOLDER_PREFIX)?.split('-').next()?.parse::<u32>().ok());
        let dead = pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if dead {
            // Somebody else's stays, and is theirs to remove.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
