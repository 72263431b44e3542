//! `audit`.

use axum::http::Method;

use super::args::{Audit, Global, ListAudit, VerifyAudit};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::render;
use crate::audit::{Chained, Event, VerifyResult};
use crate::problem::{Handling, Kind, Problem};

pub async fn run(door: &Door, global: &Global, command: &Audit) -> Result<(), Problem> {
    match command {
        Audit::List(args) => list(door, global, args).await,
        Audit::Verify(args) => verify(door, global, args).await,
    }
}

async fn list(door: &Door, global: &Global, args: &ListAudit) -> Result<(), Problem> {
    let after = args.after.map_or(String::new(), |after| format!("&after={after}"));
    let path = format!("/api/v1/audit?limit={}{after}", args.limit);
    let records: Vec<Chained> = door.client.call(Method::GET, &path, NOTHING).await?;
    if global.json {
        render::json(&records);
        return Ok(());
    }
    let row = |chained: &Chained| {
        let (who, what) = tell(&chained.record.event);
        vec![chained.record.number.to_string(), render::time(chained.record.time), who, what]
    };
    render::table(&["RECORD", "TIME", "WHO", "WHAT"], &records.iter().map(row).collect::<Vec<_>>(), &[0]);
    Ok(())
}

fn tell(event: &Event) -> (String, String) {
    match event {
        Event::Asked { who, from, what } => {
            (from.as_ref().map_or(who.clone(), |from| format!("{who} from {from}")), what.clone())
        }
        Event::Answered { asked, status, about } => {
            let about = about.as_ref().map_or(String::new(), |about| format!(", {about}"));
            (String::new(), format!("record {asked} answered {status}{about}"))
        }
        Event::JobEnded { job, what, result } => (String::new(), format!("job {job}, {what}: {result}")),
        Event::TornEnd { bytes } => {
            (String::new(), format!("a crash had left {} of a record; cut off", render::bytes(*bytes)))
        }
    }
}

async fn verify(door: &Door, global: &Global, args: &VerifyAudit) -> Result<(), Problem> {
    let head = args.head.as_ref().map_or(String::new(), |head| format!("?head={}", segment(head)));
    let path = format!("/api/v1/audit/verification{head}");
    let result: VerifyResult = door.client.call(Method::GET, &path, NOTHING).await?;
    if global.json {
        render::json(&result);
    } else {
        for damage in &result.damaged {
            render::line(&format!("DAMAGED line {}: {}", damage.line, damage.problem));
        }
        if result.torn_ends > 0 {
            let times = render::count(result.torn_ends, "time");
            render::line(&format!("{times} a crash had left a torn record, which was cut off"));
        }
        render::line(&format!("{}, the last has the hash {}", render::count(result.records, "record"), result.head));
    }
    if result.ok {
        if !global.json {
            render::line("the chain holds");
        }
        return Ok(());
    }
    let title = match result.head_found {
        Some(false) => "the audit log does not go through this hash: records that were there are not, or were changed",
        _ => "the audit log is not what was written",
    };
    let problem = Problem::new(Kind::Damage, title).hint("compare it with a copy that was kept elsewhere");
    Err(problem.handled(Handling::AnswerTold))
}
