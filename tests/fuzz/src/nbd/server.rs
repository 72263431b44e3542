//! The server: whatever a client sends, the connection ends when the client has ended, and nothing else comes of it.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use nbd_server::{ExportTable, Limits, Listen, MemoryExport, Server};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{block_on, name};
use crate::{Input, images};

/// Small, so that a few bytes cannot ask for much.
const DISK: u64 = 64 << 10;

async fn start() -> PathBuf {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    thread_local! {
        static SOCKET: std::cell::RefCell<Option<PathBuf>> = const { std::cell::RefCell::new(None) };
    }
    if let Some(socket) = SOCKET.with_borrow(Clone::clone) {
        return socket;
    }
    let table = Arc::new(ExportTable::new());
    let content: Vec<u8> = (0..DISK).map(|at| if at < DISK / 2 { at.to_le_bytes()[0] } else { 0 }).collect();
    let added = table.add(name(), Arc::new(MemoryExport::from_bytes(&content)));
    added.unwrap_or_else(|error| panic!("{error}"));
    let dir = DIR.get_or_init(|| images::memory_dir("nbd"));
    let socket = dir.path().join(format!("{:?}", std::thread::current().id()));
    let limits = Limits { requests_per_connection: 8, bytes_per_connection: 1 << 20, ..Limits::default() };
    let listener = Server::new(table, limits).bind(&Listen::Unix(socket.clone())).await;
    let listener = listener.unwrap_or_else(|error| panic!("{error}"));
    tokio::spawn(listener.serve(std::future::pending::<()>()));
    SOCKET.set(Some(socket.clone()));
    socket
}

/// Sends all of it, hears the server out, and returns how much it said.
fn talk(bytes: &[u8]) -> usize {
    block_on(async {
        let socket = start().await;
        let stream = UnixStream::connect(socket).await.unwrap_or_else(|error| panic!("the server is gone: {error}"));
        let (mut from, mut to) = stream.into_split();
        let send = async {
            let _ = to.write_all(bytes).await; // the server may have heard enough
            let _ = to.shutdown().await;
        };
        let receive = async {
            let (mut heard, mut buffer) = (0, vec![0; 64 << 10]);
            while let Ok(length @ 1..) = from.read(&mut buffer).await {
                heard += length;
            }
            heard
        };
        tokio::join!(send, receive).1
    })
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [b"IHAVEOPT", &kind.to_be_bytes()[..], &length.to_be_bytes(), data].concat()
}

fn go(infos: &[u8]) -> Vec<u8> {
    [&4_u32.to_be_bytes()[..], b"disk", &u16::try_from(infos.len() / 2).unwrap_or(0).to_be_bytes(), infos].concat()
}

fn contexts() -> Vec<u8> {
    let query = b"base:allocation";
    [&4_u32.to_be_bytes()[..], b"disk", &1_u32.to_be_bytes(), &15_u32.to_be_bytes(), query].concat()
}

/// Up to transmission: simple replies, structured ones, extended headers.
fn negotiation(style: u64) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    match style % 3 {
        0 => {}
        1 => bytes.extend([option(8, &[]), option(10, &contexts())].concat()),
        _ => bytes.extend([option(11, &[]), option(10, &contexts())].concat()),
    }
    bytes.extend(option(7, &go(&[0, 3])));
    bytes
}

pub(crate) fn handshake(data: &[u8]) {
    let heard = talk(data);
    assert!(heard >= 18, "the server did not greet");
}

pub(crate) fn handshake_seeds() -> Vec<Vec<u8>> {
    let all = [
        3_u32.to_be_bytes().to_vec(),
        option(8, &[]),
        option(3, &[]),
        option(9, &contexts()),
        option(10, &contexts()),
        option(6, &go(&[0, 0, 0, 1, 0, 2, 0, 3])),
        option(11, &[]),
        option(99, &[1; 40]),
        option(7, &go(&[0, 3])),
        [0x2560_9513_u32.to_be_bytes().to_vec(), vec![0, 0, 0, 2], vec![0; 20]].concat(),
    ];
    let old = [&3_u32.to_be_bytes()[..], &option(1, b"disk")].concat();
    let abort = [&1_u32.to_be_bytes()[..], &option(2, &[])].concat();
    vec![all.concat(), old, abort]
}

/// The first byte: the style of replies, and 128 for bytes as they are; else requests are built of the bytes.
pub(crate) fn transmission(data: &[u8]) {
    let mut input = Input::new(data);
    let kind = input.number(1);
    let mut bytes = negotiation(kind & 0x7f);
    if kind & 0x80 != 0 {
        bytes.extend(input.rest());
    }
    let mut cookie = 0_u64;
    while !input.is_empty() {
        bytes.extend(request(&mut input, kind, cookie));
        cookie += 1;
    }
    let heard = talk(&bytes);
    assert!(heard > 18, "the server did not negotiate");
}

/// Command (1 byte), flags (1), offset (3), length (3); a write carries as much as it says, up to a bound.
fn request(input: &mut Input, kind: u64, cookie: u64) -> Vec<u8> {
    let extended = kind % 0x80 % 3 == 2;
    let command = u16::try_from(input.number(1) % 12).unwrap_or(0);
    let flags = u16::try_from(input.number(1)).unwrap_or(0);
    let offset = input.number(3);
    let length = u32::try_from(input.number(3)).unwrap_or(0);
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend([flags.to_be_bytes(), command.to_be_bytes()].concat());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    match extended {
        true => bytes.extend(u64::from(length).to_be_bytes()),
        false => bytes.extend(length.to_be_bytes()),
    }
    let carries = command == 1 || (extended && flags & 0x20 != 0);
    if carries {
        bytes.resize(bytes.len() + length.min(100_000) as usize, 0x5a);
    }
    bytes
}

pub(crate) fn transmission_seeds() -> Vec<Vec<u8>> {
    let mut built = Vec::new();
    for (command, flags, offset, length) in [
        (0_u8, 0_u8, 0_u32, 100_u32),
        (1, 1, 50, 300),
        (3, 0, 0, 0),
        (4, 0, 4096, 8192),
        (5, 0, 0, 512),
        (6, 2, 100, 9000),
        (7, 8, 0, 65_536),
        (0, 4, 60_000, 5536),
        (2, 0, 0, 0),
    ] {
        built.extend([command, flags]);
        built.extend(&offset.to_le_bytes()[..3]);
        built.extend(&length.to_le_bytes()[..3]);
    }
    let mut seeds: Vec<Vec<u8>> = (0..3).map(|style| [&[style], &built[..]].concat()).collect();
    for style in 0..3 {
        let mut raw = vec![0x80 | style];
        let mut input = Input::new(&built);
        while !input.is_empty() {
            raw.extend(request(&mut input, u64::from(style), 1));
        }
        seeds.push(raw);
    }
    seeds
}
