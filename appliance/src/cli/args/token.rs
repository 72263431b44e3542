//! Tokens of the API.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand, ValueEnum};

use crate::cli::token::{End, parse_end};

#[derive(Debug, Subcommand)]
pub enum Token {
    /// Make a token; it is shown this once
    Create(CreateToken),
    /// List the tokens: whose they are, what they may do, when they end
    List,
    /// End a token at once
    Revoke(RevokeToken),
}

#[derive(Debug, Args)]
#[command(after_help = "\
A viewer looks. An operator backs up, recovers, reads disks and files and restores: he is trusted with the data, and with\n\
files of this host. An admin also drops points, frees space, and changes keys and tokens. With --machine an operator\n\
cannot do what names files of this host (backup, restore, rehydrate, export, verify), which would be a way around it.\n\n\
A program sends the token as `Authorization: Bearer TOKEN`.")]
pub struct CreateToken {
    /// Whose it is
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
    /// What it may do
    #[arg(long, value_enum)]
    pub role: RoleArg,
    /// Only for this machine, and may be given several times [default: all machines]
    #[arg(long, value_name = "MACHINE")]
    pub machine: Vec<String>,
    /// When it ends: 12h, 90d, 2027-01-31 (its last day) or 2027-01-31T03:00:00Z [default: when it is revoked]
    #[arg(long, value_name = "WHEN", value_parser = parse_end)]
    pub expires: Option<End>,
}

/// A role, as it is typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum RoleArg {
    Viewer,
    Operator,
    Admin,
}

#[derive(Debug, Args)]
pub struct RevokeToken {
    /// Its name or id
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub token: String,
}
