//! `backup` and `commit`.

use axum::http::Method;

use super::args::{Backup, Commit, Global, Machines};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::{progress, recover, render};
use crate::capture::{BackupRequest, BackupResult, DomainSpec, MachineView, parse_sources};
use crate::catalog::spec::short_id;
use crate::problem::Problem;
use crate::recovery::{CommitRequest, RecoveryView, Schedule, ScheduleRequest, Wish};
use crate::retention::rules::parse_labels;

pub async fn run(door: &Door, global: &Global, args: &Backup) -> Result<(), Problem> {
    let mut hardware = super::hardware::of(&args.made_of)?;
    if args.mac.is_some() {
        hardware.nic.mac.clone_from(&args.mac);
    }
    let (machine, domain) = domain(args)?;
    let request = BackupRequest {
        machine: machine.clone(),
        sources: if domain.is_some() { Vec::new() } else { parse_sources(&args.sources)? },
        domain,
        labels: parse_labels(&args.labels)?,
        format: args.format.clone(),
        hardware,
    };
    request.check()?;
    let result = progress::run(&door.client, "/api/v1/points", &request).await?;
    told(global, &machine, result)
}

/// The machine's name, and the domain that it is, if one is named: `libvirt:DOMAIN` or `libvirt:URI#DOMAIN`.
fn domain(args: &Backup) -> Result<(String, Option<DomainSpec>), Problem> {
    let named = match args.sources.as_slice() {
        [] => args.machine.strip_prefix("libvirt:"),
        [source] => source.strip_prefix("libvirt:").filter(|_| !std::path::Path::new(source).exists()),
        _ => None,
    };
    let Some(named) = named else {
        if args.freeze {
            return Err(Problem::usage("only the guest of a domain can be frozen").hint("use it with libvirt:DOMAIN"));
        }
        return Ok((args.machine.clone(), None));
    };
    let (uri, name) = match named.split_once('#') {
        Some((uri, name)) => (uri.to_owned(), name),
        None => (args.connect.clone().unwrap_or_else(default_uri), named),
    };
    if name.is_empty() {
        return Err(Problem::usage(format!("`libvirt:{named}` names no domain")).hint("write libvirt:DOMAIN"));
    }
    let machine = if args.sources.is_empty() { name.to_owned() } else { args.machine.clone() };
    Ok((machine, Some(DomainSpec { uri, domain: name.to_owned(), freeze: args.freeze })))
}

fn default_uri() -> String {
    if rustix::process::geteuid().is_root() { "qemu:///system" } else { "qemu:///session" }.to_owned()
}

/// `machines`.
pub async fn machines(door: &Door, global: &Global, args: &Machines) -> Result<(), Problem> {
    let on = args.on.clone().unwrap_or_else(|| format!("libvirt:{}", default_uri()));
    let path = format!("/api/v1/machines?on={}", segment(&on));
    let machines: Vec<MachineView> = door.client.call(Method::GET, &path, NOTHING).await?;
    if global.json {
        render::json(&machines);
        return Ok(());
    }
    if machines.is_empty() {
        render::line(&format!("{on} has no domains"));
        return Ok(());
    }
    let row = |machine: &MachineView| {
        let disks: Vec<String> = machine.disks.iter().map(|disk| format!("{} {}", disk.name, disk.source)).collect();
        vec![machine.name.clone(), machine.state.clone(), machine.uuid.clone(), disks.join(", ")]
    };
    let rows: Vec<Vec<String>> = machines.iter().map(row).collect();
    render::lines(&render::table_lines(&["DOMAIN", "STATE", "UUID", "DISKS"], &rows, &[]));
    Ok(())
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
