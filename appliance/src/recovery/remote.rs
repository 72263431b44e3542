//! A recovery whose domain runs on another host: its disks are served over TCP, and what it is named by there says whose
//! it is.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use blockstore::lease::{self, Surroundings};
use hypervisor::DiskSource;
use hypervisor::libvirt::Domains;
use nbd_server::{Listen, Server};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::one::{NBD_SOCKET, Recovery};
use super::{HypervisorKind, RecoverRequest};
use crate::problem::Problem;
use crate::publish::{TlsRequest, secured};
use crate::rehydrate::{Place, Plan};

/// Where a recovery's disks are served to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServeOn {
    /// `tcp:ADDRESS:PORT`, as the other host reaches this one; with port 0 one that is free is taken, and kept.
    pub listen: String,
    /// With TLS, and nothing without it.
    #[serde(default)]
    pub tls: Option<TlsRequest>,
    /// Without TLS: the address once more, as proof that it is meant.
    #[serde(default)]
    pub insecure_tcp: Option<String>,
}

impl ServeOn {
    /// The address.
    fn address(&self) -> Result<SocketAddr, Problem> {
        let wrong = |why: &str| {
            Problem::usage(format!("disks cannot be served on `{}`: {why}", self.listen))
                .hint("give the address by which libvirt's host reaches this one: --serve-on tcp:ADDRESS:PORT")
        };
        match self.listen.parse() {
            Ok(Listen::Tcp(address)) if address.ip().is_unspecified() => Err(wrong("it is not one host's address")),
            Ok(Listen::Tcp(address)) => Ok(address),
            Ok(Listen::Unix(_)) => Err(wrong("another host does not reach a socket of this one")),
            Err(error) => Err(wrong(&error.to_string())),
        }
    }
}

/// Whether a recovery on this libvirt is on another host.
fn is_remote(uri: &str) -> bool {
    Domains::at(uri).is_ok_and(|domains| !domains.are_local())
}

/// Refuses what cannot be served before anything exists, and takes a port.
pub(super) fn prepare(title: &str, request: &mut RecoverRequest) -> Result<(), Problem> {
    let remote = matches!(&request.on, HypervisorKind::Libvirt(uri) if is_remote(uri));
    match (&mut request.serve_on, remote) {
        (None, false) => Ok(()),
        (Some(_), false) => {
            Err(Problem::usage(format!("{title}: the VM is on this host, and its disks need no address"))
                .hint("--serve-on is for a libvirt on another host"))
        }
        (None, true) => {
            Err(Problem::refused(format!("{title}: it is on another host, which does not reach this one's disks"))
                .hint("serve them there with --serve-on tcp:ADDRESS:PORT and --tls-dir, or run lifeboat on that host"))
        }
        (Some(serve), true) => {
            let mut address = serve.address()?;
            if serve.tls.is_none() && !address.ip().is_loopback() && serve.insecure_tcp.is_none() {
                return Err(Problem::usage(format!(
                    "{title}: {address} is not a loopback address; disks are not served to other hosts without TLS"
                ))
                .hint(format!("give --tls-dir, or waive it with --insecure-tcp {}", serve.listen)));
            }
            if address.port() == 0 {
                let free = TcpListener::bind(address).and_then(|listener| listener.local_addr());
                address =
                    free.map_err(|error| Problem::failed(format!("{title}: cannot listen on {address}"), &error))?;
                if serve.insecure_tcp.as_ref() == Some(&serve.listen) {
                    serve.insecure_tcp = Some(format!("tcp:{address}"));
                }
                serve.listen = format!("tcp:{address}");
            }
            Ok(())
        }
    }
}

impl Recovery {
    /// Where its disks are served.
    pub(super) fn listen(&self, server: Server) -> Result<(Server, Listen), Problem> {
        match &self.definition.request.serve_on {
            None => Ok((server, Listen::Unix(self.socket(NBD_SOCKET)))),
            Some(serve) => {
                let listen = Listen::Tcp(serve.address()?);
                Ok((secured(server, &listen, serve.tls.as_ref(), serve.insecure_tcp.as_deref())?, listen))
            }
        }
    }

    /// How its VM reaches a disk.
    pub(super) fn export_source(&self, disk: &str) -> Result<DiskSource, Problem> {
        let export = disk.to_owned();
        Ok(match &self.definition.request.serve_on {
            None => DiskSource::Export { socket: self.socket(NBD_SOCKET), export },
            Some(serve) => {
                let address = serve.address()?;
                let (host, port) = (address.ip().to_string(), address.port());
                DiskSource::Remote { host, port, export, tls: serve.tls.is_some() }
            }
        })
    }

    /// Whether a disk of its VM is one that it serves.
    pub(super) fn uses_export(&self, disk: &hypervisor::MachineDisk) -> bool {
        self.export_source(&disk.name).is_ok_and(|ours| disk.source == ours)
    }

    /// What its domain carries on another host, where folders of many hosts meet.
    pub(super) fn owner(&self) -> Option<String> {
        self.definition.request.serve_on.as_ref().map(|_| owner_of(self.dir()))
    }

    /// Refuses targets that the VM's host does not reach.
    pub(super) fn check_targets(&self, plan: &Plan) -> Result<(), Problem> {
        let local = plan.disks.iter().map(|disk| &disk.place).find(|place| !matches!(place, Place::Nbd(_)));
        match (local, &self.definition.request.serve_on) {
            (Some(place), Some(_)) => Err(Problem::refused(format!(
                "recovery {} runs on another host, which does not reach {place}",
                self.name()
            ))
            .hint("give NBD exports that both hosts reach: --to nbd://SERVER/EXPORT")),
            _ => Ok(()),
        }
    }
}

/// What the domain of the recovery in `folder` carries on another host.
pub(super) fn owner_of(folder: &Path) -> String {
    format!("{}:{}", lease::System.process().host, folder.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(listen: &str) -> ServeOn {
        ServeOn { listen: listen.to_owned(), tls: None, insecure_tcp: None }
    }

    #[test]
    fn only_an_address_of_one_host_is_served_on() {
        assert_eq!(serve("tcp:192.0.2.1:10809").address().unwrap(), "192.0.2.1:10809".parse().unwrap());
        for listen in ["tcp:0.0.0.0:1", "tcp:[::]:1", "unix:/x", "192.0.2.1:1", ""] {
            assert!(serve(listen).address().unwrap_err().to_string().contains("cannot be served"), "{listen}");
        }
    }
}
