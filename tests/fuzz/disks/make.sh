#!/usr/bin/env bash
# Makes the disks that the fuzz targets of partition tables, volumes and file systems change: small ones of the systems'
# own tools and drivers, clean and as they are while in use. As root, for the kernel's drivers. They are kept in the
# repository, so that an input means the same for ever; run this to add one, and commit what it makes.
#
#   tests/fuzz/disks/make.sh [NAME...]     NAME as in the list at the end
#
# A disk is stored as its size in bytes, then its sectors that are not zero, each behind its number (4 bytes), all of it
# compressed by zstd.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
work=$(mktemp -d)
at=$work/mount
mkdir "$at"
trap 'umount -q "$at" || true; rm -rf "$work"' EXIT

# pack NAME: stores $work/disk.
pack() {
    /usr/bin/python3 - "$work/disk" >"$work/sectors" <<'PYTHON'
import os, sys
out = sys.stdout.buffer
with open(sys.argv[1], "rb") as disk:
    size = os.fstat(disk.fileno()).st_size
    out.write(size.to_bytes(8, "little"))
    at = 0
    while at < size:
        try:
            at = os.lseek(disk.fileno(), at, os.SEEK_DATA) // 512 * 512
        except OSError:
            break
        end = os.lseek(disk.fileno(), at, os.SEEK_HOLE)
        while at < end:
            sector = os.pread(disk.fileno(), 512, at)
            if sector.strip(b"\0"):
                out.write((at // 512).to_bytes(4, "little") + sector.ljust(512, b"\0"))
            at += 512
PYTHON
    zstd -q -f --ultra -22 "$work/sectors" -o "$here/$1.zst"
    printf '%s: %s sectors, %s bytes stored\n' "$1" $(($(stat -c %s "$work/sectors") / 516)) "$(stat -c %s "$here/$1.zst")"
}

new() { rm -f "$work/disk"; truncate -s "$1" "$work/disk"; }
mounted() { mount -o "loop${1:+,$1}" "$work/disk" "$at"; }

# fill DIR [LINKS]: what a file system may hold, little of it, and such that compresses.
fill() {
    mkdir -p "$1/etc/deep/er" "$1/many"
    echo web01 >"$1/etc/hostname"
    yes 'a line of text' | head -c 9000 >"$1/etc/deep/er/a long name with spaces.txt" || true
    for number in $(seq 60); do echo "$number" >"$1/many/file number $number"; done
    [ "${2:-}" ] || return 0
    ln -s etc/hostname "$1/link"
    ln -s "$(printf 'l%.0s' $(seq 100))" "$1/long link"
    ln "$1/etc/hostname" "$1/etc/again"
    mkfifo "$1/pipe"
    truncate -s 1M "$1/sparse"
    printf data | dd of="$1/sparse" bs=1 seek=300000 conv=notrunc status=none
    setfattr -n user.note -v kept "$1/etc/hostname"
    setfattr -n user.long -v "$(printf 'v%.0s' $(seq 300))" "$1/etc/hostname"
}
tree() { rm -rf "$work/tree"; mkdir "$work/tree"; fill "$work/tree" "$@"; }

# Leaves the disk as it is now, with what was changed last in its log alone.
in_use() { cp --sparse=always "$work/disk" "$work/copy"; umount "$at"; mv "$work/copy" "$work/disk"; }

make_ext2() { tree links; new 2M; mke2fs -q -F -t ext2 -b 1024 -d "$work/tree" "$work/disk"; }
make_ext4() { tree links; new 4M; mke2fs -q -F -t ext4 -O inline_data,ea_inode -I 256 -b 1024 -d "$work/tree" "$work/disk"; }
make_ext4_in_use() {
    new 8M; mke2fs -q -F -t ext4 -b 1024 -J size=1 "$work/disk"
    mounted commit=300; fill "$at" links; sync -f "$at"; rm -r "$at/many"; mkdir "$at/many"; echo 1 >"$at/many/1"; sync -f "$at"; in_use
}
make_ext4_fast_commit() {
    new 16M; mke2fs -q -F -t ext4 -O fast_commit -b 1024 -J size=4 "$work/disk"
    mounted commit=300; fill "$at" links; sync -f "$at"
    sync_each "$at"; in_use
}
make_fat12() { tree; new 1M; mkfs.fat -F 12 -s 1 "$work/disk" >/dev/null; mcopy -s -i "$work/disk" "$work/tree"/* ::; }
make_fat16() { tree; new 8M; mkfs.fat -F 16 -s 1 "$work/disk" >/dev/null; mcopy -s -i "$work/disk" "$work/tree"/* ::; }
make_fat32() { tree; new 34M; mkfs.fat -F 32 -s 1 "$work/disk" >/dev/null; mcopy -s -i "$work/disk" "$work/tree"/* ::; }
make_exfat() {
    new 4M; mkfs.exfat -c 512 "$work/disk" >/dev/null
    local device; device=$(losetup --find --show "$work/disk")
    mount.exfat-fuse "$device" "$at" 2>/dev/null; fill "$at"; umount "$at"
    while pgrep -f "exfat-fuse.*$device" >/dev/null; do sleep 0.1; done
    losetup --detach "$device"
}
make_ntfs() {
    new 3M; mkntfs -q -F -f "$work/disk"
    ntfs-3g -o compression,streams_interface=xattr "$work/disk" "$at"
    fill "$at"
    mkdir "$at/packed"
    setfattr -n system.ntfs_attrib -v 0x00080000 "$at/packed"
    yes 'a line of text that repeats' | head -c 70000 >"$at/packed/text" || true
    setfattr -n user.Zone.Identifier -v '[ZoneTransfer]' "$at/etc/hostname"
    for number in $(seq 40); do setfattr -n "user.stream $number" -v "$(printf 'v%.0s' $(seq 40))" "$at/etc/hostname"; done
    ln "$at/etc/hostname" "$at/again"
    ln -s etc/hostname "$at/link"
    umount "$at"
    while pgrep -f "ntfs-3g.*$at" >/dev/null; do sleep 0.1; done
    # What is large and read by nobody here: the table of capital letters, and the log.
    /usr/bin/python3 - "$work/disk" <<'PYTHON'
import sys
with open(sys.argv[1], "r+b") as disk:
    whole = disk.read()
    letters = whole.find(b"".join(number.to_bytes(2, "little") for number in range(64)))
    whole = whole[:letters] + bytes(128 << 10) + whole[letters + (128 << 10):]
    whole = b"".join(bytes(512) if sector == b"\xff" * 512 else sector for sector in (whole[at:at + 512] for at in range(0, len(whole), 512)))
    disk.seek(0)
    disk.write(whole)
PYTHON
}
make_iso() { tree links; xorriso -as mkisofs -quiet -J -R -o "$work/disk" "$work/tree" 2>/dev/null; }
make_xfs() { new 300M; mkfs.xfs -q "$work/disk"; mounted; fill "$at" links; fill_xfs; umount "$at"; }
make_xfs_small_blocks() { new 300M; mkfs.xfs -q -b size=1024 -n size=4096 "$work/disk"; mounted; fill "$at" links; fill_xfs; umount "$at"; }
make_xfs_v4() {
    tree
    { printf '/none\n0 0\nd--755 0 0\n'; cd "$work/tree/many"
      for file in *; do cp "$file" "$work/${file// /-}"; echo "${file// /-} ---644 0 0 $work/${file// /-}"; done
      printf 'link l--777 0 0 somewhere\nfolder d--755 0 0\n$\n$\n'; } >"$work/description"
    new 300M; mkfs.xfs -q -m crc=0 -n ftype=0 -p "$work/description" "$work/disk" 2>/dev/null
}
make_xfs_in_use() {
    new 300M; mkfs.xfs -q "$work/disk"; mounted; fill "$at" links; fill_xfs; sync -f "$at"
    rm -r "$at/etc/deep"; echo more >"$at/more"; mv "$at/link" "$at/many/link"; rm "$at"/many/*7
    xfs_io -x -c 'shutdown -f' "$at"; in_use
}
fill_xfs() { local number; for number in $(seq 30); do setfattr -n "user.attribute $number" -v "$(printf 'v%.0s' $(seq $((number * 4))))" "$at/many"; done; }
make_btrfs() {
    new 120M; mkfs.btrfs -q -m single "$work/disk" >/dev/null
    mounted compress-force="${1:-zlib}"; btrfs -q subvolume create "$at/within"; fill "$at" links; fill "$at/within"; umount "$at"
}
make_btrfs_lzo() { make_btrfs lzo; }
make_btrfs_zstd() { make_btrfs zstd; }
make_btrfs_in_use() {
    new 120M; mkfs.btrfs -q -m single "$work/disk" >/dev/null
    mounted commit=300; fill "$at" links; sync -f "$at"
    sync_each "$at"; in_use
}
# Changes of many kinds, each synced by itself: what logs of single files are for.
sync_each() {
    /usr/bin/python3 - "$1" <<'PYTHON'
import os, sys
os.chdir(sys.argv[1])
def sync(path):
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)
def write(path, text, mode="w"):
    with open(path, mode) as file:
        file.write(text); file.flush(); os.fsync(file.fileno())
write("new", "new\n")
write("etc/hostname", "renamed\n")
write("many/file number 7", "longer " * 3000)
os.unlink("many/file number 8"); sync("many")
os.rename("many/file number 9", "etc/nine"); sync("etc/nine")
os.link("new", "etc/new again"); sync("new")
os.mkdir("etc/fresh"); write("etc/fresh/file", "x" * 20000)
os.truncate("etc/deep/er/a long name with spaces.txt", 100); sync("etc/deep/er/a long name with spaces.txt")
os.setxattr("new", "user.fresh", b"value"); sync("new")
PYTHON
}

table() { sfdisk -q "$work/disk" 2>/dev/null; }
make_mbr() {
    new 16M; printf 'label: dos\nsize=2048,type=83\nsize=4096,type=c\ntype=5\nsize=2048,type=83\nsize=2048,type=7\nsize=2048\n' | table
    mkfs.fat --offset 6144 -F 12 "$work/disk" 1024 >/dev/null 2>&1 || true
}
make_gpt() { new 16M; printf 'label: gpt\nsize=2048,type=U,name=ESP\nsize=4096,type=L,name=root\nsize=4096\n' | table; }
make_gpt_damaged() { make_gpt; dd if=/dev/zero of="$work/disk" bs=512 seek=1 count=1 conv=notrunc status=none; }
make_lvm() {
    new 32M; printf 'label: gpt\nstart=2048,size=20480,type=V\nsize=20480,type=V\n' | table
    local first second config
    first=$(losetup --find --show --offset 1M --sizelimit 10M "$work/disk")
    second=$(losetup --find --show --offset 11M --sizelimit 10M "$work/disk")
    config='devices { use_devicesfile=0 filter=["a|/dev/loop.*|","r|.*|"] } activation { udev_sync=0 udev_rules=0 }'
    lvm() { "$1" --config "$config" -q --driverloaded n "${@:2}" >/dev/null; }
    lvm pvcreate "$first" "$second"
    lvm vgcreate -s 128k lifeboat "$first" "$second"
    lvm lvcreate -an -Zn -Wn -L 8M -n root lifeboat "$first"
    lvm lvcreate -an -Zn -Wn -L 256k -i 2 -I 64k -n fast lifeboat
    lvm lvextend -L 10M lifeboat/root
    losetup --detach "$first"; losetup --detach "$second"
}

names=("$@")
if [ $# -eq 0 ]; then mapfile -t names < <(declare -F | sed -n 's/^declare -f make_//p' | tr _ -); fi
for name in "${names[@]}"; do "make_${name//-/_}"; pack "$name"; done
