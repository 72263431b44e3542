//! `backup` and `commit`.

use axum::http::Method;

use super::args::{Backup, Commit, Global};
use super::client::segment;
use super::connect::Door;
use super::{progress, recover, render};
use crate::capture::{BackupRequest, BackupResult, parse_sources};
use crate::catalog::spec::short_id;
use crate::problem::Problem;
use crate::recovery::{CommitRequest, RecoveryView, Schedule, ScheduleRequest, Wish};
use crate::retention::rules::parse_labels;

pub async fn run(door: &Door, global: &Global, args: &Backup) -> Result<(), Problem> {
    let mut hardware = super::hardware::of(&args.made_of)?;
    if args.mac.is_some() {
        hardware.nic.mac.clone_from(&args.mac);
    }
    let request = BackupRequest {
        machine: args.machine.clone(),
        sources: parse_sources(&args.sources)?,
        labels: parse_labels(&args.labels)?,
        format: args.format.clone(),
        hardware,
    };
    request.check()?;
    let result = progress::run(&door.client, "/api/v1/points", &request).await?;
    told(global, &args.machine, result)
}

pub async fn commit(door: &Door, global: &Global, args: &Commit) -> Result<(), Problem> {
    let consistency = match args.consistency.as_str() {
        "application" => Wish::Application,
        "crash" => Wish::Crash,
        _ => Wish::Auto,
    };
    let request = CommitRequest { labels: parse_labels(&args.labels)?, consistency };
    request.check()?;
    if args.off || args.every.is_some() {
        return schedule(door, global, args, request).await;
    }
    let machine = recover::get(door, &args.name).await?.machine;
    let path = format!("/api/v1/recoveries/{}/commit", segment(&args.name));
    let result = progress::run(&door.client, &path, &request).await?;
    told(global, &machine, result)
}

async fn schedule(door: &Door, global: &Global, args: &Commit, request: CommitRequest) -> Result<(), Problem> {
    let CommitRequest { labels, consistency } = request;
    let schedule = args.every.map(|every_seconds| Schedule { every_seconds, consistency, labels });
    let path = format!("/api/v1/recoveries/{}/commits", segment(&args.name));
    let view: RecoveryView = door.client.call(Method::PUT, &path, Some(&ScheduleRequest { schedule })).await?;
    match (args.every, global.json) {
        (_, true) => render::json(&view),
        (Some(every), _) => render::line(&format!("{} is committed every {}", view.name, render::duration(every))),
        (None, _) => render::line(&format!("{} is committed only when asked for", view.name)),
    }
    Ok(())
}

fn told(global: &Global, machine: &str, result: serde_json::Value) -> Result<(), Problem> {
    let result: BackupResult =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read what was done", &error))?;
    if global.json {
        render::json(&result);
        return Ok(());
    }
    if let Some(why) = &result.why_crash {
        render::note(&format!("as consistent as after a power cut: {why}"));
    }
    let how = if result.consistency == "application" { ", application-consistent" } else { "" };
    render::line(&format!(
        "recovery point {} of {machine}{how}: read {}, new {}, stored {}, in {:.1} s",
        short_id(&result.point),
        render::bytes(result.read),
        render::bytes(result.new),
        render::bytes(result.stored),
        result.seconds
    ));
    Ok(())
}
