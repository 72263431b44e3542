//! What `show` tells of a recovery point.

use blockstore::Repository;
use blockstore::base::Base;
use serde::{Deserialize, Serialize};

use crate::catalog::PointSummary;
use crate::problem::Problem;

/// Extents asked for at a time.
const EXTENTS: usize = 4096;

/// A recovery point in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PointDetail {
    /// What `points` lists.
    #[serde(flatten)]
    pub summary: PointSummary,
    /// The id of the point it was made against.
    pub parent: Option<String>,
    /// The VM's hardware definition.
    pub hardware: serde_json::Value,
    /// Bytes read from the sources.
    pub read: u64,
    /// Bytes of chunks that the repository did not have.
    pub new: u64,
    /// How long the backup took.
    pub seconds: f64,
    /// Its disks.
    pub disks_detail: Vec<DiskDetail>,
}

/// A disk of a recovery point in full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDetail {
    /// As given at backup.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Bytes that are not holes.
    pub data: u64,
    /// The id of its manifest's root.
    pub root: String,
}

/// Reads what is to be shown of `summary`'s point.
pub fn point(repository: &Repository, summary: &PointSummary) -> Result<PointDetail, Problem> {
    let point = crate::disks::load_point(repository, &summary.id)?;
    let mut disks_detail = Vec::with_capacity(point.disks.len());
    for disk in &point.disks {
        let failed = |error: &blockstore::error::ReadError| {
            Problem::from_read(&format!("cannot read the manifest of disk {} of {}", disk.name, point.machine), error)
        };
        let opened = repository.open_disk(&point, &disk.name).map_err(|error| failed(&error))?;
        let (mut at, mut data) = (0, 0);
        while at < disk.size {
            for extent in opened.extents(at, disk.size - at, EXTENTS).map_err(|error| failed(&error))? {
                at += extent.length;
                data += if extent.hole { 0 } else { extent.length };
            }
        }
        disks_detail.push(DiskDetail { name: disk.name.clone(), size: disk.size, data, root: disk.root.to_string() });
    }
    Ok(PointDetail {
        summary: summary.clone(),
        parent: point.parent.map(|parent| parent.to_string()),
        hardware: point.hardware.clone(),
        read: point.stats.read,
        new: point.stats.new_bytes,
        seconds: point.stats.seconds,
        disks_detail,
    })
}
