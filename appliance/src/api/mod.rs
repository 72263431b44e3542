//! The API: every operation of the product, over the state folder's socket, over the network, or called in-process by
//! the command line. Handlers take requests apart and put answers together; the work is done elsewhere.
//!
//! A new operation is a handler and one row in `rows`, or in `rows` of a module for a family of them; [`table`] says
//! what a row declares.

mod audit;
pub mod contract;
mod document;
mod drills;
mod events;
mod extract;
mod feed;
mod files;
pub mod keyless;
mod keys;
pub mod listener;
pub mod login;
pub mod network;
pub mod once;
mod retention;
mod schedules;
pub mod table;
mod tokens;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use futures_util::future::Either;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::contract::{EVENTS, METRICS};
use self::extract::{Body, Path, Query};
use self::login::Logins;
use self::table::{ADMIN, Need, OPERATOR, Reach, Row, VIEWER};
use crate::access::Caller;
use crate::admission::{Capacity, Terms};
use crate::app::App;
use crate::audit::About;
use crate::capture::{self, BackupRequest, BackupResult};
use crate::catalog::{DamagedPoint, ListedPoint, Listing, PointSummary};
use crate::jobs::{Job, JobView, Jobs, Subject};
use crate::metrics::House;
use crate::problem::Problem;
use crate::publish::ExportRequest;
use crate::recovery::{CommitRequest, HypervisorKind, Order, RecoverRequest, RecoveryView, ScheduleRequest, Unchanged};
use crate::rehydrate::RehydrateRequest;
use crate::restore::{self, RestoreRequest};
use crate::statistics::{self, Group};
use crate::{collect, inspect, verify};

/// The largest request holds a machine's definition with its UEFI variables.
const BODY_MAX: usize = 8 << 20;

/// What `/healthz` says: who answers, and for which repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Health {
    /// The program's version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The repository's folder.
    pub repository: PathBuf,
}

/// That somebody answers.
#[derive(Debug, Serialize, JsonSchema)]
struct Alive {
    /// `ok` or `ready`.
    status: &'static str,
    /// Who it is, for those who may know.
    #[serde(flatten)]
    who: Option<Health>,
}

