//! Every option byte for byte, right and wrong.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Running, contexts, go, name, u16_at, u32_at, u64_at};
use nbd_server::export::BlockSize;
use nbd_server::{Limits, MemoryExport};

const SIZE: u64 = 1 << 20;
const ACK: u32 = 1;
const UNSUP: u32 = (1 << 31) + 1;
const POLICY: u32 = (1 << 31) + 2;
const INVALID: u32 = (1 << 31) + 3;
const UNKNOWN: u32 = (1 << 31) + 6;
const BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
const SHUTDOWN: u32 = (1 << 31) + 7;
const TOO_BIG: u32 = (1 << 31) + 9;
const EXT_HEADER_REQD: u32 = (1 << 31) + 10;

fn server() -> Running {
    Running::start(Arc::new(MemoryExport::new(SIZE)))
}

fn last(replies: &[(u32, Vec<u8>)]) -> u32 {
    replies.last().expect("at least one").0
}

#[test]
fn the_old_form_opens_an_export_with_and_without_padding() {
    let server = server();
    for (flags, padding) in [(1, 124), (3, 0), (0, 124), (2, 0)] {
        let mut raw = server.connect();
        raw.greet(flags);
        raw.send_option(1, b"disk");
        let answer = raw.receive(10 + padding);
        assert_eq!(u64_at(&answer, 0), SIZE);
        assert_eq!(u16_at(&answer, 8) & 1, 1);
        assert!(answer[10..].iter().all(|&byte| byte == 0));
        assert_eq!(raw.read(0, 0, 512), Ok(vec![0; 512]));
    }
}

#[test]
fn the_old_form_closes_on_an_unknown_export_and_finds_the_default() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    raw.send_option(1, b"nothing");
    assert!(raw.is_closed());
    let mut raw = server.connect();
    raw.greet(3);
    raw.send_option(1, b"");
    assert_eq!(u64_at(&raw.receive(10), 0), SIZE);
}

#[test]
fn unknown_client_flags_close_the_connection() {
    let server = server();
    for flags in [4, 1 << 31] {
        let mut raw = server.connect();
        raw.greet(flags);
        assert!(raw.is_closed());
    }
}

#[test]
fn list_names_every_export_and_refuses_data() {
    let server = server();
    server.table.add(name("zweite"), Arc::new(MemoryExport::new(4096))).expect("free");
    let mut raw = server.connect();
    raw.greet(3);
    let replies = raw.option(3, &[]);
    let names: Vec<&[u8]> =
        replies.iter().filter(|r| r.0 == 2).map(|r| &r.1[4..4 + u32_at(&r.1, 0) as usize]).collect();
    assert_eq!(names, [&b"disk"[..], b"zweite"]);
    assert_eq!(last(&replies), ACK);
    assert_eq!(last(&raw.option(3, b"x")), INVALID);
}

#[test]
fn info_tells_everything_and_stays_in_the_handshake() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    let replies = raw.option(6, &go("disk", &[1, 2, 3, 999]));
    let fact = |kind: u16| {
        let found = replies.iter().find(|(reply, data)| *reply == 3 && u16_at(data, 0) == kind);
        found.map(|(_, data)| data[2..].to_vec())
    };
    let export = fact(0).expect("size and flags");
    assert_eq!((u64_at(&export, 0), u16_at(&export, 8) & (1 << 7)), (SIZE, 0), "DF needs structured replies");
    assert_eq!(fact(1).expect("the name"), b"disk");
    assert_eq!(fact(2).expect("the description"), b"a disk in memory");
    let sizes = fact(3).expect("block sizes");
    assert_eq!([u32_at(&sizes, 0), u32_at(&sizes, 4), u32_at(&sizes, 8)], [1, 4096, 32 << 20]);
    assert_eq!(last(&replies), ACK);
    assert_eq!(last(&raw.option(6, &go("nothing", &[]))), UNKNOWN);
    assert_eq!(last(&raw.option(7, &go("nothing", &[]))), UNKNOWN);
    assert_eq!(last(&raw.option(7, &go("disk", &[]))), ACK);
    assert_eq!(raw.read(0, 0, 16), Ok(vec![0; 16]));
}

#[test]
fn malformed_options_are_refused_and_the_handshake_goes_on() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    assert_eq!(last(&raw.option(6, b"")), INVALID);
    assert_eq!(last(&raw.option(7, &[0xff; 12])), INVALID);
    assert_eq!(last(&raw.option(7, b"\0\0\0\x04disk\0\x02\0\0")), INVALID);
    assert_eq!(last(&raw.option(7, b"\0\0\0\x04d\0sk\0\0")), INVALID);
    assert_eq!(last(&raw.option(8, b"x")), INVALID);
    assert_eq!(last(&raw.option(11, b"x")), INVALID);
    assert_eq!(last(&raw.option(5, b"")), POLICY);
    for unknown in [0, 4, 12, 0xdead_beef] {
        assert_eq!(last(&raw.option(unknown, b"data")), UNSUP);
    }
    assert_eq!(last(&raw.option(6, &go(&"x".repeat(5000), &[]))), INVALID);
    assert_eq!(last(&raw.option(99, &vec![0; 100_000])), TOO_BIG);
    assert_eq!(last(&raw.option(7, &go("disk", &[]))), ACK);
}

