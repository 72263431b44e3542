//! The client: a server that says anything costs the connection, and nothing else.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::OnceLock;

use nbd_server::{Client, ClientOptions, NbdUri};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::{block_on, name};
use crate::images;

/// A client meets a server that sends `bytes`, whatever it is asked, and then ends.
fn meet(bytes: &[u8]) {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    thread_local! {
        static LISTENER: RefCell<Option<Rc<UnixListener>>> = const { RefCell::new(None) };
    }
    let dir = DIR.get_or_init(|| images::memory_dir("client"));
    let socket = dir.path().join(format!("{:?}", std::thread::current().id()));
    block_on(async {
        let listener = LISTENER.with_borrow_mut(|listener| {
            let bind = || Rc::new(UnixListener::bind(&socket).unwrap_or_else(|error| panic!("no socket: {error}")));
            Rc::clone(listener.get_or_insert_with(bind))
        });
        let serve = async {
            let Ok((stream, _)) = listener.accept().await else { panic!("the client does not come") };
            let (mut from, mut to) = stream.into_split();
            let send = async {
                let _ = to.write_all(bytes).await;
                let _ = to.shutdown().await;
            };
            let receive = async {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(1..) = from.read(&mut buffer).await {}
            };
            tokio::join!(send, receive);
        };
        tokio::join!(serve, ask(NbdUri::unix(&socket, &name())));
    });
}

async fn ask(uri: NbdUri) {
    let options = ClientOptions { contexts: vec!["base:allocation".into(), "x:y".into()], ..ClientOptions::default() };
    let Ok(client) = Client::connect(&uri, &options).await else { return };
    let size = client.size();
    let _ = (client.flags(), client.block_size(), client.contexts().count());
    let mut buffer = vec![0; 4096];
    let status = client.block_status(0, size.min(1 << 20));
    let (read, status, written, flushed) =
        tokio::join!(client.read(0, &mut buffer), status, client.write(0, &[1; 512]), client.flush());
    let _ = (read, written, flushed);
    if let Ok(extents) = status {
        let sum: u64 = extents.iter().map(|extent| extent.length).sum();
        assert!(sum <= size.min(1 << 20), "extents beyond what was asked for: {sum}");
        assert!(extents.iter().all(|extent| extent.length > 0), "an empty extent");
    }
    client.disconnect().await;
}

pub(crate) fn handshake(data: &[u8]) {
    meet(data);
}

/// The first byte: whether structured replies were agreed on.
pub(crate) fn replies(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    meet(&[&agreement(kind % 2 == 0), rest].concat());
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [
        &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

/// What a server says up to transmission.
fn agreement(structured: bool) -> Vec<u8> {
    let mut bytes = [b"NBDMAGIC", &b"IHAVEOPT"[..], &3_u16.to_be_bytes()].concat();
    match structured {
        true => {
            bytes.extend(reply(8, 1, &[]));
            bytes.extend(reply(10, 4, &[&9_u32.to_be_bytes()[..], b"base:allocation"].concat()));
            bytes.extend(reply(10, 1, &[]));
        }
        false => bytes.extend(reply(8, 0x8000_0001, b"no")),
    }
    let flags: u16 = 0b1_1101_1111_1111 & !2;
    let size: u64 = 1 << 20;
    bytes.extend(reply(7, 3, &[&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat()));
    bytes.extend(reply(
        7,
        3,
        &[&[0, 3][..], &1_u32.to_be_bytes(), &4096_u32.to_be_bytes(), &(1_u32 << 25).to_be_bytes()].concat(),
    ));
    bytes.extend(reply(7, 1, &[]));
    bytes
}

fn chunk(kind: u16, done: bool, cookie: u64, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    [
        &0x668e_33ef_u32.to_be_bytes()[..],
        &u16::from(done).to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn simple(cookie: u64, data: &[u8]) -> Vec<u8> {
    [&0x6744_6698_u32.to_be_bytes()[..], &0_u32.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
}

/// Good answers to what [`ask`] asks, for the cookies from `first`.
fn answers(structured: bool, first: u64) -> Vec<u8> {
    let [read, status, write, flush] = [first, first + 1, first + 2, first + 3];
    if !structured {
        return [simple(read, &[7; 4096]), simple(status, &[]), simple(write, &[])].concat();
    }
    let part = |offset: u64| [&offset.to_be_bytes()[..], &[7; 1024]].concat();
    let hole = [&2048_u64.to_be_bytes()[..], &2048_u32.to_be_bytes()].concat();
    let extents = [9_u32, 4096, 0, (1 << 20) - 4096, 3].map(u32::to_be_bytes).concat();
    let error = [&5_u32.to_be_bytes()[..], &3_u16.to_be_bytes(), b"bad"].concat();
    [
        chunk(1, false, read, &part(1024)),
        chunk(2, false, read, &hole),
        chunk(5, true, status, &extents),
        chunk(1, true, read, &part(0)),
        chunk(32_769, true, write, &error),
        chunk(0, true, flush, &[]),
    ]
    .concat()
}

pub(crate) fn handshake_seeds() -> Vec<Vec<u8>> {
    [true, false].map(|structured| [agreement(structured), answers(structured, 0)].concat()).into()
}

pub(crate) fn replies_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for first in [0, 1] {
        seeds.push([&[0], &answers(true, first)[..]].concat());
        seeds.push([&[1], &answers(false, first)[..]].concat());
    }
    seeds
}
