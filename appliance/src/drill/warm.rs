//! Fetches what a drill has seen a guest read into the chunk cache, ahead of a recovery's guest. See docs/design/drills.md
//!
//! It is a guess, and nothing rests on it: what fails is left to whoever reads it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use blockstore::drill::BootTrace;
use blockstore::{DrillId, PointDisk};

use super::DrillResult;
use crate::app::App;
use crate::catalog::PointSummary;

/// Threads that fetch.
const THREADS: usize = 4;
/// Chunks that one of them fetches at once.
const STEP: usize = 16;
/// Drills that are looked at for a trace.
const LOOKED_AT: usize = 8;
/// A trace takes at most this share of the cache.
const CACHE_SHARE: u64 = 2;

/// Begins to fetch what a guest of `point` will want, and returns at once.
pub fn warm(app: &Arc<App>, point: &PointSummary) {
    let (app, point) = (app.clone(), point.clone());
    let work = move || {
        let since = Instant::now();
        let Some((drill, trace)) = trace_for(&app, &point) else { return };
        let fetched = fetch(&app, &point, &trace);
        tracing::info!(
            machine = point.machine, drill = %drill, chunks = trace.chunks(), fetched,
            seconds = since.elapsed().as_secs_f64(), "boot trace fetched"
        );
    };
    if let Err(error) = thread::Builder::new().name("boot-trace".to_owned()).spawn(work) {
        tracing::warn!(%error, "no thread for the boot trace");
    }
}

/// The newest trace of a drill that passed: of this point, else of the machine's others.
fn trace_for(app: &App, point: &PointSummary) -> Option<(DrillId, BootTrace)> {
    let points = app.points().ok()?;
    let own = |id: &DrillId| id.point.to_string() == point.id;
    let of_machine = |id: &DrillId| {
        let name = id.point.to_string();
        points.iter().any(|other| other.id == name && other.machine == point.machine)
    };
    let mut ids: Vec<DrillId> = app.repository.drills().ok()?.into_iter().filter(of_machine).collect();
    ids.sort_unstable_by_key(|id| (!own(id), std::cmp::Reverse(id.time_unix_ms)));
    let passed = |id: &DrillId| {
        let summary = app.drill_summary(*id).ok();
        summary.is_some_and(|summary| summary["result"] == DrillResult::Passed.to_string())
    };
    ids.into_iter().filter(passed).take(LOOKED_AT).find_map(|id| {
        let trace = app.repository.drill(id).ok()?.attached.trace;
        (trace.chunks() > 0).then_some((id, trace))
    })
}

/// Fetches a trace in its order, as far as the cache has room for it; returns how many chunks were not there yet.
fn fetch(app: &App, point: &PointSummary, trace: &BootTrace) -> u64 {
    let Ok(point) = crate::disks::load_point(&app.repository, &point.id) else { return 0 };
    let room = app.repository.cache_bytes() / CACHE_SHARE / u64::from(app.repository.chunk_size());
    let mut room = usize::try_from(room).unwrap_or(usize::MAX);
    let mut steps: Vec<(Arc<PointDisk>, &[u64])> = Vec::new();
    for traced in &trace.disks {
        // A disk that is new, or gone, has no trace.
        let Ok(disk) = app.repository.open_disk(&point, &traced.disk) else { continue };
        let chunks = traced.chunks.get(..traced.chunks.len().min(room)).unwrap_or_default();
        room -= chunks.len();
        steps.extend(chunks.chunks(STEP).map(|step| (disk.clone(), step)));
    }
    let (next, fetched, failed) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        while !failed.load(Ordering::Relaxed)
            && let Some((disk, chunks)) = steps.get(next.fetch_add(1, Ordering::Relaxed))
        {
            match disk.prefetch(chunks) {
                Ok(count) => drop(fetched.fetch_add(count as u64, Ordering::Relaxed)),
                Err(error) => {
                    tracing::debug!(error = %crate::problem::chain(&error), "a boot trace is not fetched to its end");
                    failed.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    thread::scope(|scope| (0..THREADS).for_each(|_| drop(scope.spawn(work))));
    fetched.into_inner()
}
