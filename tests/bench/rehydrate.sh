# The way back to production storage: how fast both ways copy, beside `qemu-img convert` from the same export; how long
# the cutover holds the guest; and what the guest's writes take meanwhile. Sourced by bench.sh.

# Waits until a recovery is in a state; fails where that cannot come any more.
wait_state() {
    local name=$1 want=$2 tries view
    for tries in $(seq 6000); do
        view=$("$lifeboat" --json recovery "$name" 2>>"$place/servers.log")
        if [ "$(jq -r .state <<<"$view")" = "$want" ]; then return 0; fi
        if [ "$(jq -r .rehydration.phase <<<"$view")" = held ]; then break; fi
        sleep 0.1
    done
    jq -r .problem <<<"$view" >>"$place/servers.log"
    return 1
}

# Ends the machine of a recovery, which a discard would not: it is in production.
stop_machine() {
    local pid
    pid=$(jq -r '.pid // empty' <<<"$1")
    if [ -n "$pid" ] && grep -qsF "$place/" "/proc/$pid/cmdline"; then stop "$pid"; fi
}

# convert_peer RECOVERY: the whole disk through qemu-img from the recovery's export, synced; then compared, as we do.
convert_peer() {
    local uri began
    uri=$("$lifeboat" --json recovery "$1" | jq -r '.disks[0].nbd_uri')
    began=$(now)
    qemu-img convert -f raw -O raw -t writeback "$uri" "$place/converted.raw" 2>>"$place/servers.log" || return 1
    note rehydrate.copy.peer "$(since "$began")"
    qemu-img compare -f raw -F raw "$uri" "$place/converted.raw" >>"$place/servers.log" 2>&1 || return 1
    note rehydrate.proven.peer "$(since "$began")"
    rm "$place/converted.raw"
}

# rehydrate_once MODE RECOVERY: from the command until all is copied and compared, then the cutover.
rehydrate_once() {
    local mode=$1 name=$2 began view target=$place/rehydrated.raw
    began=$(now)
    "$lifeboat" rehydrate "$name" --to "$target" --mode "$mode" >>"$place/servers.log" 2>&1 || return 1
    note "rehydrate.proven.$mode" "$(since "$began")"
    view=$("$lifeboat" --json cutover "$name") || return 1
    note "rehydrate.pause.$mode" "$(jq .timings.cutover_pause_ms <<<"$view")"
    stop_machine "$view"
    end_recoveries "$LIFEBOAT_STATE"
    cmp "$image" "$target" >>"$place/servers.log" 2>&1 || return 1
    rm -f "$target"
}

# guest_latency KEY QMP: sets QEMU's histogram of the guest's writes back, waits, and notes the bounds below which half
# and 99 % of them lie, in milliseconds, as near as the histogram's steps of a quarter tell.
guest_latency() {
    /usr/bin/python3 - "$2" "$seconds" <<'PYTHON' >"$place/latency" || return 1
import json, socket, sys, time
qemu = socket.socket(socket.AF_UNIX)
qemu.settimeout(20)
qemu.connect(sys.argv[1])
lines = qemu.makefile("rw")
def call(command, **arguments):
    print(json.dumps({"execute": command, "arguments": arguments}), file=lines, flush=True)
    while "return" not in (answer := json.loads(lines.readline())):
        assert "error" not in answer, answer
    return answer["return"]
call("qmp_capabilities")
bounds = [int(20_000 * 1.25 ** step) for step in range(60)]
call("block-latency-histogram-set", id="/machine/peripheral/device0/virtio-backend", boundaries=bounds)
time.sleep(max(5, 3 * float(sys.argv[2])))
stats = next(one for one in call("query-blockstats") if one.get("qdev", "").startswith("/machine/peripheral/device0"))
histogram = stats["stats"]["wr_latency_histogram"]
def below(share):
    left = share * sum(histogram["bins"])
    for count, bound in zip(histogram["bins"], histogram["boundaries"] + [float("inf")]):
        left -= count
        if left <= 0:
            return bound / 1e6
assert sum(histogram["bins"]) > 0, "the guest has written nothing"
print(below(0.5), below(0.99))
PYTHON
    read -r half most <"$place/latency"
    note "rehydrate.half.$1" "$half"
    note "rehydrate.p99.$1" "$most"
}

