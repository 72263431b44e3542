//! What clients do that they should not, and what happens around a connection: slow readers, lost clients, exports
//! that go away, hang, fail or panic, and the end of a server.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Running, Style, name, u32_at};
use nbd_server::export::{BlockSize, ExportError, Extent, ExtentKind, Piece, ZeroMode};
use nbd_server::{Export, Limits, MemoryExport};

/// An export whose operations wait at a gate, fail, or panic, as a test wants. Reads give ones.
#[derive(Default)]
struct Scripted {
    gate: Mutex<bool>,
    opened: Condvar,
    inside: AtomicUsize,
    inside_max: AtomicUsize,
    log: Mutex<Vec<&'static str>>,
    fail_flush: bool,
    short_read: bool,
    panic_on_trim: bool,
}

impl Scripted {
    fn open_gate(&self) {
        *self.gate.lock().expect("no panic inside") = true;
        self.opened.notify_all();
    }

    fn wait(&self, what: &'static str) {
        let now = self.inside.fetch_add(1, Ordering::SeqCst) + 1;
        self.inside_max.fetch_max(now, Ordering::SeqCst);
        let open = self.gate.lock().expect("no panic inside");
        drop(self.opened.wait_while(open, |open| !*open).expect("no panic inside"));
        self.inside.fetch_sub(1, Ordering::SeqCst);
        self.log.lock().expect("no panic inside").push(what);
    }
}

impl Export for Scripted {
    fn size(&self) -> u64 {
        1 << 30
    }
    fn read_only(&self) -> bool {
        false
    }
    fn description(&self) -> String {
        String::new()
    }
    fn block_size(&self) -> BlockSize {
        BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 }
    }
    fn read(&self, _offset: u64, length: u32, pieces: &mut Vec<Piece>) -> Result<(), ExportError> {
        self.wait("read");
        let length = if self.short_read { length - 1 } else { length };
        pieces.push(Piece::Data(Bytes::from(vec![1; length as usize])));
        Ok(())
    }
    fn write(&self, _offset: u64, _data: &[u8]) -> Result<(), ExportError> {
        self.wait("write");
        Ok(())
    }
    fn write_zeroes(&self, _offset: u64, _length: u64, _mode: ZeroMode) -> Result<(), ExportError> {
        Err(ExportError::NoSpace)
    }
    fn trim(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        assert!(!self.panic_on_trim, "a fault in the export");
        Err(ExportError::NotSupported)
    }
    fn flush(&self) -> Result<(), ExportError> {
        self.wait("flush");
        if self.fail_flush { Err(ExportError::Io) } else { Ok(()) }
    }
    fn cache(&self, _offset: u64, _length: u64) -> Result<(), ExportError> {
        Err(ExportError::ShuttingDown)
    }
    fn extents(&self, _offset: u64, length: u64, _limit: usize) -> Result<Vec<Extent>, ExportError> {
        let half = Extent { length, kind: ExtentKind::AllocatedZero }; // too much on purpose: the server clips
        Ok(vec![half, half])
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_failed_flush_fails_the_write_with_fua_and_errors_reach_the_wire() {
    let export = Arc::new(Scripted { fail_flush: true, ..Scripted::default() });
    export.open_gate();
    let server = Running::start(Arc::clone(&export) as Arc<dyn Export>);
    let mut raw = server.open(Style::Structured);
    raw.request(1, 1, 1, 0, 4, b"data");
    assert_eq!(raw.outcome(1), 5);
    assert_eq!(*export.log.lock().expect("quiet"), ["write", "flush"]);
    raw.request(3, 0, 2, 0, 0, &[]);
    assert_eq!(raw.outcome(2), 5);
    raw.request(6, 0, 3, 0, 4, &[]);
    assert_eq!(raw.outcome(3), 28);
    raw.request(4, 0, 4, 0, 4, &[]);
    assert_eq!(raw.outcome(4), 95);
    raw.request(5, 0, 5, 0, 4, &[]);
    assert_eq!(raw.outcome(5), 108);
}

#[test]
fn an_export_that_panics_or_answers_short_costs_one_request() {
    let export = Arc::new(Scripted { short_read: true, panic_on_trim: true, ..Scripted::default() });
    export.open_gate();
    let server = Running::start(export);
    let mut raw = server.open(Style::Structured);
    raw.request(4, 0, 1, 0, 4, &[]);
    assert_eq!(raw.outcome(1), 5);
    assert_eq!(raw.read(0, 0, 100), Err(5));
    raw.request(7, 0, 2, 0, 100, &[]);
    let chunk = raw.chunk(0);
    assert_eq!((chunk.kind, u32_at(&chunk.payload, 4), chunk.payload.len()), (5, 100, 12), "clipped and joined");
}

#[test]
fn slow_operations_run_at_once_and_answer_out_of_order() {
    let export = Arc::new(Scripted::default());
    let server = Running::start(Arc::clone(&export) as Arc<dyn Export>);
    let mut raw = server.open(Style::Structured);
    for cookie in 0..20 {
        raw.request(0, 0, cookie, 0, 4096, &[]);
    }
    raw.request(7, 0, 99, 0, 100, &[]); // overtakes the reads, which wait
    assert_eq!(raw.chunk(0).cookie, 99);
    until("all reads are inside", || export.inside.load(Ordering::SeqCst) == 20);
    export.open_gate();
    let mut cookies: Vec<u64> = (0..20).map(|_| raw.chunk(0).cookie).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..20).collect::<Vec<_>>());
}

