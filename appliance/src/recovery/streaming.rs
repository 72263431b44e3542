//! A recovery whose disks Lifeboat itself copies. The rules: docs/design/rehydration.md

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use blockstore::overlay::Overlay;

use super::moving::{Moving, cannot_copy, remove_made, target_problem};
use super::one::{Driver, Recovery};
use crate::problem::Problem;
use crate::rehydrate::{self, LiveDisk, Move, Opening, Place, Plan, Regions, Stream};

impl Recovery {
    /// Opens the targets, makes the files that are to be made.
    pub(super) async fn open_targets(&self, plan: &Plan, opening: Opening) -> Result<Vec<Move>, Problem> {
        let disks = self.lock().disks.clone();
        let (plan, summaries) = (plan.clone(), self.definition.disks.clone());
        let notes = self.dir().join("disks");
        let open = move || {
            let mut moves: Vec<Move> = Vec::new();
            for ((planned, disk), live) in plan.disks.iter().zip(&summaries).zip(disks) {
                let checkpoint = notes.join(&disk.name).join("hydrated");
                match open_one(&planned.place, &disk.name, disk.size, live, checkpoint, opening) {
                    Ok(one) => moves.push(one),
                    Err(problem) => {
                        if opening != Opening::Again {
                            remove_made(&Plan { disks: plan.disks[..moves.len()].to_vec(), ..plan.clone() });
                        }
                        return Err(problem);
                    }
                }
            }
            Ok(moves)
        };
        tokio::task::spawn_blocking(open).await.map_err(|error| cannot_copy(&error))?
    }

    /// Copies.
    pub(super) fn begin_stream(&self, driver: &mut Driver, moves: Vec<Move>) -> Result<(), Problem> {
        let limit = driver.plan.as_ref().and_then(|plan| plan.limit);
        let stream =
            tokio::task::block_in_place(|| Stream::start(moves, limit)).map_err(|error| cannot_copy(&error))?;
        let (watch, plan) = (stream.watch(), driver.plan.clone());
        self.show(|shown| {
            shown.moving = Some(watch);
            shown.plan = plan;
        });
        driver.moving = Some(Moving::Stream(stream));
        Ok(())
    }
}

fn open_one(
    place: &Place,
    name: &str,
    size: u64,
    disk: Arc<LiveDisk>,
    checkpoint: PathBuf,
    opening: Opening,
) -> Result<Move, Problem> {
    let target = rehydrate::open(place, size, opening).map_err(|error| target_problem(place, name, &error))?;
    let regions = match (opening, disk.overlay()) {
        (Opening::Again, Some(export)) => {
            let written = rehydrate::written_before(&checkpoint, size);
            forget_changed(&export.overlay, &written);
            Regions::resumed(size, written)
        }
        _ => Regions::all_open(size),
    };
    Ok(Move {
        name: name.to_owned(),
        size,
        disk,
        place: place.clone(),
        target: target.into(),
        regions: Arc::new(regions),
        checkpoint,
        copied: AtomicU64::new(0),
        data: AtomicU64::new(0),
        busy: AtomicU64::new(0),
        differences: AtomicU64::new(0),
    })
}

/// Takes out of `written` what the overlay holds: nobody knows whether that was copied before or after it changed.
fn forget_changed(overlay: &Overlay, written: &rehydrate::RegionSet) {
    let mut at = 0;
    while at < overlay.size() {
        for extent in overlay.changed(at, overlay.size() - at, 1024) {
            if extent.changed {
                for region in rehydrate::touched(at, extent.length) {
                    written.remove(region);
                }
            }
            at += extent.length;
        }
    }
}
