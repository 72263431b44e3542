//! `recover`, `recoveries`, `recovery` and `discard`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::http::Method;
use hypervisor::Keep;

use super::args::{Admission, Global, Name, Recover, Recovery, Start};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::{host, render};
use crate::catalog::spec::short_id;
use crate::problem::Problem;
use crate::recovery::{
    CommitsView, DiskView, HypervisorKind, Identity, RecoverRequest, RecoveryView, RehydrationView, Schedule, ServeOn,
    Wish,
};
use crate::signals::stop_signal;

/// How often a new recovery is looked at for its first output.
const LOOK: Duration = Duration::from_millis(50);

pub async fn run(door: &Door, global: &Global, args: &Recover) -> Result<(), Problem> {
    let request = RecoverRequest {
        point: args.point.clone(),
        name: args.name.clone(),
        on: HypervisorKind::parse(&args.on)?,
        network: args.network.clone(),
        accel: args.accel.clone(),
        display: args.display.clone(),
        mac: args.mac.clone(),
        commits: args.commit_every.map(|every_seconds| Schedule {
            every_seconds,
            consistency: Wish::Auto,
            labels: BTreeMap::new(),
        }),
        hardware: super::hardware::of(&args.made_of)?,
        keep: if args.persistent { Keep::Persistent } else { Keep::Transient },
        identity: if args.keep_identity { Identity::Keep } else { Identity::Fresh },
        serve_on: serve_on(args)?,
        runs_as: None,
    };
    let started = admitted(door, "/api/v1/recoveries", Some(&request), args.admission).await?;
    let view = wait_for_console(door, started, Duration::from_secs(args.wait)).await?;
    if global.json {
        render::json(&view);
    } else {
        describe(&view);
    }
    Ok(())
}

fn serve_on(args: &Recover) -> Result<Option<ServeOn>, Problem> {
    let Some(listen) = args.serve_on.clone() else { return Ok(None) };
    let tls = super::export::tls(args.tls_dir.as_deref(), false, &[])?;
    Ok(Some(ServeOn { listen, tls, insecure_tcp: args.insecure_tcp.clone() }))
}

/// Asks for a VM to be started, and waits for memory if that is wanted.
async fn admitted(
    door: &Door,
    path: &str,
    body: Option<&RecoverRequest>,
    admission: Admission,
) -> Result<RecoveryView, Problem> {
    let terms = match admission {
        Admission { queue: true, .. } => "queue",
        Admission { force: true, .. } => "force",
        Admission { .. } => "check",
    };
    let path = format!("{path}?admission={terms}");
    let started: RecoveryView = tokio::select! {
        started = door.client.call(Method::POST, &path, body) => started?,
        problem = host::wait(door), if admission.queue => return Err(problem),
    };
    for warning in &started.warnings {
        render::note(&format!("warning: {warning}"));
    }
    Ok(started)
}

/// Looks at the recovery until its guest has written to the console, has ended, or time is up.
async fn wait_for_console(door: &Door, mut view: RecoveryView, limit: Duration) -> Result<RecoveryView, Problem> {
    let since = Instant::now();
    while view.hypervisor != HypervisorKind::None && view.timings.first_console_ms.is_none() && view.pid.is_some() {
        if since.elapsed() > limit {
            render::note("the guest has not written to its serial console yet");
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop_signal() => break,
        }
        view = get(door, &view.name).await?;
    }
    Ok(view)
}

pub async fn get(door: &Door, name: &str) -> Result<RecoveryView, Problem> {
    door.client.call(Method::GET, &format!("/api/v1/recoveries/{}", segment(name)), NOTHING).await
}

pub fn describe(view: &RecoveryView) {
    render::lines(&lines(view));
}

