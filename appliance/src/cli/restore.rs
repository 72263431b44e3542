//! `restore`.

use super::args::{Global, Restore};
use super::client::segment;
use super::connect::Door;
use super::{progress, render};
use crate::problem::Problem;
use crate::restore::{RestoreRequest, RestoreResult, Start};

pub async fn run(door: &Door, global: &Global, args: &Restore) -> Result<(), Problem> {
    let mut targets = Vec::with_capacity(args.to.len());
    for target in &args.to {
        targets.push(crate::restore::parse_target(target)?);
    }
    let start = match (args.in_place, args.resume) {
        (true, _) => Start::InPlace,
        (_, true) => Start::Resume,
        _ => Start::New,
    };
    let (format, overwrite, verify) = (args.format.clone(), args.overwrite, args.verify);
    let request = RestoreRequest { targets, format, overwrite, start, verify };
    let path = format!("/api/v1/points/{}/restore", segment(&args.point));
    let result = progress::run(&door.client, &path, &request).await?;
    let result: RestoreResult =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read the restore's result", &error))?;
    if global.json {
        render::json(&result);
        return Ok(());
    }
    for disk in &result.disks {
        let written = render::bytes(disk.written);
        let how = match disk.unchanged {
            None => format!("{written} of data"),
            Some(unchanged) => format!("{written} written, {} was right already", render::bytes(unchanged)),
        };
        render::line(&format!(
            "restored {} to {} ({}, {how}{})",
            disk.name,
            disk.target,
            render::bytes(disk.size),
            if disk.verified { "; read back and compared" } else { "" }
        ));
    }
    render::line(&format!("done in {:.1} s", result.seconds));
    Ok(())
}
