#!/usr/bin/env bash
# test-python.sh [PYTEST ARGUMENTS]: builds the wheel (dev profile, cargo's usual target folder), looks at it in a fresh
# environment (check-wheel.sh), checks the types (mypy), installs it into a virtual environment in build/, and runs
# ffi/python/tests against the installed wheel.
#
# The tests of the LMCache channel need the real LMCache. They run with the installation of `make demo-vllm`
# (KVXFER_E2E_HOME, default ~/.cache/kvxfer-e2e) where that exists; otherwise they say SKIPPED.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
build=$root/build/python
venv=$build/venv
python=${PYTHON:-python3}
mkdir -p "$build"

packages=("maturin>=1.9,<2" "cffi>=1.16" "pytest>=8" numpy "mypy>=1.11")
if [ "$(cat "$venv/.complete" 2>/dev/null)" != "${packages[*]}" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "${packages[@]}"
  echo "${packages[*]}" >"$venv/.complete"
fi

echo "test-python: building the wheel"
rm -rf "$build/wheels"
features=$(scripts/features.sh 2>/dev/null)
PATH=$venv/bin:$PATH MATURIN_PEP517_ARGS="--profile=dev $features" "$venv/bin/python" -m pip --disable-pip-version-check wheel \
  --quiet --no-deps --no-build-isolation --wheel-dir "$build/wheels" ./ffi/python
wheel=$(echo "$build"/wheels/kvxfer-*.whl)
PYTHON=$venv/bin/python scripts/check-wheel.sh "$wheel"
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall "$wheel"

echo "test-python: the types"
(cd ffi/python && "$venv/bin/python" -m mypy --cache-dir "$build/mypy")

# From a folder of its own, so that the installed package is tested and not the source beside the tests.
mkdir -p "$build/run"
cd "$build/run"
# Device memory is tried under a CUDA driver over host memory.
export KVXFER_CUDA_STANDIN
KVXFER_CUDA_STANDIN=$(cd "$root" && cargo run --quiet --package kvxfer-cuda-standin --bin cuda-standin)
echo "test-python: $("$venv/bin/python" --version), $(basename "$wheel")"
"$venv/bin/python" -m pytest -c "$root/ffi/python/pyproject.toml" -p no:cacheprovider "$root/ffi/python/tests" "$@"

e2e=${KVXFER_E2E_HOME:-$HOME/.cache/kvxfer-e2e}/venv
if [ -f "$e2e/.complete" ]; then
  echo "test-python: the LMCache channel against $("$e2e/bin/python" -c 'from importlib.metadata import version; print("LMCache", version("lmcache"))')"
  "$e2e/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target "$build/e2e" "$wheel"
  PYTHONPATH=$build/e2e LMCACHE_TRACK_USAGE=false PYTHONHASHSEED=0 \
    "$e2e/bin/python" -m pytest -c "$root/ffi/python/pyproject.toml" -p no:cacheprovider "$root/ffi/python/tests/with_lmcache" "$@" || [ $? -eq 5 ] # 5: none of the tests asked for is here
else
  echo "SKIPPED: tests of the LMCache channel: no LMCache in $e2e; \`make demo-vllm\` or examples/vllm_cpu/install.sh brings it"
fi
