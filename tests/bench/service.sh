# The service over many recovery points: 100,000 of 500 machines (BENCH_POINTS, BENCH_MACHINES; BENCH_MANY names a
# repository of that kind that is there already), and a policy for each machine. How long lists, plans and the scheduler
# take, and how it stands 200 clients at once. Sourced by bench.sh.

POINTS=${BENCH_POINTS:-100000}
MACHINES=${BENCH_MACHINES:-500}
CLIENTS=200

measure_service() {
    local made repo state=$place/many-state token pid n address
    have curl || { skip 'service: curl is missing'; return 0; }
    made=$(mktemp -d /dev/shm/lb-bench.XXXXXX)
    repo=${BENCH_MANY:-$made/repo}
    if ! make_many "$repo"; then
        rm -rf "$made"
        skip 'service: its repository could not be made'
        return 0
    fi
    {
        printf '[listen]\naddress = "127.0.0.1:0"\ninsecure-http = true\n'
        for ((n = 0; n < MACHINES; n++)); do
            printf '[policies.p%03d]\nschedule = "%d 3 * * *"\njitter = "1h"\n[policies.p%03d.retention]\nkeep-last = 3\nkeep-daily = 14\n' "$n" $((n % 60)) "$n"
            printf '[policies.p%03d.machines.vm-%03d]\nsources = ["/nowhere"]\n' "$n" "$n"
        done
    } >"$place/many.toml"
    local begun
    begun=$(now)
    env -u LIFEBOAT_PASSPHRASE "$lifeboat" --repo "$repo" --state "$state" serve --config "$place/many.toml" >"$place/many.url" 2>"$place/many.log" &
    pid=$!
    started+=("$pid")
    until address=$(sed -n 1p "$place/many.url") && [ -n "$address" ]; do
        kill -0 "$pid" 2>/dev/null || { skip 'service: it does not start'; return 0; }
        sleep 0.05
    done
    until [ -S "$state/lifeboat.sock" ]; do sleep 0.05; done
    local socket=$state/lifeboat.sock first
    # The first list of all reads every point.
    first=$(ask "$socket" "/api/v1/points?limit=1")
    result service.first "$(calculate "$first + $(since "$begun")")"
    sleep 3 # what was changed just now may be changed once more without a trace, so it is looked at again each time
    for ((n = 0; n < rounds + 4; n++)); do
        result service.machine "$(millis "$(ask "$socket" '/api/v1/points?machine=vm-250')")"
        result service.page "$(millis "$(ask "$socket" '/api/v1/points?limit=1000')")"
        result service.all "$(millis "$(ask "$socket" '/api/v1/points')")"
        result service.plan "$(millis "$(ask "$socket" /api/v1/prune '{"machines":["vm-250"],"rules":{"last":3,"daily":14},"dry_run":true}')")"
        result service.scheduler "$(millis "$(ask "$socket" /api/v1/schedules)")"
        result service.metrics "$(millis "$(ask "$socket" /metrics)")"
    done
    # After a change the names of all points are looked at again.
    head -c 65536 /dev/zero | tr '\0' x >"$place/small.raw"
    for ((n = 0; n < rounds; n++)); do
        env -u LIFEBOAT_PASSPHRASE "$lifeboat" --repo "$repo" --state "$state" backup one "$place/small.raw" >/dev/null
        result service.changed "$(millis "$(ask "$socket" '/api/v1/points?machine=one')")"
    done
    sleep 3
    token=$(env -u LIFEBOAT_PASSPHRASE "$lifeboat" --repo "$repo" --state "$state" token create bench --role viewer 2>/dev/null)
    local config=$place/many.curl begin
    for ((n = 0; n < CLIENTS * 10; n++)); do
        printf 'url = "%s/api/v1/points?machine=vm-%03d"\noutput = "/dev/null"\n' "$address" $((n % MACHINES))
    done >"$config"
    begin=$(now)
    curl --no-progress-meter --parallel --parallel-immediate --parallel-max "$CLIENTS" --header "Authorization: Bearer $token" \
        --write-out '%{http_code} %{time_total}\n' --config "$config" >"$place/many.codes" || true
    result service.clients "$(calculate "$CLIENTS * 10 / $(since "$begin")")"
    result service.refused "$(calculate "$CLIENTS * 10 - $(grep -c '^200 ' "$place/many.codes")" '%d')"
    result service.slowest "$(millis "$(awk '{ print $2 }' "$place/many.codes" | sort -n | sed -n "$((CLIENTS * 99 / 10))p")")"
    stop "$pid"
    rm -rf "$made" "$state"
}

# A repository of many points. Each is synced: in memory that takes minutes, elsewhere hours, so it lies there.
make_many() {
    local target=${CARGO_TARGET_DIR:-$here/../target}
    if [ -n "${BENCH_MANY:-}" ]; then return; fi
    (cd "$here/.." && cargo build --quiet --release --package blockstore --example points) || return 1
    say "service: making $POINTS points of $MACHINES machines"
    "$target/release/examples/points" "$1" "$MACHINES" "$POINTS" 2>/dev/null
}

# Asks the service, and prints how many seconds that took.
ask() {
    local socket=$1 path=$2 body=${3:-}
    curl --silent --show-error --fail --unix-socket "$socket" ${body:+--header 'content-type: application/json' --data "$body"} \
        --output /dev/null --write-out '%{time_total}' "http://l$path"
}

millis() { calculate "$1 * 1000" '%.2f'; }
result() { printf '%s %s\n' "$1" "$2" >>"$place/results"; }

report_service() {
    grep -q '^service\.' "$place/results" || return 0
    local what
    printf '\n## The service: %s recovery points of %s machines, a policy for each\n\n' "$POINTS" "$MACHINES"
    {
        printf 'what\tms\n'
        for what in 'points of one machine (200):machine' 'a page of 1,000 points:page' 'all points, about 40 MB of JSON:all' \
            'the plan of a prune of one machine:plan' 'the scheduler looks at all policies:scheduler' \
            'metrics:metrics' 'the first list after a backup:changed' '99 in 100 of 200 clients at once:slowest'; do
            printf '%s\t%s\n' "${what%:*}" "$(figure "$(median "service.${what##*:}")")"
        done
    } | table
    printf '\n%s requests a second from %s clients at once, %s of %s not answered with 200; from the start to the first list %s s.\n' \
        "$(figure "$(median service.clients)")" "$CLIENTS" "$(median service.refused)" $((CLIENTS * 10)) "$(figure "$(median service.first)")"
    promise "list of a machine among $POINTS points" '< 100 ms' smaller 1 service.machine 100 ' ms'
    promise 'a page of 1,000 of them' '< 100 ms' smaller 1 service.page 100 ' ms'
    promise 'plan of a prune of a machine' '< 100 ms' smaller 1 service.plan 100 ' ms'
    promise "scheduler over $MACHINES policies" '< 100 ms' smaller 1 service.scheduler 100 ' ms'
    promise "$CLIENTS clients at once: requests that failed" 'none' smaller 0 service.refused 1
}
