//! The audit log.

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub enum Audit {
    /// List who has changed what through the API, and what came of it
    List(ListAudit),
    /// Prove that no record was changed, taken out or put in
    Verify(VerifyAudit),
}

#[derive(Debug, Args)]
pub struct ListAudit {
    /// At most so many records
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub limit: usize,
    /// The ones that follow record N, instead of the newest
    #[arg(long, value_name = "N")]
    pub after: Option<u64>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The last hash stands for all records up to it. Note it elsewhere now and then: with --head it is proven that the log\n\
still begins with what it was then, also to the end.")]
pub struct VerifyAudit {
    /// A last hash that was noted earlier and must be in the log
    #[arg(long, value_name = "HASH")]
    pub head: Option<String>,
}
