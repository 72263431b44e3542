//! What can be typed.

mod audit;
mod drill;
mod files;
mod machine;
mod points;
mod recovery;
mod schedule;
mod serve;
mod size;
mod token;
mod upkeep;

use std::path::PathBuf;

use clap::builder::TypedValueParser;
use clap::{Args, Parser, Subcommand};

use crate::app::Options;
use crate::config::ConfigFile;
use crate::problem::Problem;

pub use audit::{Audit, ListAudit, VerifyAudit};
pub use drill::{Drill, Drills};
pub use files::{Cp, Find, Ls, Mount};
pub use machine::MachineArgs;
pub use points::{Backup, Forget, Init, Machines, Points, Protect, Restore, Show, ShowPoint};
pub use recovery::{Admission, Commit, Name, Recover, Recoveries, Recovery, Rehydrate, Start};
pub use schedule::{RunSchedule, Schedule};
pub use serve::{Export, Serve, Tls};
pub use size::parse_size;
pub use token::{CreateToken, RevokeToken, RoleArg, Token};
pub use upkeep::{Collect, Key, NewKey, Prune, RemoveKey, Verify};

/// Boots virtual machines straight from their backup.
#[derive(Debug, Parser)]
#[command(
    name = "lifeboat",
    version,
    about = "Boots virtual machines straight from their backup",
    after_help = "A POINT is an id prefix, MACHINE (its newest), MACHINE~1 (one before) or MACHINE@TIME.\n\
                  Exit status: 0 done, 1 failed, 2 usage, 3 damage found, 4 not found, 5 refused or in use."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The repository: a folder, as a path or a file:// URL
    #[arg(long, global = true, help_heading = "Everywhere", env = "LIFEBOAT_REPO", value_name = "URL")]
    pub repo: Option<String>,
    /// The folder for recoveries and caches [default: /var/lib/lifeboat, or ~/.local/state/lifeboat]
    #[arg(long, global = true, help_heading = "Everywhere", env = "LIFEBOAT_STATE", value_name = "DIR", value_parser = clap::builder::OsStringValueParser::new().map(PathBuf::from))]
    pub state: Option<PathBuf>,
    /// A file whose first line is the passphrase; LIFEBOAT_PASSPHRASE may hold the passphrase itself
    #[arg(long, global = true, help_heading = "Everywhere", env = "LIFEBOAT_PASSPHRASE_FILE", value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
    /// The repository's key file, used instead of a passphrase; `init` makes it
    #[arg(
        long,
        global = true,
        help_heading = "Everywhere",
        env = "LIFEBOAT_KEY_FILE",
        value_name = "FILE",
        conflicts_with = "passphrase_file"
    )]
    pub key_file: Option<PathBuf>,
    /// Memory for chunks that are served again and again, shared by all disks [default: 512M]
    #[arg(long, global = true, help_heading = "Everywhere", env = "LIFEBOAT_CACHE", value_name = "SIZE", value_parser = parse_size)]
    pub cache: Option<u64>,
    /// Answer in JSON
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,
}

/// Memory for chunks if nobody says how much.
const CACHE: u64 = 512 << 20;

impl Global {
    /// The same, with what a configuration says where the command line says nothing.
    pub fn options_with(&self, config: Option<&ConfigFile>) -> Result<Options, Problem> {
        let options = self.options()?;
        let Some(config) = config else { return Ok(options) };
        let state_given = self.state.as_ref().is_some_and(|state| !state.as_os_str().is_empty());
        let cache = self.cache.or(config.cache()).unwrap_or(CACHE);
        Ok(Options { cache, ..config.complete(options, state_given) })
    }

    /// What a process that does the work itself opens.
    pub fn options(&self) -> Result<Options, Problem> {
        let state = match &self.state {
            Some(state) if !state.as_os_str().is_empty() => state.clone(),
            _ => default_state()?,
        };
        let state = std::path::absolute(&state)
            .map_err(|error| Problem::failed(format!("cannot use state folder {}", state.display()), &error))?;
        Ok(Options {
            repository: self.repo.clone(),
            state,
            passphrase_file: self.passphrase_file.clone(),
            passphrase: std::env::var("LIFEBOAT_PASSPHRASE").ok(),
            key_file: self.key_file.clone(),
            cache: self.cache.unwrap_or(CACHE),
        })
    }
}

fn default_state() -> Result<PathBuf, Problem> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/lifeboat"));
    }
    let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    var("XDG_STATE_HOME")
        .or_else(|| var("HOME").map(|home| home.join(".local/state")))
        .map(|dir| dir.join("lifeboat"))
        .ok_or_else(|| Problem::usage("there is no place for the state folder").hint("give --state DIR"))
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a repository
    Init(Init),
    /// Back up a machine's disks as a recovery point
    Backup(Backup),
    /// List the domains of a libvirt, to back them up
    Machines(Machines),
    /// List recovery points
    Points(Points),
    /// Show one recovery point
    Show(ShowPoint),
    /// Protect a recovery point: no prune or forget passes it
    Protect(Protect),
    /// Take a recovery point's protection away
    Unprotect(Show),
    /// Drop one recovery point
    Forget(Forget),
    /// Drop the recovery points that no rule keeps
    Prune(Prune),
    /// Copy a recovery point's disks to image files or devices
    Restore(Restore),
    /// Check that what is stored is whole
    Verify(Verify),
    /// List, add, remove and rotate the keys that open the repository
    #[command(subcommand)]
    Key(Key),
    /// Free the space of what no recovery point needs
    Collect(Collect),
    /// Serve a recovery point's disks over NBD until interrupted
    Export(Export),
    /// Show what lies on the disks of a recovery point: volumes, directories, versions of a file
    Ls(Ls),
    /// Copy files and trees out of a recovery point, without booting it
    Cp(Cp),
    /// Find files by name on all disks of a recovery point
    Find(Find),
    /// Make certificates for NBD over TLS
    Tls(Tls),
    /// Show the files of a recovery point in a folder until interrupted
    Mount(Mount),
    /// Boot a machine straight from a recovery point
    Recover(Recover),
    /// Show what this host carries, and how many more VMs it could
    Status,
    /// List running recoveries
    Recoveries(Recoveries),
    /// Show one recovery
    Recovery(Recovery),
    /// Start the VM of a recovery again, on all that it has written
    Start(Start),
    /// Copy a recovery's disks to production storage while its guest runs
    Rehydrate(Rehydrate),
    /// Move a rehydrated guest onto production storage, without a reboot
    Cutover(Name),
    /// Make what a recovery's guest has written a new recovery point, while it runs
    Commit(Commit),
    /// End a recovery; what its guest wrote is lost unless it is cut over, the recovery point stays
    Discard(Name),
    /// Make, list and revoke the tokens that let programs and people use the API over the network
    #[command(subcommand)]
    Token(Token),
    /// Show the policies of the service, or run one now
    #[command(subcommand)]
    Schedule(Schedule),
    /// Show who has changed what through the API, and prove that the log of it is whole
    #[command(subcommand)]
    Audit(Audit),
    /// Boot recovery points in isolation, and judge whether they come up
    Drill(Drill),
    /// List what drills found
    Drills(Drills),
    /// Run as a service: take up recoveries, serve their disks and the API
    Serve(Serve),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
