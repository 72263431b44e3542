//! Making, listing and restoring recovery points.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

use super::{MachineArgs, parse_size};

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
#[command(after_help = "\
What the machine is made of is kept with the recovery point, and `recover` goes by it. What is not\n\
given is taken from the machine's newest point.")]
pub struct Backup {
    /// What the machine is called; libvirt:DOMAIN or libvirt:URI#DOMAIN alone is that domain, with all its disks
    pub machine: String,
    /// An image file or block device (raw, qcow2, or what qemu-nbd opens), an OVA by itself, or an nbd:// or nbd+unix:// URI;
    /// NAME=SOURCE names the disk, else they are disk0, disk1 and so on
    #[arg(value_name = "SOURCE")]
    pub sources: Vec<String>,
    /// Which libvirt knows the domain [default: qemu:///system, or qemu:///session without root]
    #[arg(long, env = "LIBVIRT_DEFAULT_URI", value_name = "URI")]
    pub connect: Option<String>,
    /// Let the agent in the domain's guest freeze its file systems for the instant, or make no backup
    #[arg(long)]
    pub freeze: bool,
    /// Keep KEY=VALUE with the recovery point
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
    /// Take image files to be `raw` or `qcow2` instead of looking
    #[arg(long, value_parser = ["raw", "qcow2"])]
    pub format: Option<String>,
    #[command(flatten)]
    pub made_of: MachineArgs,
    /// The network card's address
    #[arg(long, value_name = "ADDRESS", help_heading = "The machine")]
    pub mac: Option<String>,
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
pub struct ShowPoint {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// Print the machine's definition in full, for --hardware of `backup` and `recover`
    #[arg(long)]
    pub hardware: bool,
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
pub struct Restore {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// Where to: a file, a block device, an NBD URI, or a folder for all disks; DISK=TARGET for one of several
    #[arg(long = "to", required = true, num_args = 1.., value_name = "[DISK=]TARGET")]
    pub to: Vec<String>,
    /// What a file is written as [default: by its ending, else raw]
    #[arg(long, value_parser = crate::restore::FORMATS)]
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
pub struct Machines {
    /// libvirt:URI [default: libvirt:qemu:///system, or qemu:///session without root]
    #[arg(long, value_name = "HYPERVISOR")]
    pub on: Option<String>,
}
