//! `collect`.

use blockstore::Repository;
use blockstore::collect::{CollectReport, PackReport, Quarantined};
use chrono::{DateTime, Utc};

use super::args::{Collect, Global};
use super::connect::Door;
use super::{progress, render};
use crate::app;
use crate::catalog::spec::short_id;
use crate::collect::{CollectRequest, CollectResult, Explain, KeylessResult, rehearse_keyless};
use crate::problem::{Handling, Kind, Problem};

/// Packs that `--explain` shows.
const SHOWN_MAX: usize = 40;

pub async fn run(door: &Door, global: &Global, args: &Collect) -> Result<(), Problem> {
    let explain = args.explain.as_ref().map(|pack| match pack.as_str() {
        "" => Explain::All,
        prefix => Explain::Pack(prefix.to_owned()),
    });
    let request = CollectRequest {
        dry_run: args.dry_run,
        explain,
        reclaim_now: args.reclaim_now,
        quarantine_seconds: args.quarantine,
        threshold: args.threshold,
    };
    let result = progress::run(&door.client, "/api/v1/collect", &request).await?;
    let result: CollectResult =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read the result", &error))?;
    if global.json {
        render::json(&result);
    } else {
        match &result.explained {
            Some(packs) => explain_packs(packs),
            None => tell(&result.report, result.seconds),
        }
    }
    match damage(&result.report) {
        None => Ok(()),
        Some(problem) => Err(problem.handled(Handling::AnswerTold)),
    }
}

/// Whether all that can be done is to look without the key.
pub async fn is_keyless(global: &Global, args: &Collect) -> Result<bool, Problem> {
    let options = global.options()?;
    if !args.dry_run || args.explain.is_some() || options.secret()?.is_some() || Door::is_served(global).await? {
        return Ok(false);
    }
    let location = options.repository_path()?;
    // What is wrong with the repository is said by whoever opens it for good.
    Ok(Repository::open_keyless(app::storage(&location)).is_ok_and(|keyless| keyless.encrypted()))
}

/// Without the key there is no door: nothing can be served.
pub fn run_keyless(global: &Global) -> Result<(), Problem> {
    let location = global.options()?.repository_path()?;
    let keyless =
        Repository::open_keyless(app::storage(&location)).map_err(|error| Problem::from_open(&location, &error))?;
    let result = rehearse_keyless(&keyless)?;
    if global.json {
        render::json(&result);
    } else {
        tell_keyless(&result);
    }
    if result.report.damaged.is_empty() {
        return Ok(());
    }
    let objects = render::count(result.report.damaged.len() as u64, "object");
    Err(Problem::new(Kind::Damage, format!("{objects} cannot be read: what is said above may not be all"))
        .hint("`lifeboat verify` says more")
        .handled(Handling::AnswerTold))
}

/// What a collect met that is not as it should be.
fn damage(report: &CollectReport) -> Option<Problem> {
    let (blocked, packs) = (report.blocked.len() as u64, report.lost_packs.len() as u64);
    if blocked > 0 {
        let title = format!("nothing can be freed: {} cannot be read", render::count(blocked, "object"));
        return Some(Problem::new(Kind::Damage, title).hint(
            "`lifeboat verify` says more; `lifeboat forget` drops a point that is beyond repair, and frees the rest",
        ));
    }
    let lost = match (packs, report.lost_chunks) {
        (0, 0) => return None,
        (0, chunks) => format!("{} in no pack", render::count(chunks, "chunk")),
        (packs, _) => format!("{} missing or damaged", render::count(packs, "pack")),
    };
    Some(Problem::new(Kind::Damage, format!("recovery points need what is lost: {lost}")).hint(
        "`lifeboat verify` names the machines and disks that it hits; `lifeboat verify --repair` stores anew what can be \
         had elsewhere",
    ))
}

fn tell(report: &CollectReport, seconds: f64) {
    let would = if report.dry_run { "would be " } else { "" };
    for blocker in report.blocked.iter().chain(&report.lost_packs) {
        render::line(&format!("DAMAGED {}: {}", blocker.object, blocker.problem));
    }
    if report.lost_chunks > 0 {
        let chunks = render::count(report.lost_chunks, "chunk");
        render::line(&format!("{chunks} that points need are in no pack; `lifeboat verify` names whom it hits"));
    }
    if report.repacked_packs > 0 {
        let (packs, bytes) = (render::count(report.repacked_packs, "pack"), render::bytes(report.repacked_bytes));
        render::line(&format!("{packs} {would}repacked, {bytes} written anew"));
    }
    if report.condemned_packs > 0 {
        let (packs, bytes) = (render::count(report.condemned_packs, "pack"), render::bytes(report.condemned_bytes));
        render::line(&format!("{packs} {would}put into quarantine, {bytes}"));
    }
    if report.reprieved_packs > 0 {
        let packs = render::count(report.reprieved_packs, "pack");
        render::line(&format!("{packs} {would}taken out of quarantine: points need them after all"));
    }
    report.quarantined.iter().for_each(tell_quarantined);
    let (packs, bytes) = (render::count(report.freed_packs, "pack"), render::bytes(report.freed_bytes));
    render::line(&format!("{packs} {would}deleted, {bytes} {would}freed"));
    let (needed, stored) = (render::bytes(report.live_bytes), render::bytes(report.pack_bytes));
    let points = render::count(report.points, "recovery point");
    let need = if report.points == 1 { "needs" } else { "need" };
    render::line(&format!("{points} {need} {needed} of {stored}; looked at in {seconds:.1} s"));
}

