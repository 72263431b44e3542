//! Exports without a recovery: a recovery point's disks served over NBD for as long as somebody holds them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use blockstore::{RecoveryPoint, Repository};
use nbd_server::{Access, ClientCertificates, ClientName, ExportTable, Listen, Server, TlsServer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::catalog::PointSummary;
use crate::disks::{self, OpenOverlay};
use crate::exports::{BaseExport, FirstRead, OverlayExport};
use crate::problem::{Kind, Problem};
use crate::state_dir::StateDir;

/// What to serve, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ExportRequest {
    /// The recovery point, as [`crate::catalog::spec`] takes it.
    pub point: String,
    /// One disk; all of them when not given.
    #[serde(default)]
    pub disk: Option<String>,
    /// `unix:PATH` or `tcp:HOST:PORT`.
    pub listen: String,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// The folder of an overlay to keep; a throw-away one when not given.
    #[serde(default)]
    pub overlay: Option<PathBuf>,
    /// Serve with TLS, and nothing without it.
    #[serde(default)]
    pub tls: Option<TlsRequest>,
    /// Serve other machines without TLS: the address of `listen` once more, as proof that it is meant.
    #[serde(default)]
    pub insecure_tcp: Option<String>,
}

/// How to serve with TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TlsRequest {
    /// The folder with the certificates, named as QEMU names them.
    pub dir: PathBuf,
    /// Let clients in that show no certificate.
    #[serde(default)]
    pub anonymous_clients: bool,
    /// Only clients whose certificate is for one of these names, each `NAME` or, for one disk only, `DISK=NAME`; all of
    /// the authority's when empty.
    #[serde(default)]
    pub clients: Vec<String>,
}

/// The server, as secure as was asked for. `insecure`: the address once more, to serve other hosts without TLS.
pub(crate) fn secured(
    server: Server,
    listen: &Listen,
    tls: Option<&TlsRequest>,
    insecure: Option<&str>,
) -> Result<Server, Problem> {
    match (tls, insecure) {
        (Some(_), Some(_)) => {
            Err(Problem::usage("an export with TLS is not insecure").hint("give either --tls-dir or --insecure-tcp"))
        }
        (Some(tls), None) => Ok(server.with_tls(tls.load()?)),
        (None, Some(named)) if *named == listen.to_string() => Ok(server.with_plain_tcp_for_everyone()),
        (None, Some(named)) => Err(Problem::usage(format!("`{named}` is not what is listened on"))
            .hint(format!("to serve {listen} without TLS, give --insecure-tcp {listen}"))),
        (None, None) => Ok(server),
    }
}

impl ExportRequest {
    /// Who may see each of these disks.
    fn access(&self, disks: &[String]) -> Result<Vec<(String, Access)>, Problem> {
        let clients = self.tls.as_ref().map_or(&[][..], |tls| &tls.clients);
        let mut named: Vec<(Option<&str>, ClientName)> = Vec::new();
        for client in clients {
            let (disk, name) = match client.split_once('=') {
                Some((disk, name)) => (Some(disk), name),
                None => (None, client.as_str()),
            };
            if let Some(disk) = disk.filter(|disk| disks.iter().all(|served| served != disk)) {
                return Err(Problem::usage(format!("--tls-client {client}: disk `{disk}` is not served"))
                    .hint(format!("served are {}", disks.join(", "))));
            }
            let name = ClientName::new(name)
                .map_err(|error| Problem::because(Kind::Usage, format!("no client can be called `{name}`"), &error))?;
            named.push((disk, name));
        }
        let access = |disk: &String| {
            let mine = named.iter().filter(|(of, _)| of.is_none_or(|of| of == disk));
            match mine.map(|(_, name)| name.clone()).collect::<Vec<_>>() {
                names if !names.is_empty() => Ok((disk.clone(), Access::Clients(names))),
                _ if named.is_empty() => Ok((disk.clone(), Access::Everyone)),
                _ => Err(Problem::usage(format!("no client may use disk {disk}"))
                    .hint(format!("give --tls-client {disk}=NAME too, or serve less with --disk"))),
            }
        };
        disks.iter().map(access).collect()
    }
}

impl TlsRequest {
    fn load(&self) -> Result<TlsServer, Problem> {
        if self.anonymous_clients && !self.clients.is_empty() {
            return Err(Problem::usage("clients without a certificate have no name")
                .hint("give either --tls-anonymous-clients or --tls-client"));
        }
        let clients = if self.anonymous_clients { ClientCertificates::Waived } else { ClientCertificates::Required };
        TlsServer::from_folder(&self.dir, clients).map_err(|error| Problem::from_tls(&self.dir, &error))
    }
}

/// A served disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Served {
    /// The disk.
    pub disk: String,
    /// Where it is served.
    pub uri: String,
    /// In bytes.
    pub size: u64,
}

/// The exports of this process that belong to no recovery.
#[derive(Debug)]
pub struct Exports {
    server: Server,
    next: AtomicU64,
    running: Mutex<BTreeMap<u64, Running>>,
}

#[derive(Debug)]
struct Running {
    subject: String,
    table: Arc<ExportTable>,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

/// An export serves until this is dropped.
#[derive(Debug)]
pub struct Hold {
    exports: Arc<Exports>,
    id: u64,
    /// What is served.
    pub served: Vec<Served>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(running) = self.exports.lock().get_mut(&self.id)
            && let Some(stop) = running.stop.take()
        {
            // One that has ended by itself does not listen any more.
            let _ = stop.send(());
        }
    }
}

