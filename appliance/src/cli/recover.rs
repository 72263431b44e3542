//! `recover`, `recoveries`, `recovery` and `discard`.

use std::time::{Duration, Instant};

use axum::http::Method;

use super::args::{Global, Name, Recover};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::render;
use crate::catalog::spec::short_id;
use crate::problem::Problem;
use crate::recovery::{DiskView, HypervisorKind, RecoverRequest, RecoveryView};
use crate::signals::stop_signal;

/// How often a new recovery is looked at for its first output.
const LOOK: Duration = Duration::from_millis(50);

pub async fn run(door: &Door, global: &Global, args: &Recover) -> Result<(), Problem> {
    let request = RecoverRequest {
        point: args.point.clone(),
        name: args.name.clone(),
        on: HypervisorKind::parse(&args.on)?,
        memory: args.memory,
        cpus: args.cpus,
        network: args.network.clone(),
        accel: args.accel.clone(),
        firmware: args.firmware.clone(),
        machine_type: args.machine_type.clone(),
        bus: args.bus.clone(),
    };
    let started: RecoveryView = door.client.call(Method::POST, "/api/v1/recoveries", Some(&request)).await?;
    let view = wait_for_console(door, started, Duration::from_secs(args.wait)).await?;
    if global.json {
        render::json(&view);
    } else {
        describe(&view);
    }
    Ok(())
}

/// Looks at the recovery until its guest has written to the console, has ended, or time is up.
async fn wait_for_console(door: &Door, mut view: RecoveryView, limit: Duration) -> Result<RecoveryView, Problem> {
    let since = Instant::now();
    while view.hypervisor == HypervisorKind::Qemu && view.timings.first_console_ms.is_none() && view.pid.is_some() {
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
    let mut pairs = vec![
        ("recovery", view.name.clone()),
        ("state", view.state.to_string()),
        ("point", format!("{} of {}", short_id(&view.point), view.machine)),
    ];
    let optional = [
        ("problem", view.problem.clone()),
        ("vm", view.vm.clone()),
        ("accelerator", view.accelerator.clone()),
        ("pid", view.pid.map(|pid| pid.to_string())),
        ("console", view.console.clone()),
        ("qmp", view.qmp.clone()),
        ("guest agent", view.guest_agent.clone()),
    ];
    pairs.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    if let Some(moving) = &view.rehydration {
        let left = moving.seconds_left.map_or(String::new(), |seconds| format!(", {seconds} s"));
        let text =
            format!("{}, {}/s, {} left{left}", moving.phase, render::bytes(moving.rate), render::bytes(moving.left));
        pairs.push(("rehydration", text));
        let latency = moving.latency_us.map_or(String::new(), |us| format!(", requests take {us} us"));
        pairs.push(("guest", format!("changes {}/s{latency}", render::bytes(moving.dirty_rate))));
    }
    if !view.next.is_empty() {
        pairs.push(("next", view.next.join(" | ")));
    }
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
    render::pairs(&pairs);
    render::line("");
    let moves = view.disks.iter().any(|disk| disk.target.is_some());
    let row = |disk: &DiskView| {
        let mut row = vec![disk.name.clone(), render::bytes(disk.size), render::bytes(disk.overlay)];
        if moves {
            row.push(format!("{} %", disk.hydrated * 100 / disk.size.max(1)));
            row.push(disk.target.clone().unwrap_or_else(|| "-".to_owned()));
        }
        row.push(disk.nbd_uri.clone().unwrap_or_else(|| "not served".to_owned()));
        row
    };
    let rows: Vec<Vec<String>> = view.disks.iter().map(row).collect();
    match moves {
        true => render::table(&["DISK", "SIZE", "WRITTEN", "COPIED", "TARGET", "NBD URI"], &rows, &[1, 2, 3]),
        false => render::table(&["DISK", "SIZE", "WRITTEN", "NBD URI"], &rows, &[1, 2]),
    }
    for disk in view.disks.iter().filter(|disk| disk.space_short) {
        render::line("");
        render::line(&format!(
            "the overlay of {} has only {} left: make room, or the guest is stopped when it is full until there is some",
            disk.name,
            render::bytes(disk.free.unwrap_or(0))
        ));
    }
    describe_served(view);
    if view.vm.as_deref() == Some("shut-off") {
        let name = &view.name;
        render::line("");
        render::line(&format!(
            "its VM is off: `lifeboat start {name}` starts it again, `lifeboat discard {name}` ends it"
        ));
    }
}

/// What the disks' clients have asked for.
fn describe_served(view: &RecoveryView) {
    let micros = |bound: Option<u64>| match bound {
        None => "-".to_owned(),
        Some(bound) if bound < 1000 => format!("{bound} us"),
        Some(bound) => format!("{} ms", bound / 1000),
    };
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
    if !rows.is_empty() {
        render::line("");
        let head = ["DISK", "READS", "READ", "MEMORY", "P99 <", "WRITES", "P99 <", "FLUSHES", "P99 <", "ERRORS"];
        render::table(&head, &rows, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }
}

pub async fn list(door: &Door, global: &Global) -> Result<(), Problem> {
    let views: Vec<RecoveryView> = door.client.call(Method::GET, "/api/v1/recoveries", NOTHING).await?;
    if global.json {
        render::json(&views);
        return Ok(());
    }
    if views.is_empty() {
        render::line("no recoveries; `lifeboat recover POINT` begins one");
        return Ok(());
    }
    let row = |view: &RecoveryView| {
        vec![
            view.name.clone(),
            if view.problem.is_some() { format!("{} (!)", view.state) } else { view.state.to_string() },
            view.vm.clone().unwrap_or_else(|| "-".to_owned()),
            view.machine.clone(),
            short_id(&view.point).to_owned(),
            view.pid.map_or("-".to_owned(), |pid| pid.to_string()),
        ]
    };
    let rows: Vec<Vec<String>> = views.iter().map(row).collect();
    render::table(&["RECOVERY", "STATE", "VM", "MACHINE", "POINT", "PID"], &rows, &[]);
    for view in &views {
        if let Some(problem) = &view.problem {
            render::line(&format!("{}: {problem}", view.name));
        }
    }
    Ok(())
}

pub async fn show(door: &Door, global: &Global, args: &Name) -> Result<(), Problem> {
    let view = get(door, &args.name).await?;
    if global.json {
        render::json(&view);
    } else {
        describe(&view);
    }
    Ok(())
}

pub async fn start(door: &Door, global: &Global, args: &Name) -> Result<(), Problem> {
    let path = format!("/api/v1/recoveries/{}/start", segment(&args.name));
    let view: RecoveryView = door.client.call(Method::POST, &path, NOTHING).await?;
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
        let targets: Vec<String> = view.disks.iter().filter_map(|disk| disk.target.clone()).collect();
        let kept = match targets.as_slice() {
            [] => format!("recovery point {} is as it was", short_id(&view.point)),
            targets => format!("its disks stay on {}", targets.join(", ")),
        };
        render::line(&format!("discarded recovery {}; {kept}", view.name));
    }
    Ok(())
}
