//! What can be typed.

use std::path::PathBuf;

use clap::builder::{NonEmptyStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

use crate::app::Options;
use crate::problem::Problem;
use crate::retention::Span;

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
    /// Memory for chunks that are served again and again, shared by all disks
    #[arg(long, global = true, help_heading = "Everywhere", env = "LIFEBOAT_CACHE", default_value = "512M", value_name = "SIZE", value_parser = parse_size)]
    pub cache: u64,
    /// Answer in JSON
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub json: bool,
}

impl Global {
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
            cache: self.cache,
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
    /// List recovery points
    Points(Points),
    /// Show one recovery point
    Show(Show),
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
    /// Run as a service: take up recoveries, serve their disks and the API
    Serve(Serve),
}

#[derive(Debug, Args)]
pub struct Init {
    /// Size of a chunk: a power of two from 16K to 4M
    #[arg(long, default_value = "64K", value_name = "SIZE", value_parser = parse_size)]
    pub chunk_size: u64,
    /// Store everything as it is; whoever can read the folder can read the disks
    #[arg(long)]
    pub no_encryption: bool,
}

#[derive(Debug, Args)]
pub struct Backup {
    /// What the machine is called
    pub machine: String,
    /// An image file or block device (raw, qcow2, or what qemu-nbd opens), or an nbd:// or nbd+unix:// URI;
    /// NAME=SOURCE names the disk, else they are disk0, disk1 and so on
    #[arg(required = true, value_name = "SOURCE")]
    pub sources: Vec<String>,
    /// Keep KEY=VALUE with the recovery point
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
    /// Take image files to be `raw` or `qcow2` instead of looking
    #[arg(long, value_parser = ["raw", "qcow2"])]
    pub format: Option<String>,
}

#[derive(Debug, Args)]
pub struct Points {
    /// Only this machine's
    pub machine: Option<String>,
}

#[derive(Debug, Args)]
pub struct Show {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
}

#[derive(Debug, Args)]
pub struct Protect {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// The last day it is protected, as 2027-01-31, or a time as 2027-01-31T03:00:00Z [default: no end]
    #[arg(long, value_name = "DATE", value_parser = crate::forget::parse_until)]
    pub until: Option<chrono::DateTime<chrono::Utc>>,
}

#[derive(Debug, Args)]
pub struct Forget {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// Forget it even if it is its machine's newest
    #[arg(long)]
    pub newest: bool,
}

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
pub struct Restore {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// Where to: a file, a block device, or a folder for all disks; DISK=TARGET for one of several
    #[arg(long = "to", required = true, num_args = 1.., value_name = "[DISK=]TARGET")]
    pub to: Vec<String>,
    /// `raw` or `qcow2` [default: by the target's ending, else raw]
    #[arg(long, value_parser = ["raw", "qcow2"])]
    pub format: Option<String>,
    /// Replace files that exist and write to block devices
    #[arg(long)]
    pub overwrite: bool,
    /// Change raw files or block devices that exist: what they hold is hashed, and only what differs is written
    #[arg(long, conflicts_with_all = ["overwrite", "resume"])]
    pub in_place: bool,
    /// Go on where an interrupted restore to the same target stopped; if this one is interrupted, keep what it did
    #[arg(long)]
    pub resume: bool,
    /// Read everything back afterwards and compare it
    #[arg(long)]
    pub verify: bool,
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
    #[arg(long, value_name = "DURATION", value_parser = super::collect::parse_duration)]
    pub quarantine: Option<u64>,
    /// Repack packs of which less than this is needed, in per cent; 0 repacks nothing [default: 50]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub threshold: Option<u8>,
}

