//! Disks of recovery points, opened to be served: the base from the repository, and the overlay that takes writes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use blockstore::base::Base;
use blockstore::disk::LocalFolder;
use blockstore::overlay::{Overlay, OverlayIdentity};
use blockstore::{Lease, PointDisk, RecoveryPoint, Repository};
use nbd_server::ExportName;
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use crate::problem::Problem;
use crate::state_dir::create_private_dir;

/// Whether an overlay is expected to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenOverlay {
    /// It is new.
    Create,
    /// It has been there before; one that is missing is an error.
    Existing,
    /// Whichever it is.
    Any,
}

/// The recovery point with id `id`.
pub fn load_point(repository: &Repository, id: &str) -> Result<RecoveryPoint, Problem> {
    let parsed = id.parse().map_err(|_| Problem::usage(format!("`{id}` is not the id of a recovery point")))?;
    repository
        .load_point(parsed)
        .map_err(|error| Problem::from_read(&format!("cannot read recovery point {id}"), &error))
}

/// A lease of a point for as long as `work` on it lasts: what it needs stays, even if the point is forgotten meanwhile.
pub fn hold(repository: &Repository, work: &str, point: &RecoveryPoint) -> Result<Lease, Problem> {
    let owner = format!("{work} of {}", point.machine);
    repository
        .hold_point(&owner, point)
        .map_err(|error| Problem::from_read(&format!("cannot take a lease for the {owner}"), &error))
}

/// A disk's export name.
pub fn export_name(disk: &str) -> Result<ExportName, Problem> {
    ExportName::new(disk)
        .map_err(|error| Problem::failed(format!("disk {disk} cannot be exported by its name"), &error))
}

/// A disk of `point`, read-only.
pub fn open(repository: &Repository, point: &RecoveryPoint, disk: &str) -> Result<Arc<PointDisk>, Problem> {
    repository
        .open_disk(point, disk)
        .map_err(|error| Problem::from_read(&format!("cannot open disk {disk} of {}", point.machine), &error))
}

/// How often an open overlay is looked after.
const UPKEEP: Duration = Duration::from_secs(2);

/// The overlay of a disk, in the folder `DIR/DISK`, looked after for as long as somebody has it.
pub fn open_overlay(
    dir: &Path,
    point: &RecoveryPoint,
    disk: &str,
    base: Arc<dyn Base>,
    open: OpenOverlay,
) -> Result<Arc<Overlay>, Problem> {
    create_private_dir(dir)
        .map_err(|error| Problem::failed(format!("cannot make folder {}", dir.display()), &error))?;
    let identity = OverlayIdentity { point: *point.id.as_bytes(), disk: disk.to_owned(), size: base.size() };
    let folder = Arc::new(LocalFolder::new(dir));
    let at = Path::new(disk);
    let create = match open {
        OpenOverlay::Create => true,
        OpenOverlay::Existing => false,
        OpenOverlay::Any => !dir.join(disk).join("data").exists(),
    };
    let opened =
        if create { Overlay::create(folder, at, identity, base) } else { Overlay::open(folder, at, identity, base) };
    let overlay = Arc::new(opened.map_err(|error| {
        Problem::from_overlay(&format!("cannot open the overlay of disk {disk} in {}", dir.display()), &error)
    })?);
    look_after(&overlay);
    Ok(overlay)
}

/// Compacts its journal and warns when space gets short, until nobody has the overlay any more.
fn look_after(overlay: &Arc<Overlay>) {
    let Ok(runtime) = Handle::try_current() else { return }; // flushes compact by themselves then
    let overlay = Arc::downgrade(overlay);
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            let Some(overlay) = overlay.upgrade() else { return };
            // What fails poisons the overlay, which says so itself.
            let _ = spawn_blocking(move || overlay.maintain()).await;
        }
    });
}
