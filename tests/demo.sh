#!/usr/bin/env bash
# The main job, on a real machine: back it up twice, lose it, boot it straight from its backup, kill Lifeboat under it,
# move it back to production storage while it runs, and find everything it had synced. Everything happens below one temporary folder, which is removed at the end.
set -euo pipefail

lifeboat=${LIFEBOAT_BIN:?the program to show}
guests=${LIFEBOAT_GUESTS:?the folder of the test guests}
place=$(mktemp -d "${TMPDIR:-/tmp}/lifeboat-demo.XXXXXX")
export LIFEBOAT_REPO=$place/repository LIFEBOAT_STATE=$place/state LIFEBOAT_PASSPHRASE='correct horse battery staple'
disk=$place/web01.raw
console=$LIFEBOAT_STATE/recoveries/web01/console.log
accel=${LIFEBOAT_ACCEL:-auto}

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ lifeboat %s\n' "$*"; "$lifeboat" "$@"; }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.1f s", b - a }'; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }

clean_up() {
    local pid
    pid=$(recovery .pid 2>/dev/null || true)
    if [ -n "$pid" ] && [ "$pid" != null ]; then kill -9 "$pid" 2>/dev/null || true; fi
    "$lifeboat" discard web01 >/dev/null 2>&1 || true
    pid=$(sed -n 's/^process \([0-9]*\).*/\1/p' "$LIFEBOAT_STATE/lock" 2>/dev/null || true)
    if [ -n "$pid" ] && [ "$(readlink "/proc/$pid/exe")" = "$(readlink -f "$lifeboat")" ]; then kill "$pid" 2>/dev/null || true; fi
    rm -rf "$place"
}
trap clean_up EXIT

# Waits until FILE has a line with TEXT, COUNT of them or more.
wait_for() {
    local file=$1 text=$2 count=${3:-1} found tries
    for tries in $(seq 1200); do
        found=$(grep -c -- "$text" "$file" 2>/dev/null || true)
        if [ "${found:-0}" -ge "$count" ]; then return; fi
        sleep 0.1
    done
    tail -n 20 "$file" >&2 || true
    die "waited in vain for '$text' in $file"
}

# Sends a command to the recovered machine's QEMU.
qmp() {
    /usr/bin/python3 - "$LIFEBOAT_STATE/recoveries/web01/qmp.sock" "$1" <<'PYTHON'
import json, socket, sys
qemu = socket.socket(socket.AF_UNIX)
qemu.settimeout(20)
qemu.connect(sys.argv[1])
lines = qemu.makefile("rw")
for command in ("qmp_capabilities", sys.argv[2]):
    print(json.dumps({"execute": command}), file=lines, flush=True)
    while "return" not in (answer := json.loads(lines.readline())):
        assert "error" not in answer, answer
PYTHON
}

kill_lifeboat() { kill -9 "$(sed -n 's/^process \([0-9]*\).*/\1/p' "$LIFEBOAT_STATE/lock")"; }
recovery() { "$lifeboat" recovery web01 --json | jq -r "$1"; }
last_seq() { tr -d '\r' <"$console" | sed -n 's/^LIFEBOAT-GUEST: seq \([0-9]*\)$/\1/p' | tail -n 1; }

say "A machine in production: a Debian kernel on a disk of its own"
cp --sparse=always "$guests/guest-counter.raw" "$disk"
ls -lhs "$disk"

say "An encrypted repository, and the first backup"
run init
run backup web01 "$disk"

say "The machine runs, and writes to its disk"
mkfifo "$place/monitor"
production=$place/production.log
sleep 600 >"$place/monitor" & holder=$!
qemu-system-x86_64 -nodefaults -machine q35 -accel tcg,thread=multi -m 512 -smp 2 -display none \
    -drive "file=$disk,format=raw,if=virtio" -serial "file:$production" -monitor stdio \
    <"$place/monitor" >/dev/null & machine=$!
wait_for "$production" 'LIFEBOAT-GUEST: seq' 20
echo system_powerdown >"$place/monitor"
wait "$machine" || die "the machine ended badly"
kill "$holder" 2>/dev/null || true
wait "$holder" 2>/dev/null || true
tr -d '\r' <"$production" | grep LIFEBOAT-GUEST | sed -n 1,6p
echo "... $(grep -c 'LIFEBOAT-GUEST: seq' "$production") records written and synced, then powered off"