#[test]
fn a_client_has_no_more_in_flight_than_the_limit_in_number_and_bytes() {
    let export = Arc::new(Scripted::default());
    let limits = Limits { requests_per_connection: 5, bytes_per_connection: 3 << 20, ..Limits::default() };
    let server = Running::with_limits(Arc::clone(&export) as Arc<dyn Export>, limits);
    let mut raw = server.open(Style::Structured);
    (0..30).for_each(|cookie| raw.request(0, 0, cookie, 0, 10, &[]));
    until("five are inside", || export.inside.load(Ordering::SeqCst) == 5);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(export.inside_max.load(Ordering::SeqCst), 5);
    export.open_gate();
    (0..30).for_each(|_| assert_eq!(raw.chunk(0).kind, 1));
    *export.gate.lock().expect("quiet") = false;
    export.inside_max.store(0, Ordering::SeqCst);
    (0..10).for_each(|cookie| raw.request(0, 0, cookie, 0, 1 << 20, &[]));
    until("three are inside", || export.inside.load(Ordering::SeqCst) == 3);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(export.inside_max.load(Ordering::SeqCst), 3);
    export.open_gate();
    (0..10).for_each(|_| assert_eq!(raw.chunk(0).payload.len(), 8 + (1 << 20)));
}

#[test]
fn a_client_that_does_not_read_is_not_read_from_and_gets_everything_later() {
    for resident in [true, false] {
        let content: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 253).to_le_bytes()[0]).collect();
        let disk = MemoryExport::from_bytes(&content);
        let server = Running::start(Arc::new(if resident { disk } else { disk.not_resident() }));
        let mut raw = server.open(Style::Structured);
        let mut sender = raw.socket.try_clone().expect("a second handle");
        sender.set_nonblocking(true).expect("a socket option");
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0; 20]);
        request.extend((128_u32 << 10).to_be_bytes());
        // 128 KiB a request: unread, the replies to all of these would be far more than any bound.
        let mut sent = 0;
        let mut patience = 10;
        while patience > 0 && sent < request.len() * 40_000 {
            match std::io::Write::write(&mut sender, &request[sent % request.len()..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(20));
                    patience -= 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(patience, 0, "the server took every request without having its replies read");
        raw.socket.set_nonblocking(false).expect("a socket option");
        for _ in 0..(sent / request.len()).min(500) {
            assert!(raw.chunk(0).payload[8..] == content[..128 << 10]);
        }
    }
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let disk = Arc::new(MemoryExport::new(64 << 20));
    let server = Running::start(Arc::clone(&disk) as Arc<dyn Export>);
    for round in 0..40_u64 {
        let mut raw = server.open(Style::Structured);
        match round % 4 {
            0 => raw.request(0, 0, 1, 0, 16 << 20, &[]), // the reply has nowhere to go
            1 => raw.request(1, 0, 1, 0, 1 << 20, &[0; 1000]), // most of the payload never comes
            2 => raw.send(&[&[0x25, 0x60]]),
            _ => (0..50).for_each(|cookie| raw.request(0, 0, cookie, 0, 1 << 20, &[])),
        }
    }
    until("every connection has ended", || server.table.connections(&name("disk")) == Some(0));
    assert!(disk.content().iter().all(|&byte| byte == 0), "half a payload is not written");
    assert_eq!(server.open(Style::Simple).read(0, 0, 10), Ok(vec![0; 10]));
}

#[test]
fn a_removed_export_finishes_what_is_in_flight_refuses_the_rest_and_is_gone() {
    let export = Arc::new(Scripted::default());
    let server = Running::start(Arc::clone(&export) as Arc<dyn Export>);
    let mut raw = server.open(Style::Structured);
    let mut idle = server.open(Style::Structured);
    raw.request(1, 0, 1, 0, 4, b"data");
    until("the write is inside", || export.inside.load(Ordering::SeqCst) == 1);
    let retirement = server.table.remove(&name("disk")).expect("it is there");
    assert!(idle.is_closed());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let early =
        runtime.block_on(async { tokio::time::timeout(Duration::from_millis(100), retirement.finished()).await });
    assert!(early.is_err(), "an operation still runs");
    export.open_gate();
    runtime.block_on(retirement.finished());
    assert_eq!(*export.log.lock().expect("quiet"), ["write"]);
    assert_eq!(raw.outcome(1), 0);
    assert!(raw.is_closed());
    let mut late = server.connect();
    late.greet(3);
    assert_eq!(late.option(7, &common::go("disk", &[])).last().expect("one").0, (1 << 31) + 6);
}

