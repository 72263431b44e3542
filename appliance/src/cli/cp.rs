//! `cp`: files and trees out of disks.

use std::path::{Path, PathBuf};

use tokio::sync::mpsc;

use super::args::{Cp, Global};
use super::client::Download;
use super::connect::Door;
use super::extract::{self, Existing, Outcome, Target};
use super::files::visible;
use super::render;
use crate::files::{CopyRequest, Place};
use crate::problem::{Handling, Kind, Problem};
use crate::signals::stop_signal;

/// Pieces of the stream that wait for the disk.
const WAITING_MAX: usize = 8;
/// Problems that are told one by one.
const TOLD_MAX: usize = 100;

pub async fn run(door: &Door, global: &Global, args: &Cp) -> Result<(), Problem> {
    let (places, dest) = match args.places.split_last() {
        _ if args.tar => (args.places.as_slice(), None),
        Some((dest, places)) if !places.is_empty() => (places, Some(PathBuf::from(dest))),
        _ => {
            return Err(Problem::usage("there is no destination")
                .hint("write `lifeboat cp POINT:DISK:VOLUME:PATH DEST`, or add --tar"));
        }
    };
    let request = CopyRequest {
        places: places.iter().map(|spec| Place { recovery: args.from.clone(), spec: spec.clone() }).collect(),
    };
    let target = dest.as_deref().map(|dest| target(dest, places)).transpose()?;
    let download = door.client.download("/api/v1/files/tar", &request).await?;
    match target {
        None => to_stdout(download).await,
        Some(target) => {
            let existing = if args.overwrite { Existing::Replace } else { Existing::Keep };
            let outcome = extract(download, target, existing).await?;
            tell(global, &outcome)
        }
    }
}

/// Where things go: into `dest` if it is a folder, or if there may be several; else one thing becomes `dest`.
fn target(dest: &Path, places: &[String]) -> Result<Target, Problem> {
    let several = places.len() > 1 || places.iter().any(|place| place.contains(['*', '?', '[', '{']));
    let failed = |error: &std::io::Error| Problem::failed(format!("cannot copy to {}", dest.display()), error);
    if several && !dest.exists() {
        std::fs::create_dir_all(dest).map_err(|error| failed(&error))?;
    }
    if dest.is_dir() {
        return Target::into(dest).map_err(|error| failed(&error));
    }
    if several {
        return Err(
            Problem::refused(format!("{} is not a folder", dest.display())).hint("name a folder for several files")
        );
    }
    Target::named(dest).map_err(|error| failed(&error))
}

async fn to_stdout(mut download: Download) -> Result<(), Problem> {
    use std::os::fd::AsFd;
    use tokio::io::AsyncWriteExt;
    let failed = |error: std::io::Error| Problem::failed("cannot write the tar stream", &error);
    // Unbuffered: what is written is in pieces already.
    let out = std::io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let mut out = tokio::fs::File::from_std(out.into());
    while let Some(bytes) = download.next().await? {
        match out.write_all(&bytes).await {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.map_err(failed)?,
        }
    }
    match out.flush().await {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(failed),
    }
}

async fn extract(mut download: Download, target: Target, existing: Existing) -> Result<Outcome, Problem> {
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    let work = tokio::task::spawn_blocking(move || extract::extract(receiver, &target, existing));
    loop {
        let bytes = tokio::select! {
            bytes = download.next() => bytes?,
            () = stop_signal() => return Err(Problem::new(Kind::Failed, "the copy was interrupted").hint("what was copied before is whole")),
        };
        let Some(bytes) = bytes else { break };
        if sender.send(bytes).await.is_err() {
            break;
        }
    }
    drop(sender);
    let outcome = work.await.map_err(|error| Problem::failed("the copy ended badly", &error))?;
    outcome.map_err(|error| Problem::failed("the copy broke off", &error))
}

fn tell(global: &Global, outcome: &Outcome) -> Result<(), Problem> {
    for notice in &outcome.notices {
        render::note(&visible(notice));
    }
    for problem in outcome.problems.iter().take(TOLD_MAX) {
        render::complain(&format!("lifeboat: {}", visible(problem)));
    }
    if outcome.problems.len() > TOLD_MAX {
        render::complain(&format!("lifeboat: and {} more", outcome.problems.len() - TOLD_MAX));
    }
    if global.json {
        render::json(&serde_json::json!({
            "files": outcome.files, "bytes": outcome.bytes, "kept": outcome.kept,
            "problems": outcome.problems, "notices": outcome.notices,
        }));
    } else {
        render::line(&format!("copied {}, {}", render::count(outcome.files, "object"), render::bytes(outcome.bytes)));
    }
    if outcome.problems.is_empty() && outcome.kept.is_empty() {
        return Ok(());
    }
    for path in outcome.kept.iter().take(TOLD_MAX) {
        render::complain(&format!("lifeboat: {} exists already and was kept", visible(path)));
    }
    let problem = if outcome.problems.is_empty() {
        Problem::refused(format!("{} existed already", render::count(outcome.kept.len() as u64, "file")))
            .hint("--overwrite replaces them")
    } else {
        Problem::new(
            Kind::Failed,
            format!("{} could not be copied", render::count(outcome.problems.len() as u64, "object")),
        )
    };
    Err(problem.handled(Handling::AnswerTold))
}
