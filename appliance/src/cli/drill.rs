//! `drill` and `drills`.

use axum::http::Method;

use super::args::{Drill, Drills, Global};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::{progress, render};
use crate::catalog::spec::short_id;
use crate::drill::{DrillReport, DrillRequest, DrillResult};
use crate::problem::{Handling, Kind, Problem};

pub async fn run(door: &Door, global: &Global, args: &Drill) -> Result<(), Problem> {
    let request = DrillRequest {
        points: args.points.clone(),
        expect: args.expect.clone(),
        ports: args.ports.clone(),
        agent: args.agent,
        command: args.command.clone(),
        screenshot: args.screenshot,
        timeout: args.timeout,
        parallel: args.parallel,
        memory_budget: args.memory_budget,
        network: args.network.clone(),
        accel: args.accel.clone(),
        hardware: super::hardware::of(&args.made_of)?,
    };
    let result = progress::run(&door.client, "/api/v1/drills", &request).await?;
    let reports: Vec<DrillReport> =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read the result", &error))?;
    match (global.json, reports.as_slice()) {
        (true, [report]) => render::json(report),
        (true, reports) => render::json(&reports),
        (false, reports) => reports.iter().for_each(describe),
    }
    let failed = reports.iter().filter(|report| report.result == DrillResult::Failed).count();
    if failed == 0 {
        return Ok(());
    }
    let title = format!("{failed} of {} failed", render::count(reports.len() as u64, "drill"));
    Err(Problem::new(Kind::Failed, title).handled(Handling::AnswerTold))
}

fn describe(report: &DrillReport) {
    let point = short_id(&report.point);
    let heading = match (&report.reason, report.rto_ms) {
        (Some(reason), _) => format!("FAILED {} ({point}) at stage {}: {reason}", report.machine, report.stage),
        (None, rto) => format!("passed {} ({point}): ready after {}", report.machine, render::millis(rto)),
    };
    render::line(&heading);
    for check in &report.checks {
        let mark = if check.passed { "+" } else { "-" };
        let detail = check.detail.as_ref().map_or(String::new(), |detail| format!(": {}", detail.replace('\n', " ")));
        render::line(&format!("  {mark} {}{detail}", check.check));
    }
    let times = report.times;
    let times = [("first block", times.first_block_ms), ("kernel", times.kernel_ms), ("ready", times.ready_ms)];
    let times: Vec<String> = times
        .iter()
        .filter(|(_, at)| at.is_some())
        .map(|(what, at)| format!("{what} {}", render::millis(*at)))
        .collect();
    let read = format!("read {} in {}", render::bytes(report.bytes_read), render::count(report.chunks_read, "chunk"));
    render::line(&format!("  {}", [times, vec![read]].concat().join(", ")));
    if report.result == DrillResult::Failed {
        match report.console_tail.as_slice() {
            [] => render::line("  its console is empty"),
            lines => {
                render::line("  the last lines of its console:");
                lines.iter().for_each(|line| render::line(&format!("  | {line}")));
            }
        }
    }
    if let Some(screenshot) = &report.screenshot {
        render::line(&format!("  screen: {screenshot}"));
    }
    report.warnings.iter().for_each(|warning| render::note(&format!("warning: {warning}")));
}

pub async fn list(door: &Door, global: &Global, args: &Drills) -> Result<(), Problem> {
    let query = args.machine.as_ref().map_or(String::new(), |machine| format!("?machine={}", segment(machine)));
    let reports: Vec<DrillReport> = door.client.call(Method::GET, &format!("/api/v1/drills{query}"), NOTHING).await?;
    if global.json {
        render::json(&reports);
        return Ok(());
    }
    if reports.is_empty() {
        render::line("no drills yet; `lifeboat drill POINT` runs one");
        return Ok(());
    }
    let row = |report: &DrillReport| {
        vec![
            render::time(report.time),
            report.machine.clone(),
            short_id(&report.point).to_owned(),
            report.result.to_string(),
            report.stage.to_string(),
            report.rto_ms.map_or("-".to_owned(), |rto| render::millis(Some(rto))),
            render::bytes(report.bytes_read),
            report.reason.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<Vec<String>> = reports.iter().map(row).collect();
    render::table(&["TIME", "MACHINE", "POINT", "RESULT", "STAGE", "READY", "READ", "WHY"], &rows, &[5, 6]);
    Ok(())
}