/// All that is known of a recovery, the most urgent first.
pub fn lines(view: &RecoveryView) -> Vec<String> {
    let mut pairs = vec![
        ("recovery", view.name.clone()),
        ("state", view.state.to_string()),
        ("point", format!("{} of {}", short_id(&view.point), view.machine)),
    ];
    pairs.extend(view.problem.clone().map(|problem| ("problem", problem)));
    if let Some(moving) = &view.rehydration {
        let done = view.disks.iter().map(|disk| disk.hydrated).sum();
        pairs.push(("copied", render::share(done, view.disks.iter().map(|disk| disk.size).sum())));
        let left = moving.seconds_left.map_or(String::new(), |left| format!(", about {} left", render::duration(left)));
        let limit = moving.limit.map_or(String::new(), |limit| format!(" (at most {}/s)", render::bytes(limit)));
        pairs.push(("rehydration", format!("{}, {}/s{limit}{left}", moving.phase, render::bytes(moving.rate))));
        let latency =
            moving.latency_us.map_or(String::new(), |us| format!(", its requests take {}", render::micros(us)));
        pairs.push(("guest", format!("changes {}/s{latency}", render::bytes(moving.dirty_rate))));
    }
    let free = view.disks.iter().filter_map(|disk| disk.free).min();
    let free = free.map_or(String::new(), |free| format!(", {} free", render::bytes(free)));
    let written = view.disks.iter().map(|disk| disk.overlay).sum();
    pairs.push(("overlay", format!("{}{free}", render::bytes(written))));
    let domain = view.domain.as_ref();
    let optional = [
        ("on", Some(String::from(view.hypervisor.clone())).filter(|_| domain.is_some())),
        ("domain", domain.map(|domain| format!("{} {} ({})", domain.name, domain.uuid, kept(domain.keep)))),
        ("vm", view.vm.clone()),
        ("accelerator", view.accelerator.clone()),
        ("pid", view.pid.map(|pid| pid.to_string())),
        ("console", view.console.clone()),
        ("qmp", view.qmp.clone()),
        ("guest agent", view.guest_agent.clone()),
        ("display", view.display.clone()),
    ];
    pairs.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    let timings = view.timings;
    let times = [
        ("time to export", timings.export_ms),
        ("time to VM", timings.started_ms),
        ("time to first read", timings.first_read_ms),
        ("time to console", timings.first_console_ms),
    ];
    pairs.extend(times.into_iter().filter(|(_, time)| time.is_some()).map(|(name, time)| (name, render::millis(time))));
    if let Some(pause) = timings.cutover_pause_ms {
        pairs.push(("held by cutover", format!("{pause} ms")));
    }
    pairs.extend(view.commits.as_ref().map(|commits| ("commits", commits_line(commits))));
    for (at, command) in next_commands(view).into_iter().enumerate() {
        pairs.push((if at == 0 { "next" } else { "" }, command));
    }
    let mut lines = render::pair_lines(&pairs);
    lines.push(String::new());
    lines.extend(disk_lines(view));
    lines.extend(served_lines(view));
    if view.vm.as_deref() == Some("shut-off") {
        let name = &view.name;
        lines.push(String::new());
        lines
            .push(format!("its VM is off: `lifeboat start {name}` starts it again, `lifeboat discard {name}` ends it"));
    }
    lines
}

/// How often it is committed, and how that went.
fn commits_line(commits: &CommitsView) -> String {
    let mut parts = Vec::new();
    parts.extend(commits.every_seconds.map(|every| format!("every {}", render::duration(every))));
    parts.extend(commits.last_point.as_ref().map(|point| {
        let time = commits.last_time.map_or(String::new(), |time| format!(" at {}", render::time(time)));
        let how = commits.last_consistency.as_ref().map_or(String::new(), |how| format!(" ({how}-consistent)"));
        format!("last {}{time}{how}", short_id(point))
    }));
    parts.extend(commits.next_time.map(|time| format!("next {}", render::time(time))));
    parts.extend(commits.problem.as_ref().map(|problem| format!("FAILED: {problem}")));
    parts.join(", ")
}

