//! The real QEMU, with disks served by qemu-nbd: no guest is needed to see a machine start, lose its disks, be adopted
//! and end. The emulator is used everywhere, so that a host's KVM does not matter.
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hypervisor::qemu::guest_agent::{AgentError, GuestAgent};
use hypervisor::qemu::qmp;
use hypervisor::{
    Accelerator, AdoptError, Bus, Card, DiskSource, Display, ErrorPolicy, Firmware, Hypervisor, MachineDefinition,
    MachineDisk, MachineError, MachineEvent, MachineFiles, Network, Qemu, QemuHypervisor, StartError, Status,
    Subscription,
};
use serde_json::json;
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(15);

fn installed(programs: &[&str]) -> bool {
    for program in programs {
        if Command::new(program).arg("--version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "{program} is missing");
            println!("skipped: {program} is not installed");
            return false;
        }
    }
    true
}

fn ready() -> bool {
    installed(&["qemu-system-x86_64", "qemu-nbd"])
}

/// A folder with a disk and an NBD server that can be killed and started again.
struct Lab {
    folder: TempDir,
    server: Option<Child>,
}

impl Lab {
    fn new() -> Lab {
        let mut lab = Lab::without_server();
        std::fs::File::create(lab.disk()).and_then(|disk| disk.set_len(16 << 20)).expect("a sparse file");
        lab.serve();
        lab
    }

    fn without_server() -> Lab {
        Lab { folder: tempfile::Builder::new().prefix("lb,").tempdir().expect("a temporary folder"), server: None }
    }

