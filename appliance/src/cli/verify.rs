//! `verify`.

use super::args::{Global, Verify};
use super::connect::Door;
use super::{progress, render};
use crate::catalog::spec::short_id;
use crate::problem::{Handling, Kind, Problem};
use crate::verify::{VerifyRequest, VerifyResult};

/// What a verification without the key leaves open.
const WITHOUT_KEY: &str = "checked without the key: objects are what was written and packs hold what the index says; \
                           whether points find all their chunks and frames open, only a verify with the key shows";

pub async fn run(door: &Door, global: &Global, args: &Verify) -> Result<(), Problem> {
    let request = VerifyRequest { point: args.point.clone(), read_data: args.read_data };
    let result = progress::run(&door.client, "/api/v1/verify", &request).await?;
    let result: VerifyResult =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read the result", &error))?;
    if global.json {
        render::json(&result);
    } else {
        for damage in &result.damaged {
            render::line(&format!("DAMAGED {}: {}", damage.object, damage.problem));
            for hit in &damage.hits {
                render::line(&format!("        hits disk {} of point {}", hit.disk, short_id(&hit.point)));
            }
        }
        for repaired in &result.repaired {
            render::line(&format!("repaired {}: {}", repaired.object, repaired.problem));
        }
        render::line(&format!(
            "checked {} and {}{} in {:.1} s",
            render::count(result.points, "recovery point"),
            render::count(result.chunks, "chunk"),
            if args.read_data { format!(", read {}", render::bytes(result.bytes_read)) } else { String::new() },
            result.seconds
        ));
    }
    if result.keyless && !global.json {
        render::line(WITHOUT_KEY);
    }
    if result.ok {
        if !global.json {
            render::line(if result.keyless { "no damage found" } else { "all is whole" });
        }
        return Ok(());
    }
    Err(Problem::new(
        Kind::Damage,
        format!("damage in {} of the repository", render::count(result.damaged.len() as u64, "object")),
    )
    .hint("a backup that meets a damaged chunk stores it anew; points that are not named still restore")
    .handled(Handling::AnswerTold))
}
