# Serving over NBD: fio's nbd engine on one connection over a Unix socket, or TCP on loopback where a server's name says
# so, against Lifeboat and other servers of the same image. Rounds are interleaved, so that a busy moment of the machine
# falls on all. Sourced by bench.sh.

readonly WARM=$((256 * 1024 * 1024)) # less than the chunk cache of 512 MiB

# The tests of a group, and the options of fio for each.
fio_options() {
    case $1 in
        randread-1) echo '--rw=randread --bs=4k --iodepth=1' ;;
        randread-32 | cold-32) echo '--rw=randread --bs=4k --iodepth=32' ;;
        cold-1) echo '--rw=randread --bs=4k --iodepth=1' ;;
        seqread-8 | coldseq-8) echo '--rw=read --bs=256k --iodepth=8' ;;
        randwrite-1) echo '--rw=randwrite --bs=4k --iodepth=1' ;;
        mixed-32) echo '--rw=randrw --rwmixread=70 --bs=4k --iodepth=32' ;;
        randwrite-32 | rewrite-32) echo '--rw=randwrite --bs=4k --iodepth=32' ;;
        randwrite-32-fsync | rewrite-32-fsync) echo "--read_iolog=$place/iolog --replay_no_stall=1 --bs=4k --iodepth=32" ;;
    esac
}

test_title() {
    case $1 in
        randread-1) echo 'warm 4 KiB random read, QD 1' ;;
        randread-32) echo 'warm 4 KiB random read, QD 32' ;;
        seqread-8) echo 'warm 256 KiB sequential read, QD 8' ;;
        randwrite-1) echo '4 KiB random write, QD 1' ;;
        mixed-32) echo '4 KiB random, 70 % reads, 30 % writes, QD 32' ;;
        randwrite-32) echo '4 KiB random write, QD 32' ;;
        randwrite-32-fsync) echo '4 KiB random write, QD 32, fsync every 32' ;;
        rewrite-32) echo '4 KiB random rewrite, QD 32' ;;
        rewrite-32-fsync) echo '4 KiB random rewrite, QD 32, fsync every 32' ;;
        cold-1) echo 'cold 4 KiB random read, QD 1' ;;
        cold-32) echo 'cold 4 KiB random read, QD 32' ;;
        coldseq-8) echo 'cold 256 KiB sequential read, QD 8' ;;
    esac
}

# A port of loopback that is free now. Below those that are handed out for connections.
free_port() {
    local port
    while port=$((20000 + RANDOM % 10000)); do
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "$port"; return; fi
    done
}