    fn disk(&self) -> PathBuf {
        self.folder.path().join("disk.raw")
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    fn serve(&mut self) {
        let mut server = Command::new("qemu-nbd");
        server.args(["--persistent", "--shared=0", "--export-name=root", "--format=raw", "--socket"]);
        server.arg(self.socket()).arg(self.disk());
        self.spawn(server);
    }

    /// Serves a disk that boots and writes; requests fail as long as the returned file exists.
    fn serve_failing(&mut self, error: &str, kind: &str) -> PathBuf {
        let mut disk = writing_boot_sector();
        disk.resize(1 << 20, 0);
        std::fs::write(self.disk(), disk).expect("writable");
        let trigger = self.folder.path().join("trigger");
        std::fs::write(&trigger, b"").expect("writable");
        let mut server = Command::new("nbdkit");
        server.args(["--foreground", "--exit-with-parent", "--filter=error", "--unix"]).arg(self.socket());
        server.arg("file").arg(self.disk()).arg(error).arg(format!("{kind}-rate=100%"));
        server.arg(format!("{kind}-file={}", trigger.display()));
        self.spawn(server);
        trigger
    }

    fn spawn(&mut self, mut server: Command) {
        drop(std::fs::remove_file(self.socket()));
        self.server = Some(server.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("it is installed"));
        let began = Instant::now();
        while !self.socket().exists() {
            assert!(began.elapsed() < LONG, "the server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What is on the disk now.
    fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let disk = std::fs::File::open(self.disk()).expect("it exists");
        disk.read_exact_at(&mut bytes, offset).expect("it is that long");
        bytes
    }

    fn kill_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill().expect("it is ours");
            server.wait().expect("it is ours");
        }
    }

    fn machine(&self, bus: Bus) -> MachineDefinition {
        let mut machine = MachineDefinition::new("lab machine", MachineFiles::in_folder(self.folder.path()));
        machine.memory_bytes = 64 << 20;
        machine.accelerator = Accelerator::Tcg;
        machine.disks.push(MachineDisk {
            name: "root".into(),
            source: DiskSource::Export { socket: self.socket(), export: "root".into() },
            bus,
        });
        machine
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // A failed test must not leave its machine behind.
        let pid = std::fs::read_to_string(self.folder.path().join("qemu.pid")).ok();
        if let Some(pid) = pid.and_then(|pid| pid.trim().parse::<u32>().ok()) {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains("lab machine") {
                drop(Command::new("kill").args(["-KILL", &pid.to_string()]).status());
            }
        }
        self.kill_server();
    }
}

/// Runs a qemu-io command on the first disk. What it prints goes to QEMU's own output; the disk is the witness.
async fn io(qemu: &Qemu, command: &str) {
    let command_line = format!("qemu-io -d /machine/peripheral/device0/virtio-backend \"{command}\"");
    let command = hypervisor::qapi::qmp::human_monitor_command { cpu_index: None, command_line };
    qemu.execute(&command, LONG).await.expect("it answers");
}

/// Boots, writes its own first sector over the second, and halts.
fn writing_boot_sector() -> Vec<u8> {
    let mut sector = vec![0; 512];
    let code = [
        0x31, 0xdb, // xor bx, bx
        0x8e, 0xc3, // mov es, bx
        0xbb, 0x00, 0x7c, // mov bx, 0x7c00
        0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
        0xb9, 0x02, 0x00, // mov cx, 2: sector 2 of cylinder 0
        0xba, 0x80, 0x00, // mov dx, 0x80: head 0 of the first disk
        0xcd, 0x13, // int 0x13
        0xf4, // hlt
        0xeb, 0xfd, // jmp to it
    ];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

async fn wait_for(events: &mut Subscription, wanted: impl Fn(&MachineEvent) -> bool) -> MachineEvent {
    let waiting = async {
        loop {
            let event = events.next().await.expect("the machine's handle lives");
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(LONG, waiting).await.expect("the event comes")
}

async fn start(machine: &MachineDefinition) -> Qemu {
    Qemu::start(machine).await.unwrap_or_else(|error| panic!("{error}: {:?}", std::error::Error::source(&error)))
}

#[tokio::test]
async fn a_machine_starts_is_paused_resumed_and_ends() {
    if !ready() {
        return;
    }
    let lab = Lab::new();
    let machine = lab.machine(Bus::VirtioBlk);
    let qemu = start(&machine).await;
    let mut events = qemu.events();
    assert!(!qemu.acceleration().kvm);
    assert_eq!(qemu.status().await.expect("it answers"), Status::Running);

    qemu.pause().await.expect("it pauses");
    assert_eq!(qemu.status().await.expect("it answers"), Status::Paused);
    wait_for(&mut events, |event| *event == MachineEvent::Stopped).await;
    qemu.resume().await.expect("it resumes");
    wait_for(&mut events, |event| *event == MachineEvent::Resumed).await;
    qemu.power_down().await.expect("the button works");
    wait_for(&mut events, |event| *event == MachineEvent::PowerButton).await;

    // The socket in the definition is free for others while we are connected.
    let other = qmp::Client::connect(&machine.files.qmp, LONG).await.expect("scripts can connect");
    other.call("query-block", serde_json::Value::Null, LONG).await.expect("and ask");
    drop(other);

    let picture = lab.folder.path().join("screen.png");
    qemu.screenshot(&picture).await.expect("it has a screen");
    assert!(std::fs::read(&picture).expect("written").starts_with(b"\x89PNG"));

    let exit = qemu.quit(GRACE).await.expect("it ends");
    assert_eq!((exit.by_guest, exit.reason.as_deref()), (false, Some("host-qmp-quit")));
    assert!(matches!(qemu.status().await, Err(MachineError::Gone { .. })));
    assert_eq!(qemu.quit(GRACE).await.expect("twice is fine"), exit);
    assert!(Qemu::adopt(&machine).await.expect("nothing is there").is_none());
}

#[tokio::test]
async fn a_machine_is_adopted_after_its_owner_forgot_it() {
    if !ready() {
        return;
    }
    let lab = Lab::new();
    let machine = lab.machine(Bus::VirtioBlk);
    let first = start(&machine).await;
    let pid = first.process_id();
    assert!(matches!(Qemu::start(&machine).await, Err(StartError::AlreadyRunning { pid: found, .. }) if found == pid));
    drop(first);

    let second = Qemu::adopt(&machine).await.expect("it is reachable").expect("it runs");
    assert_eq!(second.process_id(), pid);
    assert_eq!(second.status().await.expect("it answers"), Status::Running);
    let mut other = machine.clone();
    other.name = "another".to_owned();
    drop(second);
    assert!(matches!(Qemu::adopt(&other).await, Err(AdoptError::OtherMachine { .. })));

    // Behind the trait, as a recovery uses it.
    let third = QemuHypervisor.adopt(&machine).await.expect("it is reachable").expect("it runs");
    assert_eq!(third.pid(), Some(pid));
    let killed = Command::new("kill").args(["-KILL", &pid.to_string()]).status().expect("kill exists");
    assert!(killed.success());
    let exit = tokio::time::timeout(LONG, third.wait_exit()).await.expect("it is gone");
    assert_eq!(exit.reason, None);
    // Its pid file is still there, its process is not.
    assert!(machine.files.pid.exists());
    assert!(QemuHypervisor.adopt(&machine).await.expect("nothing is there").is_none());
    let again = start(&machine).await;
    assert_eq!(again.quit(GRACE).await.expect("it ends").reason.as_deref(), Some("host-qmp-quit"));
}

#[tokio::test]
async fn a_machine_whose_socket_is_gone_is_not_started_twice() {
    if !ready() {
        return;
    }
    let lab = Lab::new();
    let machine = lab.machine(Bus::VirtioBlk);
    let qemu = start(&machine).await;
    std::fs::remove_file(machine.files.control()).expect("it is there");
    assert!(matches!(Qemu::adopt(&machine).await, Err(AdoptError::Unreachable { .. })));
    assert!(matches!(Qemu::start(&machine).await, Err(StartError::AlreadyRunning { .. })));
    qemu.quit(GRACE).await.expect("the open connection still works");
}

#[tokio::test]
async fn a_killed_nbd_server_stalls_requests_and_loses_nothing() {
    if !ready() {
        return;
    }
    let mut lab = Lab::new();
    let machine = lab.machine(Bus::VirtioBlk);
    let qemu = start(&machine).await;
    io(&qemu, "write -f -P 0xa5 1M 64k").await;
    assert!(lab.read(1 << 20, 65536) == [0xa5; 65536], "the write did not arrive");
    lab.kill_server();
    assert_eq!(qemu.status().await.expect("it answers"), Status::Running);
    let began = Instant::now();
    let away = Duration::from_millis(1500);
    let asked = async {
        io(&qemu, "write -f -P 0x5a 2M 64k").await;
        began.elapsed()
    };
    let serving = async {
        tokio::time::sleep(away).await;
        lab.serve();
    };
    let (took, ()) = tokio::join!(asked, serving);
    assert!(took >= away, "the write did not wait for the server: {took:?}");
    assert!(lab.read(2 << 20, 65536) == [0x5a; 65536], "the write is lost");
    assert_eq!(qemu.status().await.expect("it answers"), Status::Running);
    qemu.quit(GRACE).await.expect("it ends");
}

#[tokio::test]
async fn a_full_export_pauses_the_machine_and_it_goes_on_when_there_is_room() {
    if !ready() || !installed(&["nbdkit"]) {
        return;
    }
    for (bus, errors) in
        [(Bus::VirtioBlk, ErrorPolicy::Pause), (Bus::VirtioBlk, ErrorPolicy::Report), (Bus::Sata, ErrorPolicy::Pause)]
    {
        let mut lab = Lab::without_server();
        let full = lab.serve_failing("error-pwrite=ENOSPC", "error-pwrite");
        let mut machine = lab.machine(bus);
        machine.errors = errors;
        let qemu = start(&machine).await;
        let mut events = qemu.events();
        let paused = async {
            // It may have happened before the subscription.
            while qemu.status().await.expect("it answers") != Status::IoError {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(LONG, paused).await.expect("the machine pauses");
        let error = qemu.resume_until_running(Duration::from_secs(1)).await.expect_err("still full");
        assert!(matches!(error, MachineError::NotRunning { status: Status::IoError, .. }), "{error}");
        let event = wait_for(&mut events, |event| matches!(event, MachineEvent::IoError(_))).await;
        let MachineEvent::IoError(event) = event else { panic!("{event:?}") };
        assert!(event.write && event.no_space && event.paused && event.disk == "disk0", "{event:?}");
        assert!(lab.read(512, 512) != writing_boot_sector(), "nothing failed");

        std::fs::remove_file(full).expect("it is there");
        qemu.resume_until_running(LONG).await.expect("there is room");
        let began = Instant::now();
        while lab.read(512, 512) != writing_boot_sector() {
            assert!(began.elapsed() < LONG, "the write that failed was not repeated");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        qemu.quit(GRACE).await.expect("it ends");
    }
}

#[tokio::test]
async fn an_unreadable_disk_pauses_the_machine_before_the_guest_knows() {
    if !ready() || !installed(&["nbdkit"]) {
        return;
    }
    let mut lab = Lab::without_server();
    let broken = lab.serve_failing("error-pread=EIO", "error-pread");
    let qemu = start(&lab.machine(Bus::VirtioBlk)).await;
    let began = Instant::now();
    while qemu.status().await.expect("it answers") != Status::IoError {
        assert!(began.elapsed() < LONG, "the machine does not pause");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::remove_file(broken).expect("it is there");
    qemu.resume_until_running(LONG).await.expect("it reads again");
    let began = Instant::now();
    while lab.read(512, 512) != writing_boot_sector() {
        assert!(began.elapsed() < LONG, "the guest does not boot");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    qemu.quit(GRACE).await.expect("it ends");
}

#[tokio::test]
async fn a_machine_that_cannot_end_by_itself_is_killed() {
    if !ready() {
        return;
    }
    let mut lab = Lab::new();
    let machine = lab.machine(Bus::VirtioBlk);
    let qemu = start(&machine).await;
    lab.kill_server();
    // With a request waiting for the server, QEMU waits, too, before it ends.
    let stuck = qmp::Client::connect(&machine.files.qmp, LONG).await.expect("scripts can connect");
    let line = json!({ "command-line": "qemu-io -d /machine/peripheral/device0/virtio-backend \"read 0 4k\"" });
    let asked = stuck.call("human-monitor-command", line, Duration::from_millis(300)).await;
    assert!(asked.is_err(), "{asked:?}");
    let began = Instant::now();
    let exit = qemu.quit(Duration::from_secs(1)).await.expect("it is killed");
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(exit.reason, None);
}

#[tokio::test]
async fn every_bus_firmware_and_machine_type_starts() {
    if !ready() {
        return;
    }
    let all = [
        (
            "q35",
            Firmware::Bios,
            vec![Bus::Nvme, Bus::VirtioBlk, Bus::VirtioScsi, Bus::Sata, Bus::Nvme],
            Network::User,
            Card::E1000e,
        ),
        (
            "pc",
            Firmware::Bios,
            vec![Bus::Ide, Bus::Ide, Bus::Ide, Bus::Sata, Bus::VirtioScsi, Bus::Nvme],
            Network::Isolated,
            Card::Rtl8139,
        ),
        ("q35", Firmware::Uefi, vec![Bus::VirtioBlk; hypervisor::MAX_DISKS], Network::User, Card::Virtio),
        ("pc", Firmware::Uefi, vec![Bus::Nvme; hypervisor::MAX_DISKS], Network::User, Card::E1000),
    ];
    for (machine_type, firmware, buses, network, card) in all {
        let lab = Lab::new();
        let mut machine = lab.machine(Bus::VirtioBlk);
        let disk = machine.disks.remove(0);
        machine.disks = buses.iter().map(|bus| MachineDisk { bus: *bus, ..disk.clone() }).collect();
        machine.machine_type = machine_type.to_owned();
        machine.firmware = firmware;
        machine.network = network;
        machine.card = card;
        machine.cpu_model = (firmware == Firmware::Uefi).then(|| "Haswell".to_owned());
        machine.display = Display::VncSocket(machine.files.qmp.with_file_name("vnc.sock"));
        let qemu = match Qemu::start(&machine).await {
            Err(StartError::Firmware { .. }) if std::env::var_os("CI").is_none() => {
                println!("skipped: no UEFI firmware is installed");
                continue;
            }
            started => started.unwrap_or_else(|error| panic!("{machine_type} {buses:?}: {error}")),
        };
        assert_eq!(qemu.status().await.expect("it answers"), Status::Running);
        let port = qemu.forward_port(22).await.expect("the network forwards");
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "nothing listens on port {port}");
        let agent = GuestAgent::connect(&machine.files.guest_agent, Duration::from_millis(200)).await;
        assert!(matches!(agent, Err(AgentError::Silent { .. })), "{agent:?}");
        let mut screen = UnixStream::connect(machine.files.qmp.with_file_name("vnc.sock")).expect("VNC listens");
        let mut greeting = [0; 4];
        screen.read_exact(&mut greeting).expect("VNC greets");
        assert_eq!(&greeting, b"RFB ");
        qemu.quit(GRACE).await.expect("it ends");
    }
}

#[tokio::test]
async fn what_cannot_start_says_why_and_leaves_nothing() {
    if !ready() {
        return;
    }
    let lab = Lab::new();
    let good = lab.machine(Bus::VirtioBlk);
    let with = |change: &dyn Fn(&mut MachineDefinition)| {
        let mut machine = good.clone();
        change(&mut machine);
        machine
    };
    let error = Qemu::start(&with(&|machine| machine.machine_type = "pdp-11".into())).await.expect_err("unknown");
    assert!(matches!(&error, StartError::UnknownMachineType { .. }), "{error}");
    let nope = DiskSource::Export { socket: lab.socket(), export: "nope".into() };
    let error = Qemu::start(&with(&|machine| machine.disks[0].source = nope.clone())).await.expect_err("no export");
    assert!(matches!(&error, StartError::Refused { stderr, .. } if stderr.contains("nope")), "{error}");
    let error = Qemu::start(&with(&|machine| machine.network = Network::Bridge("no-such-br".into()))).await;
    assert!(matches!(error, Err(StartError::MissingBridge { .. })));
    let error = Qemu::start(&with(&|machine| machine.binary = Some("/nonexistent/qemu".into()))).await;
    assert!(matches!(error, Err(StartError::Binary { .. })));
    let error = Qemu::start(&with(&|machine| machine.name.clear())).await.expect_err("no name");
    assert!(matches!(&error, StartError::Definition { .. }), "{error}");
    let error = Qemu::start(&with(&|machine| machine.files.console = "/nonexistent/console.log".into())).await;
    assert!(matches!(&error, Err(StartError::Refused { stderr, .. }) if stderr.contains("console.log")), "{error:?}");
    assert!(Qemu::adopt(&good).await.expect("nothing is there").is_none());
}

#[tokio::test]
async fn a_dropped_start_leaves_no_machine_that_cannot_be_found() {
    if !ready() {
        return;
    }
    let lab = Lab::new();
    let machine = lab.machine(Bus::VirtioBlk);
    for pause in [0, 5, 20, 60, 200] {
        drop(tokio::time::timeout(Duration::from_millis(pause), Qemu::start(&machine)).await);
        // What was far enough to be seen can be adopted; what was not ends by itself.
        let began = Instant::now();
        loop {
            match Qemu::adopt(&machine).await {
                Ok(Some(qemu)) => drop(qemu.quit(GRACE).await.expect("it ends")),
                Ok(None) if !names_this(lab.folder.path()) => break,
                Ok(None) | Err(AdoptError::Unreachable { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(began.elapsed() < LONG, "a machine is left behind");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Whether any process has this folder in its arguments, the disk's server aside.
fn names_this(folder: &Path) -> bool {
    let needle = folder.file_name().expect("it has a name").to_string_lossy().replace(',', ",,");
    let processes = std::fs::read_dir("/proc").expect("proc is mounted");
    processes.flatten().any(|process| {
        let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains(&needle) && line.contains("-daemonize")
    })
}
