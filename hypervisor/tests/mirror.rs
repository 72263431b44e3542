//! Disks of a real QEMU moved to other storage while it runs: to every kind of target, through failures, and found again
//! by whoever comes later.
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hypervisor::{
    Accelerator, Bus, Copying, DiskSource, MachineDefinition, MachineDisk, MachineEvent, MachineFiles, MirrorError,
    MirrorProgress, MirrorState, Mirroring, Qemu, Side, Status,
};
use tempfile::TempDir;

const LONG: Duration = Duration::from_secs(60);
const SIZE: u64 = 32 << 20;

fn ready(programs: &[&str]) -> bool {
    for program in programs {
        if Command::new(program).arg("--version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "{program} is missing");
            println!("skipped: {program} is not installed");
            return false;
        }
    }
    true
}

/// A folder with disks of a machine in it, and what else runs for them.
struct Lab {
    folder: TempDir,
    servers: Vec<Child>,
}

impl Lab {
    fn new(disks: usize) -> Lab {
        let lab = Lab { folder: tempfile::tempdir().expect("a temporary folder"), servers: Vec::new() };
        for disk in 0..disks {
            let file = std::fs::File::create(lab.path(&format!("source{disk}.raw"))).expect("writable");
            file.set_len(SIZE).expect("sparse");
            let noise: Vec<u8> = (0..20u32 << 20).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect();
            file.write_all_at(&noise, disk as u64 * 4096).expect("writable");
        }
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn machine(&self, disks: usize) -> MachineDefinition {
        let mut machine = MachineDefinition::new("mirror lab", MachineFiles::in_folder(self.folder.path()));
        machine.memory_bytes = 64 << 20;
        machine.accelerator = Accelerator::Tcg;
        for disk in 0..disks {
            let source = DiskSource::Raw(self.path(&format!("source{disk}.raw")));
            machine.disks.push(MachineDisk { name: format!("d{disk}"), source, bus: Bus::VirtioBlk });
        }
        machine
    }

    fn raw(&self, name: &str) -> DiskSource {
        std::fs::File::create(self.path(name)).and_then(|file| file.set_len(SIZE)).expect("a sparse file");
        DiskSource::Raw(self.path(name))
    }

    fn qcow2(&self, name: &str) -> DiskSource {
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", "qcow2"]).arg(self.path(name)).arg("32M");
        assert!(make.status().expect("it is installed").success());
        DiskSource::Qcow2(self.path(name))
    }

    /// An NBD server for a file that is larger than the disk.
    fn nbd(&mut self, name: &str, extra: &[&str]) -> DiskSource {
        let file = self.path(name);
        std::fs::File::create(&file).and_then(|file| file.set_len(SIZE + (1 << 20))).expect("a sparse file");
        let socket = self.path(&format!("{name}.sock"));
        let mut server = Command::new("nbdkit");
        server.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket);
        if !extra.is_empty() {
            server.arg("--filter=error");
        }
        server.arg("file").arg(&file).args(extra);
        self.servers.push(server.stdin(Stdio::null()).spawn().expect("it is installed"));
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < LONG, "nbdkit does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        DiskSource::Export { socket, export: String::new() }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(self.path("qemu.pid")).ok();
        if let Some(pid) = pid.and_then(|pid| pid.trim().parse::<u32>().ok()) {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains("mirror lab") {
                drop(Command::new("kill").args(["-KILL", &pid.to_string()]).status());
            }
        }
        for server in &mut self.servers {
            drop(server.kill());
            drop(server.wait());
        }
    }
}

/// Writes to a disk as its guest would.
async fn write(qemu: &Qemu, disk: usize, pattern: u8, offset: u64, length: u64) {
    let command_line =
        format!("qemu-io -d /machine/peripheral/device{disk}/virtio-backend \"write -P {pattern} {offset} {length}\"");
    let command = hypervisor::qapi::qmp::human_monitor_command { cpu_index: None, command_line };
    qemu.execute(&command, LONG).await.expect("it answers");
}

