//! Drills.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

use super::{MachineArgs, parse_size};

#[derive(Debug, Args)]
#[command(after_help = "\
Each point is booted on throw-away disks, in a machine that nothing can be reached from, and has to pass every check.\n\
Without one the guest has to be up: its kernel runs, it wrote to its disks and then read nothing new for a while, or asks for\n\
a login. A failed drill says which stage was reached: publishing, starting, firmware (nothing read), boot-loader, kernel.\n\
The result is kept with the point: `lifeboat drills`, `lifeboat show POINT`. Nothing else is left behind.\n\
Exit status: 0 all passed, 1 one failed.")]
pub struct Drill {
    /// Id prefixes, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(required = true, value_name = "POINT", value_parser = NonEmptyStringValueParser::new())]
    pub points: Vec<String>,
    /// The console has to show this regular expression; may be given several times
    #[arg(long, value_name = "REGEX")]
    pub expect: Vec<String>,
    /// This TCP port of the guest has to accept connections; may be given several times
    #[arg(long = "port", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub ports: Vec<u16>,
    /// The guest agent has to answer
    #[arg(long)]
    pub agent: bool,
    /// This command line has to succeed in the guest; its agent runs it
    #[arg(long, value_name = "COMMAND")]
    pub command: Option<String>,
    /// The screen has to show something, and to stop changing
    #[arg(long)]
    pub screenshot: bool,
    /// Each drill may take this long
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub timeout: u64,
    /// Drills at once [default: as many as the host has CPUs for]
    #[arg(long, value_name = "N")]
    pub parallel: Option<usize>,
    /// Memory that all guests may have together [default: what the host has left]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory_budget: Option<u64>,
    /// isolated: a card that leads nowhere; or none
    #[arg(long, default_value = "isolated")]
    pub network: String,
    /// auto, kvm or tcg
    #[arg(long, default_value = "auto", env = "LIFEBOAT_ACCEL")]
    pub accel: String,
    #[command(flatten)]
    pub made_of: MachineArgs,
}

#[derive(Debug, Args)]
pub struct Drills {
    /// Only this machine's
    pub machine: Option<String>,
}
