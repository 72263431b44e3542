//! The disks of a running domain, read as they were at one instant: libvirt's pull-mode backup.
//!
//! Order: (1) the guest's file systems are frozen, if that is asked for; (2) the job begins, which is the instant; (3)
//! they are thawed, whatever came of 2; (4) the disks are read from libvirt's NBD server; (5) the job is ended. A crash
//! leaves the job: the guest goes on, and [`Backup::begin`] of the next backup ends a job of ours that it finds.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;
use virt::domain::Domain;

use super::connection::Connection;
use super::domains::{Domains, by_name};
use super::error::{LibvirtError, Reason};
use super::ffi::{self, Fault};
use super::machine::CALL_DEADLINE;
use super::xml::{self, Element};

/// How long the agent may take to freeze or thaw: a guest with much to write takes its time.
const FREEZE_DEADLINE: Duration = Duration::from_secs(60);
/// How long the begin of a job may take.
const BEGIN_DEADLINE: Duration = Duration::from_secs(60);
/// What the job's NBD server calls a disk begins with this, by which a job is known as ours.
const EXPORT_PREFIX: &str = "lifeboat-";

/// Whether the guest's file systems are frozen at the instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freeze {
    /// They are as after a power cut.
    No,
    /// They are whole, or there is no backup.
    Yes,
}

/// A backup job of a domain. It has to be ended with [`Backup::end`].
#[derive(Debug)]
pub struct Backup {
    connection: Arc<Connection>,
    domain: String,
    socket: PathBuf,
    disks: Vec<String>,
}

impl Backup {
    /// Begins a backup of `disks` (`vda`), whose content is then served on `socket`. What has not changed since is kept
    /// in files beside the socket, in `scratch`.
    pub async fn begin(
        domains: &Domains,
        domain: &str,
        disks: &[String],
        folder: &Path,
        freeze: Freeze,
    ) -> Result<Backup, LibvirtError> {
        let socket = folder.join("backup.sock");
        let backup = Backup {
            connection: domains.connection().clone(),
            domain: domain.to_owned(),
            socket: socket.clone(),
            disks: disks.to_vec(),
        };
        let description = describe(&domains.find(domain).await?.disks()?, disks, &socket, folder);
        backup.end_left().await?;
        if freeze == Freeze::Yes {
            let frozen = backup.on_domain("freeze the guest's file systems", FREEZE_DEADLINE, ffi::freeze).await;
            match frozen {
                Ok(_) => {}
                // The domain has no channel for an agent: nothing is frozen.
                Err(LibvirtError::Refused { what, reason: Reason::Unsupported, message }) => {
                    return Err(LibvirtError::Refused { what, reason: Reason::NoAgent, message });
                }
                Err(error) => {
                    // It may have frozen some, or all and only the answer is late.
                    backup.thaw().await;
                    return Err(error);
                }
            }
        }
        let begin = move |domain: &Domain| ffi::backup_begin(domain, &description, None);
        let begun = backup.on_domain("begin a backup", BEGIN_DEADLINE, begin).await;
        if freeze == Freeze::Yes {
            backup.thaw().await;
        }
        match begun {
            Ok(()) => Ok(backup),
            // One that was only slow must not stay.
            Err(error @ LibvirtError::Silent { .. }) => {
                backup.end().await;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// The disks, and the NBD URIs that they are read from.
    pub fn sources(&self) -> Vec<(String, String)> {
        let uri = |disk: &String| format!("nbd+unix:///{EXPORT_PREFIX}{disk}?socket={}", self.socket.display());
        self.disks.iter().map(|disk| (disk.clone(), uri(disk))).collect()
    }

    /// Ends the job.
    pub async fn end(&self) {
        match self.on_domain("end a backup", BEGIN_DEADLINE, ffi::abort_job).await {
            Ok(()) => {}
            // The domain has ended, and its job with it.
            Err(error) if matches!(error.reason(), Reason::NoDomain | Reason::State) => {}
            Err(error) => warn!(domain = self.domain, %error, "a backup job of libvirt is not ended"),
        }
    }

    /// Ends a job that an earlier backup of ours has left.
    async fn end_left(&self) -> Result<(), LibvirtError> {
        let left = self.on_domain("tell its backup job", CALL_DEADLINE, ffi::backup_description).await?;
        if left.is_some_and(|description| description.contains(EXPORT_PREFIX)) {
            warn!(domain = self.domain, "ending the job that an earlier backup has left");
            self.end().await;
        }
        Ok(())
    }

    async fn thaw(&self) {
        if let Err(error) = self.on_domain("thaw the guest's file systems", FREEZE_DEADLINE, ffi::thaw).await {
            tracing::error!(domain = self.domain, %error, "the guest's file systems may still be frozen: virsh domfsthaw");
        }
    }

    async fn on_domain<T: Send + 'static>(
        &self,
        what: &'static str,
        deadline: Duration,
        work: impl FnOnce(&Domain) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, LibvirtError> {
        let name = self.domain.clone();
        self.connection.call(what, deadline, move |connect| work(&by_name(connect, &name)?)).await
    }
}

/// What libvirt is asked for.
fn describe(all: &[xml::CapturedDisk], wanted: &[String], socket: &Path, folder: &Path) -> String {
    let server = Element::new("server").with("transport", "unix").with("socket", socket.to_string_lossy());
    let mut disks = Element::new("disks");
    for disk in all {
        let element = Element::new("disk").with("name", disk.target.as_str());
        disks = disks.holding(if wanted.contains(&disk.target) {
            let scratch = folder.join(format!("scratch-{}", disk.target));
            element
                .with("backup", "yes")
                .with("type", "file")
                .with("exportname", format!("{EXPORT_PREFIX}{}", disk.target))
                .holding(Element::new("scratch").with("file", scratch.to_string_lossy()))
        } else {
            element.with("backup", "no")
        });
    }
    Element::new("domainbackup").with("mode", "pull").holding(server).holding(disks).to_xml()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_wanted_disks_are_served() {
        let disk = |target: &str| xml::CapturedDisk {
            target: target.to_owned(),
            source: xml::CapturedSource::Path("/x".into()),
            format: "raw".to_owned(),
            encrypted: false,
            read_only: false,
        };
        let text = describe(&[disk("vda"), disk("vdb")], &["vdb".to_owned()], Path::new("/r/s"), Path::new("/r"));
        assert_eq!(
            text,
            "<domainbackup mode='pull'>\n  <server transport='unix' socket='/r/s'/>\n  <disks>\n    \
             <disk name='vda' backup='no'/>\n    <disk name='vdb' backup='yes' type='file' exportname='lifeboat-vdb'>\n      \
             <scratch file='/r/scratch-vdb'/>\n    </disk>\n  </disks>\n</domainbackup>\n"
        );
    }
}
