# How soon a huge disk is served, and at what cost in memory. Sourced by bench.sh.

readonly HUGE=4T
readonly HUGE_BLOCKS=1024 # of 64 KiB, spread over all of it
# Written to an overlay, all over the disk.
if [ -n "${BENCH_SHORT:-}" ]; then GRAINS=100000; else GRAINS=1000000; fi

make_huge() {
    huge=$place/huge.raw
    truncate -s "$HUGE" "$huge" 2>/dev/null || return 1
    /usr/bin/python3 - "$huge" "$HUGE_BLOCKS" "$BLOCK" <<'PYTHON'
import os, random, sys
path, count, block = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(2)
with open(path, "r+b") as disk:
    for at in random.sample(range(os.path.getsize(path) // block), count):
        disk.seek(at * block)
        disk.write(random.randbytes(block))
PYTHON
}

measure_open() {
    local round key
    make_huge || { skip "a disk of $HUGE: the file system of $place has no files of that size"; return; }
    for key in passphrase keyfile; do
        if [ "$key" = keyfile ]; then
            new_repository huge-keyfile --key-file "$place/key"
        else
            new_repository huge-passphrase
        fi
        say "open: backing up a sparse disk of $HUGE"
        huge_key=()
        if [ "$key" = keyfile ]; then huge_key=(--key-file "$place/key"); fi
        command=(timeout 600 "$lifeboat" "${huge_key[@]}" backup huge "$huge")
        timed "huge-backup"
        for round in $(seq "$rounds"); do
            start_export "$place/huge-state.$key.$round" "${huge_key[@]}" huge
            note "open.$key" "$(calculate "$served_after * 1000")"
            note "open-memory.$key" "$(memory_peak_mib "$pid")"
            run_fio "huge-read.$key" "$pid" "$uri" randread-32 "$round" 0 "$(stat -c %s "$huge")"
            note "read-memory.$key" "$(memory_peak_mib "$pid")"
            stop "$pid"
        done
    done
    measure_overlay_open
    rm -f "$huge"
}

# An overlay with many scattered writes and trims, after kill -9. Uses what the loop above has opened last.
measure_overlay_open() {
    local round kept=$place/huge-overlay state=$place/huge-state.overlay key=(--key-file "$place/key")
    say "open: writing $GRAINS grains all over the disk"
    start_export "$state" "${key[@]}" huge --overlay "$kept"
    for test in "randwrite $GRAINS" "randtrim $((GRAINS / 4))"; do
        fio --name=scatter --ioengine=nbd --uri="$uri" --rw="${test% *}" --bs=4k --iodepth=32 --norandommap \
            --random_generator=tausworthe64 --size="$(stat -c %s "$huge")" --io_size="$((${test#* } * 4096))" \
            >"$place/fio.log" 2>&1 || { skip "overlay with $GRAINS writes: $(tail -n 1 "$place/fio.log")"; stop "$pid"; return; }
    done
    for round in $(seq "$rounds"); do
        kill -9 "$pid"
        wait "$pid" 2>/dev/null || true
        start_export "$state" "${key[@]}" huge --overlay "$kept"
        note open.overlay "$(calculate "$served_after * 1000")"
        note open-memory.overlay "$(memory_peak_mib "$pid")"
    done
    stop "$pid"
    rm -rf "$kept"
}

report_open() {
    local key
    printf '\n## Opening a sparse disk of %s\n\n' "$HUGE"
    {
        printf 'unlocked with\tserved after ms\tpeak memory MiB\tafter %s s of random reads\n' "$seconds"
        for key in passphrase keyfile; do
            printf '%s\t%s\t%s\t%s\n' "$key" "$(shown "open.$key" %.0f)" "$(shown "open-memory.$key" %.0f)" \
                "$(shown "read-memory.$key" %.0f)"
        done
    } | table
    printf '\nA passphrase is made slow to guess on purpose. Backing that disk up took %s s and %s MiB.\n' \
        "$(shown huge-backup.seconds %.1f)" "$(shown huge-backup.memory %.0f)"
    promise "export of a $HUGE disk, from command to served, key file" '< 100 ms' smaller 1 open.keyfile 100 ' ms'
    promise "export of a $HUGE disk, from command to served, passphrase" '< 100 ms' smaller 1 open.passphrase 100 ' ms'
    if [ "$(shown open.overlay)" != - ]; then
        printf '\nAn overlay with %s scattered writes, a quarter as many trims, and no clean end: served after %s ms, %s MiB.\n' \
            "$GRAINS" "$(shown open.overlay %.0f)" "$(shown open-memory.overlay %.0f)"
    fi
    promise "memory with a $HUGE disk, after reads (64 + 512 MiB cache)" '< 64 MiB + cache' smaller 1 read-memory.keyfile 576 ' MiB'
}