# start_lifeboat [VARIABLE=VALUE...]: an export in an environment of its own. LIFEBOAT_PASSPHRASE= leaves it out.
start_lifeboat() {
    local LIFEBOAT_REPO=$LIFEBOAT_REPO LIFEBOAT_PASSPHRASE=$LIFEBOAT_PASSPHRASE LIFEBOAT_CACHE=${LIFEBOAT_CACHE:-}
    if [ $# -gt 0 ]; then local "$@"; fi
    export LIFEBOAT_REPO LIFEBOAT_PASSPHRASE LIFEBOAT_CACHE
    [ -n "$LIFEBOAT_PASSPHRASE" ] || unset LIFEBOAT_PASSPHRASE
    [ -n "$LIFEBOAT_CACHE" ] || unset LIFEBOAT_CACHE
    start_export "$place/nbd-state.$RANDOM$RANDOM" vm
}

# wanted TEST...: those of them that are to be measured.
wanted() {
    local test
    for test in "$@"; do
        if [[ " ${BENCH_NBD:-$test} " == *" $test "* ]]; then echo "$test"; fi
    done
}

# over_each NAME...: sets servers to these, once for each of the transports.
over_each() {
    local name
    servers=()
    for name in "$@"; do
        if [[ " $transports " == *' unix '* ]]; then servers+=("$name"); fi
        if [[ " $transports " == *' tcp '* ]]; then servers+=("$name, TCP"); fi
    done
}

# Starts a server of its own: sets pid and uri, or fails where this machine cannot run it.
start_server() {
    local name=${1%, TCP} socket=$sockets/nbd.$RANDOM$RANDOM port tries listen= qemu nbdkit
    if [ "$name" = "$1" ]; then
        uri="nbd+unix:///?socket=$socket"
        qemu=(qemu-nbd -t -e 8 -k "$socket")
        nbdkit=(nbdkit -f -U "$socket")
    else
        port=$(free_port)
        uri="nbd://127.0.0.1:$port"
        listen=tcp:127.0.0.1:$port
        qemu=(qemu-nbd -t -e 8 -b 127.0.0.1 -p "$port")
        nbdkit=(nbdkit -f -i 127.0.0.1 -p "$port")
    fi
    case $name in
        lifeboat) start_lifeboat; return ;;
        'lifeboat, not encrypted') start_lifeboat "LIFEBOAT_REPO=$place/nbd-plain" LIFEBOAT_PASSPHRASE=; return ;;
        'lifeboat, cache off') start_lifeboat LIFEBOAT_CACHE=0; return ;;
        'nbdkit file') "${nbdkit[@]}" file "$image" & ;;
        'nbdkit null') "${nbdkit[@]}" null "$size" & ;;
        'nbdkit cow') "${nbdkit[@]}" --filter=cow file "$image" & ;;
        'qemu-nbd raw, threads') "${qemu[@]}" -f raw -r --aio=threads "$image" & ;;
        'qemu-nbd raw, io_uring') "${qemu[@]}" -f raw -r --aio=io_uring "$image" & ;;
        'qemu-nbd qcow2 overlay')
            rm -f "$place/overlay.qcow2"
            qemu-img create -q -f qcow2 -b "$image" -F raw "$place/overlay.qcow2"
            "${qemu[@]}" -f qcow2 "$place/overlay.qcow2" & ;;
        'qemu-nbd zstd qcow2') "${qemu[@]}" -f qcow2 -r "$compressed" & ;;
    esac 2>>"$place/servers.log"
    pid=$!
    started+=("$pid")
    for tries in $(seq 200); do
        if nbdinfo --size "$uri" >/dev/null 2>&1; then return 0; fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.02
    done
    skip "$1: it does not serve here ($(tail -n 1 "$place/servers.log"))"
    return 1
}

# Hundredths of a second of processor time that a process has used.
processor_ticks() { awk '{ sub(/^.*\) /, ""); print $12 + $13 }' "/proc/$1/stat"; }

# Random writes with a sync after every 32, as a log for fio to replay: the option of fio 3.33 sends more syncs the
# longer one takes, which is another load for each server.
write_iolog() {
    awk -v seed="$1" -v from="$2" -v bytes="$3" -v count="$((60000 * seconds))" '
        BEGIN { srand(seed); blocks = bytes / 4096
                print "fio version 2 iolog\ndisk add\ndisk open"
                for (i = 1; i <= count; i++) {
                    printf "disk write %.0f 4096\n", from + int(rand() * blocks) * 4096
                    if (i % 32 == 0) print "disk sync 0 0"
                }
                print "disk close" }' >"$place/iolog"
}

# run_fio KEY PID URI TEST SEED FROM LENGTH
run_fio() {
    local key=$1 server=$2 at=$3 test=$4 seed=$5 before after side=read total range=()
    if [[ $test == *-fsync ]]; then
        write_iolog "$seed" "$6" "$7"
    else
        range=(--offset="$6" --size="$7" --norandommap --randseed="$seed" --time_based)
    fi
    before=$(processor_ticks "$server")
    # shellcheck disable=SC2046 # a list of options
    if ! fio --name=bench --ioengine=nbd --uri="$at" --output-format=json --output="$place/fio.json" \
        --runtime="$seconds" $(fio_options "$test") "${range[@]}" >"$place/fio.log" 2>&1; then
        skip "$key: fio failed: $(tail -n 1 "$place/fio.log")"
        return 0
    fi
    after=$(processor_ticks "$server")
    [[ $test != *write* ]] || side=write
    # Of mixed ones the rate is that of both sides, the latency that of reads.
    total=$(jq '.jobs[0] | .read.total_ios + .write.total_ios' "$place/fio.json")
    note "$key.iops" "$(jq '.jobs[0] | .read.iops + .write.iops' "$place/fio.json")"
    note "$key.rate" "$(jq '.jobs[0] | (.read.bw_bytes + .write.bw_bytes) / 1e6' "$place/fio.json")"
    note "$key.p50" "$(jq ".jobs[0].$side.clat_ns.percentile[\"50.000000\"] / 1000" "$place/fio.json")"
    note "$key.p99" "$(jq ".jobs[0].$side.clat_ns.percentile[\"99.000000\"] / 1000" "$place/fio.json")"
    note "$key.p999" "$(jq ".jobs[0].$side.clat_ns.percentile[\"99.900000\"] / 1000" "$place/fio.json")"
    note "$key.processor" "$(calculate "($after - $before) / $(getconf CLK_TCK) * 1e6 / ($total ? $total : 1)")"
}

