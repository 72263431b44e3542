//! The client against servers that are foreign, scripted, or hostile.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Running, name};
use nbd_server::client::Violation;
use nbd_server::export::{ExtentKind, ZeroMode};
use nbd_server::wire::Errno;
use nbd_server::{BlockingClient, ClientError, ClientOptions, MemoryExport, NbdUri};

fn options() -> ClientOptions {
    ClientOptions { connect_timeout: Duration::from_secs(5), ..ClientOptions::default() }
}

/// Accepts one client, gives it an export of 1 MiB with structured replies, and sends `answer` after its first
/// request.
fn scripted(answer: Vec<u8>) -> (tempfile::TempDir, NbdUri) {
    scripted_with(answer, 28)
}

/// The same; a request of 32 bytes is one with extended headers.
fn scripted_with(answer: Vec<u8>, request: usize) -> (tempfile::TempDir, NbdUri) {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("s");
    let listener = UnixListener::bind(&socket).expect("free");
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("a client");
        client.write_all(b"NBDMAGICIHAVEOPT\0\x03").expect("sent");
        client.read_exact(&mut [0; 4]).expect("client flags");
        loop {
            let mut head = [0; 16];
            client.read_exact(&mut head).expect("an option");
            let option = &head[8..12];
            client.read_exact(&mut vec![0; common::u32_at(&head, 12) as usize]).expect("its data");
            let reply = |kind: u32, data: &[u8]| {
                let length = u32::try_from(data.len()).expect("short").to_be_bytes();
                [&common::OPTION_REPLY.to_be_bytes()[..], option, &kind.to_be_bytes(), &length, data].concat()
            };
            let go = option == [0, 0, 0, 7];
            if go {
                client.write_all(&reply(3, &[0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 1])).expect("sent");
            }
            let refused = option == [0, 0, 0, 11] && request == 28;
            client.write_all(&reply(if refused { (1 << 31) + 1 } else { 1 }, &[])).expect("sent");
            if go {
                break;
            }
        }
        client.read_exact(&mut vec![0; request]).expect("a request");
        client.write_all(&answer).expect("sent");
        let _ = client.read(&mut [0; 1]); // until the client leaves
    });
    let uri = NbdUri::unix(&socket, &name(""));
    (folder, uri)
}

fn chunk(flags: u8, kind: u16, cookie: u8, length: u32, payload: &[u8]) -> Vec<u8> {
    let head = [0x66, 0x8e, 0x33, 0xef, 0, flags];
    let cookie = [0, 0, 0, 0, 0, 0, 0, cookie];
    [&head[..], &kind.to_be_bytes(), &cookie, &length.to_be_bytes(), payload].concat()
}

#[test]
fn a_hostile_server_costs_the_connection_and_the_caller_learns_why() {
    let offset = [0; 8];
    let cases: [(Vec<u8>, Violation); 11] = [
        (vec![0x55; 64], Violation::Magic(0x5555_5555)),
        (chunk(1, 0, 9, 0, &[]), Violation::Cookie),
        (chunk(1, 0, 0, 0, &[]), Violation::Coverage),
        (chunk(0, 0, 0, 0, &[]), Violation::Length),
        (chunk(1, 1, 0, 4, &[0; 4]), Violation::Length),
        (chunk(1, 1, 0, u32::MAX, &offset), Violation::Coverage),
        (chunk(1, 2, 0, 12, &[&offset[..], &[0xff; 4]].concat()), Violation::Coverage),
        (chunk(1, 2, 0, 13, &[0; 13]), Violation::Length),
        (chunk(1, 0x8001, 0, u32::MAX, &[]), Violation::Length),
        (chunk(1, 0x8001, 0, 6, &[0, 0, 0, 5, 0xff, 0xff]), Violation::Length),
        (chunk(1, 77, 0, 0, &[]), Violation::ReplyType(77)),
    ];
    for (answer, violation) in cases {
        let (_folder, uri) = scripted(answer);
        let client = BlockingClient::connect(&uri, &options()).expect("a good handshake");
        for _ in 0..2 {
            match client.read(0, &mut [0; 4096]) {
                Err(ClientError::Protocol(found)) => assert_eq!(found, violation),
                other => panic!("{violation:?}: {other:?}"),
            }
        }
    }
}

#[test]
fn pieces_in_any_order_make_one_read_and_errors_with_an_offset_fail_it() {
    let data = |flags, at: u8, byte| chunk(flags, 1, 0, 16, &[&[0, 0, 0, 0, 0, 0, 0, at][..], &[byte; 8]].concat());
    let hole = chunk(1, 2, 0, 12, &[0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 8]);
    let (_folder, uri) = scripted([data(0, 16, 2), data(0, 0, 1), hole].concat());
    let client = BlockingClient::connect(&uri, &options()).expect("a good handshake");
    let mut buffer = [0xee; 24];
    client.read(0, &mut buffer).expect("complete");
    assert_eq!(buffer, *[[1; 8], [0; 8], [2; 8]].as_flattened());

    let error = chunk(1, 0x8002, 0, 14, &[0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4]);
    let (_folder, uri) = scripted([data(0, 0, 1), error].concat());
    let client = BlockingClient::connect(&uri, &options()).expect("a good handshake");
    assert!(matches!(client.read(0, &mut buffer), Err(ClientError::Server(Errno::NoSpc))));
}

