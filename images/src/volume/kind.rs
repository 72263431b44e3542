//! What a volume may hold.

/// What a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// ext2, ext3 and ext4.
    Ext,
    /// FAT12, FAT16 and FAT32.
    Fat,
    /// exFAT.
    ExFat,
    /// NTFS.
    Ntfs,
    /// ISO 9660.
    Iso,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// A physical volume of LVM2, whose logical volumes are listed beside it.
    LvmMember,
    /// A partition that only holds other partitions.
    Extended,
    /// LUKS.
    Luks,
    /// BitLocker.
    BitLocker,
    /// A member of a Linux software RAID.
    MdRaid,
    /// A member of a firmware RAID.
    FirmwareRaid,
    /// ZFS.
    Zfs,
    /// Swap space.
    Swap,
    /// A cache or backing device of bcache.
    Bcache,
    /// ReFS.
    Refs,
    /// HFS+.
    HfsPlus,
    /// APFS.
    Apfs,
    /// A file system of Linux that is not read here.
    OtherLinux,
    /// UFS of the BSDs.
    Ufs,
    /// VMFS.
    Vmfs,
    /// A volume of Storage Spaces or of dynamic disks.
    WindowsManaged,
    /// Nothing but zeroes where a file system would begin.
    Empty,
    /// Not recognised.
    Unknown,
}

impl Kind {
    /// Whether its files can be read.
    pub fn is_readable(self) -> bool {
        matches!(self, Kind::Ext | Kind::Fat | Kind::ExFat | Kind::Ntfs | Kind::Iso | Kind::Xfs | Kind::Btrfs)
    }

    /// Why its files cannot be read.
    pub fn why_not(self) -> &'static str {
        match self {
            Kind::Luks | Kind::BitLocker => "it is encrypted, and the key is not here",
            Kind::MdRaid | Kind::FirmwareRaid => "it is one member of a RAID",
            Kind::Zfs => "it is a member of a ZFS pool",
            Kind::Swap => "it is swap space and has no files",
            Kind::Bcache => "it belongs to a bcache set",
            Kind::LvmMember => "it holds logical volumes, which are listed by their own names",
            Kind::Extended => "it only holds other partitions",
            Kind::Empty => "it is empty",
            Kind::Unknown => "what it holds is not recognised",
            Kind::WindowsManaged => "it is managed by Windows' volume manager",
            _ => "this file system is not read",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Ext => "ext2/3/4",
            Kind::Fat => "FAT",
            Kind::ExFat => "exFAT",
            Kind::Ntfs => "NTFS",
            Kind::Iso => "ISO 9660",
            Kind::Xfs => "XFS",
            Kind::Btrfs => "Btrfs",
            Kind::LvmMember => "LVM2 physical volume",
            Kind::Extended => "extended partition",
            Kind::Luks => "LUKS",
            Kind::BitLocker => "BitLocker",
            Kind::MdRaid => "Linux RAID",
            Kind::FirmwareRaid => "firmware RAID",
            Kind::Zfs => "ZFS",
            Kind::Swap => "swap space",
            Kind::Bcache => "bcache",
            Kind::Refs => "ReFS",
            Kind::HfsPlus => "HFS+",
            Kind::Apfs => "APFS",
            Kind::OtherLinux => "another Linux file system",
            Kind::Ufs => "UFS",
            Kind::Vmfs => "VMFS",
            Kind::WindowsManaged => "Windows managed volume",
            Kind::Empty => "nothing",
            Kind::Unknown => "unknown content",
        })
    }
}
