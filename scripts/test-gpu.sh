#!/usr/bin/env bash
# test-gpu.sh [--no-bench]: the tests of device memory on this machine's own driver and GPU, then `kvxfer bench --gpu`.
#
# Everywhere else these tests run under a stand-in driver (crates/kvxfer-cuda-standin); here the same ones meet the real one. With
# compute-sanitizer on the PATH one run goes under it. What was skipped is said at the end. Exit code 3: no driver or no device.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! ldconfig -p 2>/dev/null | grep -q 'libcuda\.so\.1' && [ ! -e /usr/lib/wsl/lib/libcuda.so.1 ]; then
  echo "test-gpu: SKIPPED, all of it: libcuda.so.1 is not there, so this machine has no NVIDIA driver" >&2
  exit 3
fi
if command -v nvidia-smi >/dev/null 2>&1 && ! nvidia-smi -L | grep -q GPU; then
  echo "test-gpu: SKIPPED, all of it: nvidia-smi lists no GPU" >&2
  exit 3
fi

features=$(scripts/features.sh)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export KVXFER_TEST_GPU=1
run() { # run NAME COMMAND...
  echo "== $1"
  shift
  "$@" 2>&1 | tee -a "$log"
}
# shellcheck disable=SC2086
run "memory, fences, transfers, processes" cargo test $features -p kvxfer-core --test cuda -- --nocapture
# shellcheck disable=SC2086
run "the gather kernels" cargo test $features -p kvxfer-core --test gather -- --nocapture
# shellcheck disable=SC2086
run "the Contract on cuda_ipc, and on tcp between devices" cargo test $features --test contract -- --nocapture cuda_ipc:: _devices:: _device::
# shellcheck disable=SC2086
run "the C++ wrapper" cargo test $features --test c_abi -- --nocapture wrappers::device
if command -v compute-sanitizer >/dev/null 2>&1; then
  # shellcheck disable=SC2086
  test=$(cargo test $features -p kvxfer-core --test gather --no-run --message-format=json 2>/dev/null |
    sed -nE 's/.*"executable":"([^"]*gather[^"]*)".*/\1/p' | tail -n1)
  run "the gather kernels under compute-sanitizer" compute-sanitizer --leak-check full --error-exitcode 1 --target-processes all "$test" --test-threads=1
else
  echo "SKIPPED: compute-sanitizer is not on the PATH" | tee -a "$log"
fi
if [ "${1:-}" != --no-bench ]; then
  # shellcheck disable=SC2086
  cargo build --release -p kvxfer-cli $features
  mkdir -p build
  run "the benchmark" target/release/kvxfer bench --gpu --no-progress --json build/bench-gpu.json
  target/release/kvxfer doctor --secs 0 | sed -n '/^GPUs/,/^$/p'
fi
echo "== skipped"
grep -h "SKIPPED" "$log" | sort | uniq -c || echo "nothing"
