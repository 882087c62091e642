#!/usr/bin/env bash
# demo-vllm.sh [--sync|--async] [--keep] [--skip-bench] [--reps N]: a real vLLM prefiller hands a real cache to a real decoder
# through kvxfer, on a CPU. Installs what is missing (once, 3 minutes, 3.2 GB in ~/.cache/kvxfer-e2e or KVXFER_E2E_HOME),
# builds the wheel and installs it there, and runs examples/vllm_cpu/demo.py, whose exit status tells whether all of it held.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
home=${KVXFER_E2E_HOME:-$HOME/.cache/kvxfer-e2e}
pip() { "$home/venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

"$root/examples/vllm_cpu/install.sh"

echo "demo-vllm: building the wheel (release) and installing it beside vLLM"
"$home/venv/bin/python" -c 'import maturin' 2>/dev/null || pip install "maturin>=1.9,<2" "cffi>=1.16"
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
PATH=$home/venv/bin:$PATH MATURIN_PEP517_ARGS="--profile=release $(scripts/features.sh)" pip wheel --no-deps --no-build-isolation \
  --wheel-dir "$wheels" ./ffi/python
pip install --no-deps --force-reinstall "$wheels"/kvxfer-*.whl

# Not exec: the folder above is removed at the end. The demo ends its servers itself, on Ctrl-C and SIGTERM too.
"$home/venv/bin/python" "$root/examples/vllm_cpu/demo.py" "$@"