/// All operations. Add a row for a new one: who may, what it reaches, who answers.
fn rows(app: &App) -> Vec<Row<Arc<App>>> {
    let own = vec![
        Row::get("/healthz", Need::Nobody, Reach::Whole, health)
            .answers::<Alive>("Says that somebody answers; who, to whoever may know"),
        Row::get("/readyz", Need::Nobody, Reach::Whole, ready)
            .answers::<Alive>("Says whether the repository can be reached"),
        Row::get("/metrics", VIEWER, Reach::Whole, metrics)
            .sends(METRICS, "What is counted, in the text form of OpenMetrics"),
        Row::get("/api/v1/machines", OPERATOR, Reach::Whole, list_machines)
            .answers::<Vec<capture::MachineView>>("Lists the machines that a hypervisor has"),
        Row::get("/api/v1/points", VIEWER, Reach::Judged, list_points)
            .answers::<Vec<ListedPoint>>("Lists recovery points, oldest first"),
        Row::post("/api/v1/points", OPERATOR, Reach::Whole, back_up).begins::<BackupResult>("Backs a machine up"),
        Row::get("/api/v1/points/{point}", VIEWER, Reach::Judged, show_point)
            .answers::<inspect::PointDetail>("Shows a recovery point"),
        Row::get("/api/v1/points/{point}/hardware", VIEWER, Reach::Judged, show_hardware)
            .answers::<serde_json::Value>("Shows the machine's definition, UEFI variables included"),
        Row::post("/api/v1/points/{point}/restore", OPERATOR, Reach::Whole, restore_point)
            .begins::<restore::RestoreResult>("Restores disks to images, devices or NBD exports"),
        Row::post("/api/v1/verify", OPERATOR, Reach::Whole, verify_repository)
            .begins::<verify::VerifyResult>("Verifies the repository or a recovery point"),
        Row::post("/api/v1/collect", ADMIN, Reach::Whole, collect_repository)
            .begins::<collect::CollectResult>("Frees what no recovery point needs"),
        Row::post("/api/v1/exports", OPERATOR, Reach::Whole, export)
            .sends(EVENTS, "Serves disks over NBD for as long as the answer is listened to"),
        Row::get("/api/v1/host", VIEWER, Reach::Whole, host)
            .answers::<Capacity>("Says what room the host has for recoveries"),
        Row::get("/api/v1/recoveries", VIEWER, Reach::Judged, list_recoveries)
            .answers::<Vec<RecoveryView>>("Lists recoveries"),
        Row::post("/api/v1/recoveries", OPERATOR, Reach::Judged, recover)
            .creates::<RecoveryView>("Boots a machine from a recovery point"),
        Row::get("/api/v1/recoveries/{name}", VIEWER, Reach::Recovery, show_recovery)
            .answers::<RecoveryView>("Shows a recovery"),
        Row::delete("/api/v1/recoveries/{name}", OPERATOR, Reach::Recovery, discard)
            .answers::<RecoveryView>("Ends a recovery and removes what it holds"),
        Row::post("/api/v1/recoveries/{name}/start", OPERATOR, Reach::Recovery, start)
            .answers::<RecoveryView>("Starts the VM again on what it has written"),
        Row::post("/api/v1/recoveries/{name}/rehydration", OPERATOR, Reach::Whole, rehydrate)
            .answers::<RecoveryView>("Copies the disks to production storage while the guest runs"),
        Row::patch("/api/v1/recoveries/{name}/rehydration", OPERATOR, Reach::Recovery, steer)
            .answers::<RecoveryView>("Pauses, resumes or cancels the copying"),
        Row::post("/api/v1/recoveries/{name}/cutover", OPERATOR, Reach::Recovery, cut_over)
            .answers::<RecoveryView>("Moves the VM to production storage without a reboot"),
        Row::post("/api/v1/recoveries/{name}/commit", OPERATOR, Reach::Recovery, commit)
            .begins::<BackupResult>("Makes a recovery point of what the guest has written"),
        Row::put("/api/v1/recoveries/{name}/commits", OPERATOR, Reach::Recovery, schedule)
            .answers::<RecoveryView>("Sets or ends commits by the clock"),
    ];
    let jobs = job_rows().into_iter().map(|row| row.with_state(app.jobs.clone()));
    let families = [
        drills::rows(),
        keys::rows(),
        files::rows(),
        retention::rows(),
        tokens::rows(),
        audit::rows(),
        schedules::rows(),
        feed::rows(),
        document::rows(),
    ];
    own.into_iter().chain(jobs).chain(families.into_iter().flatten()).collect()
}

fn job_rows() -> Vec<Row<Arc<Jobs>>> {
    vec![
        Row::get("/api/v1/jobs", VIEWER, Reach::Judged, list_jobs).answers::<Vec<JobView>>("Lists jobs"),
        Row::get("/api/v1/jobs/{id}", VIEWER, Reach::Judged, show_job).answers::<JobView>("Shows a job"),
        Row::delete("/api/v1/jobs/{id}", OPERATOR, Reach::Judged, cancel_job).answers::<JobView>("Tells a job to end"),
        Row::get("/api/v1/jobs/{id}/events", VIEWER, Reach::Judged, follow_job)
            .sends(EVENTS, "Tells the progress of a job until it ends"),
    ]
}

fn router(app: &Arc<App>) -> Router {
    table::gated(rows(app), app).layer(DefaultBodyLimit::max(BODY_MAX))
}

/// The API for the owner of the state folder: on its socket, and in-process.
pub fn owners(app: &Arc<App>) -> Router {
    router(app).layer(Extension(Caller::Owner))
}

/// The API for the steps of a policy.
pub fn of_policy(app: &Arc<App>, policy: &str) -> Router {
    table::gated(rows(app), app).layer(Extension(Caller::Policy(policy.to_owned())))
}

/// The API for the network, where a token says who asks.
pub fn strangers(app: &Arc<App>) -> Router {
    let logins = Logins::new(app.tokens.clone());
    router(app).layer(from_fn_with_state(logins, login::identify))
}

