//! `backup`.

use super::args::{Backup, Global};
use super::connect::Door;
use super::{progress, render};
use crate::capture::{BackupRequest, BackupResult, parse_sources};
use crate::catalog::spec::short_id;
use crate::problem::Problem;
use crate::retention::rules::parse_labels;

pub async fn run(door: &Door, global: &Global, args: &Backup) -> Result<(), Problem> {
    let request = BackupRequest {
        machine: args.machine.clone(),
        sources: parse_sources(&args.sources)?,
        labels: parse_labels(&args.labels)?,
        format: args.format.clone(),
    };
    request.check()?;
    let result = progress::run(&door.client, "/api/v1/points", &request).await?;
    let result: BackupResult =
        serde_json::from_value(result).map_err(|error| Problem::failed("cannot read the backup's result", &error))?;
    if global.json {
        render::json(&result);
        return Ok(());
    }
    render::line(&format!(
        "recovery point {} of {}: read {}, new {}, stored {}, in {:.1} s",
        short_id(&result.point),
        args.machine,
        render::bytes(result.read),
        render::bytes(result.new),
        render::bytes(result.stored),
        result.seconds
    ));
    Ok(())
}
