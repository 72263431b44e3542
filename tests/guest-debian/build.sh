#!/usr/bin/env bash
# Builds a guest that is a real Debian (on Ubuntu: a real Ubuntu): usage: build.sh [OUT_DIR], by default target/guests.
#
#   guest-debian.raw    GPT, EFI system partition with GRUB, ext4 root; systemd, journald, the distribution's kernel for
#                       virtual machines with its own initramfs, the guest agent, and the witness of the small guests
#   guest-debian.sha256 the checksums of all its files
#
# Root is logged in on the serial console without a password. What the witness says there: tests/guest/README.md. Nothing
# is mounted and no loop device is used; unpacking a system needs root, or sudo. The image is kept until something under
# this folder changes; the packages are those that the distribution has on that day.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
witness=$here/../guest/witness.rs
out=${1:-$here/../../target/guests}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

readonly MIB=$((1024 * 1024))
readonly ESP_MIB=34
readonly ROOT_MIB=700
readonly FILES_MAX=150 # checksummed at every boot, read from disk each time
readonly EPOCH=1700000000
readonly KERNEL_OPTIONS='console=ttyS0,115200 root=LABEL=debian-root rw quiet loglevel=4 panic=1 mitigations=off
    random.trust_cpu=on cryptomgr.notests no_timer_check i8042.noaux i8042.nokbd systemd.show_status=false'

say() { printf 'debian guest: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; return; fi
    command -v sudo >/dev/null || die "neither root nor sudo: a system cannot be unpacked"
    sudo "$@"
}

# The package sources of this machine, without those that a guest has no use for.
sources() {
    apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' \
        | grep -E " $codename(-updates|-security)? main$" | sort -u
}

unpack() {
    local kernel agent=qemu-guest-agent
    . /etc/os-release
    codename=${VERSION_CODENAME:?}
    case $ID in
        debian) kernel=linux-image-cloud-amd64 ;;
        ubuntu) kernel=linux-image-virtual ;;
        *) die "no packages of $ID are known here" ;;
    esac
    [ -n "$(sources)" ] || die "apt has no source of $codename"
    say "unpacking $codename with $kernel"
    # What no test looks at is left out: it makes the image half as large.
    as_root env SOURCE_DATE_EPOCH="$EPOCH" mmdebstrap --quiet --variant=minbase --format=directory \
        --include="$kernel,systemd-sysv,udev,initramfs-tools,zstd,$agent" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --aptopt='Apt::Install-Recommends "false"' \
        --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
        --essential-hook='printf "MODULES=list\nCOMPRESS=zstd\n" >"$1/etc/initramfs-tools/conf.d/guest"' \
        --essential-hook='printf "%s\n" virtio_pci virtio_blk virtio_scsi sd_mod ahci nvme ext4 >"$1/etc/initramfs-tools/modules"' \
        "$codename" "$tree" - < <(sources) >"$work/mmdebstrap.log" 2>&1 \
        || { tail -n 40 "$work/mmdebstrap.log" >&2; die "the system cannot be unpacked"; }
}

write() { as_root tee "$tree$1" >/dev/null; }

configure() {
    local file
    echo debian-guest | write /etc/hostname
    printf '127.0.0.1 localhost debian-guest\n' | write /etc/hosts
    printf 'LABEL=debian-root / ext4 defaults 0 1\nLABEL=ESP /boot/efi vfat noauto 0 2\n' | write /etc/fstab
    : | write /etc/machine-id
    as_root mkdir -p "$tree/boot/efi" "$tree/boot/grub" "$tree/etc/systemd/system/serial-getty@ttyS0.service.d" \
        "$tree/var/log/journal" "$tree/var/lib"
    as_root passwd -q -R "$tree" -d root
    # Root is logged in on the console without being asked.
    write /etc/systemd/system/serial-getty@ttyS0.service.d/login.conf <<'UNIT'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200 %I vt220
UNIT
    # A login hangs the console up, so it is opened for each line anew, and until that succeeds.
    write /etc/systemd/system/witness.service <<'UNIT'
[Unit]
Description=Says what it finds on the disk, and counts durably
After=systemd-remount-fs.service systemd-journald.service
[Service]
ExecStart=/bin/sh -c '/usr/local/sbin/witness | while IFS= read -r line; do until echo "$line" >/dev/ttyS0; do sleep 0.1; done; done'
[Install]
WantedBy=multi-user.target
UNIT
    as_root systemctl --quiet --root="$tree" enable witness.service serial-getty@ttyS0.service
    # An emulated processor has no time for what nobody looks at.
    as_root systemctl --quiet --root="$tree" mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer \
        e2scrub_reap.service fstrim.timer getty@tty1.service man-db.timer systemd-pcrphase.service 2>/dev/null || true
    printf 'mode=counter\ninterval_ms=75\n' | write /etc/lifeboat-guest.conf
    rustc --edition 2024 -C opt-level=s -C panic=abort -C strip=symbols -C target-feature=+crt-static \
        -o "$work/witness" "$witness"
    as_root install -D -m 755 "$work/witness" "$tree/usr/local/sbin/witness"
    as_root touch "$tree/var/log/boots" "$tree/var/log/counter"
    as_root "$work/witness" slots "$tree/var/lib/slots"
    (cd "$tree" && find usr/lib usr/bin usr/share -type f -size +4k -size -256k | LC_ALL=C sort \
        | awk -v most="$FILES_MAX" '{ all[NR] = $0 } END { step = NR / most; if (step < 1) step = 1
            for (i = 1; i <= NR; i += step) print all[int(i)] }' | while read -r file; do
        printf '%s  /%s\n' "$(sha256sum "$file" | cut -d' ' -f1)" "$file"
    done) | write /etc/checksums
    file=$(cd "$tree/boot" && ls -d vmlinuz-* | sed -n 1p)
    [ -s "$tree/boot/initrd.img-${file#vmlinuz-}" ] || die "the kernel's package made no initramfs"
    printf 'linux /boot/%s %s\ninitrd /boot/initrd.img-%s\nboot\n' "$file" "$(echo $KERNEL_OPTIONS)" \
        "${file#vmlinuz-}" | write /boot/grub/grub.cfg
    as_root rm -rf "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/* "$tree"/var/log/apt "$tree"/var/log/dpkg.log
}

