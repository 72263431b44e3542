//! Files out of disks. Lists are streams of JSON lines that end with `"end"`, content is a tar stream.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body as HttpBody;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::mpsc;

use super::contract::{EVENTS, LINES, TAR};
use super::table::{OPERATOR, Reach, Row};
use super::{Answer, Body, Shared, blocking};
use crate::access::Caller;
use crate::app::App;
use crate::files::answer::{DiskFiles, Line};
use crate::files::place::{Within, split};
use crate::files::{self, Copy, CopyRequest, Disks, FindRequest, ListRequest, MountRequest, Place, VersionsRequest};
use crate::problem::{Kind, Problem};

/// Pieces of an answer that wait for a slow listener.
const WAITING_MAX: usize = 8;
/// Lines are sent in pieces of about this size.
const PIECE: usize = 64 << 10;

pub(super) fn rows() -> Vec<Row<Arc<App>>> {
    vec![
        Row::post("/api/v1/files/volumes", OPERATOR, Reach::Judged, volumes)
            .answers::<Vec<DiskFiles>>("Lists disks, partitions and volumes")
            .looks(),
        Row::post("/api/v1/files/list", OPERATOR, Reach::Judged, list)
            .sends(LINES, "Lists a folder, one entry a line")
            .looks(),
        Row::post("/api/v1/files/find", OPERATOR, Reach::Judged, find)
            .sends(LINES, "Finds files by a glob, one a line")
            .looks(),
        Row::post("/api/v1/files/versions", OPERATOR, Reach::Judged, versions)
            .sends(LINES, "Lists a file's versions across recovery points, one a line")
            .looks(),
        Row::post("/api/v1/files/tar", OPERATOR, Reach::Judged, tar)
            .sends(TAR, "Sends files and trees as a tar stream"),
        Row::post("/api/v1/mounts", OPERATOR, Reach::Whole, mount)
            .sends(EVENTS, "Mounts disks as files for as long as the answer is listened to"),
    ]
}

/// The disks that a place is on. Places on the same disks share them.
fn disks(
    app: &App,
    caller: &Caller,
    place: &Place,
    known: &mut HashMap<String, Arc<Disks>>,
) -> Result<(Arc<Disks>, Within), Problem> {
    let (key, within) = match &place.recovery {
        Some(name) => (format!("recovery {name}"), Within::parse(&place.spec)),
        None => split(&place.spec, |spec| app.resolve_for(caller, spec).map(|point| point.id))?,
    };
    if let Some(disks) = known.get(&key) {
        return Ok((disks.clone(), within));
    }
    let disks = match &place.recovery {
        Some(name) => {
            if !caller.sees(&app.recoveries.view(name)?.machine) {
                return Err(Problem::not_found(format!("there is no recovery {name}")));
            }
            files::live(name, app.recoveries.disks(name)?)?
        }
        None => files::of_point(&app.repository, &key)?,
    };
    let disks = Arc::new(disks);
    known.insert(key, disks.clone());
    Ok((disks, within))
}

async fn volumes(State(app): Shared, caller: Caller, Body(place): Body<Place>) -> Answer<Vec<DiskFiles>> {
    let found = blocking(move || {
        let (disks, within) = disks(&app, &caller, &place, &mut HashMap::new())?;
        files::volumes(&disks, &within)
    });
    found.await.map(axum::Json)
}

async fn list(State(app): Shared, caller: Caller, Body(request): Body<ListRequest>) -> Result<Response, Problem> {
    lines(move |tell| {
        let (disks, mut within) = disks(&app, &caller, &request.place, &mut HashMap::new())?;
        within.path = request.path.clone().or(within.path);
        files::list(&disks, &within, tell)
    })
    .await
}

async fn find(State(app): Shared, caller: Caller, Body(request): Body<FindRequest>) -> Result<Response, Problem> {
    lines(move |tell| {
        let (disks, within) = disks(&app, &caller, &request.place, &mut HashMap::new())?;
        files::find(&disks, &within, &request.glob, tell)
    })
    .await
}

