//! `verify`.

use super::args::{Global, Verify};
use super::connect::Door;
use super::{progress, render};
use crate::catalog::spec::short_id;
use crate::problem::{Handling, Kind, Problem};
use crate::verify::{Hit, RepairSource, VerifyRequest, VerifyResult};

/// Disks and ranges that are printed for one object.
const HITS_SHOWN: usize = 10;
const RANGES_SHOWN: usize = 4;

/// What a verification without the key leaves open.
const WITHOUT_KEY: &str = "checked without the key: objects are what was written and packs hold what the index says; \
                           whether points find all their chunks and frames open, only a verify with the key shows";

pub async fn run(door: &Door, global: &Global, args: &Verify) -> Result<(), Problem> {
    let portion = args.read_data.clone().filter(|portion| portion != "100%");
    let request = VerifyRequest {
        point: args.point.clone(),
        read_data: args.read_data.is_some(),
        portion,
        hash_only: args.hash_only,
        repair: args.repair,
        copies: args.copies.iter().map(|copy| crate::app::repository_path(copy)).collect::<Result<_, _>>()?,
        sources: args.sources.iter().map(|source| repair_source(source)).collect::<Result<_, _>>()?,
    };
    let result = progress::run(&door.client, "/api/v1/verify", &request).await?;
    let result: VerifyResult =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read the result", &error))?;
    if global.json {
        render::json(&result);
    } else {
        for damage in &result.damaged {
            render::line(&format!("DAMAGED {}: {}", damage.object, damage.problem));
            damage.hits.iter().take(HITS_SHOWN).for_each(|hit| render::line(&format!("        hits {}", told(hit))));
            if let Some(more) = damage.hits.len().checked_sub(HITS_SHOWN).filter(|more| *more > 0) {
                let disks = render::count(more as u64, "more disk");
                render::line(&format!("        hits {disks}; --json lists all"));
            }
        }
        for repaired in &result.repaired {
            render::line(&format!("repaired {}: {}", repaired.object, repaired.problem));
        }
        if let Some(repair) = result.repair {
            let packs = render::count(repair.packs, "pack");
            let chunks = render::count(repair.chunks, "chunk");
            render::line(&format!("repaired: {packs} put back, {chunks} stored anew"));
        }
        render::line(&format!(
            "checked {} and {}{} in {:.1} s",
            render::count(result.points, "recovery point"),
            render::count(result.chunks, "chunk"),
            if args.read_data.is_some() {
                format!(", read {}", render::bytes(result.bytes_read))
            } else {
                String::new()
            },
            result.seconds
        ));
    }
    if result.keyless && !global.json {
        render::line(WITHOUT_KEY);
    }
    if !global.json && args.read_data.is_some() && result.packs_read < result.packs_needed {
        let since = result.oldest_verified.map_or("never".to_owned(), render::time);
        render::line(&format!(
            "that is {} of {}; what waits longest was verified: {since}",
            render::bytes(result.bytes_read),
            render::bytes(result.bytes_needed)
        ));
    }
    if result.ok {
        if !global.json {
            render::line(match (result.keyless, args.read_data.is_some()) {
                (false, _) => "all is whole",
                (true, true) => "no damage found",
                (true, false) => "no damage found; the data was not read, `--read-data` does",
            });
        }
        return Ok(());
    }
    Err(Problem::new(
        Kind::Damage,
        format!("damage in {} of the repository", render::count(result.damaged.len() as u64, "object")),
    )
    .hint(if args.repair {
        "give a --copy of the repository or a --source image that still has it; what is not named still restores"
    } else {
        "`verify --repair` stores data anew where it can be had; so does a backup that meets it; what is not named still restores"
    })
    .handled(Handling::AnswerTold))
}

fn repair_source(source: &str) -> Result<RepairSource, Problem> {
    let (disk, location) = crate::capture::parse_source(source)?;
    Ok(RepairSource { disk, location })
}

fn told(hit: &Hit) -> String {
    let shown = hit.ranges.iter().take(RANGES_SHOWN).map(|[from, to]| format!("{from}+{}", to - from));
    let mut ranges: Vec<String> = shown.collect();
    if hit.ranges.len() > RANGES_SHOWN {
        ranges.push(format!("{} more", hit.ranges.len() - RANGES_SHOWN));
    }
    format!(
        "{} disk {} of point {}: {} at {}",
        hit.machine,
        hit.disk,
        short_id(&hit.point),
        render::bytes(hit.bytes),
        ranges.join(", ")
    )
}
