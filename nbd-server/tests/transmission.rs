//! Every command byte for byte, right and wrong, in all three header styles.

mod common;

use std::sync::Arc;

use common::{Running, Style, u32_at, u64_at};
use nbd_server::{Export, MemoryExport, Operation};

const PAGE: u64 = 64 << 10;
const SIZE: u64 = 8 * PAGE + 100;
const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];

const PERM: u32 = 1;
const INVAL: u32 = 22;
const NOSPC: u32 = 28;

/// Data in pages 1 and 3, and both ways to answer: from memory, and on another thread.
fn disks() -> [(Arc<MemoryExport>, Running); 2] {
    [MemoryExport::new(SIZE), MemoryExport::new(SIZE).not_resident()].map(|disk| {
        let disk = Arc::new(disk);
        disk.write(PAGE, &[1; 65536]).expect("in range");
        disk.write(3 * PAGE, &[3; 65536]).expect("in range");
        (Arc::clone(&disk), Running::start(disk))
    })
}

#[test]
fn reads_return_the_content_with_holes_and_unfragmented() {
    for (disk, server) in disks() {
        let content = disk.content();
        for style in STYLES {
            let mut raw = server.open(style);
            for (offset, length) in [(0, 1), (PAGE - 3, 7), (10, 5 * PAGE), (0, SIZE), (SIZE - 1, 1), (SIZE, 0), (5, 0)]
            {
                let range = usize::try_from(offset).expect("small")..usize::try_from(offset + length).expect("small");
                let flags = if style == Style::Simple { &[0][..] } else { &[0, 1, 4, 5][..] };
                for &flags in flags {
                    let read = raw.read(flags, offset, range.len());
                    assert!(read.as_deref() == Ok(&content[range.clone()]), "{style:?} {offset} {length} {flags}");
                }
            }
        }
        let (reads, total) = (server.table.statistics(&common::name("disk")).expect("there"), 7 * 9);
        assert_eq!(reads.count(Operation::Read).requests, total);
    }
}

#[test]
fn an_unfragmented_read_is_one_chunk_and_others_show_holes() {
    for (_, server) in disks() {
        let mut raw = server.open(Style::Structured);
        raw.request(0, 4, 1, 0, 4 * PAGE, &[]);
        let chunk = raw.chunk(0);
        assert_eq!((chunk.kind, chunk.done, chunk.payload.len() as u64), (1, true, 8 + 4 * PAGE));
        raw.request(0, 0, 2, 0, 4 * PAGE, &[]);
        let kinds: Vec<u16> = (0..4).map(|_| raw.chunk(0).kind).collect();
        assert_eq!(kinds, [2, 1, 2, 1]);
    }
}

#[test]
fn writes_zeroes_and_trims_change_the_disk_and_fua_flushes_first() {
    for (disk, server) in disks() {
        for style in STYLES {
            let mut raw = server.open(style);
            let announce = if style == Style::Extended { 32 } else { 0 };
            let mut model = disk.content();
            raw.request(1, announce, 1, 100, 300, &[9; 300]);
            assert_eq!(raw.outcome(1), 0);
            model[100..400].fill(9);
            let before = disk.flushes();
            raw.request(1, announce | 1, 2, PAGE + 5, 200_000, &vec![8; 200_000]);
            assert_eq!(raw.outcome(2), 0);
            model[65541..265_541].fill(8);
            assert_eq!(disk.flushes(), before + 1, "FUA");
            raw.request(6, 0, 3, 150, 10, &[]);
            assert_eq!(raw.outcome(3), 0);
            model[150..160].fill(0);
            raw.request(6, 1 | 2 | 16, 4, 3 * PAGE, PAGE, &[]);
            assert_eq!(raw.outcome(4), 0);
            model[196_608..262_144].fill(0);
            raw.request(4, 1, 5, 0, 120, &[]);
            assert_eq!(raw.outcome(5), 0);
            model[..120].fill(0);
            assert_eq!(disk.flushes(), before + 3);
            raw.request(3, 0, 6, 0, 0, &[]);
            assert_eq!(raw.outcome(6), 0);
            raw.request(3, 1, 7, 0, 0, &[]);
            assert_eq!(raw.outcome(7), 0);
            assert_eq!(disk.flushes(), before + 5);
            raw.request(5, 0, 8, 0, SIZE, &[]);
            assert_eq!(raw.outcome(8), 0);
            assert!(disk.content() == model, "{style:?}");
        }
    }
}

