//! `status`, and what other commands say of the host.

use std::time::Duration;

use axum::http::Method;

use super::args::Global;
use super::connect::{Door, NOTHING};
use super::render;
use crate::admission::Capacity;
use crate::problem::Problem;
use crate::signals::stop_signal;

/// How often somebody who waits is told how it stands.
const LOOK: Duration = Duration::from_secs(2);

async fn get(door: &Door) -> Result<Capacity, Problem> {
    door.client.call(Method::GET, "/api/v1/host", NOTHING).await
}

fn room(capacity: &Capacity) -> String {
    let vms = render::count(capacity.more_vms, "more VM");
    format!("this host can carry {vms} of 2 GiB: {} of memory are left", render::bytes(capacity.room))
}

pub async fn show(door: &Door, global: &Global) -> Result<(), Problem> {
    let capacity = get(door).await?;
    if global.json {
        render::json(&capacity);
        return Ok(());
    }
    let host = capacity.host;
    let available = render::bytes(host.memory_available);
    let limited = if host.memory_limit.is_some() { ", the limit of a control group" } else { "" };
    let swap = match host.swap_total {
        0 => "none".to_owned(),
        total => format!("{} used of {}", render::bytes(total.saturating_sub(host.swap_free)), render::bytes(total)),
    };
    render::pairs(&[
        ("memory", format!("{available} available of {}{limited}", render::bytes(host.memory_total))),
        ("kept for the host", render::bytes(capacity.reserve)),
        ("swap", swap),
        ("overlay space", host.space.map_or("-".to_owned(), |space| format!("{} free", render::bytes(space)))),
        ("CPUs", host.cores.to_string()),
    ]);
    for (what, holders) in [("holds", &capacity.holders), ("waits for", &capacity.waiting)] {
        for holder in holders.iter().filter(|holder| holder.ask.memory > 0) {
            let (memory, touched) = (render::bytes(holder.ask.memory), render::bytes(holder.resident));
            render::line(&format!("{} {what} {memory} ({touched} touched), {} CPUs", holder.name, holder.ask.cpus));
        }
    }
    render::line(&room(&capacity));
    Ok(())
}

/// Below the list of recoveries.
pub async fn footer(door: &Door) -> Result<(), Problem> {
    // The list is what was asked for.
    let Ok(capacity) = get(door).await else { return Ok(()) };
    for waiting in &capacity.waiting {
        render::line(&format!("{} waits for {} of memory", waiting.name, render::bytes(waiting.ask.memory)));
    }
    render::line(&room(&capacity));
    Ok(())
}

/// Says who waits as long as anybody does; ends when the user no longer wants to wait.
pub async fn wait(door: &Door) -> Problem {
    let mut told = String::new();
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop_signal() => return Problem::refused("no longer waiting for memory; nothing was started"),
        }
        let Ok(capacity) = get(door).await else { continue };
        let names: Vec<&str> = capacity.waiting.iter().map(|waiting| waiting.name.as_str()).collect();
        let now = format!(
            "waiting for memory, first in first out: {}; there is room for {}; Ctrl-C gives up",
            names.join(", "),
            render::bytes(capacity.room)
        );
        if !names.is_empty() && now != told {
            render::note(&now);
            told = now;
        }
    }
}
