//! A libvirt daemon of a test's own: without systemd, with its own configuration, folders and socket, beside any other.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::sandbox::is_root;
use crate::{Console, PATIENCE, Sandbox, have, skip, tool, tool_output, wait_until};

/// The folders that a daemon of root uses, whatever its configuration says, and what stands in for them.
const FOLDERS: [(&str, &str); 5] = [
    ("etc", "/etc/libvirt"),
    ("run", "/run/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("cache", "/var/cache/libvirt"),
    ("log", "/var/log/libvirt"),
];

/// A libvirt daemon. Dropped, it ends; its domains end with the sandbox.
#[derive(Debug)]
pub struct Libvirtd {
    dir: PathBuf,
    /// One of the whole host, else of a user; and of which, if not the test's own.
    system: bool,
    user: Option<u32>,
    /// The port on which it is reached as if it were on another host.
    port: Option<u16>,
    child: Child,
}

/// An address of this host that is not known to be one.
const ELSEWHERE: &str = "127.0.0.2";

impl Libvirtd {
    /// Starts one in the sandbox.
    #[track_caller]
    pub fn start(sandbox: &Sandbox) -> Option<Libvirtd> {
        Libvirtd::begin(sandbox, None)
    }

    /// The same, reached over TCP as if it were on another host; its QEMUs have the certificates in `certificates`.
    #[track_caller]
    pub fn elsewhere(sandbox: &Sandbox, certificates: &Path) -> Option<Libvirtd> {
        Libvirtd::begin(sandbox, Some(certificates))
    }

    #[track_caller]
    fn begin(sandbox: &Sandbox, elsewhere: Option<&Path>) -> Option<Libvirtd> {
        if !have(&["libvirtd", "virsh", "qemu-system-x86_64", "unshare"]) {
            return None;
        }
        let (dir, user) = (sandbox.path("virt"), sandbox.user());
        let system = is_root() && user.is_none();
        let port = elsewhere.map(|_| free_port());
        configure(&dir, system, elsewhere.zip(port));
        if let Some(user) = user {
            tool("chown", &["-R", &user.to_string(), &dir.display().to_string()]);
        }
        let mut daemon = Libvirtd { child: spawn(&dir, system, user, port), dir, system, user, port };
        if !daemon.is_up() {
            skip(&format!("libvirtd does not start here: {}", daemon.said()));
            return None;
        }
        Some(daemon)
    }

    /// Where it is reached.
    pub fn uri(&self) -> String {
        let (user, socket) = match self.system {
            true => ("system", self.dir.join("libvirt-sock")),
            false => ("session", self.dir.join("run/libvirt/libvirt-sock")),
        };
        match self.port {
            Some(port) => format!("qemu+tcp://{ELSEWHERE}:{port}/{user}"),
            None => format!("qemu+unix:///{user}?socket={}", socket.display()),
        }
    }

    /// Recovers the newest point of `vm` on it.
    #[track_caller]
    pub fn recover(&self, sandbox: &Sandbox, more: &[&str]) -> (Value, Console) {
        let on = format!("libvirt:{}", self.uri());
        let view = sandbox.json(&[&["recover", "vm", "--memory", "512M", "--wait", "0", "--on", &on], more].concat());
        assert_eq!(view["state"], "running", "{view}");
        let console = Console::new(view["console"].as_str().unwrap_or_default());
        (view, console)
    }

    /// Runs virsh on it, which has to succeed.
    #[track_caller]
    pub fn virsh(&self, args: &[&str]) -> String {
        tool("virsh", &[&["-c", &self.uri()], args].concat())
    }

    /// Whether it knows a domain.
    pub fn knows(&self, domain: &str) -> bool {
        tool_output("virsh", &["-c", &self.uri(), "domstate", domain]).status.success()
    }

    /// Ends the daemon at once. Its domains run on.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Reached by nobody any more, and in the way of the next.
        for left in ["libvirtd.pid", "libvirt-sock", "run/libvirt/libvirtd.pid", "run/libvirt/libvirt-sock"] {
            let _ = std::fs::remove_file(self.dir.join(left));
        }
    }

    /// Starts it again.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.child = spawn(&self.dir, self.system, self.user, self.port);
        assert!(self.is_up(), "libvirtd does not start again: {}", self.said());
    }

    fn is_up(&mut self) -> bool {
        let since = std::time::Instant::now();
        while since.elapsed() < PATIENCE {
            if tool_output("virsh", &["-c", &self.uri(), "version"]).status.success() {
                return true;
            }
            if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
                return false;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        false
    }

    fn said(&self) -> String {
        std::fs::read_to_string(self.dir.join("libvirtd.log")).unwrap_or_default()
    }
}