# The counter guest writes and syncs all the time, on the disk that is copied.
measure_guest_latency() {
    local mode view
    "$lifeboat" backup busy root="$guests/guest-counter.raw" data="$image" >/dev/null
    for mode in mirror stream; do
        view=$("$lifeboat" --json recover busy --name "busy-$mode" --memory 512M --wait 0 --accel "$accel") || return 1
        wait_up "$(jq -r .console <<<"$view")" || return 1
        sleep 3
        guest_latency "calm.$mode" "$(jq -r .qmp <<<"$view")" || return 1
        "$lifeboat" rehydrate "busy-$mode" --to "root=$place/root.raw" "data=$place/data.raw" --mode "$mode" --detach \
            >>"$place/servers.log" 2>&1 || return 1
        guest_latency "busy.$mode" "$(jq -r .qmp <<<"$view")" || return 1
        wait_state "busy-$mode" ready-for-cutover || return 1
        view=$("$lifeboat" --json cutover "busy-$mode") || return 1
        note "rehydrate.busypause.$mode" "$(jq .timings.cutover_pause_ms <<<"$view")"
        stop_machine "$view"
        end_recoveries "$LIFEBOAT_STATE"
        rm -f "$place/root.raw" "$place/data.raw"
    done
}

measure_rehydrate() {
    local round accel=${LIFEBOAT_ACCEL:-tcg}
    have qemu-system-x86_64 || { skip 'rehydrate: qemu-system-x86_64 is not installed'; return; }
    make_images
    new_repository rehydrate
    "$lifeboat" backup vm "$image" >/dev/null
    cat "$image" >/dev/null
    for round in $(seq "$rounds"); do
        say "rehydrate, round $round of $rounds"
        # Each begins with what the service has in memory after somebody has read the whole disk.
        "$lifeboat" recover vm --name plain --on none >>"$place/servers.log"
        convert_peer plain || { skip "rehydrate: qemu-img failed ($(tail -n 1 "$place/servers.log"))"; return; }
        rehydrate_once stream plain || { skip "rehydrate: stream failed ($(tail -n 1 "$place/servers.log"))"; return; }
        # A machine that finds nothing to boot: its QEMU has only the copying to do.
        "$lifeboat" recover vm --name bare --memory 64M --accel "$accel" >>"$place/servers.log"
        rehydrate_once mirror bare || { skip "rehydrate: mirror failed ($(tail -n 1 "$place/servers.log"))"; return; }
    done
    [ -e "$guests/guest-counter.raw" ] || { skip "rehydrate: no guest in $guests"; return; }
    say "rehydrate, what a guest feels"
    measure_guest_latency || skip "rehydrate: a guest could not be measured ($(tail -n 1 "$place/servers.log"))"
}

report_rehydrate() {
    local who
    printf '\n## Rehydration of %s, whose data is compressed and encrypted in the repository\n\n' "$(numfmt --to=iec "$size")"
    {
        printf 'who\tcopied and synced, s\tand compared, s\tcutover held the guest, ms\tthe same, guest writing, ms\n'
        for who in peer mirror stream; do
            printf '%s\t%s\t%s\t%s\t%s\n' "$([ $who = peer ] && echo 'qemu-img convert, compare' || echo "rehydrate --mode $who")" \
                "$(shown "rehydrate.copy.$who" %.2f)" "$(shown "rehydrate.proven.$who" %.2f)" \
                "$(shown "rehydrate.pause.$who" %.0f)" "$(shown "rehydrate.busypause.$who" %.0f)"
        done
    } | table
    printf '\n## What a guest that writes and syncs all the time feels, accelerator %s\n\n' "${LIFEBOAT_ACCEL:-tcg}"
    {
        printf 'mode\thalf of its writes before, ms\tduring, ms\t99 %% before, ms\tduring, ms\n'
        for who in mirror stream; do
            printf '%s\t%s\t%s\t%s\t%s\n' "$who" "$(shown "rehydrate.half.calm.$who" %.2f)" "$(shown "rehydrate.half.busy.$who" %.2f)" \
                "$(shown "rehydrate.p99.calm.$who" %.2f)" "$(shown "rehydrate.p99.busy.$who" %.2f)"
        done
    } | table
    promise 'mirror, all copied and compared, beside qemu-img convert and compare' '>= 0.8x' shorter 0.8 \
        rehydrate.proven.mirror rehydrate.proven.peer ' s'
    promise 'stream, all copied and compared, beside qemu-img convert and compare' '>= 0.8x' shorter 0.8 \
        rehydrate.proven.stream rehydrate.proven.peer ' s'
}