fn kept(keep: Keep) -> &'static str {
    match keep {
        Keep::Transient => "transient",
        Keep::Persistent | Keep::Production => "persistent",
    }
}

/// What can be done next, as it is typed.
fn next_commands(view: &RecoveryView) -> Vec<String> {
    let command = |step: &String| match step.split_once(' ') {
        Some((verb, rest)) => format!("lifeboat {verb} {} {rest}", view.name),
        None if step == "rehydrate" => format!("lifeboat rehydrate {} --to TARGET", view.name),
        None => format!("lifeboat {step} {}", view.name),
    };
    view.next.iter().map(command).collect()
}

fn disk_lines(view: &RecoveryView) -> Vec<String> {
    let moves = view.disks.iter().any(|disk| disk.target.is_some());
    let row = |disk: &DiskView| {
        let mut row = vec![disk.name.clone(), render::bytes(disk.size), render::bytes(disk.overlay)];
        if moves {
            row.push(format!("{} %", disk.hydrated.saturating_mul(100) / disk.size.max(1)));
            row.push(disk.target.clone().unwrap_or_else(|| "-".to_owned()));
        }
        row.push(disk.nbd_uri.clone().unwrap_or_else(|| "not served".to_owned()));
        row
    };
    let rows: Vec<Vec<String>> = view.disks.iter().map(row).collect();
    let mut lines = match moves {
        true => render::table_lines(&["DISK", "SIZE", "WRITTEN", "COPIED", "TARGET", "NBD URI"], &rows, &[1, 2, 3]),
        false => render::table_lines(&["DISK", "SIZE", "WRITTEN", "NBD URI"], &rows, &[1, 2]),
    };
    for disk in view.disks.iter().filter(|disk| disk.space_short) {
        lines.push(String::new());
        lines.push(format!(
            "the overlay of {} has only {} left: make room, or the guest is stopped when it is full until there is some",
            disk.name,
            render::bytes(disk.free.unwrap_or(0))
        ));
    }
    lines
}

/// What the disks' clients have asked for.
fn served_lines(view: &RecoveryView) -> Vec<String> {
    let micros = |bound: Option<u64>| bound.map_or("-".to_owned(), render::micros);
    let row = |disk: &DiskView| {
        let served = disk.served.as_ref().filter(|served| served.reads + served.writes + served.flushes > 0)?;
        let memory = (served.reads_from_memory * 100).checked_div(served.reads);
        Some(vec![
            disk.name.clone(),
            served.reads.to_string(),
            render::bytes(served.read_bytes),
            memory.map_or("-".to_owned(), |share| format!("{share} %")),
            micros(served.read_p99_us),
            served.writes.to_string(),
            micros(served.write_p99_us),
            served.flushes.to_string(),
            micros(served.flush_p99_us),
            served.errors.to_string(),
        ])
    };
    let rows: Vec<Vec<String>> = view.disks.iter().filter_map(row).collect();
    if rows.is_empty() {
        return Vec::new();
    }
    let head = ["DISK", "READS", "READ", "MEMORY", "P99 <", "WRITES", "P99 <", "FLUSHES", "P99 <", "ERRORS"];
    let mut lines = vec![String::new()];
    lines.extend(render::table_lines(&head, &rows, &[1, 2, 3, 4, 5, 6, 7, 8, 9]));
    lines
}

pub async fn list(door: &Door, global: &Global) -> Result<(), Problem> {
    let views: Vec<RecoveryView> = door.client.call(Method::GET, "/api/v1/recoveries", NOTHING).await?;
    if global.json {
        render::json(&views);
        return Ok(());
    }
    render::lines(&list_lines(&views));
    host::footer(door).await
}

