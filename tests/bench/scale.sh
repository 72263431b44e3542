# How the index grows: repositories of 1, 10 and 100 TiB of unique data, their index alone. Sourced by bench.sh.
#
# 100 TiB in chunks of 64 KiB would be an index of 80 GB; it is measured in chunks of 1 MiB (about 11 GB), which is made,
# measured and removed again. What does not fit beside 5 GB of free room is skipped.

measure_scale() {
    local target tib chunk need room line
    target=${CARGO_TARGET_DIR:-$here/../target}
    (cd "$here/.." && cargo build --quiet --release --package blockstore --example scale) || { skip 'scale: it does not build'; return 0; }
    for tib in 1 10 100; do
        chunk=$BLOCK need=$((tib * 1100000000))
        [ "$tib" -lt 100 ] || chunk=1048576 need=13000000000
        room=$(($(df --output=avail -B1 "$place" | tail -n 1) - 5000000000))
        if [ "$room" -lt "$need" ]; then skip "scale, $tib TiB: $need bytes of room are needed"; continue; fi
        say "scale, $tib TiB in chunks of $chunk"
        if line=$("$target/release/examples/scale" "$place/scale" "$tib" "$chunk"); then
            printf '%s\n' "$line" >>"$place/scale.table"
        else
            rm -rf "$place/scale"
            skip "scale, $tib TiB: failed"
        fi
    done
}

report_scale() {
    [ -s "$place/scale.table" ] || return 0
    printf '\n## Scale: the index of so much unique data, without the data\n\n'
    {
        printf 'TiB\tchunk\tentries\tindex GB\topen ms\thit us\tmiss us\town memory MiB\tmapped and touched MiB\tmark and plan s\tmarks MiB\town memory of that MiB\n'
        awk -F '\t' -v OFS='\t' '{ print $1, $2 / 1024 " KiB", $3, sprintf("%.2f", $4 / 1e9), sprintf("%.1f", $5 * 1000), $6, $7, $8, $9, $10, $11, $12 }' \
            "$place/scale.table"
    } | table
    printf '\nMapped pages are page cache that the kernel takes back when it wants to.\n'
    awk -F '\t' '$1 == 1 { print "scale.open " $5; print "scale.own " $8; print "scale.plan " $12 }' "$place/scale.table" >>"$place/results"
    promise 'opening 1 TiB of unique data, 16.8 million chunks' '< 1 s' smaller 1 scale.open 1 ' s'
    promise 'memory for 1 TiB of unique data' '<= 256 MiB' smaller 1 scale.own 256 ' MiB'
    promise 'memory to mark 16.8 million chunks and plan a collect' '<= 256 MiB' smaller 1 scale.plan 256 ' MiB'
}
