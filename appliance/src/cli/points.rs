//! `points` and `show`.

use axum::http::Method;

use super::args::{Global, Points, ShowPoint};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::render;
use crate::catalog::spec::short_id;
use crate::catalog::{DamagedPoint, ListedPoint, PointSummary};
use crate::inspect::{DiskLocality, PointDetail};
use crate::problem::Problem;

pub async fn list(door: &Door, global: &Global, args: &Points) -> Result<(), Problem> {
    let query = args.machine.as_ref().map_or(String::new(), |machine| format!("?machine={}", segment(machine)));
    let points: Vec<ListedPoint> = door.client.call(Method::GET, &format!("/api/v1/points{query}"), NOTHING).await?;
    if global.json {
        render::json(&points);
        return Ok(());
    }
    if points.is_empty() {
        render::line("no recovery points yet; `lifeboat backup MACHINE SOURCE` makes one");
        return Ok(());
    }
    let row = |point: &ListedPoint| match point {
        ListedPoint::Whole(point) => row(point),
        ListedPoint::Damaged(point) => damaged_row(point),
    };
    let rows: Vec<Vec<String>> = points.iter().map(row).collect();
    render::table(
        &["POINT", "MACHINE", "TIME", "DISKS", "SIZE", "STORED", "PROTECTED", "DRILL", "LABELS"],
        &rows,
        &[3, 4, 5],
    );
    for point in &points {
        if let ListedPoint::Damaged(point) = point {
            render::line(&format!("DAMAGED {}: {}", short_id(&point.id), point.damaged));
        }
    }
    Ok(())
}

fn damaged_row(point: &DamagedPoint) -> Vec<String> {
    let protected = if point.protected { "yes" } else { "" };
    [short_id(&point.id), "DAMAGED", "-", "-", "-", "-", protected, "", ""].map(str::to_owned).to_vec()
}

fn protected(point: &PointSummary) -> String {
    match (point.protected, point.protected_until) {
        (false, _) => String::new(),
        (true, Some(until)) => format!("until {}", render::time(until)),
        (true, None) if point.protection_damaged => "yes (damaged)".to_owned(),
        (true, None) => "yes".to_owned(),
    }
}

fn row(point: &PointSummary) -> Vec<String> {
    vec![
        short_id(&point.id).to_owned(),
        point.machine.clone(),
        render::time(point.time),
        point.disks.len().to_string(),
        render::bytes(point.size),
        render::bytes(point.stored),
        protected(point),
        drilled(point, "result"),
        labels(point),
    ]
}

/// A field of the newest drill; empty without one.
fn drilled(point: &PointSummary, field: &str) -> String {
    let drill = point.drill.as_ref().and_then(|drill| drill.get(field)?.as_str());
    drill.unwrap_or_default().to_owned()
}

/// The newest drill in words.
fn drill_line(point: &PointSummary) -> String {
    let Some(drill) = &point.drill else { return "none".to_owned() };
    let time = drill.get("time").and_then(|time| serde_json::from_value(time.clone()).ok()).map(render::time);
    let rto = drill.get("rto_ms").and_then(serde_json::Value::as_u64);
    let how = match (rto, drilled(point, "reason")) {
        (Some(_), _) => format!(", ready after {}", render::millis(rto)),
        (None, why) if !why.is_empty() => format!(" at stage {}: {why}", drilled(point, "stage")),
        (None, _) => String::new(),
    };
    format!("{} {}{how}", drilled(point, "result"), time.unwrap_or_default())
}

fn labels(point: &PointSummary) -> String {
    point.labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
}

pub async fn show(door: &Door, global: &Global, args: &ShowPoint) -> Result<(), Problem> {
    let path = format!("/api/v1/points/{}", segment(&args.point));
    if args.hardware {
        let hardware: serde_json::Value = door.client.call(Method::GET, &format!("{path}/hardware"), NOTHING).await?;
        render::json(&hardware);
        return Ok(());
    }
    let point: PointDetail = door.client.call(Method::GET, &path, NOTHING).await?;
    if global.json {
        render::json(&point);
        return Ok(());
    }
    let summary = &point.summary;
    render::pairs(&[
        ("point", summary.id.clone()),
        ("machine", summary.machine.clone()),
        ("time", render::time(summary.time)),
        ("parent", point.parent.clone().unwrap_or_else(|| "none".to_owned())),
        ("consistency", summary.consistency.clone()),
        ("labels", labels(summary)),
        ("hardware", point.machine_in_words.clone()),
        ("protected", if summary.protected { protected(summary) } else { "no".to_owned() }),
        ("drill", drill_line(summary)),
        ("read", render::bytes(point.read)),
        ("new", render::bytes(point.new)),
        ("stored", render::bytes(summary.stored)),
        ("compared", format!("{} chunks with the sources", point.compared)),
        ("took", format!("{:.1} s", point.seconds)),
    ]);
    let rows: Vec<Vec<String>> = point
        .disks_detail
        .iter()
        .map(|disk| {
            vec![
                disk.name.clone(),
                render::bytes(disk.size),
                render::bytes(disk.data),
                pieces(&disk.locality),
                disk.root.clone(),
            ]
        })
        .collect();
    render::line("");
    render::table(&["DISK", "SIZE", "DATA", "READ FROM", "ROOT"], &rows, &[1, 2]);
    Ok(())
}

/// What reading a disk costs: `12 packs, 1.04x` fetches 4 % more than it uses.
fn pieces(locality: &DiskLocality) -> String {
    let DiskLocality { sampled, packs, read_amplification, .. } = locality;
    let noun = if *packs == 1 { "pack" } else { "packs" };
    let how = if *sampled { " (sampled)" } else { "" };
    format!("{packs} {noun}, {read_amplification:.2}x{how}")
}
