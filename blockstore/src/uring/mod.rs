//! Many reads of one file at once: by io_uring where the kernel has it, else one `pread` after the other.
//!
//! What is in the page cache costs the same either way (1.4 us for 4 KiB). What is not is fetched from the device all
//! together instead of one after the other, and that without a thread for each: 64 scattered reads of 4 KiB took 36 to
//! 47 us each instead of 235 to 427 on a busy virtual disk. So this serves whoever wants several pieces before it can go
//! on; a single read is a `pread`. Rings are never shared: each thread has its own, made when it first needs it.

mod ring;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use crate::disk::ReadAt;
use ring::Ring;

/// Fills the buffer of each read. After an error the buffers hold anything.
pub(crate) fn read_many(file: &File, reads: &mut [ReadAt]) -> io::Result<()> {
    if reads.len() < 2 || !rings_work() {
        return read_each(file, reads);
    }
    RING.with_borrow_mut(|slot| match slot {
        Slot::Ready(ring) => {
            let done = ring.read_many(file, reads);
            if ring.is_broken() {
                *slot = Slot::Refused;
            }
            done
        }
        Slot::Refused => read_each(file, reads),
        Slot::Unused => match Ring::new() {
            Ok(mut ring) => {
                let done = ring.read_many(file, reads);
                *slot = if ring.is_broken() { Slot::Refused } else { Slot::Ready(Box::new(ring)) };
                done
            }
            Err(_) => {
                *slot = Slot::Refused; // memory that may be locked is used up, say
                read_each(file, reads)
            }
        },
    })
}

/// The plain engine.
fn read_each(file: &File, reads: &mut [ReadAt]) -> io::Result<()> {
    reads.iter_mut().try_for_each(|read| file.read_exact_at(&mut read.buffer, read.offset))
}

/// The ring of a thread.
enum Slot {
    Unused,
    Ready(Box<Ring>),
    /// It cannot have one, or its ring failed.
    Refused,
}

thread_local! {
    static RING: RefCell<Slot> = const { RefCell::new(Slot::Unused) };
}

/// Whether this kernel lets us have rings that read; looked at once.
fn rings_work() -> bool {
    static WORK: OnceLock<bool> = OnceLock::new();
    *WORK.get_or_init(|| match Ring::new().and_then(|ring| ring.check()) {
        Ok(()) => true,
        Err(error) => {
            tracing::info!(%error, "no io_uring here: reads go one after the other");
            false
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;

    type Engine = fn(&File, &mut [ReadAt]) -> io::Result<()>;

    /// Each engine that this machine has.
    fn engines() -> Vec<Engine> {
        let by_ring: Engine = |file, reads| {
            let mut ring = Ring::new()?;
            ring.read_many(file, reads)?;
            ring.read_many(file, reads) // the same ring once more
        };
        if rings_work() { vec![read_each, read_many, by_ring] } else { vec![read_each, read_many] }
    }

    fn byte(at: usize) -> u8 {
        u8::try_from((at * 31 + at / 4096) % 251).unwrap()
    }

    #[test]
    fn each_engine_reads_what_is_there_and_refuses_what_is_not() {
        const LEN: usize = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, (0..LEN).map(byte).collect::<Vec<u8>>()).unwrap();
        let file = File::open(&path).unwrap();
        let read = |offset: usize, length: usize| ReadAt { offset: offset as u64, buffer: vec![0xee; length] };
        for engine in engines() {
            // More than a ring takes at once, of all lengths, overlapping, empty ones among them.
            let mut reads: Vec<ReadAt> = (0..1000).map(|n| read(n * 7919 % (LEN - 9000), n * 37 % 9000)).collect();
            engine(&file, &mut reads).unwrap();
            for read in &reads {
                let start = usize::try_from(read.offset).unwrap();
                assert!(read.buffer.iter().zip(start..).all(|(found, at)| *found == byte(at)), "at {start}");
            }
            engine(&file, &mut []).unwrap();
            let mut past = [read(0, 10), read(LEN - 5, 10), read(20, 10)];
            assert_eq!(engine(&file, &mut past).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert!(past.iter().all(|read| read.buffer.len() == 10), "buffers come back also from a failure");
            let write_only = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            assert!(engine(&write_only, &mut [read(0, 10), read(20, 10)]).is_err());
        }
    }

    #[test]
    fn each_engine_reads_past_the_page_cache() {
        let dir = tempfile::tempdir_in(".").unwrap(); // a file system with a device, where there is one
        let path = dir.path().join("file");
        std::fs::write(&path, (0..256 * 4096).map(byte).collect::<Vec<u8>>()).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let Ok(file) = std::fs::OpenOptions::new().read(true).custom_flags(direct).open(&path) else { return };
        let aligned = |grain: usize| {
            // A vector of this size begins at a page only by chance: take what the file system says to it.
            ReadAt { offset: (grain * 4096) as u64, buffer: vec![0; 4096] }
        };
        for engine in engines() {
            let mut reads: Vec<ReadAt> = (0..200).map(|n| aligned(n * 37 % 256)).collect();
            match engine(&file, &mut reads) {
                Ok(()) => {
                    for read in &reads {
                        let start = usize::try_from(read.offset).unwrap();
                        assert!(read.buffer.iter().zip(start..).all(|(found, at)| *found == byte(at)), "at {start}");
                    }
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}"),
            }
        }
    }
}
