#!/usr/bin/env bash
# install-nvrtc.sh [--force]: puts NVIDIA's run-time compiler (NVRTC) into kvxfer's cache folder.
#
# Downloads the wheel nvidia-cuda-nvrtc-cu12 from PyPI with pip and unpacks it to ${XDG_CACHE_HOME:-~/.cache}/kvxfer/nvrtc. The tests
# compile the GPU kernels with it and compare with the PTX that ships; no GPU is needed. With KVXFER_NVRTC=1 kvxfer compiles
# the kernels for the device at hand. Done already: says so and does nothing. Exit code 3: it could not be had here (no Python, pip or
# network, no wheel for this machine); everything else of kvxfer works without it.
set -euo pipefail

version=12.8.93
force=0
case "${1:-}" in
  "") ;;
  --force) force=1 ;;
  *) echo "install-nvrtc: unknown argument $1; usage: install-nvrtc.sh [--force]" >&2; exit 2 ;;
esac

give_up() {
  echo "install-nvrtc: $1" >&2
  exit 3
}

dir="${XDG_CACHE_HOME:-$HOME/.cache}/kvxfer/nvrtc"
library=nvidia/cuda_nvrtc/lib/libnvrtc.so.12
if [ "$force" = 0 ] && [ -f "$dir/$library" ] && [ "$(cat "$dir/version" 2>/dev/null)" = "$version" ]; then
  echo "install-nvrtc: NVRTC $version is there already: $dir/$library"
  exit 0
fi

command -v python3 >/dev/null 2>&1 || give_up "python3 is missing (Debian: python3, python3-pip)"
python3 -m pip --version >/dev/null 2>&1 || give_up "pip is missing (Debian: python3-pip; or python3 -m ensurepip)"

mkdir -p "$(dirname "$dir")"
# Beside the target, so that putting it in place is a rename.
tmp="$(mktemp -d "$dir.XXXXXX")"
trap 'rm -rf "$tmp"' EXIT
if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --platform "manylinux2010_$(uname -m)" --platform "manylinux2014_$(uname -m)" --platform "manylinux_2_17_$(uname -m)" \
  --timeout 30 --retries 2 --dest "$tmp" "nvidia-cuda-nvrtc-cu12==$version" >"$tmp/pip.log" 2>&1; then
  give_up "pip could not download nvidia-cuda-nvrtc-cu12 $version for $(uname -m): $(grep -m1 "^ERROR" "$tmp/pip.log" || tail -n1 "$tmp/pip.log")"
fi
python3 -m zipfile -e "$tmp"/*.whl "$tmp/unpacked"
[ -f "$tmp/unpacked/$library" ] || give_up "the wheel holds no $library"
echo "$version" >"$tmp/unpacked/version"
rm -rf "$dir"
mv "$tmp/unpacked" "$dir"
echo "install-nvrtc: NVRTC $version: $dir/$library"
