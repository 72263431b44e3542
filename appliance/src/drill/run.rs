//! One drill: disks published on throw-away overlays, a machine started on them, watched to its verdict, thrown away.
//!
//! What exists meanwhile, all in one folder `STATE/drilling/N`: overlays, sockets, console, pid file. The machine is a child of
//! the thread that runs the drill, and the kernel kills it with that thread: it ends with Lifeboat, however that ends. What
//! a killed Lifeboat leaves is the folder, and a lease that no longer counts; [`clean_up`] takes the folder away, after a
//! look for a machine that lives in it all the same.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockstore::drill::{Attachments, MAX_SCREENSHOT_LEN};
use blockstore::overlay::Overlay;
use blockstore::{Lease, Progress, Repository};
use hypervisor::{MachineFiles, Qemu};
use nbd_server::{ExportName, ExportTable, Listen, Server};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::checks::{self, Check};
use super::console::{Console, last_lines};
use super::course::{Course, Event, Verdict};
use super::traced::Recorder;
use super::watch::{self as watching, Lab, millis};
use super::{DrillReport, DrillRequest, DrillResult};
use crate::catalog::PointSummary;
use crate::disks::{self, OpenOverlay};
use crate::exports::{FirstRead, OverlayExport};
use crate::problem::{Kind, Problem};
use crate::recovery::{self, RecoverRequest};
use crate::state_dir::{StateDir, create_private_dir};

/// How often a drill looks whether it is to stop.
const CANCEL_INTERVAL: Duration = Duration::from_millis(100);
/// What a last look at the screen, and taking things away, may take beyond the drill's time.
const FAREWELL: Duration = Duration::from_secs(60);
/// Lines of a console that a report quotes.
const QUOTED: usize = 20;

/// What a drill works on.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub repository: Arc<Repository>,
    pub state: StateDir,
    pub server: Server,
    pub point: PointSummary,
    pub machine: RecoverRequest,
    /// What is odd about the machine.
    pub warnings: Vec<String>,
    pub request: Arc<DrillRequest>,
    pub checks: Vec<Check>,
    /// Tells its folder from those of others.
    pub number: usize,
}

/// What a drill brings.
#[derive(Debug)]
pub(super) struct Brought {
    pub report: DrillReport,
    pub attached: Attachments,
}

/// Runs a drill to its verdict. What fails on the way is a verdict, too; an error says that there is none.
///
/// To be polled by a thread of its own: its machine ends with that thread.
pub(super) async fn run(order: &Order, cancel: &Progress) -> Result<Brought, Problem> {
    let began = Instant::now();
    let time = chrono::Utc::now();
    let folder = Folder::make(&order.state, order.number)?;
    let mut course = Course::new(order.checks.iter().map(Check::planned).collect());
    let recorder = Recorder::new(began);
    let mut seen = Seen { warnings: order.warnings.clone(), ..Seen::default() };
    let deadline = Duration::from_secs(order.request.timeout) + FAREWELL;
    let driven = drive(order, &folder, &recorder, &mut course, &mut seen, cancel, began);
    let ended = match tokio::time::timeout(deadline, driven).await {
        Ok(ended) => ended,
        Err(_) => {
            // Something hangs that should not: the guest's time is looked at where it runs.
            course.apply(Event::Deadline, millis(began));
            Ok(())
        }
    };
    if cancel.is_cancelled() {
        return Err(Problem::new(Kind::Failed, format!("the drill of {} was cancelled", order.point.machine)));
    }
    if let Err(problem) = ended {
        course.apply(Event::Broken(problem.to_string().replace('\n', "; ")), millis(began));
    }
    let reason = match course.verdict() {
        Some(Verdict::Passed) => None,
        Some(Verdict::Failed(why)) => Some(why.clone()),
        None => Some("it ended without a verdict".to_owned()),
    };
    let result = if reason.is_none() { DrillResult::Passed } else { DrillResult::Failed };
    let report = DrillReport {
        id: None,
        point: order.point.id.clone(),
        machine: order.point.machine.clone(),
        time,
        result,
        stage: course.stage(),
        reason,
        rto_ms: course.times().ready_ms.filter(|_| result == DrillResult::Passed),
        times: course.times(),
        checks: course.checks().to_vec(),
        kernel_by: course.kernel_by().map(str::to_owned),
        resets: course.resets(),
        seconds: began.elapsed().as_secs_f64(),
        accelerator: seen.accelerator,
        bytes_read: seen.bytes_read,
        chunks_read: recorder.chunks(),
        bytes_written: seen.bytes_written,
        console_tail: last_lines(&seen.console, QUOTED),
        console: None,
        screenshot: None,
        warnings: seen.warnings,
    };
    let attached = Attachments { console: seen.console, screenshot: seen.screenshot, trace: recorder.boot_trace() };
    Ok(Brought { report, attached })
}