/// The recoveries as a table, and what is wrong with any.
pub fn list_lines(views: &[RecoveryView]) -> Vec<String> {
    if views.is_empty() {
        return vec!["no recoveries; `lifeboat recover POINT` begins one".to_owned()];
    }
    let row = |view: &RecoveryView| {
        vec![
            view.name.clone(),
            if view.problem.is_some() { format!("{} (!)", view.state) } else { view.state.to_string() },
            view.vm.clone().unwrap_or_else(|| "-".to_owned()),
            view.machine.clone(),
            short_id(&view.point).to_owned(),
            view.pid.map_or("-".to_owned(), |pid| pid.to_string()),
            view.rehydration.as_ref().map_or("-".to_owned(), |moving| progress(view, moving)),
        ]
    };
    let rows: Vec<Vec<String>> = views.iter().map(row).collect();
    let mut lines = render::table_lines(&["RECOVERY", "STATE", "VM", "MACHINE", "POINT", "PID", "COPIED"], &rows, &[]);
    let problem = |view: &RecoveryView| Some(format!("{}: {}", view.name, view.problem.as_ref()?));
    lines.extend(views.iter().filter_map(problem));
    lines
}

/// How far the copying is, in a few words.
fn progress(view: &RecoveryView, moving: &RehydrationView) -> String {
    let size: u64 = view.disks.iter().map(|disk| disk.size).sum();
    let done: u64 = view.disks.iter().map(|disk| disk.hydrated).sum();
    let percent = u128::from(done) * 100 / u128::from(size.max(1));
    let left = moving.seconds_left.map_or(String::new(), |left| format!(", {} left", render::duration(left)));
    match moving.phase.as_str() {
        "copying" => format!("{percent} %, {}/s{left}", render::bytes(moving.rate)),
        phase => format!("{percent} %, {phase}"),
    }
}

/// A recovery on one line.
pub fn summary(view: &RecoveryView) -> String {
    let mut parts = vec![format!("{} {}", view.name, view.state)];
    parts.extend(view.vm.as_ref().map(|vm| format!("vm {vm}")));
    if let Some(moving) = &view.rehydration {
        parts.push(format!("copied {}", progress(view, moving)));
        parts.push(format!("guest changes {}/s", render::bytes(moving.dirty_rate)));
        parts.extend(moving.latency_us.map(|us| format!("its requests take {}", render::micros(us))));
    }
    parts.push(format!("overlay {}", render::bytes(view.disks.iter().map(|disk| disk.overlay).sum())));
    parts.extend(view.problem.as_ref().map(|problem| problem.replace('\n', " ")));
    parts.join("; ")
}

pub async fn show(door: &Door, global: &Global, args: &Recovery) -> Result<(), Problem> {
    let view = get(door, &args.name).await?;
    if global.json {
        render::json(&view);
    } else {
        describe(&view);
    }
    Ok(())
}

pub async fn start(door: &Door, global: &Global, args: &Start) -> Result<(), Problem> {
    let path = format!("/api/v1/recoveries/{}/start", segment(&args.name));
    let view = admitted(door, &path, None, args.admission).await?;
    if global.json {
        render::json(&view);
    } else {
        describe(&view);
    }
    Ok(())
}

pub async fn discard(door: &Door, global: &Global, args: &Name) -> Result<(), Problem> {
    let path = format!("/api/v1/recoveries/{}", segment(&args.name));
    let view: RecoveryView = door.client.call(Method::DELETE, &path, NOTHING).await?;
    if global.json {
        render::json(&view);
    } else {
        if view.point.is_empty() && view.disks.is_empty() {
            render::line(&format!("{} is gone", view.name));
            return Ok(());
        }
        let targets: Vec<String> = view.disks.iter().filter_map(|disk| disk.target.clone()).collect();
        let kept = match targets.as_slice() {
            [] => format!("recovery point {} is as it was", short_id(&view.point)),
            targets => format!("its disks stay on {}", targets.join(", ")),
        };
        render::line(&format!("discarded recovery {}; {kept}", view.name));
    }
    Ok(())
}
