//! Several drills: as many at once as CPUs, a memory budget and the host allow. Recoveries come first: a drill never
//! waits in their queue, it starts when there is room that nobody waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use blockstore::Progress;
use tokio::runtime::Handle;

use super::checks::Check;
use super::run::{self, Order};
use super::{DrillReport, DrillRequest, report};
use crate::access::Caller;
use crate::admission::{Ask, Grant};
use crate::app::App;
use crate::catalog::PointSummary;
use crate::events::Topic;
use crate::jobs::Subject;
use crate::problem::{Kind, Problem};
use crate::recovery::RecoverRequest;

/// How often somebody who waits for room looks for it.
const LOOK: Duration = Duration::from_millis(500);
/// Points that one request may name.
const POINTS_MAX: usize = 10_000;

/// Drills that can be run.
#[derive(Debug)]
pub struct Plan {
    points: Vec<Planned>,
    request: Arc<DrillRequest>,
    checks: Vec<Check>,
}

/// A point, and the machine that it is booted in.
#[derive(Debug)]
struct Planned {
    point: PointSummary,
    machine: RecoverRequest,
    warnings: Vec<String>,
}

impl Plan {
    /// What is drilled, for a person.
    pub fn subject(&self) -> Subject {
        match self.points.as_slice() {
            [one] => Subject::machine(&one.point.machine),
            points => Subject::from(format!("{} points", points.len())),
        }
    }
}

/// Finds the points that a request names, among those that `caller` may see, and looks whether it makes sense.
pub fn plan(app: &App, caller: &Caller, request: DrillRequest) -> Result<Plan, Problem> {
    let checks = request.checks()?;
    if request.points.is_empty() || request.points.len() > POINTS_MAX {
        return Err(Problem::usage(format!("{} points are named", request.points.len()))
            .hint(format!("name 1 to {POINTS_MAX} points to drill")));
    }
    let points = request.points.iter().map(|spec| prepare(app, caller, &request, spec)).collect::<Result<_, _>>()?;
    Ok(Plan { points, request: Arc::new(request), checks })
}

/// What a point is booted in: what its backup says of the machine, and what is asked for.
fn prepare(app: &App, caller: &Caller, request: &DrillRequest, spec: &str) -> Result<Planned, Problem> {
    let point = app.resolve_for(caller, spec)?;
    let (mut machine, warnings) = app.recoveries.complete(&point, request.machine(&point))?.into_parts();
    // It meets nobody who has the same one, and guests know their network by it.
    machine.mac = machine.hardware.nic.mac.is_some().then(|| "keep".to_owned());
    crate::recovery::check_machine(&machine, &point.disks)?;
    if request.memory_budget.is_some_and(|budget| budget < machine.ask().memory) {
        return Err(Problem::usage(format!("the memory budget is less than what the guest of {} has", point.machine))
            .hint("give a larger --memory-budget, or less --memory"));
    }
    Ok(Planned { point, machine, warnings })
}

/// Runs all drills of a plan and keeps what they bring; the reports stand in the order of the points. Blocks. Must be called
/// where a runtime is.
pub fn run_all(app: &Arc<App>, plan: &Plan, progress: &Progress) -> Result<Vec<DrillReport>, Problem> {
    let runtime = Handle::current();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut brought = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(planned) = plan.points.get(number) else { return Ok(brought) };
            brought.push((number, one(app, plan, planned, &runtime, progress)?));
        }
    };
    let mut reports: Vec<(usize, DrillReport)> = Vec::new();
    let ended: Vec<Result<_, Problem>> = thread::scope(|scope| {
        // A thread for each drill at a time: a drill's machine ends with the thread that started it.
        let threads: Vec<_> = (0..at_once(plan)).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    for ended in ended {
        reports.extend(ended?);
    }
    reports.sort_by_key(|(number, _)| *number);
    Ok(reports.into_iter().map(|(_, report)| report).collect())
}

/// How many drills run at once.
fn at_once(plan: &Plan) -> usize {
    let asks = || plan.points.iter().map(|planned| planned.machine.ask());
    let most = |what: fn(&Ask) -> u64| asks().map(|ask| what(&ask)).max().unwrap_or(0).max(1);
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
    let by_cpus = plan.request.parallel.map_or(cores.div_ceil(most(|ask| ask.cpus.into())), |parallel| parallel as u64);
    let by_memory = plan.request.memory_budget.map_or(u64::MAX, |budget| budget / most(|ask| ask.memory));
    usize::try_from(by_cpus.min(by_memory)).unwrap_or(usize::MAX).clamp(1, plan.points.len().max(1))
}

fn one(
    app: &Arc<App>,
    plan: &Plan,
    planned: &Planned,
    runtime: &Handle,
    progress: &Progress,
) -> Result<DrillReport, Problem> {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let point = &planned.point;
    let grant = wait_for_room(app, planned, progress)?;
    let order = Order {
        repository: app.repository.clone(),
        state: app.state.clone(),
        server: app.server.clone(),
        point: point.clone(),
        machine: planned.machine.clone(),
        warnings: planned.warnings.clone(),
        request: plan.request.clone(),
        checks: plan.checks.clone(),
        number: NUMBER.fetch_add(1, Ordering::Relaxed),
    };
    tracing::info!(machine = point.machine, point = point.id, "drill started");
    let brought = runtime.block_on(run::run(&order, progress))?;
    drop(grant);
    let report = report::keep(app, brought);
    app.events.tell(Topic::Drill, Some(&report.machine), &report);
    tracing::info!(
        machine = report.machine, point = report.point, result = %report.result, stage = %report.stage,
        reason = report.reason, rto_ms = report.rto_ms, seconds = report.seconds, "drill done"
    );
    Ok(report)
}

fn wait_for_room(app: &App, planned: &Planned, progress: &Progress) -> Result<Grant, Problem> {
    let machine = &planned.point.machine;
    loop {
        if progress.is_cancelled() {
            return Err(Problem::new(Kind::Failed, format!("the drill of {machine} was cancelled")));
        }
        if let Some(grant) = app.recoveries.room_for_drill(&format!("drill of {machine}"), planned.machine.ask())? {
            return Ok(grant);
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_bounds_how_many_drills_run_at_once() {
        let at_once = |points: usize, parallel, memory_budget| {
            let mut request = DrillRequest { parallel, memory_budget, ..DrillRequest::default() };
            request.hardware.memory = Some(1 << 30);
            let planned = |_| {
                let point = PointSummary::example();
                Planned { machine: request.machine(&point), point, warnings: Vec::new() }
            };
            let points = (0..points).map(planned).collect();
            super::at_once(&Plan { points, request: Arc::new(request), checks: Vec::new() })
        };
        assert_eq!(at_once(10, Some(4), None), 4);
        assert_eq!(at_once(3, Some(4), None), 3);
        assert_eq!(at_once(10, Some(4), Some(2 << 30)), 2);
        assert_eq!(at_once(10, Some(4), Some((2 << 30) - 1)), 1);
        assert!(at_once(10, None, None) >= 1);
    }
}