/// How long a repository may take to be found, on storage that may hang.
const READY: Duration = Duration::from_secs(5);

type Shared = State<Arc<App>>;
type Answer<T> = Result<Json<T>, Problem>;

/// Whoever has not said who he is learns only that somebody answers.
async fn health(State(app): Shared, caller: Option<Extension<Caller>>) -> Json<Alive> {
    let who = caller.map(|_| Health {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        repository: app.location.clone(),
    });
    Json(Alive { status: "ok", who })
}

/// Whether what is asked for can be done: the repository is there.
async fn ready(State(app): Shared) -> Answer<Alive> {
    let config = app.location.join("repository");
    let looked = tokio::time::timeout(READY, blocking(move || Ok(config.is_file()))).await;
    match looked {
        Ok(Ok(true)) => Ok(Json(Alive { status: "ready", who: None })),
        // Where it should be is for the log, not for strangers.
        _ => {
            tracing::warn!(repository = %app.location.display(), "not ready: the repository cannot be read");
            Err(Problem::new(crate::problem::Kind::Failed, "the repository cannot be read")
                .with_status(StatusCode::SERVICE_UNAVAILABLE))
        }
    }
}

/// In the text form of OpenMetrics, for Prometheus.
async fn metrics(State(app): Shared) -> Result<Response, Problem> {
    let recoveries = app.recoveries.tables().into_iter();
    let recoveries = recoveries.map(|(name, table)| Group { label: "recovery", name, table });
    let exports = app.exports.tables().into_iter().map(|(name, table)| Group { label: "machine", name, table });
    let groups = recoveries.chain(exports).collect();
    let looking = app.clone();
    let house = blocking(move || House::look(&looking)).await?;
    let text =
        statistics::metrics(groups, house).map_err(|error| Problem::failed("cannot write the metrics", &error))?;
    Ok(([(axum::http::header::CONTENT_TYPE, METRICS)], text).into_response())
}

#[derive(Debug, Deserialize, JsonSchema)]
struct PointsQuery {
    /// Only of this machine.
    machine: Option<String>,
    #[serde(flatten)]
    page: Page,
}

/// A part of a list that is ordered: at most `limit` of what follows `after`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
struct Page {
    /// What the part begins behind: the id, name or number of the last one seen.
    after: Option<String>,
    /// How many at most.
    #[schemars(with = "Option<std::num::NonZeroU32>")]
    limit: Option<String>,
}

impl Page {
    /// The part of `all`; `id` names what `after` may be.
    fn of<T>(&self, mut all: Vec<T>, id: impl Fn(&T) -> String) -> Result<Vec<T>, Problem> {
        if let Some(after) = &self.after {
            let at = all.iter().position(|one| id(one) == *after).ok_or_else(|| {
                Problem::usage(format!("there is nothing called `{after}` to go on after"))
                    .hint("begin anew without it")
            })?;
            all.drain(..=at);
        }
        if let Some(limit) = &self.limit {
            let limit: usize = limit
                .parse()
                .ok()
                .filter(|limit| *limit > 0)
                .ok_or_else(|| Problem::usage(format!("`{limit}` is not a number of things to list")))?;
            all.truncate(limit);
        }
        Ok(all)
    }
}

/// Runs work that touches the repository where it may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Problem> + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Problem::failed("the operation ended badly", &error))?
}

#[derive(Debug, Deserialize, JsonSchema)]
struct MachinesQuery {
    /// Which hypervisor: `libvirt:URI`.
    on: String,
}

async fn list_machines(Query(query): Query<MachinesQuery>) -> Answer<Vec<capture::MachineView>> {
    match HypervisorKind::parse(&query.on)? {
        HypervisorKind::Libvirt(uri) => capture::machines(&uri).await.map(Json),
        HypervisorKind::Qemu | HypervisorKind::None => {
            Err(Problem::usage(format!("`{}` has no list of machines", query.on))
                .hint("name a libvirt: --on libvirt:qemu:///system"))
        }
    }
}

