# The store: backup, rescan and restore beside restic and borg. Sourced by bench.sh.

store_tools() {
    local tool
    echo lifeboat
    for tool in restic borg; do
        if have "$tool"; then echo "$tool"; else skip "$tool: it is not installed"; fi
    done
}

# Makes the tool's repository anew.
store_begin() {
    local repository=$place/store-$1
    rm -rf "$repository" "$repository-state"
    case $1 in
        lifeboat) new_repository store-lifeboat ;;
        restic)
            export RESTIC_REPOSITORY=$repository RESTIC_PASSWORD=$LIFEBOAT_PASSPHRASE RESTIC_CACHE_DIR=$repository-state
            restic -q init ;;
        borg)
            export BORG_REPO=$repository BORG_PASSPHRASE=$LIFEBOAT_PASSPHRASE BORG_BASE_DIR=$repository-state
            # Its fastest encryption differs with the processor.
            if grep -qw sha_ni /proc/cpuinfo; then borg init -e repokey; else borg init -e repokey-blake2; fi ;;
    esac >/dev/null 2>&1
}

# store_backup TOOL NAME FILE: sets `command`. Everybody reads the whole file: none may trust times of change.
store_backup() {
    case $1 in
        lifeboat) command=("$lifeboat" backup vm "disk0=$3") ;;
        restic) command=(restic -q backup --force --host bench "$3") ;;
        borg) command=(borg create --chunker-params fixed,$BLOCK --files-cache disabled "::$2" "$3") ;;
    esac
}

# store_restore TOOL NAME FOLDER: sets `command`, which ends when the image is durable.
store_restore() {
    local durable='target=$1; shift; "$@" && find "$target" -type f -exec sync {} +'
    case $1 in
        lifeboat) command=("$lifeboat" restore vm --to "$3/disk0.raw") ;;
        restic) command=(restic -q restore latest --target "$3") ;;
        borg) command=(env -C "$3" borg extract --sparse "::$2") ;;
    esac
    command=(bash -c "$durable" durable "$3" "${command[@]}")
}

# store_verify TOOL: sets `command`, which reads and checks all that is stored.
store_verify() {
    case $1 in
        lifeboat) command=("$lifeboat" verify --read-data) ;;
        restic) command=(restic -q check --read-data --no-cache) ;;
        borg) command=(borg check --verify-data) ;;
    esac
}

# store_collect TOOL: sets `command`, which forgets all but the last backup and frees what only they needed.
store_collect() {
    case $1 in
        lifeboat) command=(sh -c '"$1" prune --keep-last 1 && "$1" collect --reclaim-now' collect "$lifeboat") ;;
        restic) command=(restic -q forget --keep-last 1 --prune) ;;
        borg) command=(sh -c 'borg prune --keep-last 1 && borg compact') ;;
    esac
}

# Runs `command` and notes its seconds, its processor seconds and its peak memory.
timed() {
    local elapsed memory user system
    if [ "${BENCH_COLD:-}" = 1 ]; then
        sync
        as_root sh -c 'echo 3 >/proc/sys/vm/drop_caches' || skip 'cold page cache: only root can drop it'
    fi
    if ! /usr/bin/time -q -o "$place/time" -f '%e %M %U %S' "${command[@]}" >"$place/output" 2>&1; then
        tail -n 5 "$place/output" >&2
        skip "$1: ${command[0]} failed"
        return 0
    fi
    read -r elapsed memory user system <"$place/time"
    note "$1.seconds" "$elapsed"
    note "$1.memory" "$(calculate "$memory / 1024")"
    note "$1.processor" "$(calculate "$user + $system")"
}

measure_store() {
    local round tool restored tools
    make_images
    tools=$(store_tools)
    cat "$image" "$changed" >/dev/null
    for round in $(seq "$rounds"); do
        for tool in $tools; do
            say "store, round $round of $rounds: $tool"
            store_begin "$tool"
            store_backup "$tool" first "$image"; timed "first.$tool"
            note "size.$tool" "$(calculate "$(du -s -B1 "$place/store-$tool" | cut -f1) / 1e6")"
            store_backup "$tool" second "$image"; timed "rescan.$tool"
            store_backup "$tool" third "$changed"; timed "changed.$tool"
            # Whatever a tool left in the page cache or kept out of it: what follows begins with all of it there.
            find "$place/store-$tool" -type f -exec cat {} + >/dev/null
            store_verify "$tool"; timed "verify.$tool"
            mkdir "$place/restored"
            store_restore "$tool" third "$place/restored"; timed "restore.$tool"
            restored=$(find "$place/restored" -type f -size +1M | sed -n 1p)
            cmp -s "$restored" "$changed" || skip "restore by $tool: what it restored is not what was backed up"
            rm -rf "$place/restored"
            store_collect "$tool"; timed "collect.$tool"
            rm -rf "$place/store-$tool" "$place/store-$tool-state"
        done
    done
}

report_store() {
    local tool step ratio
    printf '\n## Store: %s of ext4 full of /usr, encrypted, all by the same page cache%s\n\n' \
        "$(numfmt --to=iec "$size")" "$([ "${BENCH_COLD:-}" = 1 ] && echo ', dropped before each step' || echo ', warm')"
    {
        printf 'step\ttool\tseconds\tprocessor seconds\tpeak memory MiB\tLifeboat is faster by\n'
        for step in first rescan changed verify restore collect; do
            for tool in lifeboat restic borg; do
                [ -n "$(median "$step.$tool.seconds")" ] || continue
                ratio=$(calculate "$(median "$step.$tool.seconds") / $(median "$step.lifeboat.seconds")" %.2fx)
                printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$(store_step "$step")" "$tool" "$(shown "$step.$tool.seconds" %.2f)" \
                    "$(shown "$step.$tool.processor" %.2f)" "$(shown "$step.$tool.memory" %.0f)" \
                    "$([ "$tool" = lifeboat ] || echo "$ratio")"
            done
        done
    } | table
    printf '\nSize after the first backup, MB:'
    for tool in lifeboat restic borg; do printf ' %s %s;' "$tool" "$(shown "size.$tool" %.0f)"; done
    printf '\n'
    promise 'first backup, beside restic' '>= 2.5x' shorter 2.5 first.lifeboat.seconds first.restic.seconds ' s'
    promise 'first backup, beside borg' '>= 2x' shorter 2 first.lifeboat.seconds first.borg.seconds ' s'
    promise 'size of the store, beside restic' 'no larger' smaller 1 size.lifeboat size.restic ' MB'
    promise 'size of the store, beside borg' 'no larger' smaller 1 size.lifeboat size.borg ' MB'
    promise 'unchanged rescan, beside restic' '>= 4x' shorter 4 rescan.lifeboat.seconds rescan.restic.seconds ' s'
    promise 'full restore to raw, beside restic' '>= 3x' shorter 3 restore.lifeboat.seconds restore.restic.seconds ' s'
}

store_step() {
    case $1 in
        first) echo 'first backup' ;;
        rescan) echo 'unchanged rescan' ;;
        changed) echo "rescan, $CHANGED_PERCENT % changed" ;;
        verify) echo 'verify all data' ;;
        restore) echo 'full restore' ;;
        collect) echo 'forget all but the last, free' ;;
    esac
}
