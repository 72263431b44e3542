#!/usr/bin/env bash
# Measures what the project promises, beside other tools, on the same data and machine in one run, and prints tables
# with the promise, the ratio and whether it held. A ratio counts, an absolute figure does not: machines differ.
#
#   BENCH_PARTS     of `store nbd open boot rehydrate files trace scale service` (all but the last three)      BENCH_ROUNDS   repetitions, of which the median counts (3)
#   BENCH_SIZE      of the image made of /usr (3G)      BENCH_SECONDS  for each run of fio (3)
#   BENCH_OVER      of `unix tcp` (both): how servers of NBD are reached
#   BENCH_NBD       of the tests of `nbd` (all): `cold-32 rewrite-32-fsync`, say
#   BENCH_SHORT=1   one round, runs of one second: whether all of it works, and a first look
#   BENCH_COLD=1    drop the page cache before each step of `store`; as root, and it slows everyone on the machine
#
# Images are kept in target/bench, everything else is removed at the end. The tables also go to target/bench/report.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lifeboat=$(readlink -f "${LIFEBOAT_BIN:?the program to measure}")
guests=${LIFEBOAT_GUESTS:?the folder of the test guests}
parts=${BENCH_PARTS:-store nbd open boot rehydrate files}
transports=${BENCH_OVER:-unix tcp}
short=${BENCH_SHORT:-}
rounds=${BENCH_ROUNDS:-${short:+1}}
rounds=${rounds:-3}
seconds=${BENCH_SECONDS:-${short:+1}}
seconds=${seconds:-3}
size=$(numfmt --from=iec "${BENCH_SIZE:-3G}")
kept=${CARGO_TARGET_DIR:-$here/../target}/bench
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

for file in common data store nbd open boot rehydrate files trace scale service; do
    # shellcheck source=/dev/null # they stand beside this file
    . "$here/bench/$file.sh"
done

main() {
    local part
    for part in $parts; do
        [[ " store nbd open boot rehydrate files trace scale service " == *" $part "* ]] || die "BENCH_PARTS names '$part': use store, nbd, open, boot, rehydrate, files, trace, scale, service"
    done
    set_up
    trap clean_up EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    for part in $parts; do "measure_$part"; done
    report | tee "$kept/report.md"
}

report() {
    local part
    printf '# Promises, measured\n\n'
    printf '%s, %d CPUs (%s), %s GiB of memory, load %s when it began; lifeboat %s; %s rounds, medians.\n' \
        "$(date -u +'%F %H:%M UTC')" "$(nproc)" "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | sed -n 1p)" \
        "$(awk '/^MemTotal/ { printf "%.0f", $2 / 1048576 }' /proc/meminfo)" "$load" \
        "$("$lifeboat" --version | cut -d' ' -f2)" "$rounds"
    for part in $parts; do "report_$part"; done
    printf '\n## Promises\n\n'
    { printf 'what\tpromise\tmeasured\tthe peer\tratio\tverdict\n'; cat "$place/promises"; } | table
    if [ -s "$place/skipped" ]; then
        printf '\nSkipped:\n\n'
        sed 's/^/- /' "$place/skipped"
    fi
}

main
