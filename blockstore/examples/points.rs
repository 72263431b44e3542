//! Makes a repository of many recovery points of many machines, each of one small disk, to measure how lists, plans and
//! schedules grow. Best on a file system in memory: each point is synced.
//!
//! `cargo run --release -p blockstore --example points -- FOLDER MACHINES POINTS`: machines are called vm-000, vm-001...
#![expect(clippy::print_stderr, reason = "a program for people")]

use std::error::Error;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockstore::{Consistency, LocalStorage, PointDetails, Progress, Protection, Repository, Source};

/// Of the only disk of every machine.
const SIZE: u64 = 64 << 10;

/// A disk that says which machine's it is.
struct Disk(u64);

impl Source for Disk {
    fn size(&self) -> u64 {
        SIZE
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let text = self.0.to_le_bytes();
        for (at, byte) in (offset..).zip(buf) {
            let place = usize::try_from(at % 8).unwrap_or_default();
            *byte = text.get(place).copied().unwrap_or_default() ^ 0x5a;
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < SIZE).then_some(offset..SIZE))
    }

    fn current_size(&self) -> io::Result<u64> {
        Ok(SIZE)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let root = PathBuf::from(arguments.next().ok_or("which folder?")?);
    let machines: u64 = arguments.next().ok_or("how many machines?")?.parse()?;
    let points: u64 = arguments.next().ok_or("how many points?")?.parse()?;
    let storage = Arc::new(LocalStorage::at(&root));
    // One that was cut off is gone on with.
    let repository = match root.join("repository").exists() {
        true => Repository::open(storage, None, 0)?,
        false => {
            std::fs::create_dir_all(&root)?;
            Repository::init(storage, 64 << 10, Protection::None)?
        }
    };
    let next = AtomicU64::new(repository.list_points()?.len() as u64);
    let work = || -> Result<(), String> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= points {
                return Ok(());
            }
            seal(&repository, number % machines.max(1)).map_err(|error| error.to_string())?;
            if number.is_multiple_of(10_000) {
                eprintln!("{number} points");
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a panic".to_owned())))
    })?;
    Ok(())
}

fn seal(repository: &Repository, machine: u64) -> Result<(), Box<dyn Error>> {
    let disk = Disk(machine);
    let mut backup = repository.begin_backup(&format!("vm-{machine:03}"), None, Arc::new(Progress::new()))?;
    backup.add_disk("disk0", &disk)?;
    let (labels, hardware) = (std::collections::BTreeMap::new(), serde_json::Value::Null);
    backup.seal(PointDetails { labels, consistency: Consistency::Crash, hardware })?;
    Ok(())
}
