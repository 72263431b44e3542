//! A server in this process on a socket of its own, and a client that sends whatever bytes a test wants.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nbd_server::{Export, ExportName, ExportTable, Limits, Listen, NbdUri, Server};
use tokio::sync::oneshot;

pub const INIT: &[u8] = b"NBDMAGIC";
pub const OPTION: &[u8] = b"IHAVEOPT";
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// A running server; ends, and is waited for, when dropped.
pub struct Running {
    pub table: Arc<ExportTable>,
    pub socket: PathBuf,
    /// Where it listens.
    pub local: Listen,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

pub fn name(text: &str) -> ExportName {
    ExportName::new(text).expect("a valid name")
}

impl Running {
    pub fn start(export: Arc<dyn Export>) -> Running {
        Running::with_limits(export, Limits::default())
    }

    pub fn with_limits(export: Arc<dyn Export>, limits: Limits) -> Running {
        let table = Arc::new(ExportTable::new());
        table.add(name("disk"), export).expect("an empty table");
        Running::launch(table, None, move |table| Server::new(table, limits))
    }

    /// On a free TCP port of loopback, or on a Unix socket.
    pub fn launch(
        table: Arc<ExportTable>,
        listen: Option<Listen>,
        server: impl FnOnce(Arc<ExportTable>) -> Server + Send + 'static,
    ) -> Running {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("nbd.sock");
        let (stop, stopped) = oneshot::channel();
        let (bound, ready) = std::sync::mpsc::channel();
        let (served, listen) = (Arc::clone(&table), listen.unwrap_or_else(|| Listen::Unix(socket.clone())));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = server(served).bind(&listen).await.expect("a free socket");
                bound.send(listener.local().clone()).expect("the test waits");
                listener.serve(stopped).await;
            });
        });
        let local = ready.recv().expect("the server starts");
        Running { table, socket, local, stop: Some(stop), thread: Some(thread), _folder: folder }
    }

    pub fn uri(&self) -> NbdUri {
        NbdUri::unix(&self.socket, &name("disk"))
    }

    /// Tells the server to end, without waiting.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(()); // it may have ended already
        }
    }

    /// Ends the server and waits until it has.
    pub fn join(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server does not panic");
        }
    }

    pub fn connect(&self) -> Raw {
        Raw::connect(&self.socket)
    }

    /// In transmission, with what was asked for.
    pub fn open(&self, style: Style) -> Raw {
        let mut raw = self.connect();
        raw.greet(3);
        match style {
            Style::Simple => {}
            Style::Structured => assert_eq!(raw.option(8, &[]), [(1, vec![])]),
            Style::Extended => assert_eq!(raw.option(11, &[]), [(1, vec![])]),
        }
        if style != Style::Simple {
            let replies = raw.option(10, &contexts("disk", &["base:allocation", "memory:written"]));
            assert_eq!(replies.last().map(|reply| reply.0), Some(1));
        }
        assert_eq!(raw.option(7, &go("disk", &[3])).last().map(|reply| reply.0), Some(1));
        raw.style = style;
        raw
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the server panicked");
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Simple,
    Structured,
    Extended,
}

/// A connection for raw bytes.
pub struct Raw {
    pub socket: UnixStream,
    pub style: Style,
}

/// A reply chunk, or a simple reply as (done, kind 0xffff, error number, data).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub cookie: u64,
    pub done: bool,
    pub kind: u16,
    pub payload: Vec<u8>,
}

pub const SIMPLE: u16 = 0xffff;

impl Raw {
    pub fn connect(socket: &std::path::Path) -> Raw {
        let socket = UnixStream::connect(socket).expect("the server listens");
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket option");
        Raw { socket, style: Style::Simple }
    }

    pub fn send(&mut self, parts: &[&[u8]]) {
        self.socket.write_all(&parts.concat()).expect("the server reads");
    }

    pub fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.socket.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// Whether the server has closed the connection, with nothing more to read.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => rest.is_empty(),
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub fn greet(&mut self, flags: u32) {
        assert_eq!(self.receive(18), [INIT, OPTION, &[0, 3]].concat());
        self.send(&[&flags.to_be_bytes()]);
    }

