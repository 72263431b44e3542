//! The disks that files are read from.

use std::sync::Arc;

use blockstore::overlay::Overlay;
use blockstore::{Lease, Repository};
use images::SharedDisk;
use images::volume::{DiskLayout, scan};

use crate::exports::{BaseImage, OverlayImage};
use crate::problem::Problem;

/// The disks of a machine, with what lies on them.
pub struct Disks {
    /// Whose they are, for a person.
    pub of: String,
    /// What lies on them.
    pub layouts: Vec<DiskLayout>,
    /// What is to be known of all of them.
    pub notice: Option<String>,
    /// Keeps the point while it is read, even if it is forgotten.
    pub lease: Option<Lease>,
}

/// The disks of a recovery point.
pub fn of_point(repository: &Repository, id: &str) -> Result<Disks, Problem> {
    let point = crate::disks::load_point(repository, id)?;
    let lease = crate::disks::hold(repository, "file access", &point)?;
    let mut disks: Vec<(String, SharedDisk)> = Vec::new();
    for disk in &point.disks {
        let opened = crate::disks::open(repository, &point, &disk.name)?;
        disks.push((disk.name.clone(), Arc::new(BaseImage(opened))));
    }
    let of = format!("point {} of {}", crate::catalog::spec::short_id(id), point.machine);
    Ok(Disks { of, layouts: scan(&disks), notice: None, lease: Some(lease) })
}

/// The disks of a recovery as they are at present.
pub fn live(name: &str, disks: Vec<(String, Arc<Overlay>)>) -> Result<Disks, Problem> {
    if disks.is_empty() {
        return Err(Problem::refused(format!("the disks of recovery {name} are not served at present"))
            .hint(format!("`lifeboat recovery {name}` says why")));
    }
    let disks: Vec<(String, SharedDisk)> =
        disks.into_iter().map(|(name, overlay)| (name, Arc::new(OverlayImage(overlay)) as SharedDisk)).collect();
    let notice = "these are the disks of a running machine: what it has not written out yet is missing".to_owned();
    Ok(Disks { of: format!("recovery {name}"), layouts: scan(&disks), notice: Some(notice), lease: None })
}
