#!/usr/bin/env bash
# fuzz.sh [SECONDS]: every decoder under libFuzzer, SECONDS each (default 60). Needs `cargo install cargo-fuzz` and a nightly toolchain.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo-fuzz >/dev/null 2>&1 || { echo "fuzz: cargo-fuzz is missing; cargo install cargo-fuzz" >&2; exit 3; }
for target in $(cd fuzz && cargo +nightly fuzz list); do
  echo "== $target"
  (cd fuzz && cargo +nightly fuzz run "$target" -- -max_total_time="${1:-60}" -rss_limit_mb=2048)
done
