#!/usr/bin/env bash
# Stands before rustc for the crates of this workspace (RUSTC_WORKSPACE_WRAPPER): compiles them so that libFuzzer sees
# which paths an input takes. These are options of LLVM's pass, which any rustc has.
rustc=$1
shift
exec "$rustc" "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