#[test]
fn a_lost_connection_fails_what_is_in_flight_and_a_silent_server_times_out() {
    let (_folder, uri) = scripted(chunk(0, 1, 0, 5000, &[0; 100]));
    let client = BlockingClient::connect(&uri, &options()).expect("a good handshake");
    let client = Arc::new(client);
    let reader = Arc::clone(&client);
    let waiting = std::thread::spawn(move || reader.read(0, &mut [0; 4992]));
    std::thread::sleep(Duration::from_millis(50));
    client.disconnect();
    assert!(matches!(waiting.join().expect("no panic"), Err(ClientError::Lost(_))));

    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("s");
    let _silent = UnixListener::bind(&socket).expect("free");
    let quick = ClientOptions { connect_timeout: Duration::from_millis(100), ..options() };
    let error = BlockingClient::connect(&NbdUri::unix(&socket, &name("")), &quick).err();
    assert!(matches!(error, Some(ClientError::Timeout { .. })), "{error:?}");
    let error = BlockingClient::connect(&NbdUri::unix(Path::new("/nonexistent"), &name("")), &quick).err();
    assert!(matches!(error, Some(ClientError::Connect { .. })), "{error:?}");
}

#[test]
fn what_cannot_be_asked_is_refused_before_it_is_sent() {
    let server = Running::start(Arc::new(MemoryExport::from_bytes(&[1; 5000]).read_only()));
    let client = BlockingClient::connect(&server.uri(), &options()).expect("it listens");
    assert!(matches!(client.read(4999, &mut [0; 2]), Err(ClientError::Range { offset: 4999, length: 2 })));
    assert!(matches!(client.read(u64::MAX, &mut [0; 2]), Err(ClientError::Range { .. })));
    assert!(matches!(client.write(0, &[0]), Err(ClientError::Server(Errno::Perm))));
    assert!(matches!(client.trim(0, 1), Err(ClientError::Server(Errno::Perm))));
    assert!(matches!(client.context_status("qemu:x", 0, 1), Err(ClientError::NotOffered(_))));
    assert_eq!(client.read_bytes(4990, 10).expect("in range"), [1; 10][..]);
    let missing = NbdUri { export: name("other"), ..server.uri() };
    let refused = BlockingClient::connect(&missing, &options()).err();
    assert!(matches!(refused, Some(ClientError::Refused { .. })), "{refused:?}");
}

/// A foreign server on a socket; `None` when it is not installed.
struct Foreign(Child);

impl Foreign {
    #[expect(clippy::print_stdout, reason = "a skip is said")]
    fn start(program: &str, arguments: &[&str], socket: &Path) -> Option<Foreign> {
        match Command::new(program).args(arguments).stdin(Stdio::null()).spawn() {
            Ok(child) => {
                let foreign = Foreign(child);
                let start = Instant::now();
                while !socket.exists() {
                    assert!(start.elapsed() < Duration::from_secs(20), "{program} does not listen");
                    std::thread::sleep(Duration::from_millis(10));
                }
                Some(foreign)
            }
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "{program}: {error}");
                println!("skipped: {program} is not installed");
                None
            }
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }
}

fn exercise(uri: &NbdUri) {
    let client = BlockingClient::connect(uri, &options()).expect("it listens");
    let size = client.size();
    assert_eq!(size, 64 << 20);
    let data: Vec<u8> = (0..3_u32 << 20).map(|at| (at % 251).to_le_bytes()[0]).collect();
    client.write(1 << 20, &data).expect("in range");
    client.write_durable(40 << 20, &data).expect("in range");
    client.write_zeroes(2 << 20, 1 << 20, ZeroMode::MayPunch).expect("in range");
    client.flush().expect("no failure");
    let mut back = vec![0xee; data.len()];
    client.read(40 << 20, &mut back).expect("in range");
    assert!(back == data);
    client.read(1 << 20, &mut back).expect("in range");
    assert!(back[..1 << 20] == data[..1 << 20] && back[1 << 20..2 << 20].iter().all(|&byte| byte == 0));
    let (mut at, mut allocated) = (0, 0);
    while at < size {
        for extent in client.block_status(at, size - at).expect("in range") {
            at += extent.length;
            allocated += if extent.kind == ExtentKind::Data { extent.length } else { 0 };
        }
    }
    assert_eq!(at, size);
    assert!(allocated >= 5 << 20, "{allocated} bytes of data");
    client.disconnect();
}