/// What was seen of a machine before it was thrown away.
#[derive(Debug, Default)]
struct Seen {
    accelerator: Option<String>,
    console: Vec<u8>,
    screenshot: Vec<u8>,
    bytes_read: u64,
    bytes_written: u64,
    warnings: Vec<String>,
}

async fn drive(
    order: &Order,
    folder: &Folder,
    recorder: &Arc<Recorder>,
    course: &mut Course,
    seen: &mut Seen,
    cancel: &Progress,
    began: Instant,
) -> Result<(), Problem> {
    let served = Served::publish(order, folder, recorder).await?;
    course.apply(Event::Published, millis(began));
    if let Some(variables) = &order.machine.hardware.uefi_vars {
        recovery::keep_variables(&folder.dir, variables)
            .map_err(|error| Problem::failed("its UEFI variables cannot be put in place", &error))?;
    }
    let name = format!("drill of {}", order.point.machine);
    let first = served.overlays.first().cloned();
    let definition = recovery::define_machine(&order.machine, &name, &order.point.disks, first, &folder.dir, |name| {
        folder.socket(name)
    })
    .await?;
    let vm = Qemu::start_attached(&definition, &wrapper())
        .await
        .map_err(|error| Problem::failed("its machine cannot be started", &error))?;
    recorder.listen();
    course.apply(Event::Started, millis(began));
    seen.accelerator = Some(hypervisor::Machine::accelerator(&vm));
    let (events, mut told) = mpsc::channel(64);
    let (stage, stages) = watch::channel(course.stage());
    let subscription = vm.events();
    let lab = Arc::new(Lab {
        console: Mutex::new(Console::new(&definition.files.console)),
        vm,
        files: definition.files,
        recorder: recorder.clone(),
        table: served.table.clone(),
        exports: served.names.clone(),
        began,
        stage: stages,
        events,
    });
    let mut tasks = JoinSet::new();
    checks::start(&lab, &order.checks, &mut tasks);
    tasks.spawn(watching::disks(lab.clone()));
    tasks.spawn(watching::firmware(lab.clone()));
    tasks.spawn(watching::processor(lab.clone()));
    tasks.spawn(watching::machine(lab.clone(), subscription));
    let until = began + Duration::from_secs(order.request.timeout);
    while course.verdict().is_none() && !cancel.is_cancelled() {
        tokio::select! {
            event = told.recv() => match event {
                Some((event, at)) => course.apply(event, at),
                None => break,
            },
            () = tokio::time::sleep_until(until.into()) => course.apply(Event::Deadline, millis(began)),
            () = tokio::time::sleep(CANCEL_INTERVAL) => {}
        }
        stage.send_if_modified(|known| std::mem::replace(known, course.stage()) != course.stage());
    }
    look_at_the_end(&lab, seen).await;
    tasks.shutdown().await;
    let lab = Arc::into_inner(lab);
    if let Some(lab) = lab
        && let Err(error) = lab.vm.quit(Duration::ZERO).await
    {
        seen.warnings.push(crate::problem::chain(&error));
    }
    served.retire().await;
    Ok(())
}

/// Keeps what the guest has shown.
async fn look_at_the_end(lab: &Lab, seen: &mut Seen) {
    let png = lab.files.pid.with_file_name("screen.png");
    match lab.vm.screenshot(&png).await {
        Ok(()) => match std::fs::read(&png) {
            Ok(bytes) if bytes.len() <= MAX_SCREENSHOT_LEN => seen.screenshot = bytes,
            Ok(bytes) => seen.warnings.push(format!("its screenshot of {} bytes is too large to be kept", bytes.len())),
            Err(error) => seen.warnings.push(format!("its screenshot cannot be read: {error}")),
        },
        // A machine that has ended has no screen; that it has is the verdict.
        Err(hypervisor::MachineError::Gone { .. }) => {}
        Err(error) => seen.warnings.push(format!("no screenshot: {}", crate::problem::chain(&error))),
    }
    seen.console = lab.read_console(|console| {
        // What cannot be read now was complained of when it was followed.
        while console.read_on().unwrap_or(false) && console.length() <= super::console::FLOOD {}
        console.log()
    });
    seen.bytes_read = lab.sum(|served| served.read_bytes);
    seen.bytes_written = lab.sum(|served| served.write_bytes);
}

/// A drill's disks, served on a socket in its folder.
struct Served {
    table: Arc<ExportTable>,
    names: Vec<ExportName>,
    overlays: Vec<Arc<Overlay>>,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    lease: Lease,
}