impl Drop for Libvirtd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A TCP port that nobody has.
#[track_caller]
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind((ELSEWHERE, 0)).and_then(|listener| listener.local_addr());
    listener.unwrap_or_else(|error| panic!("no port is free: {error}")).port()
}

fn configure(dir: &Path, system: bool, elsewhere: Option<(&Path, u16)>) {
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        let folder = path.parent().unwrap_or(dir);
        let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, text));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    };
    let mut qemu = "security_driver = \"none\"\nseccomp_sandbox = 0\nstdio_handler = \"file\"\n".to_owned();
    if let Some((certificates, _)) = elsewhere {
        qemu += &format!("nbd_tls_x509_cert_dir = \"{}\"\n", certificates.display());
    }
    if system {
        qemu += "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\n\
                 cgroup_controllers = [ ]\nnamespaces = [ ]\n";
        for (folder, _) in FOLDERS {
            write(&format!("{folder}/.keep"), String::new());
        }
        write("etc/qemu.conf", qemu);
        // The daemon insists on this user, whoever QEMU runs as.
        for (file, line) in [
            ("passwd", "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n"),
            ("group", "libvirt-qemu:x:64055:\n"),
        ] {
            let known = std::fs::read_to_string(format!("/etc/{file}")).unwrap_or_default();
            let others = known.lines().filter(|line| !line.starts_with("libvirt-qemu:"));
            write(file, others.map(|line| format!("{line}\n")).collect::<String>() + line);
        }
    } else {
        write("cfg/libvirt/qemu.conf", qemu);
        for folder in ["run", "cache", "data"] {
            write(&format!("{folder}/.keep"), String::new());
        }
    }
    let log = dir.join("libvirtd.log");
    let network = elsewhere.map_or(String::new(), |(_, port)| {
        format!("listen_tls = 0\nlisten_tcp = 1\nauth_tcp = \"none\"\nlisten_addr = \"{ELSEWHERE}\"\ntcp_port = \"{port}\"\n")
    });
    let socket = if system { format!("unix_sock_dir = \"{}\"\n", dir.display()) } else { String::new() };
    write(
        "libvirtd.conf",
        format!(
            "{socket}{network}auth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlog_outputs = \"3:file:{}\"\n",
            log.display()
        ),
    );
}

fn spawn(dir: &Path, system: bool, user: Option<u32>, port: Option<u16>) -> Child {
    let config = dir.join("libvirtd.conf");
    let listen = port.map(|_| "--listen");
    let mut command = if system {
        // A mount namespace of its own: no other daemon, and nothing on this machine, is touched.
        let mut script = String::new();
        for (folder, path) in FOLDERS {
            script += &format!("mkdir -p {path} && mount --bind \"$1/{folder}\" {path} || exit 1\n");
        }
        script += "mount --bind \"$1/passwd\" /etc/passwd && mount --bind \"$1/group\" /etc/group || exit 1\n\
                   exec libvirtd --config \"$1/libvirtd.conf\" --pid-file \"$1/libvirtd.pid\" $2\n";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c", &script, "bash"]).arg(dir).args(listen);
        command
    } else {
        let mut command = Command::new("libvirtd");
        command.arg("--config").arg(config).args(listen).env("HOME", dir);
        for (name, folder) in [
            ("XDG_RUNTIME_DIR", "run"),
            ("XDG_CONFIG_HOME", "cfg"),
            ("XDG_CACHE_HOME", "cache"),
            ("XDG_DATA_HOME", "data"),
        ] {
            command.env(name, dir.join(folder));
        }
        command
    };
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let path = std::env::var("PATH").unwrap_or_default();
    let child = command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    child.unwrap_or_else(|error| panic!("cannot start libvirtd: {error}; run `make deps`"))
}

/// Waits until a domain is in a state, in virsh's words.
#[track_caller]
pub fn wait_for_domain(daemon: &Libvirtd, domain: &str, state: &str) {
    wait_until(&format!("{domain} is {state}"), || {
        let said = tool_output("virsh", &["-c", &daemon.uri(), "domstate", domain]);
        String::from_utf8_lossy(&said.stdout).trim() == state
    });
}