fn tell_quarantined(quarantined: &Quarantined) {
    let (packs, bytes) = (render::count(quarantined.packs, "pack"), render::bytes(quarantined.bytes));
    let due = quarantined.due;
    render::line(&format!("in quarantine: {packs}, {bytes}, to be deleted after {}", when(due)));
    for holder in &quarantined.waits_for {
        render::line(&format!("               not before the end of {holder}"));
    }
}

fn when(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| DateTime::<Utc>::from_timestamp(seconds, 0));
    time.map_or_else(|| format!("{seconds} s after 1970"), render::time)
}

fn explain_packs(packs: &[PackReport]) {
    let head = ["PACK", "KIND", "STATE", "SIZE", "NEEDED", "FRAMES"];
    let row = |pack: &PackReport| {
        vec![
            short_id(&pack.pack.to_string()).to_owned(),
            pack.kind.clone().unwrap_or_else(|| "-".to_owned()),
            pack.state.clone(),
            render::bytes(pack.bytes),
            render::bytes(pack.live_bytes),
            format!("{} of {}", pack.live_frames, pack.frames),
        ]
    };
    if packs.is_empty() {
        render::line("every pack is needed in full");
        return;
    }
    render::table(&head, &packs.iter().take(SHOWN_MAX).map(row).collect::<Vec<_>>(), &[3, 4, 5]);
    if packs.len() > SHOWN_MAX {
        render::line(&format!("and {} more; --json has all", packs.len() - SHOWN_MAX));
    }
    let [pack] = packs else { return };
    if let Some(due) = pack.due {
        render::line(&format!("in quarantine, to be deleted after {}", when(due)));
    }
    for holder in &pack.waits_for {
        render::line(&format!("not before the end of {holder}"));
    }
    for holder in &pack.holders {
        let frames = render::count(holder.frames, "frame");
        let forgotten = if holder.forgotten { ", which is forgotten but held" } else { "" };
        let point = short_id(&holder.point.to_string()).to_owned();
        render::line(&format!("{frames} needed by point {point} of {}{forgotten}", holder.machine));
        for lease in &holder.leases {
            render::line(&format!("        held by {lease}"));
        }
    }
    if pack.holders.is_empty() && pack.live_frames == 0 {
        render::line("no recovery point and no lease needs it");
    }
}

fn tell_keyless(result: &KeylessResult) {
    let report = &result.report;
    match report.as_of {
        None => {
            render::line("no collect with the key has looked at this repository yet: what its points need is not known")
        }
        Some(time) => {
            render::line(&format!("without the key; as the last collect with it found, {}:", when(time)));
            let (packs, bytes) = (render::count(report.dead_packs, "pack"), render::bytes(report.dead_bytes));
            render::line(&format!("{packs} with {bytes} needed by nothing, not in quarantine yet"));
            render::line(&format!(
                "{} more in packs of which a part is needed",
                render::bytes(report.partly_dead_bytes)
            ));
        }
    }
    let points = |ids: &[blockstore::RecoveryPointId], what: &str| {
        if !ids.is_empty() {
            render::line(&format!("{} {what}", render::count(ids.len() as u64, "recovery point")));
        }
    };
    points(&report.points_new, "came since: they may need what is said to be free");
    points(&report.points_gone, "went since: there may be more to free");
    report.quarantined.iter().for_each(tell_quarantined);
    render::line(&format!("{} due for deletion by the next collect with the key", render::bytes(report.due_bytes)));
    if report.unnamed_packs > 0 {
        let (packs, bytes) = (render::count(report.unnamed_packs, "pack"), render::bytes(report.unnamed_bytes));
        render::line(&format!(
            "{packs} with {bytes} in no index run: left by interrupted backups, or just being stored"
        ));
    }
    report.leases.iter().for_each(|lease| render::line(&format!("at work: {lease}")));
    report.damaged.iter().for_each(|damaged| render::line(&format!("DAMAGED {damaged}")));
}

/// A duration: 0, 90s, 30m, 24h, 7d.
pub fn parse_duration(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is not a duration; write 30m, 24h or 7d");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let seconds = match unit {
        "" if number == 0 => 1,
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        "w" => 7 * 24 * 3600,
        _ => return Err(bad()),
    };
    number.checked_mul(seconds).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        for (text, seconds) in [("0", 0), ("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604_800)] {
            assert_eq!(parse_duration(text), Ok(seconds), "{text}");
        }
        for text in ["", "7", "d", "-1h", "1.5h", "1y", "99999999999999999999d", "18446744073709551615d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