say "The second backup stores what has changed"
run backup web01 "$disk"
run points

say "Production storage is lost"
rm -v "$disk"

say "The machine boots straight from its backup"
began=$(now)
run recover web01 --memory 512M --accel "$accel"
wait_for "$console" 'LIFEBOAT-GUEST: up'
up=$(since "$began")
wait_for "$console" 'LIFEBOAT-GUEST: seq' 20
working=$(since "$began")
tr -d '\r' <"$console" | grep LIFEBOAT-GUEST | sed -n 1,8p

say "Lifeboat is killed with kill -9 while the guest writes"
before=$(last_seq)
kill_lifeboat
sleep 1
stalled=$(last_seq)
echo "the guest had synced record $before when the kill was sent; it waits for its disk at record $stalled"
began=$(now)
run recoveries
wait_for "$console" "LIFEBOAT-GUEST: seq $((stalled + 10))"
echo "it went on $(since "$began") after Lifeboat was back, and is at record $(last_seq)"

say "Back to production storage while the guest runs and writes, Lifeboat killed once more meanwhile"
production_disk=$place/new-storage/web01.raw
mkdir "$place/new-storage"
began=$(now)
run rehydrate web01 --to "$production_disk" --limit 32M --detach | grep -E '^([$] |state|rehydration|disk0)'
sleep 2
kill_lifeboat
run recovery web01 | grep -E '^([$] |state|rehydration|disk0)'
for tries in $(seq 600); do
    if [ "$(recovery .state)" = ready-for-cutover ]; then break; fi
    [ "$tries" -lt 600 ] || die "the rehydration does not end"
    sleep 0.1
done
rehydrated=$(since "$began")

say "Cutover: the guest moves onto production storage, without a reboot"
before=$(last_seq)
run cutover web01
pause=$(recovery .timings.cutover_pause_ms)
wait_for "$console" "LIFEBOAT-GUEST: seq $((before + 20))"
echo "the guest was at record $before, and is at record $(last_seq)"

say "The power goes: QEMU and Lifeboat end at once. The machine starts on production storage alone"
pid=$(recovery .pid)
kill_lifeboat
kill -9 "$pid"
run start web01 | grep -E '^([$] |state|vm|disk0)'
wait_for "$console" 'LIFEBOAT-GUEST: slots ok' 2
tr -d '\r' <"$console" | grep LIFEBOAT-GUEST | sed -n '/up boot=3/,/slots ok/p'
lost=$(tr -d '\r' <"$console" | awk '
    /^LIFEBOAT-GUEST: seq / && !cut { promised = $3 }
    /^LIFEBOAT-GUEST: up boot=3/ { cut = 1 }
    /^LIFEBOAT-GUEST: log ok last=/ && cut { sub(/.*last=/, ""); kept = $0; exit }
    END { print (promised > kept + 0) ? promised - kept : 0 }')

say "The machine is shut down; nothing has touched the backup"
qmp system_powerdown
for tries in $(seq 600); do
    if [ "$(recovery .vm)" = shut-off ]; then break; fi
    sleep 0.1
done
run discard web01
run verify --read-data

field() { "$lifeboat" show "$1" --json | jq -r "$2"; }
mib() { awk -v b="$1" 'BEGIN { printf "%.1f MiB", b / 1048576 }'; }
say "In figures"
printf '%-58s %12s\n' \
    "size of the disk" "$(mib "$(field web01 .size)")" \
    "first backup: read" "$(mib "$(field web01~1 .read)")" \
    "first backup: stored, compressed and encrypted" "$(mib "$(field web01~1 .stored)")" \
    "second backup: stored" "$(mib "$(field web01 .stored)")" \
    "the repository" "$(du -sh "$LIFEBOAT_REPO" | cut -f 1)iB" \
    "from \`lifeboat recover\` until the guest's first program ran" "$up" \
    "from \`lifeboat recover\` until 20 records were written" "$working" \
    "copying back to production storage, at most 32 MiB/s" "$rehydrated" \
    "the guest's disks were held by the cutover" "$pause ms" \
    "records lost that the guest had synced" "$lost"
if [ "$lost" != 0 ]; then die "the guest has lost records"; fi
