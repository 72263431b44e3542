# The images that are measured: an ext4 file system full of /usr, the same with 2 % of its blocks changed, and a
# compressed qcow2 of it. They are kept from run to run. Sourced by bench.sh.

readonly BLOCK=65536
readonly CHANGED_PERCENT=2

# Sets image, changed and, where it is asked for, compressed.
make_images() {
    image=$kept/usr-$size.raw
    changed=$kept/usr-$size-changed.raw
    [ -e "$image" ] || make_image
    [ -e "$changed" ] || make_changed
}

# Files of /usr in the order of their names until the image is nearly full; links instead of copies where they can be.
make_image() {
    local staging=$place/staging
    say "making an image of $(numfmt --to=iec "$size") out of /usr"
    mkdir "$staging"
    (cd /usr && find . -xdev ! -name '*.pyc' -printf '%p\t%b\t%y\n' | LC_ALL=C sort \
        | awk -F '\t' -v most="$((size / 100 * 88))" '
            $3 ~ /[fld]/ { sum += $2 * 512 + 512; if (sum > most) exit; print $1 }' \
        | cpio --quiet -pdlm "$staging" 2>/dev/null) || true
    mke2fs -q -F -t ext4 -m 0 -d "$staging" -E lazy_itable_init=0,lazy_journal_init=0 "$image.new" "$((size / 1024))k" >/dev/null
    rm -rf "$staging"
    mv "$image.new" "$image"
}

make_changed() {
    cp --sparse=always "$image" "$changed.new"
    /usr/bin/python3 - "$changed.new" "$BLOCK" "$CHANGED_PERCENT" <<'PYTHON'
import os, random, sys
path, block, percent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(1)
blocks = os.path.getsize(path) // block
with open(path, "r+b") as image:
    for at in random.sample(range(blocks), blocks * percent // 100):
        image.seek(at * block)
        image.write(random.randbytes(block))
PYTHON
    mv "$changed.new" "$changed"
}

make_compressed() {
    compressed=$kept/usr-$size.zstd.qcow2
    [ -e "$compressed" ] && return
    say "making the compressed qcow2"
    qemu-img convert -f raw -O qcow2 -c -W -m 8 -o compression_type=zstd "$image" "$compressed.new"
    mv "$compressed.new" "$compressed"
}