async fn list_points(State(app): Shared, caller: Caller, Query(query): Query<PointsQuery>) -> Answer<Vec<ListedPoint>> {
    let Listing { mut points, mut damaged } = blocking(move || app.listing_for(&caller)).await?;
    if let Some(machine) = &query.machine {
        points.retain(|point| point.machine == *machine);
        // Whose they are, nobody knows.
        damaged.clear();
        if points.is_empty() {
            return Err(Problem::not_found(format!("machine {machine} has no recovery point"))
                .hint("`lifeboat points` lists all machines"));
        }
    }
    let all = points.into_iter().map(Either::Left).chain(damaged.into_iter().map(Either::Right)).collect();
    let id = |point: &Either<Arc<PointSummary>, DamagedPoint>| match point {
        Either::Left(point) => point.id.clone(),
        Either::Right(point) => point.id.clone(),
    };
    let listed = |point| match point {
        Either::Left(point) => ListedPoint::Whole(Arc::unwrap_or_clone(point)),
        Either::Right(point) => ListedPoint::Damaged(point),
    };
    Ok(Json(query.page.of(all, id)?.into_iter().map(listed).collect()))
}

async fn show_point(State(app): Shared, caller: Caller, Path(point): Path<String>) -> Answer<inspect::PointDetail> {
    blocking(move || inspect::point(&app.repository, &app.resolve_for(&caller, &point)?)).await.map(Json)
}

fn accepted(job: &Job) -> Response {
    let view = job.view();
    let about = About(format!("job {}, {} of {}", view.id, view.kind, view.subject));
    (StatusCode::ACCEPTED, Extension(about), Json(view)).into_response()
}

async fn back_up(State(app): Shared, Body(request): Body<BackupRequest>) -> Result<Response, Problem> {
    request.check()?;
    let (jobs, subject) = (app.jobs.clone(), Subject::machine(&request.machine));
    let job = jobs.start("backup", subject, move |progress| {
        let newest = app.points()?.into_iter().rfind(|point| point.machine == request.machine);
        let parent = newest.and_then(|point| {
            // Without its parent a backup reads as much and finds what is stored through the index.
            let loaded = crate::disks::load_point(&app.repository, &point.id);
            loaded.inspect_err(|problem| tracing::warn!(%problem, "backing up without the newest point")).ok()
        });
        let result = capture::back_up(&app.repository, parent.as_ref(), &request, progress)?;
        to_value(&result)
    });
    Ok(accepted(&job))
}

/// The machine's definition in full, UEFI variables included.
async fn show_hardware(State(app): Shared, caller: Caller, Path(point): Path<String>) -> Answer<serde_json::Value> {
    blocking(move || {
        let point = app.resolve_for(&caller, &point)?;
        Ok(Json(crate::disks::load_point(&app.repository, &point.id)?.hardware))
    })
    .await
}

async fn restore_point(
    State(app): Shared,
    Path(point): Path<String>,
    Body(request): Body<RestoreRequest>,
) -> Result<Response, Problem> {
    let resolving = app.clone();
    let point = blocking(move || resolving.resolve(&point)).await?;
    let plan = restore::plan(&point, &request)?;
    for target in plan.files() {
        app.check_target(target)?;
    }
    let jobs = app.jobs.clone();
    let job = jobs.start("restore", Subject::machine(&point.machine), move |progress| {
        let result = restore::restore(&app.repository, &point, &plan, progress)?;
        to_value(&result)
    });
    Ok(accepted(&job))
}

async fn verify_repository(
    State(app): Shared,
    Body(request): Body<verify::VerifyRequest>,
) -> Result<Response, Problem> {
    request.data()?;
    let resolving = app.clone();
    let spec = request.point.clone();
    let point = blocking(move || spec.map(|spec| resolving.resolve(&spec)).transpose()).await?;
    let subject = point.as_ref().map_or(Subject::from("the repository".to_owned()), |point| {
        Subject::from(format!("point {}", point.id)).of(&point.machine)
    });
    let jobs = app.jobs.clone();
    let job = jobs.start("verify", subject, move |progress| {
        let result = verify::verify(&app.repository, point.as_ref(), &request, progress)?;
        to_value(&result)
    });
    Ok(accepted(&job))
}

