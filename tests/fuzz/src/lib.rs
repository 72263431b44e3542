//! Fuzz targets for everything that reads bytes it cannot trust: what stands on disk, what comes from a socket, foreign
//! images, and the partition tables and file systems in them.
//!
//! A target takes any bytes and must come back: it panics when a promise is broken, and the fuzzer finds panics,
//! overflows, hangs and large allocations. Where a checksum or a name stands in the way of mutated bytes, the target
//! makes it good again ([`seal`]), so that what is behind it is reached. Each has seeds: good inputs to begin from.
#![forbid(unsafe_code)]

mod disks;
mod images;
mod nbd;
mod objects;
mod overlay;
mod recovery;
mod repository;
pub mod seal;
mod upkeep;
mod volumes;

/// Something to fuzz.
#[derive(Debug)]
pub struct Target {
    /// Its name on the command line; the folder of its corpus is called so, too.
    pub name: &'static str,
    /// Takes one input. A panic is a finding.
    pub run: fn(&[u8]),
    /// Good inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All there is to fuzz.
pub const TARGETS: &[Target] = &[
    Target { name: "config", run: objects::config, seeds: objects::config_seeds },
    Target { name: "key-slot", run: objects::key_slot, seeds: objects::key_slot_seeds },
    Target { name: "pack", run: objects::pack, seeds: objects::pack_seeds },
    Target { name: "index-run", run: objects::index_run, seeds: objects::index_run_seeds },
    Target { name: "point", run: objects::point, seeds: objects::point_seeds },
    Target { name: "repository", run: repository::run, seeds: repository::seeds },
    Target { name: "lease", run: upkeep::lease, seeds: upkeep::lease_seeds },
    Target { name: "quarantine", run: upkeep::quarantine, seeds: upkeep::quarantine_seeds },
    Target { name: "liveness", run: upkeep::liveness, seeds: upkeep::liveness_seeds },
    Target { name: "protection", run: upkeep::protection, seeds: upkeep::protection_seeds },
    Target { name: "drill", run: upkeep::drill, seeds: upkeep::drill_seeds },
    Target { name: "verified", run: upkeep::verified, seeds: upkeep::verified_seeds },
    Target { name: "overlay", run: overlay::run, seeds: overlay::seeds },
    Target { name: "recovery-journal", run: recovery::journal, seeds: recovery::journal_seeds },
    Target { name: "hydrated", run: recovery::hydrated, seeds: recovery::hydrated_seeds },
    Target { name: "nbd-handshake", run: nbd::server::handshake, seeds: nbd::server::handshake_seeds },
    Target { name: "nbd-transmission", run: nbd::server::transmission, seeds: nbd::server::transmission_seeds },
    Target { name: "nbd-client", run: nbd::client::handshake, seeds: nbd::client::handshake_seeds },
    Target { name: "nbd-replies", run: nbd::client::replies, seeds: nbd::client::replies_seeds },
    Target { name: "nbd-uri", run: nbd::uri, seeds: nbd::uri_seeds },
    Target { name: "image", run: images::run, seeds: images::seeds },
    Target { name: "ova", run: images::ova, seeds: images::ova_seeds },
    Target { name: "volumes", run: volumes::run, seeds: volumes::seeds },
    Target { name: "tables", run: disks::tables::run, seeds: disks::tables::seeds },
    Target { name: "lvm", run: disks::lvm::run, seeds: disks::lvm::seeds },
    Target { name: "ext", run: disks::ext::run, seeds: disks::ext::seeds },
    Target { name: "fat", run: disks::fat::run, seeds: disks::fat::seeds },
    Target { name: "exfat", run: disks::exfat::run, seeds: disks::exfat::seeds },
    Target { name: "ntfs", run: disks::ntfs::run, seeds: disks::ntfs::seeds },
    Target { name: "iso", run: disks::iso::run, seeds: disks::iso::seeds },
    Target { name: "xfs", run: disks::xfs::run, seeds: disks::xfs::seeds },
    Target { name: "btrfs", run: disks::btrfs::run, seeds: disks::btrfs::seeds },
];

/// Takes what it needs from the front of an input; zeroes when there is no more.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `length` bytes.
    pub(crate) fn bytes(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A little-endian number of `length` bytes, at most 8.
    pub(crate) fn number(&mut self, length: usize) -> u64 {
        self.bytes(length).iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub(crate) fn length(&mut self, length: usize) -> usize {
        usize::try_from(self.number(length)).unwrap_or(usize::MAX)
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