async fn versions(
    State(app): Shared,
    caller: Caller,
    Body(request): Body<VersionsRequest>,
) -> Result<Response, Problem> {
    lines(move |tell| {
        let mut points = app.listing_for(&caller)?.points;
        points.retain(|point| point.machine == request.machine);
        if points.is_empty() {
            return Err(Problem::not_found(format!("machine {} has no recovery point", request.machine))
                .hint("`lifeboat points` lists all machines"));
        }
        let within = match request.path.starts_with('/') {
            true => Within { path: Some(request.path.clone()), ..Within::default() },
            false => Within::parse(&request.path),
        };
        files::versions(&points, &|point| files::of_point(&app.repository, &point.id), &within, tell)
    })
    .await
}

/// Sends lines as they are told. What fails before the first of them is the answer's status; later it is the last line.
async fn lines(
    work: impl FnOnce(&mut dyn FnMut(Line) -> bool) -> Result<(), Problem> + Send + 'static,
) -> Result<Response, Problem> {
    let (sender, receiver) = mpsc::channel::<Result<Bytes, Problem>>(WAITING_MAX);
    tokio::task::spawn_blocking(move || {
        let mut buffer: Vec<u8> = Vec::new();
        let mut tell = |line: Line| {
            // A line is made of strings and numbers; it cannot fail to be written.
            serde_json::to_writer(&mut buffer, &line).unwrap_or_default();
            buffer.push(b'\n');
            buffer.len() < PIECE || sender.blocking_send(Ok(std::mem::take(&mut buffer).into())).is_ok()
        };
        let result = work(&mut tell);
        if !buffer.is_empty() {
            let _ = sender.blocking_send(Ok(buffer.into()));
        }
        if let Err(problem) = result {
            let _ = sender.blocking_send(Err(problem));
        }
    });
    respond(LINES, receiver).await
}

async fn tar(State(app): Shared, caller: Caller, Body(request): Body<CopyRequest>) -> Result<Response, Problem> {
    let copy = blocking(move || {
        let mut known = HashMap::new();
        let places: Result<Vec<_>, Problem> =
            request.places.iter().map(|place| disks(&app, &caller, place, &mut known)).collect();
        Copy::find(&places?)
    })
    .await?;
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    tokio::task::spawn_blocking(move || {
        // A listener that has gone away is not an error of ours.
        let _ = files::send(&copy, &mut |bytes| sender.blocking_send(Ok(bytes)).is_ok());
    });
    respond(TAR, receiver).await
}

/// Mounts for as long as the answer is listened to; it ends when somebody else unmounts the folder.
async fn mount(State(app): Shared, caller: Caller, Body(request): Body<MountRequest>) -> Result<Response, Problem> {
    app.check_target(&request.dir)?;
    let hold = blocking(move || {
        let (disks, _) = disks(&app, &caller, &request.place, &mut HashMap::new())?;
        // Nobody else has them: they were opened for this.
        let disks = Arc::try_unwrap(disks)
            .map_err(|_| Problem::new(Kind::Failed, "the disks are in use by another request"))?;
        app.mounts.start(disks, &request.dir)
    })
    .await?;
    Ok(super::events::mounted(hold))
}

async fn respond(
    kind: &'static str,
    mut receiver: mpsc::Receiver<Result<Bytes, Problem>>,
) -> Result<Response, Problem> {
    let first = match receiver.recv().await {
        Some(Ok(bytes)) => bytes,
        Some(Err(problem)) => return Err(problem),
        None => Bytes::new(),
    };
    let rest = stream::unfold((Some(first), receiver), |(first, mut receiver)| async move {
        let bytes = match first {
            Some(bytes) => bytes,
            None => match receiver.recv().await? {
                Ok(bytes) => bytes,
                Err(problem) => {
                    let line = Line::Problem(problem.to_string().replace('\n', "; "));
                    let mut bytes = serde_json::to_vec(&line).unwrap_or_default();
                    bytes.push(b'\n');
                    bytes.into()
                }
            },
        };
        Some((Ok::<_, Infallible>(bytes), (None, receiver)))
    });
    Ok(([(header::CONTENT_TYPE, kind)], HttpBody::from_stream(rest)).into_response())
}
