//! Upkeep of the repository: what is kept, whether it is whole, keys, space.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};

use crate::retention::Span;

#[derive(Debug, Args)]
#[command(
    after_help = "A point that any rule keeps stays. Hours, days, weeks (from Monday), months and years are those of the \
                  local time zone; of each, the newest point is kept. A machine's newest point always stays, and so do \
                  points that are protected, in use or damaged. `lifeboat collect` frees the space."
)]
pub struct Prune {
    /// Only this machine's points; may be given several times [default: all machines]
    #[arg(long, value_name = "MACHINE")]
    pub machine: Vec<String>,
    /// Only points with this label; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// Apply the rules to each value of this label by itself
    #[arg(long, value_name = "KEY")]
    pub group_by: Option<String>,
    /// Keep the newest N points
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_last: u64,
    /// Keep the newest point of each of the newest N hours that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_hourly: u64,
    /// The same of days
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_daily: u64,
    /// The same of weeks
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_weekly: u64,
    /// The same of months
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_monthly: u64,
    /// The same of years
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_yearly: u64,
    /// Keep all points of this time before the newest: 14d, 6h, 2w, 3m (months), 1y or 1y6m
    #[arg(long, value_name = "DURATION", value_parser = Span::parse)]
    pub keep_within: Option<Span>,
    /// Keep points with this label; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub keep_label: Vec<String>,
    /// Change nothing; say of every point what would become of it, and why
    #[arg(long)]
    pub dry_run: bool,
    /// Say of every point what became of it, and why
    #[arg(long, short)]
    pub verbose: bool,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// Only what this recovery point needs [default: all of the repository]
    pub point: Option<String>,
    /// Read, decrypt and check the data, not only the structure: all of it, or a share (5%) or size (10G) of what
    /// waits longest
    #[arg(long, num_args = 0..=1, default_missing_value = "100%", value_name = "PORTION")]
    pub read_data: Option<String>,
    /// With --read-data: check packs by their hash alone, which proves them as they were written; faster
    #[arg(long, requires = "read_data")]
    pub hash_only: bool,
    /// Store anew what is damaged or missing, from good parts of damaged packs, --copy and --source
    #[arg(long)]
    pub repair: bool,
    /// With --repair: another copy of this repository
    #[arg(long = "copy", requires = "repair", value_name = "URL")]
    pub copies: Vec<String>,
    /// With --repair: a disk image or NBD URI that holds the data, or most of it, of whatever point; with a name only
    /// the disks that are called so are repaired from it
    #[arg(long = "source", requires = "repair", value_name = "[DISK=]IMAGE")]
    pub sources: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Key {
    /// List the key slots
    List,
    /// Let another passphrase or key file open the repository
    Add(NewKey),
    /// Take a passphrase's or key file's way in; the last one stays
    Remove(RemoveKey),
    /// Put a new passphrase or key file in the place of the one in use
    Rotate(NewKey),
}

#[derive(Debug, Args)]
#[command(after_help = "LIFEBOAT_NEW_PASSPHRASE may hold the new passphrase itself.")]
pub struct NewKey {
    /// A file whose first line is the new passphrase
    #[arg(long, value_name = "FILE", conflicts_with = "new_key_file")]
    pub new_passphrase_file: Option<PathBuf>,
    /// The new key file; made if it does not exist, never overwritten
    #[arg(long, value_name = "FILE")]
    pub new_key_file: Option<PathBuf>,
    /// A name for people, at most 64 bytes
    #[arg(long)]
    pub label: Option<String>,
}

#[derive(Debug, Args)]
pub struct RemoveKey {
    /// The slot's label, or the beginning of its id
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub slot: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Packs that nothing needs wait in quarantine until their date, and until every backup that may have found their chunks\n\
has ended; the next collect after that deletes them. It runs beside backups and recoveries, and may be interrupted at\n\
any time. Without the passphrase or key file, `collect --dry-run` goes by what the last collect with it found.")]
pub struct Collect {
    /// Say what would be done; change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Show the packs that are not needed in full, or who needs the pack whose name begins with PACK; change nothing
    #[arg(long, value_name = "PACK", num_args = 0..=1, default_missing_value = "")]
    pub explain: Option<String>,
    /// Do not wait for the dates of what is in quarantine; backups and readers are waited for all the same
    #[arg(long)]
    pub reclaim_now: bool,
    /// How long packs stay in quarantine: 0, 30m, 24h, 7d [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = crate::cli::collect::parse_duration)]
    pub quarantine: Option<u64>,
    /// Repack packs of which less than this is needed, in per cent; 0 repacks nothing [default: 50]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub threshold: Option<u8>,
}
