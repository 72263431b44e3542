//! What is answered where it arrives costs no memory: requests are counted against allocations.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use common::{Running, Style};
use nbd_server::Export;
use nbd_server::export::{BlockSize, ExportError, Extent, ExtentKind, Piece, ZeroMode};

/// The system's allocator, counting what all threads ask it for but those of a test itself.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static IS_TEST: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if !IS_TEST.try_with(Cell::get).unwrap_or(true) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to `System` with the arguments as they came, so its guarantees are ours; counting neither
// allocates nor unwinds, for the flag of a thread needs no initialisation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `System` with this layout, since all of ours do.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above; the caller's promises about `new_size` are passed on.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZE: u64 = 1 << 20;
const BLOCK: usize = 4096;
static CONTENT: [u8; BLOCK] = [7; BLOCK];

/// Answers everything from memory that is there already.
#[derive(Default)]
struct Resident {
    written: AtomicU64,
}

impl Export for Resident {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn description(&self) -> String {
        String::new()
    }
    fn block_size(&self) -> BlockSize {
        BlockSize { minimum: 1, preferred: 4096, maximum: 1 << 20 }
    }
    fn read_resident(&self, _: u64, _: u32, pieces: &mut Vec<Piece>) -> bool {
        pieces.push(Piece::Data(Bytes::from_static(&CONTENT)));
        true
    }
    fn read(&self, _: u64, _: u32, _: &mut Vec<Piece>) -> Result<(), ExportError> {
        Err(ExportError::Io)
    }
    fn write_resident(&self, _: u64, data: &[u8]) -> Option<Result<(), ExportError>> {
        let right = data.len() == BLOCK && data.iter().all(|byte| *byte == 9);
        self.written.fetch_add(u64::from(right), Ordering::Relaxed);
        Some(Ok(()))
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), ExportError> {
        Err(ExportError::Io)
    }
    fn write_zeroes(&self, _: u64, _: u64, _: ZeroMode) -> Result<(), ExportError> {
        Err(ExportError::NotSupported)
    }
    fn trim(&self, _: u64, _: u64) -> Result<(), ExportError> {
        Err(ExportError::NotSupported)
    }
    fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    fn cache(&self, _: u64, _: u64) -> Result<(), ExportError> {
        Ok(())
    }
    fn extents(&self, _: u64, length: u64, _: usize) -> Result<Vec<Extent>, ExportError> {
        Ok(vec![Extent { length, kind: ExtentKind::Data }])
    }
}

/// `count` requests of 28 bytes for different blocks, each with `payload` behind it.
fn requests(command: u8, count: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for cookie in 0..count {
        bytes.extend_from_slice(b"\x25\x60\x95\x13\0\0\0");
        bytes.push(command);
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&(cookie * BLOCK as u64 % SIZE).to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(BLOCK).expect("small").to_be_bytes());
        bytes.extend_from_slice(payload);
    }
    bytes
}

#[test]
fn reads_and_writes_that_need_no_waiting_allocate_nothing() {
    const DEPTH: u64 = 32;
    const ROUNDS: u64 = 500;
    IS_TEST.set(true);
    let export = Arc::new(Resident::default());
    let server = Running::start(Arc::clone(&export) as Arc<dyn Export>);
    let mut raw = server.open(Style::Simple);
    for (command, payload, answer) in [(0, &[][..], 16 + BLOCK), (1, &[9; BLOCK][..], 16)] {
        let batch = requests(command, DEPTH, payload);
        let mut answers = vec![0; answer * usize::try_from(DEPTH).expect("small")];
        let mut round = |raw: &mut common::Raw| {
            raw.socket.write_all(&batch).expect("the server reads");
            raw.socket.read_exact(&mut answers).expect("the server answers");
            for reply in answers.chunks(answer) {
                assert_eq!(&reply[..8], b"\x67\x44\x66\x98\0\0\0\0");
                assert!(reply[16..].iter().all(|byte| *byte == 7));
            }
        };
        for _ in 0..50 {
            round(&mut raw); // buffers grow to their size
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        for _ in 0..ROUNDS {
            round(&mut raw);
        }
        let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
        assert!(allocations < ROUNDS, "{allocations} allocations in {} requests", ROUNDS * DEPTH);
    }
    assert_eq!(export.written.load(Ordering::Relaxed), 550 * DEPTH, "every payload arrived as it was sent");
}
