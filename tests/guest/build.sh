#!/usr/bin/env bash
# Builds the guests that the tests boot: usage: build.sh [OUT_DIR], by default target/guests.
#
#   guest-oneshot.raw   BIOS, MBR: boots, looks at its files, makes a record durable, powers off
#   guest-counter.raw   the same, and counts durably until the power button is pressed
#   guest-uefi.raw      like oneshot, on a GPT disk with an EFI system partition
#
# The kernel is the distribution's own; user space is busybox and the program in witness.rs. Nothing is mounted and
# nothing needs root. The images are kept until something under this folder changes; several builds may start at once.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here/../../target/guests}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

readonly MIB=$((1024 * 1024))
readonly ROOT_MIB=191   # of the root partition
readonly FILES_MAX=320  # checksummed at every boot, read from disk each time
readonly MODULES=(virtio_pci virtio_blk virtio_scsi sd_mod ahci nvme ext4 button evdev virtio_net virtio_console)
readonly KERNEL_OPTIONS='console=ttyS0,115200 loglevel=4 panic=1 mitigations=off random.trust_cpu=on
    cryptomgr.notests no_timer_check i8042.noaux i8042.nokbd'

say() { printf 'guest: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# ---- packages of the distribution ----

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# Prints the package that holds the kernel proper: Debian's cloud kernel, Ubuntu's kernel for virtual machines.
kernel_package() {
    local meta package
    for meta in linux-image-cloud-amd64 linux-image-virtual; do
        package=$(apt-cache depends "$meta" 2>/dev/null | awk '/Depends: linux-image-[0-9]/ && !found++ { print $2 }')
        if [ -n "$package" ]; then echo "$package"; return; fi
    done
    return 1
}

# Downloads without installing. A list of packages that is missing or names files that are gone is renewed once.
download() {
    (cd "$work/debs" && apt-get download -q "$@" >"$work/download.log" 2>&1)
}

fetch_kernel() {
    local package modules
    mkdir -p "$work/debs"
    package=$(kernel_package) && download "$package" || {
        say "the kernel's package cannot be had at once; reading the package lists again"
        as_root apt-get update -q >&2 || say "some package sources could not be read; going on with the others"
        package=$(kernel_package) || die "no package holds a kernel for virtual machines"
        download "$package" || { cat "$work/download.log" >&2; die "$package cannot be downloaded"; }
    }
    modules=${package/linux-image-/linux-modules-}
    if [[ $package == *-generic ]]; then download "$modules" || die "$modules cannot be downloaded"; fi
    for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/kernel"; done
    # Newer distributions have a merged /usr inside the package, too.
    lib=$work/kernel/lib/modules
    [ -d "$lib" ] || lib=$work/kernel/usr/lib/modules
    version=$(ls "$lib")
    vmlinuz=$work/kernel/boot/vmlinuz-$version
    [ -s "$vmlinuz" ] || die "no kernel in $package"
    find "$lib" -name '*.ko.xz' -exec xz -d {} +
    find "$lib" -name '*.ko.zst' -exec zstd -q -d --rm {} +
    say "kernel $version"
}

# The agent and the libraries that it may need; what it really needs is picked by copy_program.
fetch_agent() {
    local packages package
    packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
        --no-enhances qemu-guest-agent | grep -E '^(qemu-guest-agent|lib|zlib)' | grep -v perl | sort -u)
    mkdir -p "$work/agent-debs"
    # shellcheck disable=SC2086 # a list of names
    (cd "$work/agent-debs" && apt-get download -q $packages >"$work/download.log" 2>&1) \
        || { cat "$work/download.log" >&2; die "the guest agent cannot be downloaded"; }
    for package in "$work"/agent-debs/*.deb; do dpkg -x "$package" "$work/agent"; done
}

# ---- what is on the disk ----

# Copies a program from the tree FROM into the tree TO, with the libraries it is linked to and theirs.
copy_program() {
    local from=$1 to=$2 program=$3 needed found
    local queue=("$from$program") seen=' '
    install -D "$from$program" "$to$program"
    while [ ${#queue[@]} -gt 0 ]; do
        for needed in $(readelf -d "${queue[0]}" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
            if [[ $seen == *" $needed "* ]]; then continue; fi
            seen+="$needed "
            found=$(find "$from" -path '*/x86_64-linux-gnu/*' -name "$needed" | sed -n 1p)
            [ -n "$found" ] || die "$program needs $needed, which no package brought"
            if [[ $needed != ld-linux* ]]; then install -D "$found" "$to/lib/x86_64-linux-gnu/$needed"; fi
            queue+=("$found")
        done
        queue=("${queue[@]:1}")
    done
    found=$(find "$from" -path '*/x86_64-linux-gnu/*' -name 'ld-linux-x86-64.so.2' | sed -n 1p)
    install -D "$found" "$to/lib64/ld-linux-x86-64.so.2"
}

# Prints the files of a module and of what it needs, in the order in which they must be loaded. One that is built into
# this kernel, or that this kernel does not have, has none.
module_files() {
    local module
    for module in "$@"; do
        awk -v name="$module" '
            { path = $1; sub(/:$/, "", path); base = path; sub(/.*\//, "", base); sub(/\.ko$/, "", base)
              gsub(/-/, "_", base) }
            base == name { for (i = NF; i >= 2; i--) print $i; print path }' "$lib/$version/modules.dep"
    done | awk '!seen[$0]++'
}

make_initramfs() {
    local tree=$work/initramfs file
    busybox depmod -b "${lib%/lib/modules}" "$version" 2>/dev/null || die "depmod failed"
    mkdir -p "$tree"/{bin,dev,proc,sys,root,modules}
    cp "$busybox" "$tree/bin/busybox"
    cp "$here/initramfs-init" "$tree/init"
    : >"$tree/modules.list"
    while read -r file; do
        cp "$lib/$version/$file" "$tree/modules/"
        echo "/modules/$(basename "$file")" >>"$tree/modules.list"
    done < <(module_files "${MODULES[@]}")
    grep -q virtio_blk "$tree/modules.list" || grep -q virtio_blk "$lib/$version/modules.builtin" \
        || die "kernel $version has no virtio_blk"
    # Not compressed: unpacking costs an emulated machine more than reading.
    (cd "$tree" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$work/initrd.img"
}

make_witness() {
    rustc --edition 2024 -C opt-level=s -C panic=abort -C strip=symbols -C target-feature=+crt-static \
        -o "$work/witness" "$here/witness.rs"
}

# The files whose checksums every boot compares: a real mixture of code and text, taken from the kernel's packages.
make_files() {
    local tree=$1
    mkdir -p "$tree/srv/files" "$tree/usr/share/doc"
    find "$lib/$version/kernel/fs" "$lib/$version/kernel/net" "$lib/$version/kernel/crypto" -name '*.ko' -size -128k \
        | LC_ALL=C sort | awk -v most="$FILES_MAX" 'NR <= most' | xargs cp -t "$tree/srv/files"
    cp "$lib/$version"/modules.* "$work/kernel/boot/config-$version" "$tree/srv/files"
    (cd "$tree" && find srv/files -type f | LC_ALL=C sort | sed 's|^|/|' | while read -r file; do
        printf '%s  %s\n' "$(sha256sum ".$file" | cut -d' ' -f1)" "$file"
    done) >"$tree/etc/checksums"
}

make_root() {
    local tree=$work/root applet
    mkdir -p "$tree"/{bin,sbin,boot/grub,dev,etc,proc,sys,run,srv/http,tmp,usr/bin,usr/sbin,var/lib,var/log}
    cp -r "$here/root/." "$tree/"
    cp "$busybox" "$tree/bin/busybox"
    for applet in $("$busybox" --list); do
        [ "$applet" = busybox ] || ln -s /bin/busybox "$tree/bin/$applet"
    done
    ln -s /bin/busybox "$tree/sbin/init"
    ln -s /run "$tree/var/run"
    cp "$work/witness" "$tree/sbin/witness"
    cp "$vmlinuz" "$tree/boot/vmlinuz"
    cp "$work/initrd.img" "$tree/boot/initrd.img"
    : >"$tree/var/log/boots"
    : >"$tree/var/log/counter"
    "$work/witness" slots "$tree/var/lib/slots"
    echo 'LIFEBOAT-GUEST: serving' >"$tree/srv/http/index.html"
    copy_program "$work/agent" "$tree" /usr/sbin/qemu-ga
    printf 'linux /boot/vmlinuz %s\ninitrd /boot/initrd.img\nboot\n' "$(echo $KERNEL_OPTIONS)" >"$tree/boot/grub/grub.cfg"
    make_files "$tree"
}

# ---- disks ----

# Writes the root file system into IMAGE at OFFSET. The features are named here, not left to the machine's defaults:
# GRUB has to read them, and the images should be the same everywhere.
make_file_system() {
    local image=$1 offset=$2 mode=$3
    printf 'mode=%s\ninterval_ms=75\n' "$mode" >"$work/root/etc/lifeboat-guest.conf"
    cat >"$work/mke2fs.conf" <<'CONF'
[defaults]
    base_features = sparse_super,large_file,filetype,resize_inode,dir_index,ext_attr
    blocksize = 4096
    inode_size = 256
    inode_ratio = 16384
[fs_types]
    small = {
        blocksize = 4096
    }
    ext4 = {
        features = has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize
    }
CONF
    MKE2FS_CONFIG=$work/mke2fs.conf mke2fs -q -F -t ext4 -L lifeboat-root -d "$work/root" -J size=8 \
        -E "offset=$offset,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0" "$image" "${ROOT_MIB}M"
}

# With several disks, which is the first is for the firmware to say. `search` is in the core, the rest on the root.
grub_config() {
    cat <<CONFIG
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
search --no-floppy --label lifeboat-root --set=root
configfile /boot/grub/grub.cfg
CONFIG
}

# MBR: boot code, then GRUB's core in the sectors before the first partition, where it looks for itself.
make_bios_disk() {
    local image=$1 mode=$2 core_len
    truncate -s $(((ROOT_MIB + 1) * MIB)) "$image"
    printf 'label: dos\nlabel-id: 0x4c494645\nstart=2048, type=83, bootable\n' | sfdisk -q "$image"
    make_file_system "$image" "$MIB" "$mode"
    grub_config >"$work/grub-bios.cfg"
    grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -c "$work/grub-bios.cfg" -o "$work/core.img" \
        biosdisk part_msdos ext2 search_label search serial terminal configfile linux boot minicmd
    core_len=$(stat -c %s "$work/core.img")
    [ "$core_len" -le $((MIB - 512)) ] || die "GRUB's core of $core_len bytes does not fit before the partition"
    # The first 440 bytes only: the partition table stands behind them.
    dd status=none conv=notrunc bs=440 count=1 if=/usr/lib/grub/i386-pc/boot.img of="$image"
    dd status=none conv=notrunc bs=512 seek=1 if="$work/core.img" of="$image"
}

make_uefi_disk() {
    local image=$1 mode=$2 esp_mib=34
    truncate -s $(((1 + esp_mib + ROOT_MIB + 1) * MIB)) "$image"
    sfdisk -q "$image" <<TABLE
label: gpt
label-id: 4C494645-424F-4154-8000-000000000001
start=1MiB, size=${esp_mib}MiB, type=U, uuid=4C494645-424F-4154-8000-000000000002, name=esp
start=$((1 + esp_mib))MiB, size=${ROOT_MIB}MiB, type=L, uuid=4C494645-424F-4154-8000-000000000003, name=root
TABLE
    make_file_system "$image" $(((1 + esp_mib) * MIB)) "$mode"
    grub_config >"$work/grub-uefi.cfg"
    grub-mkimage -O x86_64-efi -p '(hd0,gpt2)/boot/grub' -c "$work/grub-uefi.cfg" -o "$work/bootx64.efi" \
        part_gpt ext2 search_label search serial terminal configfile linux boot minicmd
    truncate -s "${esp_mib}M" "$work/esp.img"
    mkfs.vfat -F 32 -i 4C494645 -n ESP "$work/esp.img" >/dev/null
    mmd -i "$work/esp.img" ::/EFI ::/EFI/BOOT
    mcopy -i "$work/esp.img" "$work/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI
    dd status=none conv=notrunc,sparse bs="$MIB" seek=1 if="$work/esp.img" of="$image"
}

# ---- the whole ----

build() {
    busybox=$(command -v busybox) || die "busybox is missing; run tests/deps.sh"
    "$busybox" --list | grep -x httpd >/dev/null || die "$busybox is not the full one of the package busybox-static"
    fetch_kernel
    fetch_agent
    make_witness
    make_initramfs
    make_root
    make_bios_disk "$work/guest-oneshot.raw" oneshot
    make_bios_disk "$work/guest-counter.raw" counter
    make_uefi_disk "$work/guest-uefi.raw" oneshot
    for image in guest-oneshot.raw guest-counter.raw guest-uefi.raw; do
        fallocate -d "$work/$image" 2>/dev/null || true # holes where only zeroes are; no harm where it cannot
        mv "$work/$image" "$out/$image"
    done
}

main() {
    local key
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    exec 9>"$out/.lock"
    flock 9
    key=$(cd "$here" && find . -type f ! -name '*.md' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
    if [ -e "$out/key" ] && [ "$(cat "$out/key")" = "$key" ]; then return; fi
    rm -f "$out/key"
    work=$(mktemp -d "$out/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    build
    # Written last: with it the images count as whole.
    echo "$key" >"$out/key"
    say "built in $out"
}

main
