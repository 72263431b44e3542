//! Recoveries.

use std::path::PathBuf;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

use super::{MachineArgs, parse_size};

/// What to do about a host that is full.
#[derive(Debug, Clone, Copy, Args)]
pub struct Admission {
    /// If the host has not enough memory, wait for it, first in first out; an interrupt gives the place up
    #[arg(long)]
    pub queue: bool,
    /// Start even if the host has not enough memory or space
    #[arg(long, conflicts_with = "queue")]
    pub force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
What is not given of the machine is taken from the recovery point, and where that says nothing\n\
either: 2 GiB, 2 CPUs of the host's model, q35, the firmware that the first disk boots with, virtio.")]
pub struct Recover {
    /// An id prefix, MACHINE, MACHINE~1 or MACHINE@TIME
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub point: String,
    /// What the recovery is called [default: the machine]
    #[arg(long)]
    pub name: Option<String>,
    /// `qemu` starts a VM, `libvirt:URI` defines and starts a domain (libvirt:qemu:///system); `none` only serves the disks
    #[arg(long, default_value = "qemu")]
    pub on: String,
    #[command(flatten)]
    pub made_of: MachineArgs,
    /// The network card's address, or `keep` for the one that the machine had [default: a new one]
    #[arg(long, value_name = "ADDRESS", help_heading = "The machine")]
    pub mac: Option<String>,
    /// Where the screen is shown: none, vnc (on a Unix socket that only you may open), or vnc:PORT (on 127.0.0.1, for
    /// every user of this host; from 5900 on)
    #[arg(long, default_value = "none", value_name = "WHERE")]
    pub display: String,
    /// none, user, isolated or bridge:NAME; on libvirt `original` too, the captured domain's own
    #[arg(long, default_value = "none")]
    pub network: String,
    /// auto, kvm or tcg
    #[arg(long, default_value = "auto", env = "LIFEBOAT_ACCEL")]
    pub accel: String,
    /// libvirt: keep the domain defined when it is shut off
    #[arg(long)]
    pub persistent: bool,
    /// libvirt: keep the original's UUID and the addresses of its network cards; the original must be gone
    #[arg(long)]
    pub keep_identity: bool,
    /// libvirt on another host: serve the disks to it on this address of this host, tcp:ADDRESS:PORT (port 0: one that is
    /// free); libvirt there has to trust the certificates (nbd_tls_x509_cert_dir in its qemu.conf)
    #[arg(long, value_name = "ADDRESS")]
    pub serve_on: Option<String>,
    /// With --serve-on: serve with TLS only, by the certificates in this folder, as `lifeboat tls` makes them; clients
    /// must have one of the same authority
    #[arg(long, value_name = "DIR", requires = "serve_on")]
    pub tls_dir: Option<PathBuf>,
    /// With --serve-on: serve without TLS, readable and writable for whoever reaches the address: repeat it
    #[arg(long, value_name = "ADDRESS", requires = "serve_on", conflicts_with = "tls_dir")]
    pub insecure_tcp: Option<String>,
    /// Commit it every so often from the beginning: 10m, 1h; see `commit --every`
    #[arg(long, value_name = "DURATION", value_parser = crate::cli::collect::parse_duration)]
    pub commit_every: Option<u64>,
    #[command(flatten)]
    pub admission: Admission,
    /// Wait this many seconds for the guest's first console output, to report when it came
    #[arg(long, default_value_t = 20, value_name = "SECONDS")]
    pub wait: u64,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The point is of the recovery's machine and holds all its disks as they were at one instant. If the guest agent answers,\n\
the guest's file systems are frozen for that instant; else the point is as consistent as after a power cut. Only what\n\
the guest has changed is read. The recovery goes on as before.")]
pub struct Commit {
    /// What the recovery is called
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
    /// Keep KEY=VALUE with the recovery point
    #[arg(long = "label", value_name = "KEY=VALUE", conflicts_with = "off")]
    pub labels: Vec<String>,
    /// application: fail if the guest agent does not freeze the file systems; crash: do not ask it
    #[arg(long, default_value = "auto", value_parser = ["auto", "application", "crash"], conflicts_with = "off")]
    pub consistency: String,
    /// Not now but every so often from now on, if the guest has written: 10m, 1h. Survives restarts
    #[arg(long, value_name = "DURATION", value_parser = crate::cli::collect::parse_duration, conflicts_with = "off")]
    pub every: Option<u64>,
    /// No longer commit it by itself
    #[arg(long)]
    pub off: bool,
}

#[derive(Debug, Args)]
pub struct Rehydrate {
    /// What the recovery is called
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub name: String,
    /// Where to: a file, a block device, or an nbd:// or nbd+unix:// URI; DISK=TARGET for each of several disks
    #[arg(long = "to", num_args = 1.., value_name = "[DISK=]TARGET", required_unless_present_any = ["pause", "resume", "cancel"])]
    pub to: Vec<String>,
    /// mirror: the VM's QEMU (of a domain: libvirt) copies, also to qcow2, and Lifeboat is out of the way after the
    /// cutover; stream: Lifeboat copies, whoever uses the disks [default: mirror for a running VM or domain whose disks
    /// nobody else uses, else stream]
    #[arg(long, value_parser = ["mirror", "stream"])]
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
    #[command(flatten)]
    pub admission: Admission,
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