async fn until(qemu: &Qemu, disk: usize, what: &str, reached: impl Fn(&MirrorState) -> bool) -> MirrorState {
    let began = Instant::now();
    loop {
        let state = qemu.mirror_state(disk).await.expect("it answers");
        if reached(&state) {
            return state;
        }
        assert!(began.elapsed() < LONG, "{what}: still {state:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn until_ready(qemu: &Qemu, disk: usize) {
    let ready = |state: &MirrorState| matches!(state, MirrorState::Copying(MirrorProgress { ready: true, copied, total, .. }) if copied == total);
    until(qemu, disk, "ready", ready).await;
}

fn doing(state: &MirrorState) -> Option<Copying> {
    match state {
        MirrorState::Copying(progress) => Some(progress.doing),
        _ => None,
    }
}

fn differs(lab: &Lab, disk: usize, target: &str, format: &str) -> Option<String> {
    let source = lab.path(&format!("source{disk}.raw"));
    // QEMU's tools keep away from a file that is a mirror's target; a copy of it is nobody's.
    let copy = lab.path("copy");
    std::fs::copy(lab.path(target), &copy).expect("readable");
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-U", "-f", "raw", "-F", format]).arg(source).arg(copy);
    let output = compare.output().expect("it is installed");
    (!output.status.success()).then(|| format!("{output:?}"))
}

fn same(lab: &Lab, disk: usize, target: &str, format: &str) {
    assert_eq!(differs(lab, disk, target, format), None, "disk {disk}");
}

/// What the guest wrote last reaches the target after a while; once flushed, whoever reads it beside the machine sees it.
async fn until_same(qemu: &Qemu, lab: &Lab, disk: usize, target: &str, format: &str) {
    let began = Instant::now();
    loop {
        qemu.mirror_flush(disk).await.expect("it flushes");
        let Some(difference) = differs(lab, disk, target, format) else { return };
        assert!(began.elapsed() < LONG, "disk {disk}: {difference}");
    }
}

#[tokio::test]
async fn disks_move_to_every_kind_of_target_while_the_guest_writes() {
    if !ready(&["qemu-system-x86_64", "qemu-img", "nbdkit"]) {
        return;
    }
    let mut lab = Lab::new(3);
    let qemu = Qemu::start(&lab.machine(3)).await.expect("it starts");
    let targets = [lab.raw("t0.raw"), lab.qcow2("t1.qcow2"), lab.nbd("t2.raw", &[])];
    for (disk, target) in targets.iter().enumerate() {
        assert_eq!(qemu.mirror_state(disk).await.expect("it answers"), MirrorState::None);
        qemu.mirror(disk, target, None).await.expect("it begins");
        assert!(matches!(qemu.mirror(disk, target, None).await, Err(MirrorError::Busy { .. })));
    }
    for disk in 0..3 {
        write(&qemu, disk, 7, 4096, 1 << 20).await;
        until_ready(&qemu, disk).await;
        write(&qemu, disk, 9, 24 << 20, 1 << 20).await;
    }
    until_same(&qemu, &lab, 0, "t0.raw", "raw").await;
    until_same(&qemu, &lab, 1, "t1.qcow2", "qcow2").await;
    let began = Instant::now();
    loop {
        let load = qemu.disk_load(0).await.expect("it answers");
        if load.requests > 0 && load.nanos > 0 {
            break; // the firmware has looked for a boot sector
        }
        assert!(began.elapsed() < LONG, "the guest has asked nothing of its disk: {load:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    qemu.pause().await.expect("it pauses");
    for disk in 0..3 {
        qemu.mirror_pivot(disk).await.expect("it pivots");
        assert_eq!(
            qemu.mirror_state(disk).await.expect("it answers"),
            MirrorState::Pivoted { source_held: true },
            "disk {disk}"
        );
        qemu.mirror_pivot(disk).await.expect("it is there");
        assert!(matches!(qemu.mirror_cancel(disk).await, Err(MirrorError::Pivoted { .. })));
    }
    qemu.resume().await.expect("it runs");
    for disk in 0..3 {
        qemu.mirror_release(disk).await.expect("it lets go");
        qemu.mirror_release(disk).await.expect("it has let go");
        assert_eq!(qemu.mirror_state(disk).await.expect("it answers"), MirrorState::Pivoted { source_held: false });
        write(&qemu, disk, 11, 0, 4096).await;
    }
    assert_eq!(qemu.status().await.expect("it answers"), Status::Running);
    qemu.quit(LONG).await.expect("it ends");
    for (disk, (target, format)) in [("t0.raw", "raw"), ("t1.qcow2", "qcow2"), ("t2.raw", "raw")].iter().enumerate() {
        // The source has not got the write that came after the pivot; the guest's disk has not grown with the target.
        let source = std::fs::OpenOptions::new().write(true).open(lab.path(&format!("source{disk}.raw")));
        source.expect("it exists").write_all_at(&[11; 4096], 0).expect("writable");
        same(&lab, disk, target, format);
    }
}

#[tokio::test]
async fn a_copy_is_paused_resumed_limited_cancelled_and_found_again() {
    if !ready(&["qemu-system-x86_64", "qemu-img"]) {
        return;
    }
    let lab = Lab::new(1);
    let qemu = Qemu::start(&lab.machine(1)).await.expect("it starts");
    assert!(matches!(qemu.mirror_pivot(0).await, Err(MirrorError::NotMirrored { .. })));
    assert!(matches!(qemu.mirror_limit(0, None).await, Err(MirrorError::NotMirrored { .. })));
    assert!(matches!(qemu.mirror_state(1).await, Err(MirrorError::NoDisk { .. })));
    qemu.mirror_cancel(0).await.expect("there is none");
    let missing = DiskSource::Raw(lab.path("missing.raw"));
    assert!(matches!(qemu.mirror(0, &missing, None).await, Err(MirrorError::Target { .. })));
    let mut events = qemu.events();
    qemu.mirror(0, &lab.raw("a.raw"), Some(1 << 20)).await.expect("it begins");
    assert!(matches!(qemu.mirror_pivot(0).await, Err(MirrorError::NotReady { .. })));
    assert_eq!(events.next().await, Some(MachineEvent::Mirror { disk: 0 }));
    qemu.mirror_pause(0).await.expect("it pauses");
    qemu.mirror_pause(0).await.expect("it is paused");
    drop(qemu);
    let qemu = Qemu::adopt(&lab.machine(1)).await.expect("it is reachable").expect("it lives");
    assert_eq!(doing(&qemu.mirror_state(0).await.expect("it answers")), Some(Copying::Paused));
    qemu.mirror_cancel(0).await.expect("it is cancelled");
    assert_eq!(qemu.mirror_state(0).await.expect("it answers"), MirrorState::None);
    qemu.mirror(0, &lab.raw("b.raw"), Some(1 << 20)).await.expect("it begins anew");
    qemu.mirror_pause(0).await.expect("it pauses");
    qemu.mirror_resume(0).await.expect("it goes on");
    qemu.mirror_resume(0).await.expect("it runs");
    qemu.mirror_limit(0, None).await.expect("it hurries");
    until_ready(&qemu, 0).await;
    qemu.mirror_cancel(0).await.expect("a complete copy is cancelled like any");
    assert_eq!(qemu.mirror_state(0).await.expect("it answers"), MirrorState::None);
    write(&qemu, 0, 3, 0, 4096).await;
    qemu.quit(LONG).await.expect("it ends");
    let mut bytes = [0; 4096];
    std::fs::File::open(lab.path("source0.raw")).expect("it exists").read_exact_at(&mut bytes, 0).expect("readable");
    assert_eq!(bytes, [3; 4096], "the guest is on its source");
}

#[tokio::test]
async fn a_target_that_fails_stalls_the_copy_and_not_the_guest() {
    if !ready(&["qemu-system-x86_64", "qemu-img", "nbdkit"]) {
        return;
    }
    let mut lab = Lab::new(1);
    let trigger = lab.path("trigger");
    std::fs::write(&trigger, b"").expect("writable");
    let failing = format!("error-pwrite-file={}", trigger.display());
    let target = lab.nbd("t.raw", &["error-pwrite=ENOSPC", "error-pwrite-rate=100%", &failing]);
    let qemu = Qemu::start(&lab.machine(1)).await.expect("it starts");
    qemu.mirror(0, &target, None).await.expect("it begins");
    let stalled = until(&qemu, 0, "stalled", |state| matches!(doing(state), Some(Copying::Stalled { .. }))).await;
    assert_eq!(doing(&stalled), Some(Copying::Stalled { side: Some(Side::Target), no_space: true }));
    assert_eq!(qemu.status().await.expect("it answers"), Status::Running);
    write(&qemu, 0, 5, 0, 1 << 20).await;
    std::fs::remove_file(&trigger).expect("it exists");
    qemu.mirror_resume(0).await.expect("it goes on");
    until_ready(&qemu, 0).await;
    qemu.mirror_pivot(0).await.expect("it pivots");
    qemu.mirror_release(0).await.expect("it lets go");
    qemu.quit(LONG).await.expect("it ends");
    same(&lab, 0, "t.raw", "raw");
}
