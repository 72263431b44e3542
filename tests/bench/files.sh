# Files out of disks: how soon those of a huge disk are listed, how fast a mounted folder is read beside the NBD export of
# the same disk, and how fast small files are copied out beside other ways to them. Sourced by bench.sh.

readonly FILES_DISK=1T
readonly CROWD=20000                     # entries of a directory
readonly FILES_WARM=$((256 << 20))       # read in sequence; less than the chunk cache
readonly FILES_SMALL=$((300 << 20))      # copied
readonly FILES_SMALL_MOST=$((64 << 10))  # the largest of them

files_kinds() { echo ext4 xfs btrfs ntfs exfat iso; }

# make_listed KIND: listed, a disk with a folder of many entries, of 1 TiB where the file system allows.
make_listed() {
    local kind=$1 at=$place/filled crowd=$place/crowd device
    listed=$place/listed.raw
    rm -f "$listed"
    truncate -s "$FILES_DISK" "$listed"
    mkdir -p "$at"
    if [ ! -d "$crowd" ]; then
        mkdir -p "$crowd/crowd"
        (cd "$crowd/crowd" && seq -f 'file number %05g' "$CROWD" | xargs -d '\n' touch)
    fi
    case $kind in
        ext4) mke2fs -q -F -t ext4 -d "$crowd" "$listed" ;;
        xfs) mkfs.xfs -q "$listed" && as_root mount -o loop "$listed" "$at" ;;
        btrfs) mkfs.btrfs -q "$listed" && as_root mount -o loop "$listed" "$at" ;;
        ntfs) mkntfs -q -F -f "$listed" && ntfs-3g "$listed" "$at" ;;
        exfat)
            mkfs.exfat "$listed" && device=$(as_root losetup --find --show "$listed") \
                && mount.exfat-fuse "$device" "$at" ;;
        iso) rm "$listed" && xorriso -as mkisofs -quiet -J -R -o "$listed" "$crowd" ;;
    esac >>"$place/servers.log" 2>&1 || return 1
    if mountpoint -q "$at"; then
        cp -r "$crowd/crowd" "$at/" || return 1
        files_unmount "$at"
    fi
    if [ -n "${device:-}" ]; then
        while pgrep -f "exfat-fuse.*$device" >/dev/null; do sleep 0.1; done
        as_root losetup --detach "$device"
    fi
    while pgrep -f "ntfs-3g.*$at" >/dev/null; do sleep 0.1; done
}

files_unmount() {
    local tries
    for tries in $(seq 50); do
        if as_root umount "$1" 2>>"$place/servers.log"; then return 0; fi
        sleep 0.1
    done
    as_root umount -l "$1"
}

measure_listings() {
    local kind round
    for kind in $(files_kinds); do
        say "files: a directory of $CROWD entries, $kind"
        make_listed "$kind" || { skip "listing $kind: it cannot be made here"; continue; }
        "$lifeboat" backup "listed-$kind" "$listed" >/dev/null
        for round in $(seq "$rounds"); do
            command=("$lifeboat" ls "listed-$kind:disk0:whole:/")
            timed "files.first.$kind"
            command=("$lifeboat" ls "listed-$kind:disk0:whole:/crowd")
            timed "files.crowd.$kind"
            [ "$(grep -c 'file number' "$place/output")" = "$CROWD" ] || die "the listing of $kind is not whole"
        done
    done
    rm -rf "$listed" "$place/crowd"
}

# Small files of /usr, and a large one of them together.
make_files() {
    local staging=$place/staging
    files=$kept/files.raw
    [ ! -e "$files" ] || return 0
    say "files: making an image of small files out of /usr"
    mkdir "$staging" "$staging/small"
    (cd /usr && find . -xdev -type f -size "-$((FILES_SMALL_MOST / 1024))k" ! -name '*.pyc' -printf '%p\t%s\n' | LC_ALL=C sort \
        | awk -F '\t' -v most="$FILES_SMALL" '{ sum += $2; if (sum > most) exit; print $1 }' \
        | cpio --quiet -pdlm "$staging/small" 2>/dev/null) || true
    { find /usr/lib -xdev -type f -size +1M -print0 | LC_ALL=C sort -z | xargs -0 cat || true; } 2>/dev/null \
        | head -c "$FILES_WARM" >"$staging/large" || true
    mke2fs -q -F -t ext4 -m 0 -N 200000 -d "$staging" -E lazy_itable_init=0,lazy_journal_init=0 "$files.new" 1400M >/dev/null
    rm -rf "$staging"
    mv "$files.new" "$files"
}

# start_mount DIR: sets pid.
start_mount() {
    mkdir -p "$1"
    : >"$place/mount.log"
    "$lifeboat" mount files "$1" >"$place/mount.log" 2>&1 &
    pid=$!
    started+=("$pid")
    until grep -q 'mounted on' "$place/mount.log"; do
        kill -0 "$pid" 2>/dev/null || { cat "$place/mount.log" >&2; die "lifeboat mount has failed"; }
        sleep 0.01
    done
}

# read_rate KEY FILE BYTES: MB/s of one sequential reader.
read_rate() {
    local began
    began=$(now)
    dd if="$2" of=/dev/null bs=1M count="$(($3 >> 20))" status=none
    note "$1" "$(calculate "$3 / 1e6 / $(since "$began")")"
}

# The kernel forgets what it has of a file; the disk below it does not.
forget() { dd if="$1" iflag=nocache count=0 status=none; }