#[test]
fn an_option_too_long_to_drain_or_with_bad_magic_closes_the_connection() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    raw.send(&[common::OPTION, &[0, 0, 0, 3], &[0xff; 4]]);
    assert!(raw.is_closed());
    let mut raw = server.connect();
    raw.greet(3);
    raw.send(&[b"IHAVEOPS", &[0, 0, 0, 3, 0, 0, 0, 0]]);
    assert!(raw.is_closed());
}

#[test]
fn endless_haggling_ends() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    for _ in 0..1024 {
        assert_eq!(last(&raw.option(99, b"")), UNSUP);
    }
    assert!(raw.is_closed());
}

#[test]
fn abort_is_acknowledged_and_closes() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    assert_eq!(last(&raw.option(2, &[])), ACK);
    assert!(raw.is_closed());
}

#[test]
fn contexts_are_listed_by_namespace_and_set_by_name_with_numbers_of_their_own() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    assert_eq!(last(&raw.option(9, &contexts("disk", &[]))), INVALID, "structured replies come first");
    assert_eq!(last(&raw.option(8, &[])), ACK);
    let names = |replies: &[(u32, Vec<u8>)]| -> Vec<String> {
        let contexts = replies.iter().filter(|reply| reply.0 == 4);
        contexts.map(|reply| String::from_utf8(reply.1[4..].to_vec()).expect("UTF-8")).collect()
    };
    let all = ["base:allocation", "memory:written"];
    assert_eq!(names(&raw.option(9, &contexts("disk", &[]))), all);
    assert_eq!(names(&raw.option(9, &contexts("disk", &["memory:"]))), ["memory:written"]);
    assert_eq!(names(&raw.option(9, &contexts("disk", &["qemu:dirty-bitmap:x"]))), [""; 0]);
    assert_eq!(names(&raw.option(10, &contexts("disk", &["base:"]))), [""; 0]);
    let set = raw.option(10, &contexts("disk", &["memory:written", "base:allocation", "other:x"]));
    assert_eq!(names(&set), all);
    assert_ne!(u32_at(&set[0].1, 0), u32_at(&set[1].1, 0));
    assert_eq!(last(&raw.option(10, &contexts("nothing", &["base:allocation"]))), UNKNOWN);
    assert_eq!(last(&raw.option(10, &contexts("disk", &["base"]))), INVALID);
    let mut huge = contexts("disk", &[]);
    huge[8..12].fill(0xff);
    assert_eq!(last(&raw.option(10, &huge)), INVALID);
}

#[test]
fn contexts_of_another_export_do_not_carry_over() {
    let server = server();
    server.table.add(name("b"), Arc::new(MemoryExport::new(4096))).expect("free");
    let mut raw = server.connect();
    raw.greet(3);
    raw.option(8, &[]);
    assert_eq!(last(&raw.option(10, &contexts("b", &["base:allocation"]))), ACK);
    assert_eq!(last(&raw.option(7, &go("disk", &[]))), ACK);
    raw.style = common::Style::Structured;
    raw.request(7, 0, 1, 0, 4096, &[]);
    assert_eq!(raw.outcome(1), 22);
}

#[test]
fn an_export_with_large_blocks_wants_clients_that_ask() {
    let sizes = BlockSize { minimum: 512, preferred: 4096, maximum: 1 << 20 };
    let server = Running::start(Arc::new(MemoryExport::new(SIZE).with_block_size(sizes)));
    let mut raw = server.connect();
    raw.greet(3);
    assert_eq!(last(&raw.option(7, &go("disk", &[]))), BLOCK_SIZE_REQD);
    assert_eq!(last(&raw.option(7, &go("disk", &[3]))), ACK);
    assert_eq!(raw.read(0, 1, 512), Err(22));
    assert_eq!(raw.read(0, 0, 100), Err(22));
    assert_eq!(raw.read(0, 512, 512), Ok(vec![0; 512]));
}

#[test]
fn a_half_open_handshake_ends_at_its_deadline() {
    let limits = Limits { handshake: Duration::from_millis(200), ..Limits::default() };
    let server = Running::with_limits(Arc::new(MemoryExport::new(SIZE)), limits);
    let mut silent = server.connect();
    let mut half = server.connect();
    half.greet(3);
    half.send(&[b"IHAVE"]);
    silent.receive(18);
    assert!(silent.is_closed() && half.is_closed());
}

