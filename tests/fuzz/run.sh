#!/usr/bin/env bash
# Fuzzes the given targets, or all, for FUZZ_SECONDS each (600). A finding is a panic, an overflow, an input that takes
# more than 20 s, or memory beyond the limit; its input is kept, and the way to repeat it is printed. The last line counts
# targets as `cargo test` counts tests.
#
# No cargo-fuzz and no nightly compiler is needed: this workspace's crates are compiled once more with LLVM's coverage,
# the others are those of the ordinary build. A corpus grows in the target folder from one run to the next; what is worth
# keeping for ever goes to tests/fuzz/corpus/TARGET/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

target=${CARGO_TARGET_DIR:-$PWD/target}
work=$target/fuzz
seconds=${FUZZ_SECONDS:-600}

RUSTC_WORKSPACE_WRAPPER=$PWD/tests/fuzz/instrument.sh \
    cargo build --quiet --package lifeboat-fuzz --features libfuzzer --bin fuzz || exit 1
# What is built next replaces it.
mkdir -p "$work" && cp "$target/debug/fuzz" "$work/fuzz" || exit 1

targets=("$@")
if [ $# -eq 0 ]; then mapfile -t targets < <(sed -n 's/^    Target { name: "\([a-z0-9-]*\)".*/\1/p' tests/fuzz/src/lib.rs); fi

# One allocation by an unchecked length has to fail, not to succeed because nobody touches it.
ulimit -v $((3 << 20))
export MALLOC_ARENA_MAX=2
trap '' PIPE # as Rust's own main does

passed=0 failed=0
for name in "${targets[@]}"; do
    mkdir -p "$work/corpus/$name" "$work/findings"
    kept=()
    if [ -d "tests/fuzz/corpus/$name" ]; then kept=("tests/fuzz/corpus/$name"); fi
    log=$work/$name.log
    if LIFEBOAT_FUZZ_TARGET=$name LIFEBOAT_FUZZ_SEEDS=$work/seeds/$name \
        "$work/fuzz" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=1024 -max_len=65536 -print_final_stats=1 \
        -artifact_prefix="$work/findings/$name-" "$work/corpus/$name" "$work/seeds/$name" "${kept[@]}" >"$log" 2>&1
    then
        passed=$((passed + 1))
        awk -v name="$name" '/ cov: / { for (i = 2; i < NF; i++) if ($i == "cov:") cov = $(i + 1) }
            /number_of_executed_units/ { inputs = $2 }
            END { printf "fuzz %s ... ok (%d inputs, %d places reached)\n", name, inputs, cov }' "$log"
    else
        failed=$((failed + 1))
        tail -n 40 "$log"
        echo "fuzz $name ... FAILED; to repeat it: LIFEBOAT_FUZZ_TARGET=$name $work/fuzz $work/findings/$name-..."
    fi
done
if [ "$failed" -eq 0 ]; then verdict=ok; else verdict=FAILED; fi
echo "test result: $verdict. $passed passed; $failed failed; 0 ignored; 0 measured; 0 filtered out"
[ "$failed" -eq 0 ]