#[test]
fn bad_requests_are_refused_their_payload_is_drained_and_the_connection_lives_on() {
    let (disk, server) = disks().into_iter().next().expect("two");
    let before = disk.content();
    for style in STYLES {
        let mut raw = server.open(style);
        let mut refused = |command: u16, flags: u16, offset: u64, length: u64, payload: usize, errno: u32| {
            raw.request(command, flags, 77, offset, length, &vec![0x25; payload]);
            let what = (style, command, flags, offset, length);
            if command == 0 && style == Style::Simple {
                assert_eq!(u32_at(&raw.chunk(0).payload, 0), errno, "{what:?}");
            } else {
                assert_eq!(raw.outcome(77), errno, "{what:?}");
            }
            assert_eq!(raw.read(0, 0, 4), Ok(vec![0; 4]), "{what:?}");
        };
        refused(0, 0, SIZE, 1, 0, INVAL);
        refused(0, 0, u64::MAX, 2, 0, INVAL);
        refused(0, 0, 0, (32 << 20) + 1, 0, INVAL);
        refused(0, 2, 0, 16, 0, INVAL);
        refused(0, 0x8000, 0, 16, 0, INVAL);
        refused(1, 0, SIZE - 10, 11, 11, NOSPC);
        refused(1, 0, u64::MAX - 5, 100, 100, NOSPC);
        refused(1, 2, 0, 100_000, 100_000, INVAL);
        refused(1, 0, 0, (32 << 20) + 1, (32 << 20) + 1, INVAL);
        refused(4, 0, SIZE - 1, 2, 0, INVAL);
        refused(4, 2, 0, 1, 0, INVAL);
        refused(5, 0, SIZE, 1, 0, INVAL);
        refused(6, 0, SIZE - 1, 2, 0, NOSPC);
        refused(6, 4, 0, 1, 0, INVAL);
        refused(3, 8, 0, 0, 0, INVAL);
        refused(8, 0, 0, 16, 0, INVAL);
        refused(0xffff, 0, 0, 16, 0, INVAL);
        refused(7, 0, 0, if style == Style::Simple { 16 } else { 0 }, 0, INVAL);
        if style == Style::Simple {
            refused(0, 4, 0, 16, 0, INVAL);
        }
        if style == Style::Extended {
            refused(7, 32, 0, 100, 100, INVAL);
            refused(0, 32, 0, 100_000, 100_000, INVAL);
            refused(6, 0, 0, u64::MAX, 0, NOSPC);
        }
    }
    assert!(disk.content() == before);
    assert!(server.table.statistics(&common::name("disk")).expect("there").refused() > 50);
}

#[test]
fn a_read_only_export_refuses_every_write_with_eperm() {
    let server = Running::start(Arc::new(MemoryExport::from_bytes(&[5; 1000]).read_only()));
    for style in STYLES {
        let mut raw = server.open(style);
        for (command, payload) in [(1, 16), (4, 0), (6, 0)] {
            raw.request(command, 0, 5, 0, 16, &vec![0; payload]);
            assert_eq!(raw.outcome(5), PERM);
        }
        raw.request(3, 0, 6, 0, 0, &[]);
        assert_eq!(raw.outcome(6), 0);
        assert_eq!(raw.read(0, 990, 10), Ok(vec![5; 10]));
    }
}

