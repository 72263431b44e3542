//! `mount`: shows files in a folder until interrupted.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::Method;

use super::args::{Global, Mount};
use super::connect::Door;
use super::render;
use crate::files::{MountRequest, Place};
use crate::problem::{Kind, Problem};
use crate::signals::stop_signal;

/// How often it is looked whether the folder is unmounted, within ten seconds.
const UNMOUNT_TRIES: u32 = 500;

pub async fn run(door: &Door, global: &Global, args: &Mount) -> Result<(), Problem> {
    let (spec, dir) = match (args.places.as_slice(), &args.from) {
        ([dir], Some(_)) => (String::new(), dir),
        ([point, dir], None) => (point.clone(), dir),
        (_, Some(_)) => return Err(Problem::usage("with --from the folder is all that is named")),
        (_, None) => return Err(Problem::usage("there is no folder").hint("write `lifeboat mount POINT DIR`")),
    };
    let dir: PathBuf =
        std::path::absolute(Path::new(dir)).map_err(|error| Problem::failed("cannot use the folder", &error))?;
    let before = device(&dir);
    let request = MountRequest { place: Place { recovery: args.from.clone(), spec }, dir };
    let mut events = door.client.stream(Method::POST, "/api/v1/mounts", Some(&request)).await?;
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            () = stop_signal() => break,
        };
        match event {
            Some((name, _)) if name == "mounted" => {
                if global.json {
                    render::json(&serde_json::json!({ "dir": request.dir }));
                } else {
                    render::line(&format!("mounted on {}; interrupt to unmount", request.dir.display()));
                }
            }
            Some(_) => {}
            // Somebody has unmounted it.
            None => return Ok(()),
        }
    }
    // A service unmounts it once it notices that nobody listens.
    drop(events);
    for _ in 0..UNMOUNT_TRIES {
        if device(&request.dir) == before {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Problem::new(Kind::Failed, format!("{} is still mounted", request.dir.display()))
        .hint(format!("`umount -l {}` takes it away", request.dir.display())))
}

/// The device of a folder, which is another one while something is mounted there.
fn device(dir: &Path) -> Option<u64> {
    dir.metadata().ok().map(|found| found.dev())
}
