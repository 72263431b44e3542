# Lifeboat: what can be done here. `make` alone lists it.
#
# One cargo profile (dev, as Cargo.toml has it) serves lint and tests; only the demonstration and the benchmarks build
# with release.

SHELL := /bin/bash
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
GUESTS := $(TARGET)/guests
CARGO_DENY_VERSION := 0.20
.DEFAULT_GOAL := help

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: build guests ## back up a real guest, boot it from its backup, move it back while it runs, show how long it took
	LIFEBOAT_BIN=$(TARGET)/release/lifeboat LIFEBOAT_GUESTS=$(GUESTS) tests/demo.sh

.PHONY: test
test: deps guests ## build everything and run every test
	tests/run.sh

.PHONY: lint
lint: deps ## format, clippy, licences and sources of dependencies, documentation: no warning is left
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@cargo deny --version 2>/dev/null || cargo install cargo-deny --locked --version '^$(CARGO_DENY_VERSION)'
	cargo deny check bans licenses sources
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps

.PHONY: audit
audit: deps ## look the dependencies up in the advisory database, which has to be reachable
	cargo deny check advisories

.PHONY: bench
bench: build guests ## measure the promises side by side with other tools
	LIFEBOAT_BIN=$(TARGET)/release/lifeboat LIFEBOAT_GUESTS=$(GUESTS) tests/bench.sh

.PHONY: nightly
nightly: deps guests ## every test, the long ones too, with more rounds, then ten minutes of fuzzing for each target
	LIFEBOAT_NIGHTLY=1 tests/run.sh --include-ignored

.PHONY: fuzz
fuzz: deps ## fuzz all that reads untrusted bytes, FUZZ_SECONDS (600) for each target
	tests/fuzz/run.sh

.PHONY: build
build: deps ## build target/release/lifeboat
	cargo build --release --package lifeboat

.PHONY: guests
guests: deps ## build the guests that tests and demonstration boot
	tests/guest/build.sh $(GUESTS)

.PHONY: deps
deps: ## install what all of this needs (Debian, Ubuntu)
	@tests/deps.sh

.PHONY: clean
clean: ## remove everything that was built, guests too
	cargo clean
	rm -rf $(GUESTS)
