#!/usr/bin/env bash
# Builds everything, runs every test, and fuzzes each target for a moment (ten minutes under LIFEBOAT_NIGHTLY); arguments
# go to the test programs. The last line is the sum over all of them.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

target=${CARGO_TARGET_DIR:-$PWD/target}
mkdir -p "$target"
log=$(mktemp "$target/tests.XXXXXX")
trap 'rm -f "$log"' EXIT

export LIFEBOAT_GUESTS=${LIFEBOAT_GUESTS:-$target/guests}
# Guests run under emulation: where /dev/kvm exists it may still be unable to run one. The programs under test are
# built by the same selection as the tests, so nothing is compiled twice.
export LIFEBOAT_ACCEL=${LIFEBOAT_ACCEL:-tcg}
cargo build --workspace --all-targets || exit 1
# A test that hangs must not keep the others' results: after an hour what ran is summed up, as a failure.
if [ -n "${LIFEBOAT_NIGHTLY:-}" ]; then hour=0; else hour=3600; fi
timeout --kill-after=10 "$hour" cargo test --workspace --no-fail-fast -- "$@" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
if [ -n "${LIFEBOAT_NIGHTLY:-}" ]; then seconds=600; else seconds=1; fi
FUZZ_SECONDS=${FUZZ_SECONDS:-$seconds} tests/fuzz/run.sh 2>&1 | tee -a "$log"
fuzzed=${PIPESTATUS[0]}
if [ "$status" -eq 0 ]; then status=$fuzzed; fi

awk '
    /^test result: / { for (i = 2; i <= NF; i++) {
        if ($i == "passed;") passed += $(i - 1)
        if ($i == "failed;") failed += $(i - 1)
        if ($i == "ignored;") skipped += $(i - 1) } }
    /^skipped: / { skipped++; passed-- } # such a test returned early, and counted itself as passed
    END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped }' "$log"
exit "$status"