# The same servers, one after another, over and over; they keep running, and idle servers cost nothing.
measure_warm_reads() {
    local round name test seed=0 names=() servers
    local -A pids uris
    over_each lifeboat 'lifeboat, not encrypted' 'nbdkit file' 'nbdkit null' 'qemu-nbd raw, threads' \
        'qemu-nbd raw, io_uring'
    for name in "${servers[@]}"; do
        start_server "$name" || continue
        names+=("$name"); pids[$name]=$pid; uris[$name]=$uri
        # Twice, so that a cache that wants to see something again before it keeps it has seen it again.
        fio --name=warm --ioengine=nbd --uri="$uri" --rw=read --bs=256k --iodepth=8 --offset="$warm_from" \
            --size="$WARM" --loops=2 >/dev/null
    done
    for test in $(wanted randread-1 randread-32 seqread-8); do
        for round in $(seq "$rounds"); do
            say "nbd: $(test_title "$test"), round $round of $rounds"
            seed=$((seed + 1))
            for name in "${names[@]}"; do
                run_fio "$test.${name// /_}" "${pids[$name]}" "${uris[$name]}" "$test" "$seed" \
                    "$warm_from" "$WARM"
            done
        done
    done
    for name in "${names[@]}"; do stop "${pids[$name]}"; done
}

# A server of its own for each run: what one has written, or read, does not help or hinder the next. What is to be
# rewritten is written before.
measure_fresh() {
    local test=$1 from=$2 length=$3 round name servers
    shift 3
    over_each "$@"
    for round in $(seq "$rounds"); do
        say "nbd: $(test_title "$test"), round $round of $rounds"
        for name in "${servers[@]}"; do
            start_server "$name" || continue
            if [[ $test == rewrite-* ]]; then
                fio --name=fill --ioengine=nbd --uri="$uri" --rw=write --bs=256k --iodepth=8 --offset="$from" \
                    --size="$length" --end_fsync=1 >/dev/null
            fi
            run_fio "$test.${name// /_}" "$pid" "$uri" "$test" "$round" "$from" "$length"
            stop "$pid"
            rm -f "$place/overlay.qcow2" # what is not on the disk yet need not go there
        done
    done
}

measure_nbd() {
    local test from length warm_from
    make_images
    make_compressed
    cat "$image" "$compressed" >/dev/null
    if ! have nbdkit; then skip 'nbdkit: it is not installed'; fi
    new_repository nbd
    say "nbd: backing the image up"
    "$lifeboat" backup vm "disk0=$image" >/dev/null
    (
        unset LIFEBOAT_PASSPHRASE
        new_repository nbd-plain --no-encryption
        "$lifeboat" backup vm "disk0=$image" >/dev/null
    )
    # Where the image has data, past the first tables of inodes.
    warm_from=$((size / 4 / BLOCK * BLOCK))
    if [ -n "$(wanted randread-1 randread-32 seqread-8)" ]; then measure_warm_reads; fi
    # Most of the image, so that a fresh overlay has to find room for nearly every write.
    from=$((size / 20 / BLOCK * BLOCK))
    length=$((size / 4 * 3))
    export LIFEBOAT_CACHE=16M # next to nothing: every read fetches, decrypts and decompresses
    for test in $(wanted cold-1 cold-32 coldseq-8); do
        measure_fresh "$test" "$from" "$length" lifeboat 'lifeboat, not encrypted' 'lifeboat, cache off' 'qemu-nbd zstd qcow2'
    done
    unset LIFEBOAT_CACHE
    for test in $(wanted randwrite-1 randwrite-32 randwrite-32-fsync mixed-32); do
        measure_fresh "$test" "$from" "$length" lifeboat 'lifeboat, not encrypted' 'nbdkit cow' 'qemu-nbd qcow2 overlay'
    done
    for test in $(wanted rewrite-32 rewrite-32-fsync); do
        measure_fresh "$test" "$warm_from" "$WARM" lifeboat 'nbdkit cow' 'qemu-nbd qcow2 overlay'
    done
}

