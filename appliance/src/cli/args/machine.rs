//! What a machine is made of.

use std::path::PathBuf;

use clap::Args;

use super::parse_size;

/// Kept with a recovery point by `backup`, and taken from there by `recover`.
#[derive(Debug, Args)]
#[command(next_help_heading = "The machine")]
pub struct MachineArgs {
    /// The machine's definition, as `show POINT --hardware` prints it; what is said here besides goes over it
    #[arg(long, value_name = "FILE")]
    pub hardware: Option<PathBuf>,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// The guest's CPUs
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// CPU model in QEMU's words; `host` is the host's own under KVM
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// QEMU's machine type: q35, pc, or a versioned one
    #[arg(long, value_name = "TYPE")]
    pub machine_type: Option<String>,
    /// bios or uefi; auto looks at the first disk
    #[arg(long, value_name = "FIRMWARE")]
    pub firmware: Option<String>,
    /// The machine's UEFI variables (OVMF's NVRAM file)
    #[arg(long, value_name = "FILE")]
    pub uefi_vars: Option<PathBuf>,
    /// How disks are attached: virtio-blk, virtio-scsi, sata, nvme or ide; DISK=BUS for one of them
    #[arg(long = "bus", value_name = "[DISK=]BUS")]
    pub buses: Vec<String>,
    /// Model of the network card: virtio, e1000e, e1000 or rtl8139
    #[arg(long, value_name = "MODEL")]
    pub nic: Option<String>,
}
