# What a boot trace brings: a guest's boot from its recovery point with and without one, beside the same raw disk through
# qemu-nbd, from a disk that answers each read BENCH_DELAY (5ms) late, and from the local one. As root: it mounts a file system
# on a loop device over nbdfuse over nbdkit's delay filter. Sourced by bench.sh.

# Puts the slow disk's file system at $place/slow, with nothing of it in memory.
mount_slow() {
    local delay=$1
    mkdir -p "$place/slow" "$place/slow-fuse"
    nbdkit -f -U "$sockets/slow.sock" --filter=delay file "$place/slow.img" rdelay="$delay" wdelay=0 2>>"$place/servers.log" &
    slow_server=$!
    started+=("$slow_server")
    until [ -S "$sockets/slow.sock" ]; do sleep 0.01; done
    nbdfuse "$place/slow-fuse" "nbd+unix://?socket=$sockets/slow.sock" 2>>"$place/servers.log" &
    slow_fuse=$!
    started+=("$slow_fuse")
    until [ -e "$place/slow-fuse/nbd" ]; do sleep 0.01; done
    mount -o loop "$place/slow-fuse/nbd" "$place/slow"
}

unmount_slow() {
    umount "$place/slow"
    fusermount3 -u "$place/slow-fuse" 2>>"$place/servers.log" || true
    stop "$slow_fuse"
    stop "$slow_server"
    rm -f "$sockets/slow.sock"
}

# From the command to the guest's first words: trace_boot KEY
trace_boot() {
    local began view
    began=$(now)
    view=$("$lifeboat" --json recover vm --memory 512M --wait 0 --accel "$accel" 2>>"$place/servers.log") || return 1
    wait_up "$(jq -r .console <<<"$view")" || return 1
    note "$1" "$(since "$began")"
    tr '\0' '\n' <"/proc/$(jq -r .pid <<<"$view")/cmdline" | sed "s|$LIFEBOAT_STATE/recoveries/vm/|$place/peer/|g" >"$place/peer-command"
    end_recoveries "$LIFEBOAT_STATE"
}

# The same QEMU on a raw disk under a throw-away overlay of qemu-nbd's: trace_peer KEY DISK
trace_peer() {
    local began drive command pid
    rm -rf "$place/peer"
    mkdir "$place/peer"
    mapfile -t command <"$place/peer-command"
    drive=$(grep '"driver":"nbd"' "$place/peer-command")
    began=$(now)
    qemu-nbd -t -e 8 --snapshot -k "$(jq -r .server.path <<<"$drive")" -x "$(jq -r .export <<<"$drive")" -f raw "$2" \
        2>>"$place/servers.log" &
    pid=$!
    started+=("$pid")
    until [ -S "$(jq -r .server.path <<<"$drive")" ]; do
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.002
    done
    "${command[@]}" >>"$place/servers.log" 2>&1 || return 1
    wait_up "$place/peer/console.log" || return 1
    note "$1" "$(since "$began")"
    stop_peer_machine
    stop "$pid"
}

# Boots in each way from where the repository is: trace_round WHERE
trace_round() {
    mv "$LIFEBOAT_REPO/drills" "$LIFEBOAT_REPO/set-aside"
    trace_boot "trace.$1.without" || return 1
    mv "$LIFEBOAT_REPO/set-aside" "$LIFEBOAT_REPO/drills"
}

measure_trace() {
    local round accel=${LIFEBOAT_ACCEL:-tcg} delay=${BENCH_DELAY:-5ms} slow_server slow_fuse failed
    for tool in qemu-system-x86_64 nbdkit nbdfuse mkfs.ext4; do
        have "$tool" || { skip "trace: $tool is not installed"; return; }
    done
    [ -e "$guests/guest-oneshot.raw" ] || { skip "trace: no guest in $guests"; return; }
    failed="trace: the guest did not come up"
    new_repository trace
    "$lifeboat" backup vm "$guests/guest-oneshot.raw" >/dev/null
    "$lifeboat" drill vm --memory 512M --accel "$accel" --expect 'LIFEBOAT-GUEST: up' >/dev/null \
        || { skip 'trace: the drill failed'; return; }
    for round in $(seq "$rounds"); do
        say "trace, local, round $round of $rounds"
        { trace_round local && trace_boot trace.local.with && trace_peer trace.local.peer "$guests/guest-oneshot.raw"; } \
            || { skip "$failed ($(tail -n 1 "$place/servers.log"))"; return; }
    done
    [ "$(id -u)" -eq 0 ] || { skip 'trace: a slow disk needs root'; return; }
    truncate -s 1G "$place/slow.img"
    mkfs.ext4 -q -F "$place/slow.img"
    mount_slow 0
    cp -r "$LIFEBOAT_REPO" "$place/slow/repo"
    cp "$guests/guest-oneshot.raw" "$place/slow/guest.raw"
    unmount_slow
    export LIFEBOAT_REPO=$place/slow/repo
    echo "$LIFEBOAT_REPO" >"$LIFEBOAT_STATE/bench-repository"
    for round in $(seq "$rounds"); do
        for way in without with peer; do
            say "trace, slow, $way, round $round of $rounds"
            mount_slow "$delay"
            case $way in
                without) trace_round slow ;;
                with) trace_boot trace.slow.with ;;
                peer) trace_peer trace.slow.peer "$place/slow/guest.raw" ;;
            esac || { unmount_slow; skip "$failed from the slow disk ($(tail -n 1 "$place/servers.log"))"; return; }
            unmount_slow
        done
    done
}

report_trace() {
    local where
    printf '\n## Boot of the test guest with a boot trace, accelerator %s; the slow disk answers %s late\n\n' \
        "${LIFEBOAT_ACCEL:-tcg}" "${BENCH_DELAY:-5ms}"
    {
        printf "repository on\tno trace, s\ttrace, s\tqemu-nbd on the raw disk there, s\n"
        for where in local slow; do
            printf '%s\t%s\t%s\t%s\n' "$where disk" "$(shown "trace.$where.without" %.2f)" "$(shown "trace.$where.with" %.2f)" \
                "$(shown "trace.$where.peer" %.2f)"
        done
    } | table
    promise 'boot with a trace, from the command, beside qemu-nbd raw' '<= 1.0x' smaller 1.0 \
        trace.local.with trace.local.peer ' s'
    promise 'the same, both from a slow disk' '<= 1.0x' smaller 1.0 trace.slow.with trace.slow.peer ' s'
}
