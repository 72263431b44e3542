//! Measures the repository on an image file: first backup, backup of the unchanged image, verify, restore.
//!
//! `cargo run --release -p blockstore --example throughput -- IMAGE WORK_DIR [--no-encryption|--backup-only]`
//! `WORK_DIR` must not exist; it is left behind.
#![expect(clippy::print_stdout, reason = "a program for people")]

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use blockstore::{
    Base, DataCheck, FileSource, LocalStorage, PointDetails, Progress, Protection, RecoveryPoint, Repository, Secret,
    Segment, Storage, Target, VerifyOptions, ZeroPolicy, restore,
};

struct FileTarget(File);

impl Target for FileTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let image = PathBuf::from(arguments.next().ok_or("which image?")?);
    let work = PathBuf::from(arguments.next().ok_or("which working directory?")?);
    let option = arguments.next();
    let plain = option.as_ref().is_some_and(|option| option == "--no-encryption");
    let backup_only = option.is_some_and(|option| option == "--backup-only");
    std::fs::create_dir(&work)?;
    let secret = || Secret::key_file(vec![7; 64]);
    let protection = if plain { Protection::None } else { Protection::Secret(secret()) };
    let storage: Arc<dyn Storage> = Arc::new(LocalStorage::at(work.join("repo")));
    let repository = Repository::init(storage.clone(), 64 << 10, protection)?;

    let began = Instant::now();
    let first = back_up(&repository, &image, None)?;
    report("first backup", began, first.stats.read);
    println!("  {:.3} GB stored, {} new chunks", gigabytes(first.stats.stored_bytes), first.stats.new_chunks);
    if backup_only {
        return Ok(());
    }
    let began = Instant::now();
    let second = back_up(&repository, &image, Some(&first))?;
    report("unchanged backup", began, second.stats.read);

    let began = Instant::now();
    let repository = Repository::open(storage, Some(&secret()), 64 << 20)?;
    println!("open: {:.1} ms", began.elapsed().as_secs_f64() * 1000.0);
    let began = Instant::now();
    let found =
        repository.verify(VerifyOptions { data: DataCheck::All, ..VerifyOptions::default() }, &Progress::new())?;
    report(if found.is_ok() { "verify, all data" } else { "verify FOUND DAMAGE" }, began, found.bytes_read);
    let disk = repository.open_disk(&second, "disk0")?;
    let began = Instant::now();
    let target = FileTarget(File::create_new(work.join("restored"))?);
    target.0.set_len(disk.size())?;
    let stats = restore(&disk, &target, ZeroPolicy::TargetIsZero, &Progress::new())?;
    report("restore", began, stats.data);
    cold_reads(&*disk)?;
    Ok(())
}

fn back_up(
    repository: &Repository,
    image: &std::path::Path,
    parent: Option<&RecoveryPoint>,
) -> Result<RecoveryPoint, Box<dyn Error>> {
    let source = FileSource::open(image)?;
    let mut backup = repository.begin_backup("bench", parent, Arc::new(Progress::new()))?;
    backup.add_disk("disk0", &source)?;
    Ok(backup.seal(PointDetails::default())?)
}

/// Random 4 KiB reads of a disk much larger than the cache.
fn cold_reads(disk: &dyn Base) -> Result<(), Box<dyn Error>> {
    const COUNT: u64 = 20_000;
    let began = Instant::now();
    let mut state = 1u64;
    let mut out: Vec<Segment> = Vec::new();
    for _ in 0..COUNT {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        out.clear();
        disk.read((state >> 20) % (disk.size() / 4096) * 4096, 4096, &mut out)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    println!("cold 4 KiB random reads, one thread: {:.0} a second", 20_000.0 / seconds);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn gigabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e9
}

fn report(what: &str, began: Instant, bytes: u64) {
    let seconds = began.elapsed().as_secs_f64();
    println!("{what}: {seconds:.2} s, {:.3} GB, {:.2} GB/s", gigabytes(bytes), gigabytes(bytes) / seconds);
}