#[derive(Debug, Args)]
pub struct Export {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// Only this disk [default: all]
    #[arg(long)]
    pub disk: Option<String>,
    /// unix:PATH or tcp:ADDRESS:PORT (without TLS loopback only; port 0 takes a free one)
    #[arg(long, value_name = "ADDRESS")]
    pub listen: String,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// Keep what is written in this folder, and go on with what it holds [default: a throw-away overlay]
    #[arg(long, value_name = "DIR")]
    pub overlay: Option<PathBuf>,
    /// Serve with TLS only, by ca-cert.pem, server-cert.pem and server-key.pem in this folder (and ca-crl.pem if it is
    /// there); clients must have a certificate of that authority
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Only for clients whose certificate is for this name; may be repeated [default: all of the authority's]
    #[arg(long = "tls-client", value_name = "NAME", requires = "tls_dir")]
    pub tls_clients: Vec<String>,
    /// Let everybody in who can connect, with TLS but without a certificate
    #[arg(long, requires = "tls_dir", conflicts_with = "tls_clients")]
    pub tls_anonymous_clients: bool,
    /// Serve other machines without TLS, readable and writable for whoever reaches the address: repeat what --listen says
    #[arg(long, value_name = "ADDRESS", conflicts_with = "tls_dir")]
    pub insecure_tcp: Option<String>,
}

#[derive(Debug, Args)]
pub struct Tls {
    /// The authority's folder; made if there is none
    pub dir: PathBuf,
    /// Make certificates for a host, as server and as client: its name, and further names and addresses it goes by
    #[arg(long = "host", required = true, value_name = "NAME[,NAME...]")]
    pub hosts: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "A DISK is named as `show POINT` shows it. A VOLUME is p1, p2 and so on by its number in the partition\n\
                        table, VG/LV for a logical volume, whole where there is no table. A volume that is the only one\n\
                        with files need not be named."
)]
pub struct Ls {
    /// POINT[:DISK[:VOLUME[:PATH]]]; with --from the same without POINT; with --versions a MACHINE
    #[arg(value_name = "PLACE", required_unless_present = "from", default_value = "", hide_default_value = true)]
    pub place: String,
    /// A path in the volume; without volume and path the disks and volumes are listed
    pub path: Option<String>,
    /// Look at the present disks of this running recovery, what its guest has written included
    #[arg(long, value_name = "RECOVERY")]
    pub from: Option<String>,
    /// List the versions of [DISK:VOLUME:]PATH in all recovery points of MACHINE
    #[arg(long, value_name = "PATH", conflicts_with = "from")]
    pub versions: Option<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Modes, times, links, holes and extended attributes are kept, owners too when root. Nothing is written\n\
                        outside of DEST, whatever names and links a disk has."
)]
pub struct Cp {
    /// POINT:DISK:VOLUME:PATH..., where the path may be a glob, then DEST; with --from places without POINT;
    /// with --tar no DEST
    #[arg(required = true, num_args = 1.., value_name = "PLACE... DEST")]
    pub places: Vec<String>,
    /// Copy from the present disks of this running recovery
    #[arg(long, value_name = "RECOVERY")]
    pub from: Option<String>,
    /// Write a tar stream to standard output
    #[arg(long)]
    pub tar: bool,
    /// Replace files that exist
    #[arg(long, conflicts_with = "tar")]
    pub overwrite: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The folder shows DISK/VOLUME/... and DISK.raw for every disk, read-only. An interrupt unmounts it, and so\n\
                        does umount. Without root, fusermount3 of the package fuse3 has to be there."
)]
pub struct Mount {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME, then the folder; with --from the folder alone
    #[arg(required = true, num_args = 1..=2, value_name = "POINT DIR")]
    pub places: Vec<String>,
    /// Show the present disks of this running recovery
    #[arg(long, value_name = "RECOVERY")]
    pub from: Option<String>,
}

#[derive(Debug, Args)]
pub struct Find {
    /// POINT[:DISK[:VOLUME[:PATH]]]; with --from the same without POINT
    #[arg(value_name = "PLACE")]
    pub place: String,
    /// A glob of a name, or with a slash of a whole path, where ** goes over slashes
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub glob: String,
    /// Look at the present disks of this running recovery
    #[arg(long, value_name = "RECOVERY")]
    pub from: Option<String>,
}

