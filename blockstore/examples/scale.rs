//! Measures how a repository of many terabytes opens and is searched, without the terabytes: it writes an index of that
//! size, opens it, looks chunks up, marks nine tenths of them as needed and plans what a collect would do, and removes it
//! again. The marks are set in the order of the index: a walk of manifests also pays for a lookup at a random place, which
//! is the time of a hit.
//!
//! `cargo run --release -p blockstore --example scale -- FOLDER TIB [CHUNK_SIZE]`: prints one line of fields between tabs
//! (TiB, chunk size, entries, index bytes, seconds to open, microseconds for a hit, for a miss, MiB of its own, of mapped
//! files, seconds to mark and plan, MiB of marks, peak MiB of its own meanwhile).
#![expect(clippy::print_stdout, reason = "a program for people")]

mod synthetic;

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockstore::{ChunkId, LocalStorage, Protection, Repository, Storage};
use synthetic::{Shape, memory, mix, write_index};

const LOOKUPS: u32 = 200_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let root = PathBuf::from(arguments.next().ok_or("which folder?")?);
    let tib: u64 = arguments.next().ok_or("how many TiB?")?.parse()?;
    let chunk_size: u32 = arguments.next().map_or(Ok(64 << 10), |size| size.parse())?;
    std::fs::create_dir(&root)?;
    let measured = measure(&root, tib, chunk_size);
    std::fs::remove_dir_all(&root)?;
    println!("{}", measured?);
    Ok(())
}

fn measure(root: &std::path::Path, tib: u64, chunk_size: u32) -> Result<String, Box<dyn Error>> {
    let shape = Shape::of(tib << 40, chunk_size);
    let storage: Arc<dyn Storage> = Arc::new(LocalStorage::at(root));
    let repository = Repository::init(storage.clone(), chunk_size, Protection::None)?.id();
    let bytes = write_index(root, repository, shape)?;
    let (own_before, _) = memory();

    let began = Instant::now();
    let repository = Repository::open(storage, None, 0)?;
    let open = began.elapsed().as_secs_f64();
    if repository.stats()?.index_entries != shape.chunks {
        return Err("the index does not hold what was written".into());
    }
    let hit = search(|n| shape.id(mix(n) % shape.chunks), |id| repository.knows(id))?;
    let miss = search(|n| ChunkId(*blake3::hash(&n.to_le_bytes()).as_bytes()), |id| !repository.knows(id))?;
    let (own, mapped) = memory();
    let began = Instant::now();
    let (report, peak) = watched(|| repository.plan_collect(50, |id| id.0[31] % 10 != 0));
    let plan = began.elapsed().as_secs_f64();
    if report.packs == 0 || report.live_bytes == 0 {
        return Err("the plan knows nothing of the packs".into());
    }
    Ok(format!(
        "{tib}\t{chunk_size}\t{}\t{bytes}\t{open:.4}\t{hit:.2}\t{miss:.2}\t{}\t{}\t{plan:.2}\t{}\t{}",
        shape.chunks,
        own.saturating_sub(own_before) >> 20,
        mapped >> 20,
        report.mark_bytes >> 20,
        peak.saturating_sub(own_before) >> 20,
    ))
}

/// Runs `work`, and tells the most memory of its own that the process held meanwhile.
fn watched<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let (peak, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                peak.fetch_max(memory().0, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        (result, peak.load(Ordering::Relaxed))
    })
}

/// Microseconds of one lookup.
fn search(id: impl Fn(u64) -> ChunkId, right: impl Fn(&ChunkId) -> bool) -> Result<f64, Box<dyn Error>> {
    let ids: Vec<ChunkId> = (0..u64::from(LOOKUPS)).map(id).collect();
    let began = Instant::now();
    if !ids.iter().all(right) {
        return Err("a lookup gives the wrong answer".into());
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(LOOKUPS))
}