async fn collect_repository(
    State(app): Shared,
    Body(request): Body<collect::CollectRequest>,
) -> Result<Response, Problem> {
    request.options()?;
    let jobs = app.jobs.clone();
    let job = jobs.start("collect", "the repository".to_owned(), move |progress| {
        to_value(&collect::collect(&app.repository, &request, progress)?)
    });
    Ok(accepted(&job))
}

async fn export(State(app): Shared, Body(request): Body<ExportRequest>) -> Result<Response, Problem> {
    if let Some(folder) = &request.overlay {
        app.check_target(folder)?;
    }
    let (resolving, spec) = (app.clone(), request.point.clone());
    let point = blocking(move || resolving.resolve(&spec)).await?;
    let hold = app.exports.start(&app.repository, &app.state, &point, &request).await?;
    Ok(events::hold(hold))
}

async fn list_recoveries(State(app): Shared, caller: Caller, Query(page): Query<Page>) -> Answer<Vec<RecoveryView>> {
    let mut views = app.recoveries.list();
    views.retain(|view| caller.sees(&view.machine));
    page.of(views, |view| view.name.clone()).map(Json)
}

async fn show_recovery(State(app): Shared, Path(name): Path<String>) -> Answer<RecoveryView> {
    app.recoveries.view(&name).map(Json)
}

#[derive(Debug, Deserialize, JsonSchema)]
struct AdmissionQuery {
    /// What is done when the host has no room.
    #[serde(default)]
    admission: Terms,
}

async fn host(State(app): Shared) -> Answer<Capacity> {
    app.recoveries.capacity().map(Json)
}

/// Starting and ending a recovery go on to their end even when the asker goes away.
async fn recover(
    State(app): Shared,
    caller: Caller,
    Query(query): Query<AdmissionQuery>,
    Body(request): Body<RecoverRequest>,
) -> Result<Response, Problem> {
    let (resolving, spec) = (app.clone(), request.point.clone());
    let (point, prepared) = blocking(move || {
        let point = resolving.resolve_for(&caller, &spec)?;
        let prepared = resolving.recoveries.complete(&point, request)?;
        Ok((point, prepared))
    })
    .await?;
    // An asker who goes away no longer waits for memory.
    let grant = app.recoveries.admit(&point, &prepared, query.admission).await?;
    let warmed = app.clone();
    let work = tokio::spawn(async move {
        crate::drill::warm(&warmed, &point);
        app.recoveries.start(&point, prepared, grant).await
    });
    let view = work.await.map_err(|error| Problem::failed("the recovery ended badly", &error))??;
    let about = About(format!("recovery {} of {} from point {}", view.name, view.machine, view.point));
    Ok((StatusCode::CREATED, Extension(about), Json(view)).into_response())
}

async fn start(
    State(app): Shared,
    Query(query): Query<AdmissionQuery>,
    Path(name): Path<String>,
) -> Answer<RecoveryView> {
    // An asker who goes away no longer waits for memory.
    let grant = app.recoveries.admit_again(&name, query.admission).await?;
    let work = tokio::spawn(async move { app.recoveries.start_vm(&name, grant).await });
    work.await.map_err(|error| Problem::failed("the start ended badly", &error))?.map(Json)
}

async fn rehydrate(
    State(app): Shared,
    Path(name): Path<String>,
    Body(request): Body<RehydrateRequest>,
) -> Answer<RecoveryView> {
    // What a URI may be is for the plan to say.
    for target in request.targets.iter().filter(|target| !target.place.contains("://")) {
        app.check_target(std::path::Path::new(&target.place))?;
    }
    let work = tokio::spawn(async move { app.recoveries.rehydrate(&name, &request).await });
    work.await.map_err(|error| Problem::failed("the rehydration ended badly", &error))?.map(Json)
}

async fn steer(State(app): Shared, Path(name): Path<String>, Body(order): Body<Order>) -> Answer<RecoveryView> {
    let work = tokio::spawn(async move { app.recoveries.steer(&name, order).await });
    work.await.map_err(|error| Problem::failed("the order ended badly", &error))?.map(Json)
}

