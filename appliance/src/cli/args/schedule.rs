//! Policies that run by themselves.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub enum Schedule {
    /// List the policies of the service: when they run next, and what became of their last run
    List,
    /// Run a policy now, and wait for its end
    Run(RunSchedule),
}

#[derive(Debug, Args)]
pub struct RunSchedule {
    /// The policy
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub policy: String,
    /// Return at once; the run goes on
    #[arg(long)]
    pub detach: bool,
}
