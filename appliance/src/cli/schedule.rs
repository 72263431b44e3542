//! `schedule`.

use std::time::Duration;

use axum::http::Method;

use super::args::{Global, RunSchedule, Schedule};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::render;
use crate::problem::{Handling, Kind, Problem};
use crate::schedule::{Run, RunResult, ScheduleView};
use crate::signals::stop_signal;

const PATH: &str = "/api/v1/schedules";
/// How often a run is looked at.
const LOOK: Duration = Duration::from_millis(500);

pub async fn run(door: &Door, global: &Global, command: &Schedule) -> Result<(), Problem> {
    match command {
        Schedule::List => list(door, global).await,
        Schedule::Run(args) => begin(door, global, args).await,
    }
}

async fn list(door: &Door, global: &Global) -> Result<(), Problem> {
    let views: Vec<ScheduleView> = door.client.call(Method::GET, PATH, NOTHING).await?;
    if global.json {
        render::json(&views);
        return Ok(());
    }
    if views.is_empty() {
        render::line(
            "no service with policies runs here; they are in its configuration (`lifeboat serve --config FILE`)",
        );
        return Ok(());
    }
    let row = |view: &ScheduleView| {
        let (last, result) = match &view.last {
            None => ("-".to_owned(), String::new()),
            Some(run) => (render::time(run.started), told(run)),
        };
        let next = view.next.map_or("-".to_owned(), render::time);
        vec![view.name.clone(), view.machines.len().to_string(), next, last, result]
    };
    let rows: Vec<_> = views.iter().map(row).collect();
    render::table(&["POLICY", "MACHINES", "NEXT", "LAST", "RESULT"], &rows, &[1]);
    for view in &views {
        for step in view.last.iter().flat_map(|run| &run.steps).filter(|step| step.problem.is_some()) {
            let of = step.machine.as_ref().map_or(String::new(), |machine| format!(" of {machine}"));
            let problem = step.problem.as_deref().unwrap_or_default();
            let tries = render::count(u64::from(step.tries), "try");
            render::line(&format!("{}: {}{of}, {}: {problem}", view.name, step.what, tries.replace("trys", "tries")));
        }
        if let Some((due, why)) = &view.skipped {
            render::line(&format!("{}: skipped what was due at {}: {why}", view.name, render::time(*due)));
        }
    }
    Ok(())
}

fn told(run: &Run) -> String {
    match run.result {
        RunResult::Running => match run.steps.last() {
            Some(step) => format!("running: {} {}", step.what, step.machine.as_deref().unwrap_or_default()),
            None => "running".to_owned(),
        },
        RunResult::Done => "done".to_owned(),
        RunResult::Failed => "FAILED".to_owned(),
        RunResult::Interrupted => "INTERRUPTED".to_owned(),
    }
}

async fn begin(door: &Door, global: &Global, args: &RunSchedule) -> Result<(), Problem> {
    let path = format!("{PATH}/{}", segment(&args.policy));
    let mut view: ScheduleView = door.client.call(Method::POST, &format!("{path}/run"), NOTHING).await?;
    let running = |view: &ScheduleView| view.last.as_ref().is_some_and(|run| run.result == RunResult::Running);
    while !args.detach && running(&view) {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop_signal() => {
                render::note("the run goes on; `lifeboat schedule list` shows how far it is");
                return Ok(());
            }
        }
        view = door.client.call(Method::GET, &path, NOTHING).await?;
    }
    if global.json {
        render::json(&view);
    }
    let Some(run) = view.last else { return Ok(()) };
    if !global.json {
        for step in &run.steps {
            let of = step.machine.as_ref().map_or(String::new(), |machine| format!(" of {machine}"));
            let result = match (&step.problem, step.result) {
                (Some(problem), RunResult::Failed) => format!("FAILED: {problem}"),
                (_, result) => format!("{result:?}").to_lowercase(),
            };
            render::line(&format!("{}{of}: {result}", step.what));
        }
        if args.detach {
            render::line(&format!("policy {} runs", args.policy));
        }
    }
    match run.result {
        RunResult::Running | RunResult::Done => Ok(()),
        RunResult::Failed | RunResult::Interrupted => {
            let problem = Problem::new(Kind::Failed, format!("the run of policy {} did not go well", args.policy));
            Err(problem.handled(Handling::AnswerTold))
        }
    }
}