#[test]
fn requests_that_waited_when_their_export_went_away_get_eshutdown() {
    let export = Arc::new(Scripted::default());
    let limits = Limits { requests_per_connection: 1, ..Limits::default() };
    let server = Running::with_limits(Arc::clone(&export) as Arc<dyn Export>, limits);
    let mut raw = server.open(Style::Structured);
    let request = |cookie: u8| {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, cookie, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4]);
        bytes
    };
    raw.send(&[&request(1), &request(2), &request(3)]); // one send: the server has read all three, and begun one
    until("the read is inside", || export.inside.load(Ordering::SeqCst) == 1);
    server.table.remove(&name("disk")).expect("it is there");
    assert_eq!([raw.outcome(2), raw.outcome(3)], [108, 108]);
    export.open_gate();
    let first = raw.chunk(0);
    assert_eq!((first.cookie, first.kind), (1, 1));
    assert!(raw.is_closed());
}

#[test]
fn the_end_of_a_server_waits_for_writes_flushes_and_removes_the_socket() {
    let export = Arc::new(Scripted::default());
    let mut server = Running::start(Arc::clone(&export) as Arc<dyn Export>);
    let socket = server.socket.clone();
    let mut raw = server.open(Style::Structured);
    raw.request(1, 0, 1, 0, 4, b"data");
    until("the write is inside", || export.inside.load(Ordering::SeqCst) == 1);
    server.stop();
    until("the socket is gone", || !socket.exists());
    export.open_gate();
    assert_eq!(raw.outcome(1), 0);
    assert!(raw.is_closed());
    drop(raw);
    server.join();
    assert_eq!(*export.log.lock().expect("quiet"), ["write", "flush"]);
}

#[test]
fn memory_over_all_connections_is_bounded_and_a_stalled_client_gives_way() {
    let export = Arc::new(Scripted::default());
    export.open_gate();
    let limits = Limits { bytes: 32 << 20, stall: Duration::from_millis(200), ..Limits::default() };
    let server = Running::with_limits(Arc::clone(&export) as Arc<dyn Export>, limits);
    let mut stalled = server.open(Style::Structured);
    stalled.request(0, 0, 1, 0, 30 << 20, &[]); // most of all there is, and never read
    let mut other = server.open(Style::Structured);
    assert_eq!(other.read(0, 0, 8 << 20).map(|data| data.len()), Ok(8 << 20));
    until("the stalled client is disconnected", || server.table.connections(&name("disk")) == Some(1));
}

#[test]
fn an_export_that_hangs_takes_nothing_from_others() {
    let hanging = Arc::new(Scripted::default());
    let server = Running::with_limits(
        Arc::clone(&hanging) as Arc<dyn Export>,
        Limits { operations: 8, requests_per_connection: 64, ..Limits::default() },
    );
    let good = Arc::new(MemoryExport::from_bytes(&[7; 4096]).not_resident());
    server.table.add(name("good"), good).expect("free");
    let mut stuck: Vec<_> = (0..4).map(|_| server.open(Style::Structured)).collect();
    for raw in &mut stuck {
        (0..50).for_each(|cookie| raw.request(0, 0, cookie, 0, 4096, &[]));
    }
    until("half of the threads hang", || hanging.inside.load(Ordering::SeqCst) == 4);
    let mut raw = server.connect();
    raw.greet(3);
    assert_eq!(raw.option(7, &common::go("good", &[])).last().map(|reply| reply.0), Some(1));
    for _ in 0..100 {
        assert_eq!(raw.read(0, 0, 4096), Ok(vec![7; 4096]));
    }
    assert_eq!(hanging.inside_max.load(Ordering::SeqCst), 4);
    hanging.open_gate();
    for raw in &mut stuck {
        (0..50).for_each(|_| assert_eq!(raw.chunk(0).kind, 1));
    }
}

#[test]
fn an_export_whose_clients_take_no_answer_leaves_memory_to_those_of_servers_beside_it() {
    let disk = || Arc::new(nbd_server::MemoryExport::new(64 << 20).not_resident());
    // Nobody is disconnected for the sake of others here.
    let limits = Limits { bytes: 64 << 20, stall: Duration::from_secs(3600), ..Limits::default() };
    let base = nbd_server::Server::new(Arc::default(), limits);
    let [deaf, good] = [(); 2].map(|()| {
        let table = Arc::new(nbd_server::ExportTable::new());
        table.add(name("disk"), disk()).expect("an empty table");
        let base = base.clone();
        Running::launch(table, None, move |table| base.beside(table))
    });
    let silent: Vec<_> = (0..4)
        .map(|_| {
            let mut raw = deaf.open(Style::Structured);
            (0..16).for_each(|cookie| raw.request(0, 0, cookie, 0, 4 << 20, &[]));
            raw
        })
        .collect();
    let statistics = deaf.table.statistics(&name("disk")).expect("there");
    // As much as it may have; whatever more is asked for waits.
    until("the deaf hold their share", || statistics.count(nbd_server::Operation::Read).requests >= 8);
    let mut other = good.open(Style::Structured);
    for _ in 0..4 {
        assert_eq!(other.read(0, 0, 16 << 20).map(|data| data.len()), Ok(16 << 20));
    }
    assert_eq!(deaf.table.connections(&name("disk")), Some(silent.len()));
}
