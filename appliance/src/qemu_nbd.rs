//! Images that no library reads or writes: a qemu-nbd on a private socket does, and our own client speaks to it.

use std::ffi::OsString;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use blockstore::Source;
use nbd_server::NbdUri;
use rustix::process::{Pid, Signal, kill_process};

use crate::capture::NbdSource;

/// How long qemu-nbd may take until it answers.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to write what it remembers when it is told to end.
const FAREWELL: Duration = Duration::from_secs(120);
/// Connections it serves at once.
const SHARED: &str = "64";

/// An image that is read through a qemu-nbd of its own, which ends with it.
pub struct QemuNbdSource {
    source: NbdSource,
    _server: Server,
}

/// Starts qemu-nbd on the image at `path`, of which QEMU calls the format `format`.
pub fn open(path: &Path, format: &str) -> io::Result<QemuNbdSource> {
    read(format, &["--format".into(), format.into(), path.into()])
}

/// Starts qemu-nbd on a block graph in QEMU's JSON form.
pub fn open_graph(format: &str, graph: &serde_json::Value) -> io::Result<QemuNbdSource> {
    read(format, &[format!("json:{graph}").into()])
}

fn read(format: &str, image: &[OsString]) -> io::Result<QemuNbdSource> {
    let mut args: Vec<OsString> = ["--read-only", "--shared", SHARED].map(OsString::from).into();
    args.extend_from_slice(image);
    let (server, source) = Server::start(format, &args, NbdSource::connect)?;
    Ok(QemuNbdSource { source, _server: server })
}

impl Source for QemuNbdSource {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.source.read_at(offset, buf)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.source.next_data(offset)
    }

    fn current_size(&self) -> io::Result<u64> {
        self.source.current_size()
    }
}

/// A qemu-nbd, killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    _dir: PrivateDir,
}

impl Server {
    /// Starts one with `args` and the first client, which `connect` makes.
    pub fn start<T>(
        format: &str,
        args: &[OsString],
        connect: impl Fn(&NbdUri) -> io::Result<T>,
    ) -> io::Result<(Server, T)> {
        let dir = PrivateDir::create()?;
        let socket = dir.0.join("nbd.sock");
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--socket"])
            .arg(&socket)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| missing(error, "qemu-nbd", format))?;
        let mut server = Server { child, _dir: dir };
        let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display()).parse().map_err(io::Error::other)?;
        let since = Instant::now();
        loop {
            if socket.exists()
                && let Ok(client) = connect(&uri)
            {
                return Ok((server, client));
            }
            if server.child.try_wait()?.is_some() {
                return Err(io::Error::other(server.last_words()));
            }
            if since.elapsed() > PATIENCE {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "qemu-nbd does not answer"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets it write what it remembers, and returns once it has ended well.
    pub fn end(mut self) -> io::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or(io::ErrorKind::NotFound)?, Signal::TERM)?;
        let since = Instant::now();
        loop {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => return Err(io::Error::other(self.last_words())),
                None if since.elapsed() > FAREWELL => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "qemu-nbd does not end"));
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// What an ended qemu-nbd said.
    fn last_words(&mut self) -> String {
        const SAID_MAX: u64 = 4096;
        let mut said = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            // What cannot be read is missing from the message, no more.
            let _ = stderr.take(SAID_MAX).read_to_end(&mut said);
        }
        words(&said).unwrap_or_else(|| "qemu-nbd ended without a word".to_owned())
    }
}

/// Makes an empty image of `size` bytes. `options` are those of the format.
pub fn create(path: &Path, format: &str, options: &[&str], size: u64) -> io::Result<()> {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .args(options.iter().flat_map(|option| ["-o", option]))
        .arg(path)
        .arg(size.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| missing(error, "qemu-img", format))?;
    if made.status.success() {
        return Ok(());
    }
    Err(io::Error::other(words(&made.stderr).unwrap_or_else(|| "qemu-img failed without a word".to_owned())))
}

fn missing(error: io::Error, program: &str, format: &str) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => {
            io::Error::new(error.kind(), format!("{format} images go through {program}, which is not installed"))
        }
        _ => error,
    }
}

/// What a program said, on one line.
fn words(said: &[u8]) -> Option<String> {
    let said = String::from_utf8_lossy(said).trim().replace('\n', "; ");
    (!said.is_empty()).then_some(said)
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended by itself cannot be killed and is only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder for the socket that only we may enter.
#[derive(Debug)]
struct PrivateDir(std::path::PathBuf);

impl PrivateDir {
    fn create() -> io::Result<PrivateDir> {
        use std::os::unix::fs::DirBuilderExt;
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("lifeboat-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(PrivateDir(path))
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        // An empty folder in the temporary folder harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