impl Exports {
    /// None yet. Their servers share the limits of `server`.
    pub fn new(server: Server) -> Exports {
        Exports { server, next: AtomicU64::default(), running: Mutex::default() }
    }

    /// Serves disks of `point` until the returned hold is dropped.
    pub async fn start(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        state: &StateDir,
        point: &PointSummary,
        request: &ExportRequest,
    ) -> Result<Hold, Problem> {
        let listen: Listen = request
            .listen
            .parse()
            .map_err(|error| Problem::usage(format!("cannot listen on `{}`: {error}", request.listen)))?;
        if request.read_only && request.overlay.is_some() {
            return Err(Problem::usage("an export that is read-only has no overlay")
                .hint("give either --read-only or --overlay"));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let scratch = Scratch(state.scratch().join(format!("export-{id}")));
        let overlay = match (&request.overlay, request.read_only) {
            (_, true) => None,
            (Some(folder), false) => Some(folder.clone()),
            (None, false) => Some(scratch.0.clone()),
        };
        let chosen = chosen(point, request.disk.as_deref())?;
        let table = Arc::new(ExportTable::new());
        let (server, access) = (
            secured(self.server.beside(table.clone()), &listen, request.tls.as_ref(), request.insecure_tcp.as_deref())?,
            request.access(&chosen)?,
        );
        let (filled, reading, id_of_point) = (table.clone(), repository.clone(), point.id.clone());
        let lease = tokio::task::spawn_blocking(move || {
            let point = disks::load_point(&reading, &id_of_point)?;
            let lease = disks::hold(&reading, "export", &point)?;
            access
                .into_iter()
                .try_for_each(|(disk, access)| add(&reading, &point, &disk, overlay.as_deref(), &filled, access))?;
            Ok::<_, Problem>(lease)
        })
        .await
        .map_err(|error| Problem::failed("cannot open the disks", &error))??;
        let listener = server.bind(&listen).await.map_err(|error| Problem::from_listen(&error))?;
        let mut served = Vec::new();
        for disk in point.disks.iter().filter(|disk| chosen.contains(&disk.name)) {
            let uri = listener.uri(&disks::export_name(&disk.name)?);
            served.push(Served { disk: disk.name.clone(), uri, size: disk.size });
        }
        let (stop, stopped) = oneshot::channel();
        let exports = self.clone();
        // Entered before the task can end, which takes it out again.
        let mut running = self.lock();
        running.insert(id, Running { subject: point.machine.clone(), table, stop: Some(stop), task: None });
        let task = tokio::spawn(async move {
            let scratch = scratch;
            listener
                .serve(async move {
                    // A dropped sender is a stop too.
                    let _ = stopped.await;
                })
                .await;
            drop(scratch);
            drop(lease);
            exports.lock().remove(&id);
        });
        if let Some(entry) = running.get_mut(&id) {
            entry.task = Some(task);
        }
        drop(running);
        Ok(Hold { exports: self.clone(), id, served })
    }

    /// The machines whose points are exported; exports that are ending are not among them.
    pub fn list(&self) -> Vec<String> {
        self.lock().values().filter(|running| running.stop.is_some()).map(|running| running.subject.clone()).collect()
    }

    /// What is served, for the metrics: the machine, and its exports.
    pub fn tables(&self) -> Vec<(String, Arc<ExportTable>)> {
        self.lock().values().map(|running| (running.subject.clone(), running.table.clone())).collect()
    }

    /// Ends all exports, and returns when requests in flight are answered and throw-away overlays gone.
    pub async fn close(&self) {
        let all: Vec<_> = self.lock().values_mut().map(|running| (running.stop.take(), running.task.take())).collect();
        for (stop, task) in all {
            if let Some(stop) = stop {
                let _ = stop.send(());
            }
            if let Some(task) = task
                && let Err(error) = task.await
            {
                tracing::error!(%error, "an export ended badly");
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A folder that goes when this is dropped.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %self.0.display(), %error, "cannot remove a throw-away overlay");
        }
    }
}

/// The disks of `point` that were asked for.
pub fn chosen(point: &PointSummary, disk: Option<&str>) -> Result<Vec<String>, Problem> {
    let names: Vec<String> = point.disks.iter().map(|disk| disk.name.clone()).collect();
    match disk {
        None => Ok(names),
        Some(disk) if names.iter().any(|name| name == disk) => Ok(vec![disk.to_owned()]),
        Some(disk) => Err(Problem::not_found(format!("the recovery point of {} has no disk `{disk}`", point.machine))
            .hint(format!("it has {}", names.join(", ")))),
    }
}

fn add(
    repository: &Repository,
    point: &RecoveryPoint,
    disk: &str,
    overlay: Option<&Path>,
    table: &ExportTable,
    access: Access,
) -> Result<(), Problem> {
    let description = format!("{disk} of {}", point.machine);
    let base = disks::open(repository, point, disk)?;
    let name = disks::export_name(disk)?;
    let added = match overlay {
        None => table.add_for(name, Arc::new(BaseExport { base, description }), access),
        Some(dir) => {
            let overlay = disks::open_overlay(dir, point, disk, base, OpenOverlay::Any)?;
            let first_read = FirstRead::since(Instant::now());
            table.add_for(name, Arc::new(OverlayExport { overlay, description, first_read }), access)
        }
    };
    added.map_err(|error| Problem::failed(format!("cannot export disk {disk}"), &error))
}