#[derive(Debug, Args)]
pub struct Recover {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// What the recovery is called [default: the machine]
    #[arg(long)]
    pub name: Option<String>,
    /// `qemu` starts a VM; `none` only serves the disks
    #[arg(long, default_value = "qemu")]
    pub on: String,
    /// The guest's memory
    #[arg(long, default_value = "2G", value_name = "SIZE", value_parser = parse_size)]
    pub memory: u64,
    /// The guest's CPUs
    #[arg(long, default_value_t = 2)]
    pub cpus: u32,
    /// none, user, isolated or bridge:NAME
    #[arg(long, default_value = "none")]
    pub network: String,
    /// auto, kvm or tcg
    #[arg(long, default_value = "auto", env = "LIFEBOAT_ACCEL")]
    pub accel: String,
    /// auto looks at the first disk; else bios or uefi
    #[arg(long, default_value = "auto")]
    pub firmware: String,
    /// QEMU's machine type
    #[arg(long, default_value = "q35")]
    pub machine_type: String,
    /// How disks are attached: virtio-blk, virtio-scsi, sata or ide
    #[arg(long, default_value = "virtio-blk")]
    pub bus: String,
    /// If the host has not enough memory, wait for it, first in first out; an interrupt gives the place up
    #[arg(long)]
    pub queue: bool,
    /// Start even if the host has not enough memory or space
    #[arg(long, conflicts_with = "queue")]
    pub force: bool,
    /// Wait this many seconds for the guest's first console output, to report when it came
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub wait: u64,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The point is of the recovery's machine, holds all its disks as they were at one instant, and is as consistent as after a\n\
power cut. Only what the guest has changed is read. The recovery goes on as before.")]
pub struct Commit {
    /// What the recovery is called
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
    /// Keep KEY=VALUE with the recovery point
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Rehydrate {
    /// What the recovery is called
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
    /// Where to: a file, a block device, or an nbd:// or nbd+unix:// URI; DISK=TARGET for each of several disks
    #[arg(long = "to", num_args = 1.., value_name = "[DISK=]TARGET", required_unless_present_any = ["pause", "resume", "cancel"])]
    pub to: Vec<String>,
    /// stream: Lifeboat copies, whoever uses the disks
    #[arg(long, value_parser = ["stream"])]
    pub mode: Option<String>,
    /// `raw` or `qcow2` [default: by the target's ending, else raw]
    #[arg(long, value_parser = ["raw", "qcow2"])]
    pub format: Option<String>,
    /// Bytes a second at most
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    pub limit: Option<u64>,
    /// Replace files that exist and write to block devices
    #[arg(long)]
    pub overwrite: bool,
    /// Return at once; the copying goes on
    #[arg(long)]
    pub detach: bool,
    /// Copy nothing for now
    #[arg(long, conflicts_with_all = ["to", "resume", "cancel"])]
    pub pause: bool,
    /// Copy again, after a pause or a failure of the target
    #[arg(long, conflicts_with_all = ["to", "cancel"])]
    pub resume: bool,
    /// Give it up: the guest stays on its overlay, and files made for this are removed
    #[arg(long, conflicts_with = "to")]
    pub cancel: bool,
}

#[derive(Debug, Args)]
pub struct Start {
    /// What the recovery is called
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
    /// Start even if the host has not enough memory or space
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Recoveries {
    /// Follow them until interrupted: on a terminal in place, else a line for every change, with --json the whole list
    #[arg(long)]
    pub watch: bool,
}

#[derive(Debug, Args)]
pub struct Recovery {
    /// What the recovery is called
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
    /// Follow it until interrupted or it is gone: on a terminal in place, else a line for every change
    #[arg(long)]
    pub watch: bool,
}

#[derive(Debug, Args)]
pub struct Name {
    /// What the recovery is called
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct Serve {
    /// Started by another command: end when there is nothing left to serve
    #[arg(long, hide = true)]
    pub background: bool,
}

/// A size in bytes with an optional binary unit: 512, 64K, 2G, 1.5T, 2GiB.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is not a size; write 512M or 2G");
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 6 || (whole.is_empty() && fraction.is_empty()) {
        return Err(bad());
    }
    let unit = 1_u64 << shift;
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| bad())? };
    let mut bytes = whole.checked_mul(unit).ok_or_else(bad)?;
    if !fraction.is_empty() {
        let parts: u64 = fraction.parse().map_err(|_| bad())?;
        let scale = 10_u64.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
        let part = u128::from(parts) * u128::from(unit) / u128::from(scale);
        bytes = bytes.checked_add(u64::try_from(part).map_err(|_| bad())?).ok_or_else(bad)?;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("512", 512), ("64K", 65536), ("2G", 2 << 30), ("1.5T", 3 << 39), ("2GiB", 2 << 30), ("3 mb", 3 << 20)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1X", "1..2", ".", "99999999999T", "18446744073709551616"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