#[test]
fn block_status_describes_every_context_and_can_be_one_extent() {
    let (_, server) = disks().into_iter().next().expect("two");
    for style in [Style::Structured, Style::Extended] {
        let mut raw = server.open(style);
        let mut status = |flags: u16, offset: u64, length: u64| -> Vec<Vec<(u64, u64)>> {
            raw.request(7, flags, 9, offset, length, &[]);
            let chunks = [raw.chunk(0), raw.chunk(0)];
            assert_eq!(chunks.each_ref().map(|chunk| chunk.done), [false, true]);
            assert_eq!(chunks.each_ref().map(|chunk| u32_at(&chunk.payload, 0)), [1, 2]);
            let extents = |payload: &[u8]| match style {
                Style::Extended => {
                    let found: Vec<_> = payload[8..].chunks(16).map(|d| (u64_at(d, 0), u64_at(d, 8))).collect();
                    assert_eq!(u32_at(payload, 4) as usize, found.len());
                    found
                }
                _ => payload[4..].chunks(8).map(|d| (u64::from(u32_at(d, 0)), u64::from(u32_at(d, 4)))).collect(),
            };
            chunks.iter().map(|chunk| extents(&chunk.payload)).collect()
        };
        let all = status(0, 0, SIZE);
        assert_eq!(all[0], [(PAGE, 3), (PAGE, 0), (PAGE, 3), (PAGE, 0), (4 * PAGE + 100, 3)]);
        assert_eq!(all[1], [(PAGE, 0), (PAGE, 1), (PAGE, 0), (PAGE, 1), (4 * PAGE + 100, 0)]);
        assert_eq!(status(8, 10, 2 * PAGE)[0], [(PAGE - 10, 3)]);
        assert_eq!(status(0, PAGE, 1)[0], [(1, 0)]);
    }
}

#[test]
fn pipelined_requests_are_all_answered_whatever_the_size_of_the_pieces_they_arrive_in() {
    for (disk, server) in disks() {
        let content = disk.content();
        let mut requests = Vec::new();
        for cookie in 0..500_u64 {
            let offset = cookie * 997 % (SIZE - 600);
            requests.extend(0x2560_9513_u32.to_be_bytes());
            requests.extend([0, 0, 0, 0]);
            requests.extend(cookie.to_be_bytes());
            requests.extend(offset.to_be_bytes());
            requests.extend(600_u32.to_be_bytes());
        }
        for piece in [7, 100, 20_000] {
            let mut raw = server.open(Style::Simple);
            let mut sender = raw.socket.try_clone().expect("a second handle");
            let sent = requests.clone();
            let thread = std::thread::spawn(move || {
                sent.chunks(piece).for_each(|part| std::io::Write::write_all(&mut sender, part).expect("sent"));
            });
            let mut seen = vec![false; 500];
            for _ in 0..500 {
                let chunk = raw.chunk(600);
                let at = usize::try_from(chunk.cookie * 997 % (SIZE - 600)).expect("small");
                assert!(chunk.payload[4..] == content[at..at + 600]);
                let first = !std::mem::replace(&mut seen[usize::try_from(chunk.cookie).expect("small")], true);
                assert!(first);
            }
            thread.join().expect("sent");
        }
    }
}

#[test]
fn disconnect_answers_what_came_before_and_bad_magic_ends_the_connection() {
    for (_, server) in disks() {
        let mut raw = server.open(Style::Structured);
        raw.request(1, 0, 1, 0, 3, b"abc");
        raw.request(2, 0, 2, 0, 0, &[]);
        raw.request(0, 0, 3, 0, 16, &[]);
        assert_eq!(raw.outcome(1), 0);
        assert!(raw.is_closed());
        let mut raw = server.open(Style::Structured);
        raw.send(&[&[0x55; 28]]);
        assert!(raw.is_closed());
        let mut raw = server.open(Style::Extended);
        raw.style = Style::Structured; // compact headers where extended ones were agreed
        raw.request(3, 0, 1, 0, 0, &[]);
        raw.request(3, 0, 2, 0, 0, &[]);
        assert!(raw.is_closed());
    }
}

#[test]
fn a_payload_nobody_can_send_ends_the_connection() {
    let (_, server) = disks().into_iter().next().expect("two");
    let mut raw = server.open(Style::Extended);
    raw.request(1, 32, 1, 0, u64::MAX, &[]);
    assert!(raw.is_closed());
}

/// Payload of a BLOCK_STATUS: length of the effect, then contexts.
fn filter(length: u64, contexts: &[u32]) -> Vec<u8> {
    let mut payload = length.to_be_bytes().to_vec();
    contexts.iter().for_each(|id| payload.extend(id.to_be_bytes()));
    payload
}

