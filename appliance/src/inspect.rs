//! What `show` tells of a recovery point.

use blockstore::base::Base;
use blockstore::{Locality, Repository};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::PointSummary;
use crate::hardware::Hardware;
use crate::problem::Problem;

/// Extents asked for at a time.
const EXTENTS: usize = 4096;

/// A recovery point in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PointDetail {
    /// What `points` lists.
    #[serde(flatten)]
    pub summary: PointSummary,
    /// The id of the point it was made against.
    pub parent: Option<String>,
    /// The machine's definition, without its UEFI variables.
    pub hardware: serde_json::Value,
    /// The same in a few words.
    #[serde(default)]
    pub machine_in_words: String,
    /// Bytes read from the sources.
    pub read: u64,
    /// Bytes of chunks that the repository did not have.
    pub new: u64,
    /// Chunks that were compared with the sources once more at the end.
    pub compared: u64,
    /// How long the backup took.
    pub seconds: f64,
    /// Its disks.
    pub disks_detail: Vec<DiskDetail>,
}

/// A disk of a recovery point in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DiskDetail {
    /// As given at backup.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Bytes that are not holes.
    pub data: u64,
    /// The id of its manifest's root.
    pub root: String,
    /// What reading it costs.
    pub locality: DiskLocality,
}

/// How far a disk is scattered over the repository. A large disk is only sampled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DiskLocality {
    /// Whether only some regions of 512 chunks were looked at: at most 64, spread evenly.
    pub sampled: bool,
    /// Chunks that were looked at.
    pub chunks: u64,
    /// Packs that hold them.
    pub packs: u64,
    /// Reads it takes to have them, neighbours in a pack at once.
    pub reads: u64,
    /// Bytes they take in their packs.
    pub used: u64,
    /// Bytes of the blocks of 128 KiB they lie in.
    pub fetched: u64,
    /// `fetched` for each of `used`; 1 where all lies together.
    pub read_amplification: f64,
}

impl From<Locality> for DiskLocality {
    fn from(locality: Locality) -> DiskLocality {
        DiskLocality {
            sampled: locality.sampled,
            chunks: locality.chunks,
            packs: locality.packs,
            reads: locality.reads,
            used: locality.used,
            fetched: locality.fetched,
            read_amplification: locality.amplification(),
        }
    }
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
        let locality = repository.locality(&point, &disk.name).map_err(|error| failed(&error))?.into();
        let root = disk.root.to_string();
        disks_detail.push(DiskDetail { name: disk.name.clone(), size: disk.size, data, root, locality });
    }
    let machine_in_words =
        Hardware::read(&point.hardware).map_or_else(|why| why.to_string(), |hardware| hardware.to_string());
    let mut hardware = point.hardware.clone();
    if let Some(fields) = hardware.as_object_mut() {
        fields.remove("uefi_vars");
    }
    Ok(PointDetail {
        summary: summary.clone(),
        parent: point.parent.map(|parent| parent.to_string()),
        hardware,
        machine_in_words,
        read: point.stats.read,
        new: point.stats.new_bytes,
        compared: point.stats.compared,
        seconds: point.stats.seconds,
        disks_detail,
    })
}