# The first bytes of the disk, cold and then out of the chunk cache, and those of a file on it.
measure_reads() {
    local round at=$place/mounted turn
    for round in $(seq "$rounds"); do
        say "files, round $round of $rounds: sequential reads"
        start_export "$place/files-state.$round" files
        for turn in cold warm; do
            fio --name=read --ioengine=nbd --uri="$uri" --rw=read --bs=256k --iodepth=8 --size="$FILES_WARM" \
                --output-format=json --output="$place/fio.json" >>"$place/servers.log" 2>&1
            note "files.read.nbd.$turn" "$(calculate "$(jq '.jobs[0].read.bw_bytes' "$place/fio.json") / 1e6")"
        done
        stop "$pid"
        start_mount "$at"
        for turn in cold warm; do
            read_rate "files.read.disk.$turn" "$at/disk0.raw" "$FILES_WARM"
            forget "$at/disk0.raw"
        done
        stop "$pid"
        start_mount "$at"
        for turn in cold warm; do
            read_rate "files.read.file.$turn" "$at/disk0/whole/large" "$FILES_WARM"
            forget "$at/disk0/whole/large"
        done
        stop "$pid"
    done
}

# copy_by WAY FROM: copies the tree and times it; then compares it, untimed, in the first round.
copy_by() {
    rm -rf "$place/copied"
    command=(cp -a "$2" "$place/copied")
    if [ "$1" = lifeboat ]; then command=("$lifeboat" cp files:disk0:whole:/small "$place/copied"); fi
    timed "files.copy.$1"
}

# Each way begins with nothing of the disk in memory of its own; what lies below is in the page cache for all.
measure_copies() {
    local round at=$place/mounted peer=$place/peer
    mkdir -p "$at" "$peer" "$place/nbdfuse"
    for round in $(seq "$rounds"); do
        say "files, round $round of $rounds: copies"
        copy_by lifeboat -
        start_mount "$at"
        copy_by mount "$at/disk0/whole/small"
        stop "$pid"
        start_export "$place/copy-state.$round" files --read-only
        if have nbdfuse && nbdfuse_loop "$uri"; then
            copy_by nbdfuse "$peer/small"
            files_unmount "$peer"
            files_unmount "$place/nbdfuse"
        else
            skip 'copying through nbdfuse and a loop mount: nbdfuse or the right to mount is missing'
        fi
        stop "$pid"
    done
    rm -rf "$place/copied"
}

# The export as a file by nbdfuse, and below $peer the files by the kernel's driver on it.
nbdfuse_loop() {
    local tries
    nbdfuse --readonly "$place/nbdfuse/disk" "$1" 2>>"$place/servers.log" &
    for tries in $(seq 200); do
        if [ -e "$place/nbdfuse/disk" ]; then
            as_root mount -o loop,ro,noload "$place/nbdfuse/disk" "$peer" 2>>"$place/servers.log"
            return
        fi
        sleep 0.02
    done
    return 1
}

measure_files() {
    new_repository files
    measure_listings
    make_files
    "$lifeboat" backup files "$files" >/dev/null
    measure_reads
    measure_copies
}

report_files() {
    local kind turn way
    printf '\n## Files out of a disk of %s\n\n' "$FILES_DISK"
    {
        printf 'file system\tfirst listing s\ta directory of %s entries s\tpeak memory MiB\n' "$CROWD"
        for kind in $(files_kinds); do
            printf '%s\t%s\t%s\t%s\n' "$kind" "$(shown "files.first.$kind.seconds" %.2f)" \
                "$(shown "files.crowd.$kind.seconds" %.2f)" "$(shown "files.crowd.$kind.memory" %.0f)"
        done
    } | table
    for kind in ext4 xfs btrfs ntfs; do
        promise "first listing of $kind on a disk of $FILES_DISK, from command to end" '< 2 s' smaller 1 "files.first.$kind.seconds" 2 ' s'
    done
    for kind in $(files_kinds); do
        promise "listing $CROWD entries of $kind, from command to end" '< 1 s' smaller 1 "files.crowd.$kind.seconds" 1 ' s'
    done
    printf '\n## Reading %s MiB in sequence, MB/s\n\n' "$((FILES_WARM >> 20))"
    {
        printf 'by\tcold\twarm\n'
        for way in 'nbd|NBD export, 8 at a time' 'disk|mount, disk0.raw' 'file|mount, a file of ext4'; do
            printf '%s\t%s\t%s\n' "${way#*|}" "$(shown "files.read.${way%|*}.cold" %.0f)" "$(shown "files.read.${way%|*}.warm" %.0f)"
        done
    } | table
    for turn in cold warm; do
        promise "sequential read through the mount, $turn, beside the NBD export" '>= 0.5x' faster 0.5 "files.read.disk.$turn" "files.read.nbd.$turn" ' MB/s'
        promise "the same of a file" '>= 0.5x' faster 0.5 "files.read.file.$turn" "files.read.nbd.$turn" ' MB/s'
    done
    printf '\n## Copying %s MiB of files of at most %s KiB\n\n' "$((FILES_SMALL >> 20))" "$((FILES_SMALL_MOST >> 10))"
    {
        printf 'by\tseconds\tprocessor s of the command\n'
        for way in 'lifeboat|lifeboat cp' 'mount|cp -a from lifeboat mount' 'nbdfuse|cp -a from nbdfuse and a loop mount'; do
            printf '%s\t%s\t%s\n' "${way#*|}" "$(shown "files.copy.${way%|*}.seconds" %.2f)" "$(shown "files.copy.${way%|*}.processor" %.2f)"
        done
    } | table
    promise 'cp of small files, beside nbdfuse and a loop mount' '>= 1.0x' shorter 1 files.copy.lifeboat.seconds files.copy.nbdfuse.seconds ' s'
}