report_nbd() {
    local test name key rate ours servers
    over_each lifeboat 'lifeboat, not encrypted' 'lifeboat, cache off' 'nbdkit file' 'nbdkit null' 'nbdkit cow' \
        'qemu-nbd raw, threads' 'qemu-nbd raw, io_uring' 'qemu-nbd qcow2 overlay' 'qemu-nbd zstd qcow2'
    printf '\n## NBD: fio, one connection, %s s a run\n\n' "$seconds"
    {
        printf 'test\tserver\tIOPS\tMB/s\tp50 us\tp99 us\tp99.9 us\tserver CPU us/op\tLifeboat is faster by\n'
        for test in randread-1 randread-32 seqread-8 cold-1 cold-32 coldseq-8 randwrite-1 randwrite-32 \
            randwrite-32-fsync mixed-32 rewrite-32 rewrite-32-fsync; do
            rate=iops
            if [[ $test == *seq* ]]; then rate=rate; fi
            for name in "${servers[@]}"; do
                key=$test.${name// /_}
                [ -n "$(median "$key.$rate")" ] || continue
                ours=$(median "$test.lifeboat$([[ $name != *', TCP' ]] || echo ,_TCP).$rate")
                printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$(test_title "$test")" "$name" \
                    "$(shown "$key.iops" %.0f)" "$(shown "$key.rate" %.0f)" "$(shown "$key.p50" %.0f)" \
                    "$(shown "$key.p99" %.0f)" "$(shown "$key.p999" %.0f)" "$(shown "$key.processor" %.1f)" \
                    "$([[ $name = lifeboat* ]] || [ -z "$ours" ] || calculate "$ours / $(median "$key.$rate")" %.2fx)"
            done
        done
    } | table
    printf '\nWrites go to a fresh overlay, rewrites to where it has been written before. nbdkit cow answers a flush without\n'
    printf 'making anything durable: what it is asked to keep is lost with it.\n'
    promise 'warm 4 KiB random read, QD 32, beside nbdkit file' '>= 1.0x' faster 1 randread-32.lifeboat.iops randread-32.nbdkit_file.iops
    promise 'warm 4 KiB random read, QD 32, beside nbdkit null' '>= 0.9x' faster 0.9 randread-32.lifeboat.iops randread-32.nbdkit_null.iops
    promise 'warm 256 KiB sequential read, beside nbdkit file' '>= 1.0x' faster 1 seqread-8.lifeboat.rate seqread-8.nbdkit_file.rate ' MB/s'
    promise 'cold 4 KiB random read, QD 32, beside zstd qcow2' '>= 2x' faster 2 cold-32.lifeboat.iops cold-32.qemu-nbd_zstd_qcow2.iops
    for test in randwrite-32 randwrite-32-fsync rewrite-32 rewrite-32-fsync; do
        promise "$(test_title "$test"), beside qcow2 overlay" '>= 3x' faster 3 "$test.lifeboat.iops" "$test.qemu-nbd_qcow2_overlay.iops"
        promise "$(test_title "$test"), beside nbdkit cow" '>= 2x' faster 2 "$test.lifeboat.iops" "$test.nbdkit_cow.iops"
    done
}
