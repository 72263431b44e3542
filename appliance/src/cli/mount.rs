//! `mount`: shows files in a folder until interrupted.

use std::path::{Path, PathBuf};

use axum::http::Method;

use super::args::{Global, Mount};
use super::connect::Door;
use super::render;
use crate::files::{MountRequest, Place};
use crate::problem::Problem;
use crate::signals::stop_signal;

pub async fn run(door: &Door, global: &Global, args: &Mount) -> Result<(), Problem> {
    let (spec, dir) = match (args.places.as_slice(), &args.from) {
        ([dir], Some(_)) => (String::new(), dir),
        ([point, dir], None) => (point.clone(), dir),
        (_, Some(_)) => return Err(Problem::usage("with --from the folder is all that is named")),
        (_, None) => return Err(Problem::usage("there is no folder").hint("write `lifeboat mount POINT DIR`")),
    };
    let dir: PathBuf =
        std::path::absolute(Path::new(dir)).map_err(|error| Problem::failed("cannot use the folder", &error))?;
    let request = MountRequest { place: Place { recovery: args.from.clone(), spec }, dir };
    let mut events = door.client.stream(Method::POST, "/api/v1/mounts", Some(&request)).await?;
    loop {
        let event = tokio::select! {
            event = events.next() => event?,
            () = stop_signal() => return Ok(()),
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
}
