#!/usr/bin/env bash
# Installs what building, testing and the demonstration need, on Debian 12 or 13 and on Ubuntu 22.04 or later.
#
# When everything is there this only looks for files and returns at once, so it runs before every other target.
# It asks nothing, uses sudo only when it is not root, and changes the machine's package sources in one case: QEMU's
# tools were installed from backports and no configured source has the emulator that goes with them.
set -euo pipefail

say() { printf 'deps: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# One line for each thing: the package, then what proves that it is there: a command, a file, or a Python module.
WANTED='
gcc                 gcc
g++                 g++
libc6-dev           /usr/include/stdio.h
pkg-config          pkg-config
qemu-system-x86     qemu-system-x86_64
qemu-utils          qemu-img
qemu-utils          qemu-nbd
qemu-utils          qemu-io
ovmf                /usr/share/OVMF/OVMF_CODE_4M.fd
libvirt-dev         /usr/include/libvirt/libvirt-qemu.h
libvirt-daemon      libvirtd
libvirt-daemon-driver-qemu /usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so
libvirt-clients     virsh
libnbd-bin          nbdinfo
libnbd-bin          nbdcopy
python3-libnbd      python:nbd
nbdkit              nbdkit
fio                 fio
jq                  jq
curl                curl
fuse3               fusermount3
busybox-static      /usr/share/doc/busybox-static
grub-common         grub-mkimage
grub-pc-bin         /usr/lib/grub/i386-pc/boot.img
grub-efi-amd64-bin  /usr/lib/grub/x86_64-efi/moddep.lst
e2fsprogs           mke2fs
e2fsprogs           debugfs
attr                setfattr
ntfs-3g             mkntfs
exfatprogs          mkfs.exfat
exfat-fuse          mount.exfat-fuse
genisoimage         genisoimage
xorriso             xorriso
xfsprogs            mkfs.xfs
btrfs-progs         mkfs.btrfs
procps              pgrep
lvm2                lvcreate
fdisk               sfdisk
dosfstools          mkfs.vfat
mtools              mcopy
cpio                cpio
mmdebstrap          mmdebstrap
binutils            readelf
xz-utils            xz
zstd                zstd
'

present() {
    case $1 in
        /*) [ -e "$1" ] ;;
        python:*) /usr/bin/python3 -c "import ${1#python:}" 2>/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

missing_packages() {
    local package proof
    while read -r package proof; do
        if [ -n "$package" ] && ! present "$proof"; then echo "$package"; fi
    done <<<"$WANTED" | sort -u
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then env DEBIAN_FRONTEND=noninteractive "$@"; return; fi
    command -v sudo >/dev/null || die "neither root nor sudo: run as root: $*"
    sudo DEBIAN_FRONTEND=noninteractive "$@"
}

# A source that cannot be reached, of no concern here, must not stop us: the install after it is what tells.
update() { as_root apt-get update -q >&2 || say "some package sources could not be read; going on with the others"; }

upstream_version() { sed -e 's/^[0-9]*://' -e 's/-[^-]*$//' <<<"$1"; }

# The emulator must be of the same QEMU version as the tools that are already installed. Prints the options and the
# packages for apt-get where it has to come from backports, nothing where the ordinary choice is right.
backports_choice() {
    local installed wanted codename uri
    installed=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null) || return 0
    [[ $installed == *~bpo* ]] || return 0
    wanted=$(upstream_version "$installed")
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    if ! apt-cache madison qemu-system-x86 | awk '{print $3}' | grep -- '~bpo' >/dev/null; then
        uri=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' \
            | awk -v codename="$codename" '$2 == codename && $3 == "main" && !found++ { print $1 }')
        [ -n "$uri" ] || die "qemu-utils $installed came from backports, and no source for $codename is configured"
        say "qemu-utils $installed came from backports: adding $codename-backports to the package sources"
        as_root tee /etc/apt/sources.list.d/lifeboat-backports.sources >/dev/null <<SOURCE
Types: deb
URIs: $uri
Suites: $codename-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCE
        update
    fi
    say "taking QEMU from $codename-backports, to go with qemu-utils $wanted"
    echo "-t $codename-backports qemu-system-x86 qemu-utils"
}

install_packages() {
    local packages=("$@") choice=() rest=() package
    say "installing: ${packages[*]}"
    update
    if [[ " ${packages[*]} " == *" qemu-system-x86 "* ]]; then
        read -ra choice <<<"$(backports_choice)"
    fi
    if [ ${#choice[@]} -gt 0 ]; then
        as_root apt-get install -q -y --no-install-recommends "${choice[@]}" >&2
        for package in "${packages[@]}"; do [[ $package == qemu-* ]] || rest+=("$package"); done
        packages=("${rest[@]}")
    fi
    if [ ${#packages[@]} -gt 0 ]; then
        as_root apt-get install -q -y --no-install-recommends "${packages[@]}" >&2
    fi
}

main() {
    local missing
    # The administrator's commands (mke2fs, sfdisk) are not on every user's path.
    PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "the tests boot x86-64 guests and need Linux on x86-64"
    command -v cargo >/dev/null || die "cargo is not installed: install Rust 1.95 or later, then run this again"
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "no apt-get here; install the counterparts of: ${missing[*]}"
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] || die "still missing after the installation: ${missing[*]}"
}

main "$@"