    pub fn send_option(&mut self, kind: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).expect("short");
        self.send(&[OPTION, &kind.to_be_bytes(), &length.to_be_bytes(), data]);
    }

    /// Sends an option; returns all replies, the final one last.
    pub fn option(&mut self, kind: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send_option(kind, data);
        self.option_replies(kind)
    }

    pub fn option_replies(&mut self, kind: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let head = self.receive(20);
            assert_eq!(u64_at(&head, 0), OPTION_REPLY);
            assert_eq!(u32_at(&head, 8), kind);
            let reply = u32_at(&head, 12);
            let data = self.receive(u32_at(&head, 16) as usize);
            replies.push((reply, data));
            if reply == 1 || reply >> 31 == 1 {
                return replies;
            }
        }
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u64, payload: &[u8]) {
        let (flags, command) = (flags.to_be_bytes(), command.to_be_bytes());
        let (cookie, offset) = (cookie.to_be_bytes(), offset.to_be_bytes());
        if self.style == Style::Extended {
            let magic = 0x21e4_1c71_u32.to_be_bytes();
            self.send(&[&magic, &flags, &command, &cookie, &offset, &length.to_be_bytes(), payload]);
        } else {
            let magic = 0x2560_9513_u32.to_be_bytes();
            let length = u32::try_from(length).expect("compact headers").to_be_bytes();
            self.send(&[&magic, &flags, &command, &cookie, &offset, &length, payload]);
        }
    }

    /// One chunk; `read_length` is the data to expect after a simple reply that says success.
    pub fn chunk(&mut self, read_length: usize) -> Chunk {
        let magic = u32_at(&self.receive(4), 0);
        match magic {
            0x6744_6698 => {
                assert_ne!(self.style, Style::Extended);
                let head = self.receive(12);
                let mut payload = head[..4].to_vec();
                if u32_at(&head, 0) == 0 {
                    payload.extend(self.receive(read_length));
                }
                Chunk { cookie: u64_at(&head, 4), done: true, kind: SIMPLE, payload }
            }
            0x668e_33ef => {
                assert_eq!(self.style, Style::Structured);
                let head = self.receive(16);
                let payload = self.receive(u32_at(&head, 12) as usize);
                Chunk { cookie: u64_at(&head, 4), done: head[1] & 1 == 1, kind: u16_at(&head, 2), payload }
            }
            0x6e8a_278c => {
                assert_eq!(self.style, Style::Extended);
                let head = self.receive(28);
                let payload = self.receive(usize::try_from(u64_at(&head, 20)).expect("short"));
                Chunk { cookie: u64_at(&head, 4), done: head[1] & 1 == 1, kind: u16_at(&head, 2), payload }
            }
            other => panic!("reply magic {other:#x}"),
        }
    }

    /// The error number of the next reply, 0 for success without data.
    pub fn outcome(&mut self, cookie: u64) -> u32 {
        let chunk = self.chunk(0);
        assert_eq!((chunk.cookie, chunk.done), (cookie, true));
        match chunk.kind {
            0 => 0,
            SIMPLE | 0x8001 => u32_at(&chunk.payload, 0),
            other => panic!("unexpected chunk type {other}"),
        }
    }

    /// Reads and reassembles.
    pub fn read(&mut self, flags: u16, offset: u64, length: usize) -> Result<Vec<u8>, u32> {
        let cookie = offset ^ 0xfeed;
        self.request(0, flags, cookie, offset, length as u64, &[]);
        let mut data = vec![0xee; length];
        loop {
            let chunk = self.chunk(length);
            assert_eq!(chunk.cookie, cookie);
            match chunk.kind {
                SIMPLE if u32_at(&chunk.payload, 0) == 0 => return Ok(chunk.payload[4..].to_vec()),
                SIMPLE | 0x8001 => return Err(u32_at(&chunk.payload, 0)),
                0 => {}
                1 => {
                    let at = usize::try_from(u64_at(&chunk.payload, 0) - offset).expect("inside");
                    data[at..at + chunk.payload.len() - 8].copy_from_slice(&chunk.payload[8..]);
                }
                2 => {
                    let at = usize::try_from(u64_at(&chunk.payload, 0) - offset).expect("inside");
                    data[at..at + u32_at(&chunk.payload, 8) as usize].fill(0);
                }
                other => panic!("unexpected chunk type {other}"),
            }
            if chunk.done {
                return Ok(data);
            }
        }
    }
}

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn string(data: &mut Vec<u8>, text: &str) {
    data.extend(u32::try_from(text.len()).expect("short").to_be_bytes());
    data.extend(text.as_bytes());
}

/// Data of INFO and GO.
pub fn go(export: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    string(&mut data, export);
    data.extend(u16::try_from(wanted.len()).expect("few").to_be_bytes());
    wanted.iter().for_each(|fact| data.extend(fact.to_be_bytes()));
    data
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    string(&mut data, export);
    data.extend(u32::try_from(queries.len()).expect("few").to_be_bytes());
    queries.iter().for_each(|query| string(&mut data, query));
    data
}

/// Runs a tool; `None` when it is not there.
#[expect(clippy::print_stdout, reason = "a skip is said")]
pub fn run(program: &str, arguments: &[&str]) -> Option<Output> {
    // nbdsh takes the first python3 it finds, and the distribution's is the one that has libnbd.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    match Command::new(program).args(arguments).env("PATH", path).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            assert!(std::env::var_os("CI").is_none(), "{program} is missing");
            println!("skipped: {program} is not installed");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// Runs a tool that must succeed; returns what it printed.
pub fn succeed(program: &str, arguments: &[&str]) -> Option<String> {
    let output = run(program, arguments)?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}\n{out}\n{err}");
    Some(out.into_owned())
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}
