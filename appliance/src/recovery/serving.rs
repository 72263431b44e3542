//! A recovery's exports: its disks opened, published by an NBD server, kept by a lease, and retired.

use std::path::Path;
use std::sync::Arc;

use blockstore::overlay::Overlay;
use blockstore::{RecoveryPoint, Repository};
use nbd_server::ExportTable;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::one::{Definition, Driver, Recovery};
use super::state::State;
use crate::disks::{self, OpenOverlay};
use crate::exports::{FirstRead, OverlayExport};
use crate::problem::Problem;
use crate::rehydrate::{self, LiveDisk, Mode, Opening, Plan};

/// The NBD server of a recovery.
#[derive(Debug)]
pub(super) struct Serving {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Recovery {
    pub(super) async fn publish(&self, driver: &mut Driver, open: OpenOverlay) -> Result<(), Problem> {
        let table = Arc::new(ExportTable::new());
        let (context, definition) = (self.context.clone(), self.definition.clone());
        let (dir, first_read) = (self.dir.clone(), self.first_read.clone());
        let (filled, lease_name) = (table.clone(), self.lease_name());
        let moved = driver.plan.clone().filter(|plan| driver.state == State::CutOver && plan.mode == Mode::Stream);
        let (disks, lease) = tokio::task::spawn_blocking(move || {
            if let Some(plan) = moved {
                return Ok((fill_moved(&definition, &plan, &filled)?, None));
            }
            let point = disks::load_point(&context.repository, &definition.point)?;
            let owner = format!("recovery {}", definition.name);
            let lease = context
                .repository
                .hold_recovery(&lease_name, &owner, &point)
                .map_err(|error| Problem::from_read(&format!("cannot take a lease for {owner}"), &error))?;
            let disks = fill(&context.repository, &definition, &point, &dir, open, &first_read, &filled)?;
            Ok::<_, Problem>((disks, Some(lease)))
        })
        .await
        .map_err(|error| Problem::failed("cannot publish the disks", &error))??;
        driver.lease = lease;
        if self.definition.request.runs_as.is_some() {
            crate::state_dir::make_shared_dir()
                .map_err(|error| Problem::failed("cannot make the folder of the disks' socket", &error))?;
        }
        let (server, listen) = self.listen(self.context.server.beside(table.clone()))?;
        let listener = server.bind(&listen).await.map_err(|error| Problem::from_listen(&error))?;
        self.open_socket()?;
        let mut uris = Vec::new();
        for disk in &self.definition.disks {
            uris.push(listener.uri(&disks::export_name(&disk.name)?));
        }
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(listener.serve(async move {
            // A dropped sender is a stop too.
            let _ = stopped.await;
        }));
        driver.serving = Some(Serving { stop, task });
        self.show(|shown| {
            shown.uris = uris;
            shown.disks = disks;
            shown.table = Some(table);
        });
        Ok(())
    }

    /// What tells this recovery from all others that use the repository.
    pub(super) fn lease_name(&self) -> String {
        super::remote::owner_of(&self.dir)
    }

    /// The recovery no longer needs its point.
    pub(super) fn release_lease(&self, driver: &mut Driver) {
        driver.lease = None;
        if let Err(error) = self.context.repository.release_recovery(&self.lease_name()) {
            tracing::warn!(recovery = %self.definition.name, %error, "its lease stays until it expires");
        }
    }

    pub(super) async fn serve_again(&self, driver: &mut Driver) -> Result<(), Problem> {
        match driver.serving {
            Some(_) => Ok(()),
            None => self.publish(driver, OpenOverlay::Existing).await,
        }
    }

    pub(super) async fn retire(&self, driver: &mut Driver) {
        if let Some(serving) = driver.serving.take() {
            let _ = serving.stop.send(());
            if let Err(error) = serving.task.await {
                tracing::error!(recovery = %self.definition.name, %error, "the NBD server ended badly");
            }
        }
        self.show(|shown| {
            shown.uris.clear();
            shown.disks.clear();
            shown.table = None;
            shown.commits.changes = None; // the next disks count anew
        });
    }

    /// Its disks as they are at present; none while they are not served.
    pub fn disks(&self) -> Vec<(String, Arc<Overlay>)> {
        let live = self.lock().disks.clone();
        let named = self.definition.disks.iter().map(|disk| disk.name.clone()).zip(live);
        named.filter_map(|(name, disk)| Some((name, disk.overlay()?.overlay.clone()))).collect()
    }

    /// The exports, while they are served.
    pub(super) fn table(&self) -> Option<Arc<ExportTable>> {
        self.lock().table.clone()
    }
}

/// Opens every disk of a recovery and puts it into `table`.
fn fill(
    repository: &Repository,
    definition: &Definition,
    point: &RecoveryPoint,
    dir: &Path,
    open: OpenOverlay,
    first_read: &Arc<FirstRead>,
    table: &ExportTable,
) -> Result<Vec<Arc<LiveDisk>>, Problem> {
    let mut live = Vec::new();
    for disk in &definition.disks {
        let base = disks::open(repository, point, &disk.name)?;
        let overlay = disks::open_overlay(&dir.join("disks"), point, &disk.name, base, open)?;
        let description = format!("{} of {} in recovery {}", disk.name, definition.machine, definition.name);
        let export = OverlayExport { overlay, description, first_read: first_read.clone() };
        live.push(publish(table, &disk.name, LiveDisk::new(export))?);
    }
    Ok(live)
}

/// Opens every disk of a recovery that is cut over, on production storage.
fn fill_moved(definition: &Definition, plan: &Plan, table: &ExportTable) -> Result<Vec<Arc<LiveDisk>>, Problem> {
    let mut live = Vec::new();
    for (disk, planned) in definition.disks.iter().zip(&plan.disks) {
        let place = &planned.place;
        let target = rehydrate::open(place, disk.size, Opening::Again)
            .map_err(|error| Problem::failed(format!("cannot open {place}, where disk {} is", disk.name), &error))?;
        let description = format!("{} of {} on {place}", disk.name, definition.machine);
        live.push(publish(table, &disk.name, LiveDisk::cut_over(disk.size, target.into(), description))?);
    }
    Ok(live)
}

fn publish(table: &ExportTable, disk: &str, live: LiveDisk) -> Result<Arc<LiveDisk>, Problem> {
    let live = Arc::new(live);
    table
        .add(disks::export_name(disk)?, live.clone())
        .map_err(|error| Problem::failed(format!("cannot publish disk {disk}"), &error))?;
    Ok(live)
}
