# A guest's boot from its recovery point, beside the same QEMU with the same options on the same disk, served raw by
# qemu-nbd. Sourced by bench.sh.

# Ends the machine that boot_peer started, if it runs.
stop_peer_machine() {
    local pid
    pid=$(tr -dc 0-9 2>/dev/null <"$place/peer/qemu.pid" || true)
    if [ -n "$pid" ] && grep -qsF "$place/peer/" "/proc/$pid/cmdline"; then stop "$pid"; fi
}

# Waits for the guest's first words.
wait_up() {
    local console=$1 tries
    for tries in $(seq 6000); do
        if grep -qs 'LIFEBOAT-GUEST: up' "$console"; then return 0; fi
        sleep 0.01
    done
    return 1
}

# Seconds since a process began.
age() {
    awk -v hertz="$(getconf CLK_TCK)" 'FILENAME == "/proc/uptime" { now = $1; next }
        { sub(/^.*\) /, ""); print now - $20 / hertz }' /proc/uptime "/proc/$1/stat"
}

# From the command to the guest's first words. Keeps the machine's command line for the peer, in another folder.
boot_lifeboat() {
    local began view machine key
    began=$(now)
    view=$("$lifeboat" --json recover vm --memory 512M --wait 0 --accel "$accel" 2>>"$place/servers.log") || return 1
    wait_up "$(jq -r .console <<<"$view")" || return 1
    note boot.command.lifeboat "$(since "$began")"
    machine=$(jq -r .pid <<<"$view")
    note boot.machine.lifeboat "$(age "$machine")"
    for key in export_ms started_ms; do note "boot.$key" "$(jq ".timings.$key // 0" <<<"$view")"; done
    tr '\0' '\n' <"/proc/$machine/cmdline" | sed "s|$LIFEBOAT_STATE/recoveries/vm/|$place/peer/|g" >"$place/peer-command"
    # The service too: the next round begins with none, as somebody who has lost a machine does.
    end_recoveries "$LIFEBOAT_STATE"
}

boot_peer() {
    local began drive command pid
    rm -rf "$place/peer"
    mkdir "$place/peer"
    mapfile -t command <"$place/peer-command"
    drive=$(grep '"driver":"nbd"' "$place/peer-command")
    # On a copy, for the guest writes to it; Lifeboat's has its overlay.
    cp --sparse=always "$guests/guest-oneshot.raw" "$place/peer/disk.raw"
    began=$(now)
    qemu-nbd -t -e 8 -k "$(jq -r .server.path <<<"$drive")" -x "$(jq -r .export <<<"$drive")" -f raw \
        "$place/peer/disk.raw" 2>>"$place/servers.log" &
    pid=$!
    started+=("$pid")
    until [ -S "$(jq -r .server.path <<<"$drive")" ]; do
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.002
    done
    "${command[@]}" >>"$place/servers.log" 2>&1 || return 1
    wait_up "$place/peer/console.log" || return 1
    note boot.command.peer "$(since "$began")"
    note boot.machine.peer "$(age "$(cat "$place/peer/qemu.pid")")"
    stop_peer_machine
    stop "$pid"
}

measure_boot() {
    local round accel=${LIFEBOAT_ACCEL:-tcg}
    have qemu-system-x86_64 || { skip 'boot: qemu-system-x86_64 is not installed'; return; }
    [ -e "$guests/guest-oneshot.raw" ] || { skip "boot: no guest in $guests"; return; }
    new_repository boot
    "$lifeboat" backup vm "$guests/guest-oneshot.raw" >/dev/null
    cat "$guests/guest-oneshot.raw" >/dev/null
    for round in $(seq "$rounds"); do
        say "boot, round $round of $rounds"
        boot_lifeboat || { skip "boot: the guest did not come up from its recovery point ($(tail -n 1 "$place/servers.log"))"; return; }
        boot_peer || { skip "boot: the guest did not come up through qemu-nbd ($(tail -n 1 "$place/servers.log"))"; return; }
    done
}

report_boot() {
    local who
    printf '\n## Boot of the test guest, same QEMU options, accelerator %s\n\n' "${LIFEBOAT_ACCEL:-tcg}"
    {
        printf "disk from\tcommand to guest's first words, s\tQEMU's start to them, s\n"
        for who in lifeboat peer; do
            printf '%s\t%s\t%s\n' "$([ $who = lifeboat ] && echo 'lifeboat recover, encrypted' || echo 'qemu-nbd, raw')" \
                "$(shown "boot.command.$who" %.2f)" "$(shown "boot.machine.$who" %.2f)"
        done
    } | table
    printf '\nLifeboat served the disk after %s ms and had QEMU running after %s ms.\n' "$(shown boot.export_ms %.0f)" \
        "$(shown boot.started_ms %.0f)"
    promise "boot, from the command to the guest's first words, beside qemu-nbd raw" '<= 1.05x' smaller 1.05 \
        boot.command.lifeboat boot.command.peer ' s'
    promise "boot, from QEMU's start to the guest's first words, beside qemu-nbd raw" '<= 1.05x' smaller 1.05 \
        boot.machine.lifeboat boot.machine.peer ' s'
}
