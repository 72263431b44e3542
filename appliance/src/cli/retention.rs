//! `prune`, `protect`, `unprotect` and `forget`.

use axum::http::Method;

use super::args::{Forget, Global, Protect, Prune, Show};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::render;
use crate::catalog::spec::short_id;
use crate::forget::{ForgetResult, ProtectRequest, ProtectResult};
use crate::problem::{Handling, Kind, Problem};
use crate::retention::Rules;
use crate::retention::prune::{Fate, PruneRequest, PruneResult};
use crate::retention::rules::{parse_label, parse_labels};

pub async fn prune(door: &Door, global: &Global, args: &Prune) -> Result<(), Problem> {
    let request = request(args)?;
    request.check()?;
    let result: PruneResult = door.client.call(Method::POST, "/api/v1/prune", Some(&request)).await?;
    if global.json {
        render::json(&result);
    } else {
        tell(&result, args.verbose || args.dry_run);
    }
    if result.failed > 0 {
        return Err(Problem::new(
            Kind::Failed,
            format!("{} could not be forgotten", render::count(result.failed as u64, "recovery point")),
        )
        .hint("why is said beside each; prune again when that is over")
        .handled(Handling::AnswerTold));
    }
    Ok(())
}

fn request(args: &Prune) -> Result<PruneRequest, Problem> {
    let labels = args.keep_label.iter().map(|label| parse_label(label)).collect::<Result<_, _>>()?;
    Ok(PruneRequest {
        rules: Rules {
            last: args.keep_last,
            hourly: args.keep_hourly,
            daily: args.keep_daily,
            weekly: args.keep_weekly,
            monthly: args.keep_monthly,
            yearly: args.keep_yearly,
            within: args.keep_within,
            labels,
        },
        machines: args.machine.iter().cloned().collect(),
        labels: parse_labels(&args.label)?,
        group_by: args.group_by.clone(),
        dry_run: args.dry_run,
    })
}

/// Every decision with its reasons, or only what is forgotten.
fn tell(result: &PruneResult, all: bool) {
    let rows: Vec<Vec<String>> = result
        .points
        .iter()
        .filter(|point| all || point.fate != Fate::Keep)
        .map(|point| {
            let fate = match point.fate {
                Fate::Keep => "keep",
                Fate::Forget => "forget",
                Fate::Forgotten => "forgotten",
                Fate::Failed => "FAILED",
            };
            vec![
                short_id(&point.id).to_owned(),
                point.machine.clone(),
                render::time(point.time),
                fate.to_owned(),
                point.reasons.join("; "),
            ]
        })
        .collect();
    if !rows.is_empty() {
        render::table(&["POINT", "MACHINE", "TIME", "", "WHY"], &rows, &[]);
    }
    for damaged in &result.damaged {
        render::line(&format!("DAMAGED {}: {}; it is left alone", short_id(&damaged.id), damaged.damaged));
    }
    let points = |count: usize| render::count(count as u64, "recovery point");
    if result.dry_run {
        render::line(&format!("would forget {}, keep {}", points(result.forgotten), result.kept));
    } else {
        render::line(&format!("forgot {}, kept {}", points(result.forgotten), result.kept));
    }
    if result.forgotten > 0 {
        tell_collect(result.stored);
    }
}

fn tell_collect(stored: u64) {
    let most = if stored > 0 { format!(": up to {}", render::bytes(stored)) } else { String::new() };
    render::line(&format!("`lifeboat collect` frees what no other point needs{most}"));
}

pub async fn forget(door: &Door, global: &Global, args: &Forget) -> Result<(), Problem> {
    let path = format!("/api/v1/points/{}?newest={}", segment(&args.point), args.newest);
    let result: ForgetResult = door.client.call(Method::DELETE, &path, NOTHING).await?;
    if global.json {
        render::json(&result);
        return Ok(());
    }
    render::line(&format!("forgot recovery point {}", named(&result.point, result.machine.as_ref())));
    tell_collect(result.stored);
    Ok(())
}

pub async fn protect(door: &Door, global: &Global, args: &Protect) -> Result<(), Problem> {
    let path = format!("/api/v1/points/{}/protection", segment(&args.point));
    let request = ProtectRequest { until: args.until };
    let result: ProtectResult = door.client.call(Method::PUT, &path, Some(&request)).await?;
    if global.json {
        render::json(&result);
        return Ok(());
    }
    let until =
        result.until.map_or("until it is unprotected".to_owned(), |time| format!("until {}", render::time(time)));
    render::line(&format!("recovery point {} is protected {until}", named(&result.point, result.machine.as_ref())));
    Ok(())
}

pub async fn unprotect(door: &Door, global: &Global, args: &Show) -> Result<(), Problem> {
    let path = format!("/api/v1/points/{}/protection", segment(&args.point));
    let result: ProtectResult = door.client.call(Method::DELETE, &path, NOTHING).await?;
    if global.json {
        render::json(&result);
    } else {
        render::line(&format!("recovery point {} is not protected", named(&result.point, result.machine.as_ref())));
    }
    Ok(())
}

fn named(point: &str, machine: Option<&String>) -> String {
    match machine {
        Some(machine) => format!("{} of {machine}", short_id(point)),
        None => short_id(point).to_owned(),
    }
}
