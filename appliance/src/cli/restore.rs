//! `restore`.

use super::args::{Global, Restore};
use super::client::segment;
use super::connect::Door;
use super::{progress, render};
use crate::problem::Problem;
use crate::restore::{RestoreRequest, RestoreResult};

pub async fn run(door: &Door, global: &Global, args: &Restore) -> Result<(), Problem> {
    let mut targets = Vec::with_capacity(args.to.len());
    for target in &args.to {
        targets.push(crate::restore::parse_target(target)?);
    }
    let request = RestoreRequest { targets, format: args.format.clone(), overwrite: args.overwrite };
    let path = format!("/api/v1/points/{}/restore", segment(&args.point));
    let result = progress::run(&door.client, &path, &request).await?;
    let result: RestoreResult =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read the restore's result", &error))?;
    if global.json {
        render::json(&result);
        return Ok(());
    }
    for disk in &result.disks {
        render::line(&format!(
            "restored {} to {} ({}, {} of data)",
            disk.name,
            disk.target.display(),
            render::bytes(disk.size),
            render::bytes(disk.written)
        ));
    }
    render::line(&format!("done in {:.1} s", result.seconds));
    Ok(())
}