make_disk() {
    local image=$1
    truncate -s $(((1 + ESP_MIB + ROOT_MIB + 1) * MIB)) "$image"
    sfdisk -q "$image" <<TABLE
label: gpt
label-id: 4C494645-424F-4154-8000-00000000000A
start=1MiB, size=${ESP_MIB}MiB, type=U, uuid=4C494645-424F-4154-8000-00000000000B, name=esp
start=$((1 + ESP_MIB))MiB, size=${ROOT_MIB}MiB, type=L, uuid=4C494645-424F-4154-8000-00000000000C, name=root
TABLE
    as_root env E2FSPROGS_FAKE_TIME="$EPOCH" mke2fs -q -F -t ext4 -b 4096 -L debian-root -d "$tree" -J size=16 \
        -O '^orphan_file,^metadata_csum_seed' -U 4c494645-424f-4154-8000-00000000000d \
        -E "offset=$(((1 + ESP_MIB) * MIB)),lazy_itable_init=0,lazy_journal_init=0,hash_seed=4c494645-424f-4154-8000-00000000000e" \
        "$image" "${ROOT_MIB}M"
    cat >"$work/grub.cfg" <<'CONFIG'
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
search --no-floppy --label debian-root --set=root
configfile /boot/grub/grub.cfg
CONFIG
    grub-mkimage -O x86_64-efi -p '(hd0,gpt2)/boot/grub' -c "$work/grub.cfg" -o "$work/bootx64.efi" \
        part_gpt ext2 search_label search serial terminal configfile linux boot minicmd
    truncate -s "${ESP_MIB}M" "$work/esp.img"
    mkfs.vfat -F 32 -i 4C49464F -n ESP "$work/esp.img" >/dev/null
    mmd -i "$work/esp.img" ::/EFI ::/EFI/BOOT
    mcopy -i "$work/esp.img" "$work/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI
    dd status=none conv=notrunc,sparse bs="$MIB" seek=1 if="$work/esp.img" of="$image"
}

# What the image holds, to compare with what is read out of it.
make_manifest() {
    (cd "$tree" && as_root find . -xdev -type f -print0 | LC_ALL=C sort -z | as_root xargs -0 sha256sum --) >"$1"
}

clean_up() { as_root rm -rf "$work"; }

main() {
    local key
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    exec 9>"$out/.lock-debian"
    flock 9
    key=$(cat "$here/build.sh" "$witness" | sha256sum | cut -d' ' -f1)
    if [ -e "$out/key-debian" ] && [ "$(cat "$out/key-debian")" = "$key" ]; then return; fi
    rm -f "$out/key-debian"
    for tool in mmdebstrap mke2fs sfdisk grub-mkimage mkfs.vfat mcopy; do
        command -v "$tool" >/dev/null || die "$tool is missing; run tests/deps.sh"
    done
    work=$(mktemp -d "$out/build.XXXXXX")
    chmod 755 "$work"
    trap clean_up EXIT
    tree=$work/root
    unpack
    configure
    make_manifest "$work/guest-debian.sha256"
    make_disk "$work/guest-debian.raw"
    fallocate -d "$work/guest-debian.raw" 2>/dev/null || true # holes where only zeroes are; no harm where it cannot
    mv "$work/guest-debian.sha256" "$work/guest-debian.raw" "$out/"
    # Written last: with it the image counts as whole.
    echo "$key" >"$out/key-debian"
    say "built in $out"
}

main
