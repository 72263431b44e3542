//! What drills brought: kept with the point in the repository, listed, shown; and copies of console and screenshot in the
//! state folder for whoever wants to look at files.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use blockstore::drill::DrillRecord;
use blockstore::error::ReadError;
use blockstore::{DrillId, RecoveryPointId};
use schemars::JsonSchema;
use serde::Deserialize;

use super::DrillReport;
use super::run::Brought;
use crate::access::Caller;
use crate::app::App;
use crate::problem::{Problem, chain};
use crate::state_dir::create_private_dir;

/// Drills whose copies stay in the state folder.
const COPIES: usize = 100;
/// Drills that are listed at the most.
const LISTED_MAX: usize = 1000;

/// Keeps what a drill brought. A report that cannot be kept says so and is told all the same.
pub(super) fn keep(app: &App, brought: Brought) -> DrillReport {
    let Brought { mut report, attached } = brought;
    let time = u64::try_from(report.time.timestamp_millis()).unwrap_or(0);
    let kept = report.point.parse::<RecoveryPointId>().map_err(|error| error.to_string()).and_then(|point| {
        let summary = serde_json::to_value(&report).map_err(|error| error.to_string())?;
        let record = DrillRecord { summary, attached: attached.clone() };
        app.repository.keep_drill(point, time, &record).map_err(|error| chain(&error))
    });
    let name = match kept {
        Ok(id) => {
            report.id = Some(id.to_string());
            id.to_string()
        }
        Err(why) => {
            tracing::error!(point = report.point, why, "what a drill found is not kept");
            report.warnings.push(format!("the result is not kept with the recovery point: {why}"));
            format!("{}-{time:016x}", report.point)
        }
    };
    let dir = app.state.drills().join(name);
    match copy(&dir, &attached.console, &attached.screenshot) {
        Ok((console, screenshot)) => {
            report.console = Some(console.display().to_string());
            report.screenshot = screenshot.map(|path| path.display().to_string());
        }
        Err(error) => report.warnings.push(format!("no files are left in {}: {error}", dir.display())),
    }
    drop_copies(&app.state.drills());
    report
}

fn copy(dir: &Path, console: &[u8], screenshot: &[u8]) -> io::Result<(PathBuf, Option<PathBuf>)> {
    create_private_dir(dir)?;
    let (log, png) = (dir.join("console.log"), dir.join("screenshot.png"));
    fs::write(&log, console)?;
    if screenshot.is_empty() {
        return Ok((log, None));
    }
    fs::write(&png, screenshot)?;
    Ok((log, Some(png)))
}

/// Removes the oldest copies.
fn drop_copies(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut copies: Vec<DrillId> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    copies.sort_unstable_by_key(|id| std::cmp::Reverse(id.time_unix_ms));
    for id in copies.iter().skip(COPIES) {
        // What cannot be removed is tried again next time.
        let _ = fs::remove_dir_all(dir.join(id.to_string()));
    }
}

/// Which drills to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct Filter {
    /// Of this machine.
    pub machine: Option<String>,
    /// Of this point.
    pub point: Option<String>,
    /// So many at the most.
    pub limit: Option<usize>,
}

/// Drills of the machines that `caller` may see, newest first. One that cannot be read is left out, and verify names it.
pub fn list(app: &App, caller: &Caller, filter: &Filter) -> Result<Vec<DrillReport>, Problem> {
    let point = filter.point.as_ref().map(|spec| app.resolve_for(caller, spec)).transpose()?;
    let wanted = |machine: &str| filter.machine.as_ref().is_none_or(|wanted| wanted == machine);
    let machines: Option<HashSet<String>> = match (&filter.machine, caller.is_unlimited()) {
        (None, true) => None,
        _ => {
            let points = app.listing_for(caller)?.points;
            Some(points.iter().filter(|point| wanted(&point.machine)).map(|point| point.id.clone()).collect())
        }
    };
    if let (Some(machine), Some(points)) = (&filter.machine, &machines)
        && points.is_empty()
    {
        return Err(Problem::not_found(format!("machine {machine} has no recovery point"))
            .hint("`lifeboat points` lists all machines"));
    }
    let mut ids = app.repository.drills().map_err(|error| cannot_list(&error))?;
    ids.retain(|id| point.as_ref().is_none_or(|point| point.id == id.point.to_string()));
    ids.retain(|id| machines.as_ref().is_none_or(|points| points.contains(&id.point.to_string())));
    ids.sort_unstable_by_key(|id| std::cmp::Reverse(id.time_unix_ms));
    let wanted = filter.limit.unwrap_or(LISTED_MAX).min(LISTED_MAX);
    Ok(ids.into_iter().filter_map(|id| load(app, id)).take(wanted).collect())
}

