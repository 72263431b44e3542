# What all parts of the benchmark share: a place, processes that end with it, results, and tables.
# Sourced by bench.sh.

say() { printf 'bench: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.3f\n", b - a }'; }
# calculate EXPRESSION [FORMAT]; a comparison gives 1 or 0.
calculate() { awk "BEGIN { printf \"${2:-%.6g}\\n\", ($1) }"; }
have() { command -v "$1" >/dev/null; }

# Names something that is left out, once.
skip() {
    say "skipped: $*"
    grep -qxF -- "$*" "$place/skipped" || printf '%s\n' "$*" >>"$place/skipped"
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then env DEBIAN_FRONTEND=noninteractive "$@"; return; fi
    have sudo && sudo -n DEBIAN_FRONTEND=noninteractive "$@"
}

# Installs what only the benchmark needs. What cannot be had is skipped later, where it is missed.
install_peers() {
    local missing=() pair
    for pair in restic:restic borg:borgbackup /usr/bin/time:time nbdkit:nbdkit fio:fio; do
        have "${pair%:*}" || missing+=("${pair#*:}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing: ${missing[*]}"
    { as_root apt-get update -q && as_root apt-get install -q -y --no-install-recommends "${missing[@]}"; } >&2 \
        || say "could not install all of: ${missing[*]}"
}

set_up() {
    load=$(cut -d' ' -f1 /proc/loadavg)
    install_peers
    for tool in fio jq qemu-nbd nbdinfo /usr/bin/time /usr/bin/python3; do have "$tool" || die "$tool is missing"; done
    mkdir -p "$kept"
    kept=$(readlink -f "$kept")
    place=$(mktemp -d "$kept/run.XXXXXX")
    sockets=$(mktemp -d /tmp/lb-bench.XXXXXX) # a socket's path is short
    started=()
    : >"$place/results"; : >"$place/promises"; : >"$place/skipped"
    # Every program keeps its temporary files on the file system that the others use.
    export TMPDIR=$place
    export LIFEBOAT_PASSPHRASE='correct horse battery staple'
    unset LIFEBOAT_KEY_FILE LIFEBOAT_PASSPHRASE_FILE LIFEBOAT_CACHE
}

clean_up() {
    local lock pid at
    # Above what serves them: the innermost first.
    for at in filled peer nbdfuse mounted; do
        if mountpoint -q "$place/$at"; then as_root umount -l "$place/$at" || return; fi
    done
    for pid in "${started[@]}"; do stop "$pid"; done
    # Lifeboat's services, and the machines they run, outlive the command that started them.
    for lock in "$place"/*/lock; do
        [ -e "$lock" ] || continue
        end_recoveries "$(dirname "$lock")"
    done
    stop_peer_machine
    # What is mounted there must not be emptied, nor keep the folder busy.
    if mountpoint -q "$place/slow"; then umount -l "$place/slow" || return; fi
    if mountpoint -q "$place/slow-fuse"; then fusermount3 -uz "$place/slow-fuse" || return; fi
    rm -rf "$place" "$sockets"
}

# Ends what runs in a state folder of ours: its recoveries with their machines, then the service.
end_recoveries() {
    local state=$1 name pid
    for name in "$state"/recoveries/*/; do
        [ -d "$name" ] || continue
        LIFEBOAT_REPO=$(cat "$state/bench-repository" 2>/dev/null) LIFEBOAT_STATE=$state \
            timeout 30 "$lifeboat" discard "$(basename "$name")" >/dev/null 2>&1 || true
    done
    pid=$(sed -n 's/^process \([0-9]*\).*/\1/p' "$state/lock" 2>/dev/null || true)
    if [ -n "$pid" ] && [ "$(readlink "/proc/$pid/exe")" = "$lifeboat" ]; then stop "$pid"; fi
}

# Ends a process, waits until it is gone.
stop() {
    local pid=$1 tries
    kill "$pid" 2>/dev/null || return 0
    for tries in $(seq 500); do # removing a large overlay takes its time
        if [ "$tries" = 400 ]; then kill -9 "$pid" 2>/dev/null || true; fi
        if ! kill -0 "$pid" 2>/dev/null || [[ $(cat "/proc/$pid/stat" 2>/dev/null) == *") Z "* ]]; then break; fi
        sleep 0.05
    done
    wait "$pid" 2>/dev/null || true
}

# ---- results: one line KEY VALUE for each measurement ----

note() { printf '%s %s\n' "$1" "$2" >>"$place/results"; }

# The median of a key, or nothing where it was not measured.
median() {
    awk -v key="$1" '$1 == key { print $2 }' "$place/results" | sort -g \
        | awk '{ v[NR] = $1 } END { if (NR) print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
}

# The median of a key in a format, divided by SCALE; `-` where it was not measured.
shown() {
    local value
    value=$(median "$1")
    if [ -z "$value" ]; then echo -; else calculate "$value / ${3:-1}" "${2:-%.1f}"; fi
}

# promise WHAT TEXT (faster|shorter|smaller) BOUND OURS THEIRS [UNIT]: holds a ratio against its bound. `faster` wants
# ours / theirs of rates to be BOUND or more, `shorter` theirs / ours of times; `smaller` ours / theirs to be BOUND or
# less. OURS and THEIRS are keys; THEIRS may be a number, an absolute bound.
promise() {
    local what=$1 text=$2 kind=$3 bound=$4 ours theirs unit=${7:-} ratio verdict=missed
    ours=$(median "$5")
    if [[ $6 =~ ^[0-9.]+$ ]]; then theirs=$6; else theirs=$(median "$6"); fi
    if [ -z "$ours" ] || [ -z "$theirs" ]; then
        printf '%s\t%s\t%s\t%s\t-\tnot measured\n' "$what" "$text" "${ours:--}" "${theirs:--}" >>"$place/promises"
        return
    fi
    if [ "$kind" = shorter ]; then ratio=$(calculate "$theirs / $ours"); else ratio=$(calculate "$ours / $theirs"); fi
    local holds='>='
    if [ "$kind" = smaller ]; then holds='<='; fi
    if [ "$(calculate "$ratio $holds $bound")" = 1 ]; then verdict=held; fi
    printf '%s\t%s\t%s\t%s\t%.2fx\t%s\n' "$what" "$text" "$(figure "$ours")$unit" "$(figure "$theirs")$unit" \
        "$ratio" "$verdict" >>"$place/promises"
}

# A number with three digits that count.
figure() { awk -v v="$1" 'BEGIN { printf (v >= 100 ? "%.0f" : v >= 10 ? "%.1f" : "%.2f"), v }'; }

# Turns lines of fields between tabs, the first of them the heads, into an aligned table; figures stand to the right.
table() {
    awk -F '\t' '
        { for (i = 1; i <= NF; i++) { cell[NR, i] = $i; if (length($i) > width[i]) width[i] = length($i) }
          if (NF > fields) fields = NF
          if (NR == 2) for (i = 1; i <= NF; i++) right[i] = $i == "" || $i == "-" || $i ~ /^[0-9]/ }
        END {
            for (row = 1; row <= NR; row++) {
                line = "|"
                for (i = 1; i <= fields; i++)
                    line = line sprintf(" %" (right[i] ? "" : "-") width[i] "s |", cell[row, i])
                print line
                if (row > 1) continue
                line = "|"
                for (i = 1; i <= fields; i++) {
                    rule = sprintf("%" width[i] "s", ""); gsub(/ /, "-", rule)
                    line = line " " (right[i] ? substr(rule, 2) ":" : rule) " |"
                }
                print line
            }
        }'
}

# ---- Lifeboat ----

# Makes a repository and a state folder, and speaks of them from now on.
new_repository() {
    local name=$1
    shift
    export LIFEBOAT_REPO=$place/$name LIFEBOAT_STATE=$place/$name-state
    mkdir -p "$LIFEBOAT_STATE"
    echo "$LIFEBOAT_REPO" >"$LIFEBOAT_STATE/bench-repository"
    "$lifeboat" init "$@" >/dev/null
}

# start_export STATE ARGUMENTS...: sets pid and uri, and how long it took until the export was served. Listens on a Unix
# socket, or where `listen` says.
start_export() {
    local state=$1 log began
    shift
    mkdir -p "$state"
    log=$(mktemp "$place/export.XXXXXX")
    began=$(now)
    LIFEBOAT_STATE=$state "$lifeboat" export "$@" --listen "${listen:-unix:$sockets/$(basename "$log")}" >"$log" 2>&1 &
    pid=$!
    started+=("$pid")
    until grep -qE 'nbd(\+unix)?://' "$log"; do
        kill -0 "$pid" 2>/dev/null || { cat "$log" >&2; die "lifeboat export has failed"; }
        sleep 0.002
    done
    served_after=$(since "$began")
    uri=$(grep -oE 'nbd(\+unix)?://[^" ]*' "$log" | sed -n 1p)
}

memory_peak_mib() { awk '/^VmHWM/ { print $2 / 1024 }' "/proc/$1/status"; }
