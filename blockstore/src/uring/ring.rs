//! [`Ring`]: one thread's io_uring. Buffers move into the ring's slots while the kernel fills them and come back when
//! it has said that it is done: no future, panic or early return can free memory that is still being written.
#![expect(unsafe_code, reason = "the kernel is handed raw addresses")]

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use io_uring::{IoUring, Probe, opcode, types};

use crate::disk::ReadAt;

/// Reads in flight. A device that likes depth has enough at 64.
const DEPTH: u32 = 64;

/// Interrupted, and too many results that nobody has fetched: both pass. The numbers are Linux's on every architecture.
const EINTR: i32 = 4;
const EBUSY: i32 = 16;

pub(super) struct Ring {
    ring: IoUring,
    /// What the kernel reads into, and for which read of the caller's list.
    slots: Vec<Option<(usize, Vec<u8>)>>,
    broken: bool,
}

impl Ring {
    pub(super) fn new() -> io::Result<Ring> {
        // The kernel then does its part of the work when this thread asks for results, and at no other time.
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(DEPTH);
        let ring = ring.or_else(|_| IoUring::new(DEPTH))?; // before Linux 6.1
        Ok(Ring { ring, slots: (0..DEPTH).map(|_| None).collect(), broken: false })
    }

    /// Whether it can read.
    pub(super) fn check(&self) -> io::Result<()> {
        let mut probe = Probe::new();
        self.ring.submitter().register_probe(&mut probe)?;
        if probe.is_supported(opcode::Read::CODE) { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    /// Whether it failed in a way that leaves reads in flight; it must not be used again.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Fills the buffer of each read.
    pub(super) fn read_many(&mut self, file: &File, reads: &mut [ReadAt]) -> io::Result<()> {
        let mut next = 0;
        let mut result = Ok(());
        loop {
            while result.is_ok() && next < reads.len() && self.push(file, next, reads) {
                next += 1;
            }
            if self.slots.iter().all(Option::is_none) {
                return result;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(EINTR | EBUSY)) => {}
                Err(error) => {
                    self.broken = true; // what is in flight stays in its slots, and is leaked with them
                    return Err(error);
                }
            }
            while let Some(done) = self.ring.completion().next() {
                let slot = usize::try_from(done.user_data()).ok().and_then(|at| self.slots.get_mut(at));
                let Some((at, mut buffer)) = slot.and_then(Option::take) else { continue };
                // Short or failed: the plain way goes on where it stopped, and says what is wrong.
                let filled = usize::try_from(done.result()).unwrap_or(0).min(buffer.len());
                let Some(read) = reads.get_mut(at) else { continue };
                if let (Some(rest), Ok(())) = (buffer.get_mut(filled..).filter(|rest| !rest.is_empty()), &result) {
                    result = file.read_exact_at(rest, read.offset + filled as u64);
                }
                read.buffer = buffer;
            }
        }
    }

    /// Hands a read to the ring; false if it has no room now.
    fn push(&mut self, file: &File, at: usize, reads: &mut [ReadAt]) -> bool {
        let Some(free) = self.slots.iter().position(Option::is_none) else { return false };
        let (Some(slot), Some(read)) = (self.slots.get_mut(free), reads.get_mut(at)) else { return false };
        let (_, buffer) = slot.insert((at, mem::take(&mut read.buffer)));
        // What does not fit 32 bits is read in part, and the rest in the plain way.
        let length = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), buffer.as_mut_ptr(), length)
            .offset(read.offset)
            .build()
            .user_data(free as u64);
        // SAFETY: the entry names a file and memory. The file is open until this call's caller returns, and the kernel
        // holds it by itself once the entry is submitted. The memory is the buffer's, `length` bytes of it or fewer: it
        // stands in a slot, where nothing touches it, until the completion with this slot's number has been seen, which
        // is the kernel's last use of it. A ring that is dropped with slots in use leaks them (see `Drop`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err()
            && let Some((_, buffer)) = slot.take()
        {
            read.buffer = buffer; // the queue is full: the kernel has not heard of it
            return false;
        }
        true
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for slot in &mut self.slots {
            mem::forget(slot.take()); // in flight: the kernel may write there at any time
        }
    }
}