fn load(app: &App, id: DrillId) -> Option<DrillReport> {
    let summary = app.drill_summary(id).inspect_err(|error| {
        tracing::warn!(drill = %id, error = %chain(error), "left out: a drill cannot be read");
    });
    serde_json::from_value(summary.ok()?).map(|report| with_paths(app, id, report)).ok()
}

fn with_paths(app: &App, id: DrillId, report: DrillReport) -> DrillReport {
    let dir = app.state.drills().join(id.to_string());
    let path = |name: &str| Some(dir.join(name)).filter(|path| path.is_file()).map(|path| path.display().to_string());
    DrillReport { id: Some(id.to_string()), console: path("console.log"), screenshot: path("screenshot.png"), ..report }
}

/// One drill.
pub fn show(app: &App, caller: &Caller, id: &str) -> Result<DrillReport, Problem> {
    let id = find(app, caller, id)?;
    let summary = app.drill_summary(id).map_err(|error| cannot_read(id, &error))?;
    let report =
        serde_json::from_value(summary).map_err(|error| Problem::failed(format!("cannot read drill {id}"), &error))?;
    Ok(with_paths(app, id, report))
}

/// Something that is attached to a drill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attachment {
    /// The console log.
    Console,
    /// The PNG screenshot.
    Screenshot,
    /// The boot trace, as JSON.
    Trace,
}

/// What is attached to a drill.
pub fn attachment(app: &App, caller: &Caller, id: &str, which: Attachment) -> Result<Vec<u8>, Problem> {
    let id = find(app, caller, id)?;
    let attached = app.repository.drill(id).map_err(|error| cannot_read(id, &error))?.attached;
    match which {
        Attachment::Console => Ok(attached.console),
        Attachment::Screenshot if attached.screenshot.is_empty() => {
            Err(Problem::not_found(format!("drill {id} has no screenshot")))
        }
        Attachment::Screenshot => Ok(attached.screenshot),
        Attachment::Trace => {
            let disks = attached.trace.disks.iter();
            let disks: Vec<_> =
                disks.map(|disk| serde_json::json!({ "disk": disk.disk, "chunks": disk.chunks })).collect();
            serde_json::to_vec(&disks).map_err(|error| Problem::failed("cannot write the trace", &error))
        }
    }
}

/// The drill of this name, if it is of a machine that `caller` may see.
fn find(app: &App, caller: &Caller, id: &str) -> Result<DrillId, Problem> {
    let none = || Problem::not_found(format!("there is no drill `{id}`")).hint("`lifeboat drills` lists them");
    let parsed: DrillId = id.parse().map_err(|_| none())?;
    let known = app.repository.drills().map_err(|error| cannot_list(&error))?;
    let seen = caller.is_unlimited() || {
        let point = parsed.point.to_string();
        app.listing_for(caller)?.points.iter().any(|listed| listed.id == point)
    };
    if seen && known.contains(&parsed) { Ok(parsed) } else { Err(none()) }
}

fn cannot_list(error: &ReadError) -> Problem {
    Problem::from_read("cannot list drills", error)
}

fn cannot_read(id: DrillId, error: &ReadError) -> Problem {
    Problem::from_read(&format!("cannot read drill {id}"), error)
        .hint("drill its recovery point again: the next result replaces it")
}