#[test]
fn the_client_works_with_nbdkit_and_qemu_nbd() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("kit");
    let path = socket.to_str().expect("plain");
    if let Some(_server) = Foreign::start("nbdkit", &["-f", "-U", path, "memory", "64M"], &socket) {
        exercise(&NbdUri::unix(&socket, &name("")));
    }
    let socket = folder.path().join("plain");
    let path = socket.to_str().expect("plain");
    if let Some(_server) = Foreign::start("nbdkit", &["-f", "--no-sr", "-U", path, "memory", "64M"], &socket) {
        exercise(&NbdUri::unix(&socket, &name(""))); // simple replies, no contexts
    }
    let image = folder.path().join("image");
    std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("an image");
    let socket = folder.path().join("qemu");
    let (path, image) = (socket.to_str().expect("plain"), image.to_str().expect("plain"));
    if let Some(_server) = Foreign::start("qemu-nbd", &["-t", "-f", "raw", "-x", "d", "-k", path, image], &socket) {
        exercise(&NbdUri::unix(&socket, &name("d")));
    }
}

/// A chunk with extended headers, the last of its reply.
fn extended(kind: u16, cookie: u8, length: u64, payload: &[u8]) -> Vec<u8> {
    let head = [0x6e, 0x8a, 0x27, 0x8c, 0, 1];
    let cookie = [0, 0, 0, 0, 0, 0, 0, cookie];
    [&head[..], &kind.to_be_bytes(), &cookie, &[0; 8], &length.to_be_bytes(), payload].concat()
}

#[test]
fn extended_replies_are_understood_and_hostile_ones_are_not_believed() {
    let data = extended(1, 0, 8 + 4096, &[&[0; 8][..], &[7; 4096]].concat());
    let (_folder, uri) = scripted_with(data, 32);
    let client = BlockingClient::connect(&uri, &options()).expect("a good handshake");
    let mut buffer = [0; 4096];
    client.read(0, &mut buffer).expect("complete");
    assert_eq!(buffer, [7; 4096]);
    let cases = [
        (extended(1, 0, u64::MAX, &[0; 8]), Violation::Coverage),
        (extended(2, 0, 13, &[0; 13]), Violation::Length),
        (extended(0x8001, 0, u64::MAX, &[]), Violation::Length),
        (extended(6, 0, 1 << 40, &[]), Violation::Length),
        (extended(6, 0, 24, &[&[0, 0, 0, 1, 0, 0, 0, 9][..], &[0; 16]].concat()), Violation::Length),
        (extended(6, 0, 24, &[&[0, 0, 0, 1, 0, 0, 0, 1][..], &[0xff; 16]].concat()), Violation::Flags),
        (extended(1, 1, 8, &[0; 8]), Violation::Cookie),
        (chunk(1, 0, 0, 0, &[]), Violation::Magic(0x668e_33ef)),
    ];
    for (answer, violation) in cases {
        let (_folder, uri) = scripted_with(answer, 32);
        let client = BlockingClient::connect(&uri, &options()).expect("a good handshake");
        match client.read(0, &mut buffer) {
            Err(ClientError::Protocol(found)) => assert_eq!(found, violation),
            other => panic!("{violation:?}: {other:?}"),
        }
    }
}

#[test]
fn a_request_that_is_not_answered_in_time_ends_the_connection() {
    let (_folder, uri) = scripted(Vec::new());
    let options = ClientOptions { request_timeout: Duration::from_millis(50), ..options() };
    let client = BlockingClient::connect(&uri, &options).expect("a good handshake");
    for _ in 0..2 {
        assert!(matches!(client.read(0, &mut [0; 512]), Err(ClientError::NoAnswer { .. })));
    }
}

#[test]
fn effects_beyond_four_gibibytes_are_one_request_with_extended_headers() {
    let disk = Arc::new(MemoryExport::new(20 << 30));
    let server = Running::start(Arc::clone(&disk) as Arc<dyn nbd_server::Export>);
    let client = BlockingClient::connect(&server.uri(), &options()).expect("it listens");
    client.write(19 << 30, b"here").expect("in range");
    let extents = client.block_status(0, 20 << 30).expect("in range");
    assert_eq!((extents[0].length, extents[0].kind), (19 << 30, ExtentKind::Hole));
    client.write_zeroes(0, 20 << 30, ZeroMode::MayPunch).expect("in range");
    client.trim(0, 20 << 30).expect("in range");
    let mut back = [1; 4];
    client.read(19 << 30, &mut back).expect("in range");
    assert_eq!(back, [0; 4]);
    let statistics = server.table.statistics(&name("disk")).expect("there");
    for operation in [nbd_server::Operation::WriteZeroes, nbd_server::Operation::Trim] {
        assert_eq!(statistics.count(operation).requests, 1);
    }
}
