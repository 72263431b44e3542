//! Images that no library reads: qemu-nbd opens them read-only on a private socket, and our own client reads them.

use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use std::ops::Range;

use blockstore::Source;
use nbd_server::NbdUri;

use super::source::NbdSource;

/// How long qemu-nbd may take until it answers.
const PATIENCE: Duration = Duration::from_secs(20);
/// Connections it serves at once.
const SHARED: &str = "64";

/// An image behind a qemu-nbd of its own, which ends with it.
pub struct QemuNbdSource {
    source: NbdSource,
    _server: Server,
}

/// Starts qemu-nbd on the image at `path`.
pub fn open(path: &Path, format: &str) -> io::Result<QemuNbdSource> {
    let dir = PrivateDir::create()?;
    let socket = dir.0.join("nbd.sock");
    let child = Command::new("qemu-nbd")
        .args(["--read-only", "--persistent", "--shared", SHARED, "--format", format, "--socket"])
        .arg(&socket)
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => io::Error::new(
                error.kind(),
                format!("{format} images are read through qemu-nbd, which is not installed"),
            ),
            _ => error,
        })?;
    let mut server = Server { child, _dir: dir };
    let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display()).parse().map_err(io::Error::other)?;
    let since = Instant::now();
    loop {
        if socket.exists()
            && let Ok(source) = NbdSource::connect(&uri)
        {
            return Ok(QemuNbdSource { source, _server: server });
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

#[derive(Debug)]
struct Server {
    child: Child,
    _dir: PrivateDir,
}

impl Server {
    /// What an ended qemu-nbd said.
    fn last_words(&mut self) -> String {
        const SAID_MAX: u64 = 4096;
        let mut said = Vec::new();
        if let Some(stderr) = self.child.stderr.take() {
            // What cannot be read is missing from the message, no more.
            let _ = stderr.take(SAID_MAX).read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
        if said.is_empty() { "qemu-nbd ended without a word".to_owned() } else { said }
    }
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