async fn cut_over(State(app): Shared, Path(name): Path<String>) -> Answer<RecoveryView> {
    let work = tokio::spawn(async move { app.recoveries.cut_over(&name).await });
    work.await.map_err(|error| Problem::failed("the cutover ended badly", &error))?.map(Json)
}

/// The instant is when this is asked; the job stores what was there.
async fn commit(
    State(app): Shared,
    Path(name): Path<String>,
    Body(request): Body<CommitRequest>,
) -> Result<Response, Problem> {
    request.check()?;
    let machine = app.recoveries.view(&name)?.machine;
    // An asker who goes away must not leave the guest's file systems frozen.
    let (recoveries, asked, wish) = (app.recoveries.clone(), name.clone(), request.consistency);
    let work = tokio::spawn(async move { recoveries.commit(&asked, wish).await });
    let commit = work.await.map_err(|error| Problem::failed("the commit ended badly", &error))??;
    let subject = Subject::from(format!("recovery {name}")).of(&machine);
    let job = app
        .jobs
        .start("commit", subject, move |progress| to_value(&commit.run(&request, progress, Unchanged::Commit)?));
    Ok(accepted(&job))
}

async fn schedule(
    State(app): Shared,
    Path(name): Path<String>,
    Body(request): Body<ScheduleRequest>,
) -> Answer<RecoveryView> {
    let work = tokio::spawn(async move { app.recoveries.schedule(&name, request).await });
    work.await.map_err(|error| Problem::failed("the change of the schedule ended badly", &error))?.map(Json)
}

async fn discard(State(app): Shared, Path(name): Path<String>) -> Answer<RecoveryView> {
    let work = tokio::spawn(async move { app.recoveries.discard(&name).await });
    work.await.map_err(|error| Problem::failed("the discard ended badly", &error))?.map(Json)
}

async fn list_jobs(State(jobs): State<Arc<Jobs>>, caller: Caller, Query(page): Query<Page>) -> Answer<Vec<JobView>> {
    let mut views = jobs.list();
    views.retain(|view| caller.sees_any(view.machine.as_deref()));
    page.of(views, |view| view.id.to_string()).map(Json)
}

/// The job with number `id`, if the caller may know of it.
fn job_for(jobs: &Jobs, caller: &Caller, id: u64) -> Result<Arc<Job>, Problem> {
    let job = jobs.get(id)?;
    match caller.sees_any(job.machine()) {
        true => Ok(job),
        false => Err(Jobs::missing(id)),
    }
}

async fn show_job(State(jobs): State<Arc<Jobs>>, caller: Caller, Path(id): Path<u64>) -> Answer<JobView> {
    job_for(&jobs, &caller, id).map(|job| Json(job.view()))
}

async fn cancel_job(State(jobs): State<Arc<Jobs>>, caller: Caller, Path(id): Path<u64>) -> Answer<JobView> {
    let job = job_for(&jobs, &caller, id)?;
    job.cancel();
    Ok(Json(job.view()))
}

async fn follow_job(State(jobs): State<Arc<Jobs>>, caller: Caller, Path(id): Path<u64>) -> Result<Response, Problem> {
    Ok(events::follow(job_for(&jobs, &caller, id)?))
}

fn to_value(value: &impl Serialize) -> Result<serde_json::Value, Problem> {
    serde_json::to_value(value).map_err(|error| Problem::failed("cannot write the result", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_list_make_all_of_it() {
        let all: Vec<u64> = (1..=10).collect();
        let page = |after: Option<u64>, limit: &str| {
            let page = Page { after: after.map(|after| after.to_string()), limit: Some(limit.to_owned()) };
            page.of(all.clone(), ToString::to_string)
        };
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let part = page(after, "3").unwrap();
            let Some(last) = part.last().copied() else { break };
            (after, seen) = (Some(last), [seen, part].concat());
        }
        assert_eq!(seen, all);
        assert_eq!(Page::default().of(all.clone(), ToString::to_string).unwrap(), all);
        for (after, limit) in [(Some(11), "3"), (None, "0"), (None, "many")] {
            assert_eq!(page(after, limit).unwrap_err().kind, crate::problem::Kind::Usage);
        }
    }
}