#[test]
fn a_payload_narrows_block_status_to_some_contexts() {
    const PAYLOAD_LEN: u16 = 1 << 5;
    for (_, server) in disks() {
        let mut raw = server.open(Style::Extended);
        raw.request(7, 0, 1, 0, SIZE, &[]);
        let (first, second) = (raw.chunk(0), raw.chunk(0));
        assert!(!first.done && second.done);
        let ids = [u32_at(&first.payload, 0), u32_at(&second.payload, 0)];
        for id in ids {
            let payload = filter(2 * PAGE, &[id]);
            raw.request(7, PAYLOAD_LEN, 2, 0, payload.len() as u64, &payload);
            let chunk = raw.chunk(0);
            assert_eq!((chunk.kind, chunk.done, u32_at(&chunk.payload, 0)), (6, true, id));
            let extents: Vec<u64> = chunk.payload[8..].chunks(16).map(|extent| u64_at(extent, 0)).collect();
            assert_eq!(extents, [PAGE, PAGE]);
        }
        let both = filter(PAGE, &ids);
        raw.request(7, PAYLOAD_LEN, 3, 0, both.len() as u64, &both);
        assert_eq!([raw.chunk(0).done, raw.chunk(0).done], [false, true]);
    }
}

#[test]
fn a_payload_that_narrows_to_nonsense_is_refused_and_the_connection_lives() {
    const PAYLOAD_LEN: u16 = 1 << 5;
    let (_, server) = &disks()[0];
    let mut raw = server.open(Style::Extended);
    let bad = [
        (filter(PAGE, &[]), "no context"),
        (filter(PAGE, &[77]), "a context that was not selected"),
        (filter(PAGE, &[u32::MAX]), "a number that no context has"),
        (filter(PAGE, &[1, 1]), "a context twice"),
        (filter(0, &[1]), "no length"),
        (filter(SIZE + 1, &[1]), "a length beyond the end"),
        (vec![0; 7], "half a length"),
        (filter(PAGE, &[1])[..11].to_vec(), "half a number"),
        (Vec::new(), "nothing"),
        (filter(PAGE, &[1; 100]), "more than anybody selects"),
        (vec![0; 200_000], "more than the input buffer"),
    ];
    for (payload, what) in bad {
        raw.request(7, PAYLOAD_LEN, 5, 0, payload.len() as u64, &payload);
        assert_eq!(raw.outcome(5), INVAL, "{what}");
    }
    // The header alone first: nothing is answered before the payload is there.
    raw.request(7, PAYLOAD_LEN, 6, 0, 12, &filter(PAGE, &[1])[..5]);
    raw.send(&[&filter(PAGE, &[1])[5..]]);
    assert_eq!((raw.chunk(0).kind, raw.read(0, 0, 1)), (6, Ok(vec![0])));
    // Other commands take no payload; it is drained.
    for command in [0_u16, 3, 4, 5, 6] {
        raw.request(command, PAYLOAD_LEN, 7, 0, 100, &[0; 100]);
        assert_eq!(raw.outcome(7), INVAL, "command {command}");
    }
    assert_eq!(raw.read(0, 0, 1), Ok(vec![0]));
}

#[test]
fn effects_go_beyond_four_gibibytes_with_extended_headers() {
    let disk = Arc::new(MemoryExport::new(10 << 30));
    disk.write(9 << 30, b"here").expect("in range");
    let server = Running::start(Arc::clone(&disk) as Arc<dyn Export>);
    let mut raw = server.open(Style::Extended);
    raw.request(5, 0, 1, 0, 10 << 30, &[]);
    assert_eq!(raw.outcome(1), 0);
    raw.request(7, 0, 2, 0, 10 << 30, &[]);
    let chunk = raw.chunk(0);
    assert_eq!(u64_at(&chunk.payload, 8), 9 << 30, "the first extent is longer than 32 bits can say");
    raw.chunk(0);
    raw.request(4, 0, 3, 1 << 30, 8 << 30, &[]);
    assert_eq!(raw.outcome(3), 0);
    assert_eq!(raw.read(0, 9 << 30, 4), Ok(b"here".to_vec()));
    raw.request(6, 1, 4, 0, 10 << 30, &[]);
    assert_eq!(raw.outcome(4), 0);
    assert_eq!(raw.read(0, 9 << 30, 4), Ok(vec![0; 4]));
    raw.request(6, 0, 5, 1, 10 << 30, &[]);
    assert_eq!(raw.outcome(5), NOSPC);
    raw.request(4, 0, 6, 1, u64::MAX, &[]);
    assert_eq!(raw.outcome(6), INVAL);
}
