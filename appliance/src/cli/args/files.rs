//! Files out of disks.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

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