impl Served {
    async fn publish(order: &Order, folder: &Folder, recorder: &Arc<Recorder>) -> Result<Served, Problem> {
        let table = Arc::new(ExportTable::new());
        let server = order.server.beside(table.clone());
        let (order, dir) = (order.clone(), folder.dir.join("disks"));
        let (filled, recorder) = (table.clone(), recorder.clone());
        let work = move || fill(&order, &dir, &filled, &recorder);
        let filled = tokio::task::spawn_blocking(work).await;
        let (names, overlays, lease) =
            filled.map_err(|error| Problem::failed("its disks cannot be published", &error))??;
        let listener = server
            .bind(&Listen::Unix(folder.socket("nbd.sock")))
            .await
            .map_err(|error| Problem::from_listen(&error))?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(listener.serve(async move {
            // A dropped sender is a stop too.
            let _ = stopped.await;
        }));
        Ok(Served { table, names, overlays, stop, task, lease })
    }

    async fn retire(self) {
        let _ = self.stop.send(()); // it may have ended
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the NBD server of a drill ended badly");
        }
        drop(self.lease);
    }
}

type Filled = (Vec<ExportName>, Vec<Arc<Overlay>>, Lease);

fn fill(order: &Order, dir: &Path, table: &ExportTable, recorder: &Arc<Recorder>) -> Result<Filled, Problem> {
    let point = disks::load_point(&order.repository, &order.point.id)?;
    let lease = disks::hold(&order.repository, "drill", &point)?;
    let (mut names, mut overlays) = (Vec::new(), Vec::new());
    for disk in &point.disks {
        let base = disks::open(&order.repository, &point, &disk.name)?;
        let chunk_size = base.chunk_size();
        let traced = Arc::new(recorder.trace(&disk.name, base, chunk_size));
        let overlay = disks::open_overlay(dir, &point, &disk.name, traced, OpenOverlay::Create)?;
        let name = disks::export_name(&disk.name)?;
        let description = format!("{} of {} in a drill", disk.name, point.machine);
        let export =
            OverlayExport { overlay: overlay.clone(), description, first_read: FirstRead::since(Instant::now()) };
        table
            .add(name.clone(), Arc::new(export))
            .map_err(|error| Problem::failed(format!("disk {} cannot be published", disk.name), &error))?;
        names.push(name);
        overlays.push(overlay);
    }
    Ok((names, overlays, lease))
}

/// What stands before a drill's QEMU on its command line: the kernel kills it with the thread that started it, and others
/// come first. Both tools are part of every ordinary Linux; without them a drill runs all the same.
fn wrapper() -> Vec<OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = |program: &str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    let tools: [&[&str]; 2] = [&["setpriv", "--pdeathsig", "KILL", "--"], &["nice", "-n", "5", "--"]];
    let found = tools.iter().filter(|words| words.first().is_some_and(|program| there(program)));
    found.flat_map(|words| words.iter().map(OsString::from)).collect()
}

/// The folder of a drill. It goes when this is dropped.
#[derive(Debug)]
struct Folder {
    dir: PathBuf,
    state: StateDir,
}

impl Folder {
    fn make(state: &StateDir, number: usize) -> Result<Folder, Problem> {
        let folder = Folder { dir: state.drilling().join(number.to_string()), state: state.clone() };
        create_private_dir(&folder.dir.join("disks"))
            .map_err(|error| Problem::failed(format!("cannot make folder {}", folder.dir.display()), &error))?;
        Ok(folder)
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.state.short_path(self.dir.join(name))
    }

    fn files(&self) -> MachineFiles {
        recovery::machine_files(&self.dir, |name| self.socket(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            tracing::warn!(folder = %self.dir.display(), %error, "cannot remove the folder of a drill");
        }
    }
}

impl Folder {
    fn remove(&self) -> std::io::Result<()> {
        for socket in recovery::machine_sockets(&self.dir, |name| self.socket(name)) {
            ignore_missing(std::fs::remove_file(socket))?;
        }
        ignore_missing(std::fs::remove_dir_all(&self.dir))
    }
}

fn ignore_missing(done: std::io::Result<()>) -> std::io::Result<()> {
    match done {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Takes away what drills of an earlier owner of the state folder have left, their machines first. For the owner only.
pub fn clean_up(state: &StateDir) -> Result<(), Problem> {
    let drilling = state.drilling();
    let Ok(entries) = std::fs::read_dir(&drilling) else { return Ok(()) };
    for entry in entries.flatten() {
        let folder = Folder { dir: entry.path(), state: state.clone() };
        let cannot = |error: &std::io::Error| {
            Problem::failed(format!("cannot take away what a drill left in {}", entry.path().display()), error)
        };
        if hypervisor::qemu::kill_left_over(&folder.files()).map_err(|error| cannot(&error))? {
            tracing::warn!(folder = %folder.dir.display(), "ended a machine that a drill had left");
        }
        folder.remove().map_err(|error| cannot(&error))?;
    }
    Ok(())
}