#[test]
fn connections_beyond_the_limit_are_closed() {
    let server =
        Running::with_limits(Arc::new(MemoryExport::new(SIZE)), Limits { connections: 2, ..Limits::default() });
    let mut first = server.connect();
    first.receive(18);
    let mut second = server.open(common::Style::Simple);
    // The first has not got far: it gives way.
    let mut third = server.open(common::Style::Simple);
    assert!(first.is_closed());
    // These two are in their right.
    assert!(server.connect().is_closed());
    assert_eq!((second.read(0, 0, 1), third.read(0, 0, 1)), (Ok(vec![0]), Ok(vec![0])));
    drop(second);
    while server.table.connections(&name("disk")) != Some(1) {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(server.open(common::Style::Simple).read(0, 0, 1), Ok(vec![0]));
}

#[test]
fn reply_styles_are_settled_once() {
    let server = server();
    let mut raw = server.connect();
    raw.greet(3);
    assert_eq!(last(&raw.option(8, &[])), ACK);
    assert_eq!(last(&raw.option(8, &[])), INVALID, "structured replies a second time");
    assert_eq!(last(&raw.option(11, &[])), ACK, "extended headers go beyond structured replies");
    assert_eq!(last(&raw.option(11, &[])), INVALID, "extended headers a second time");
    assert_eq!(last(&raw.option(8, &[])), EXT_HEADER_REQD);
    raw.send_option(1, b"disk");
    assert!(raw.is_closed(), "the old form cannot follow extended headers");
}

#[test]
fn a_payload_for_block_status_is_offered_with_extended_headers_and_contexts_only() {
    let server = server();
    for (style, selected, offered) in [(8, true, false), (11, false, false), (11, true, true)] {
        let mut raw = server.connect();
        raw.greet(3);
        assert_eq!(last(&raw.option(style, &[])), ACK);
        if selected {
            assert_eq!(last(&raw.option(10, &contexts("disk", &["base:allocation"]))), ACK);
        }
        let replies = raw.option(7, &go("disk", &[]));
        let export = &replies.iter().find(|(kind, data)| *kind == 3 && u16_at(data, 0) == 0).expect("size and flags").1;
        assert_eq!(u16_at(export, 10) & (1 << 12) != 0, offered, "option {style}, contexts {selected}");
    }
}

#[test]
fn the_end_of_a_server_refuses_the_option_in_hand_and_closes() {
    // Complete, begun, without all of its data, too long to be looked at: each waits in the server when it is told to end.
    let begun: [&[u8]; 4] = [
        b"IHAVEOPT\0\0\0\x07",
        b"I",
        b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0",
        b"IHAVEOPT\0\0\0\x08\0\0\0\0IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04dis",
    ];
    let whole = [common::OPTION, &7_u32.to_be_bytes(), &10_u32.to_be_bytes(), &go("disk", &[])].concat();
    for begun in begun {
        let mut server = server();
        let (mut raw, mut idle, mut silent) = (server.connect(), server.connect(), server.connect());
        let mut deaf = server.connect();
        idle.greet(3);
        assert_eq!(last(&idle.option(6, &go("disk", &[]))), ACK);
        raw.greet(3);
        deaf.greet(3);
        raw.send(&[begun]);
        deaf.send(&[b"IHAV"]); // and never the rest
        let structured = begun.len() > 20 && begun[11] == 8;
        if structured {
            assert_eq!(last(&raw.option_replies(8)), ACK);
        }
        // What was sent has been read when a request of another client, sent later, was answered.
        assert_eq!(last(&idle.option(3, &[])), ACK);
        server.stop();
        assert!(idle.is_closed(), "nothing was asked");
        silent.receive(18);
        assert!(silent.is_closed(), "nothing was said");
        let rest = if structured { &b"k\0\0"[..] } else { &whole[begun.len()..] };
        raw.send(&[rest, b"more that nobody reads"]);
        assert_eq!(last(&raw.option_replies(7)), SHUTDOWN);
        assert!(raw.is_closed());
        drop(raw);
        drop(deaf);
        server.join();
    }
}

#[test]
fn a_client_that_holds_back_its_option_does_not_hold_up_the_end_of_a_server() {
    let table = std::sync::Arc::new(nbd_server::ExportTable::new());
    let limits = Limits { goodbye: Duration::from_millis(100), ..Limits::default() };
    let mut server = Running::launch(table, None, move |table| nbd_server::Server::new(table, limits));
    let mut deaf = server.connect();
    deaf.greet(3);
    deaf.send(&[b"IHAVEOPT\0\0"]);
    let mut old = server.connect();
    old.greet(3);
    old.send(&[b"IHAVEOPT\0\0\0\x01\0\0\0\x04di"]);
    server.stop();
    old.send(&[b"sk"]);
    assert!(old.is_closed(), "the old form cannot be refused in words");
    server.join();
    assert!(deaf.is_closed());
}
