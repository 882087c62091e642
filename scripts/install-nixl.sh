#!/usr/bin/env bash
# install-nixl.sh [--cuda 12|13] [--version X.Y.Z] [--force]: puts NIXL's run-time library into kvxfer's cache folder.
#
# Downloads the wheel nixl-cu13 (nixl-cu12) from PyPI with pip, without its dependencies, unpacks the library, the UCX
# plug-in and what they need to ${XDG_CACHE_HOME:-~/.cache}/kvxfer/nixl, and keeps it only if it loads and makes a UCX
# backend. kvxfer looks there by itself. Done already: says so and does nothing. Exit code 3: it could not be had here
# (no Python, pip or network, no wheel for this machine); everything else of kvxfer works without it.
set -euo pipefail

cuda=13
version=1.5.1
force=0
while [ $# -gt 0 ]; do
  case "$1" in
    --cuda) cuda="${2:-}"; shift 2 || { echo "install-nixl: --cuda wants 12 or 13" >&2; exit 2; } ;;
    --version) version="${2:-}"; shift 2 || { echo "install-nixl: --version wants a number" >&2; exit 2; } ;;
    --force) force=1; shift ;;
    *) echo "install-nixl: unknown argument $1; usage: install-nixl.sh [--cuda 12|13] [--version X.Y.Z] [--force]" >&2; exit 2 ;;
  esac
done
case "$cuda" in
  12 | 13) ;;
  *) echo "install-nixl: --cuda wants 12 or 13, not \"$cuda\"" >&2; exit 2 ;;
esac

give_up() {
  echo "install-nixl: $1" >&2
  exit 3
}

package="nixl_cu$cuda"
dir="${XDG_CACHE_HOME:-$HOME/.cache}/kvxfer/nixl"
capi=".$package.mesonpy.libs/libnixl_capi.so"

if [ "$force" = 0 ] && [ -f "$dir/$capi" ] && [ -d "$dir/$package-$version.dist-info" ]; then
  echo "install-nixl: NIXL $version (CUDA $cuda) is there already: $dir/$capi"
  exit 0
fi

command -v python3 >/dev/null 2>&1 || give_up "python3 is missing (Debian: python3, python3-pip)"
python3 -m pip --version >/dev/null 2>&1 || give_up "pip is missing (Debian: python3-pip; or python3 -m ensurepip)"

mkdir -p "$(dirname "$dir")"
# Beside the target, so that putting it in place is a rename.
tmp="$(mktemp -d "$dir.XXXXXX")"
trap 'rm -rf "$tmp"' EXIT

# The library is the same for every Python, so the wheel of one fixed version serves all.
if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation cp --python-version 3.12 --abi cp312 --platform "manylinux_2_28_$(uname -m)" \
  --timeout 30 --retries 2 --dest "$tmp" "nixl-cu$cuda==$version" >"$tmp/pip.log" 2>&1; then
  give_up "pip could not download nixl-cu$cuda $version for $(uname -m): $(grep -m1 "^ERROR" "$tmp/pip.log" || tail -n1 "$tmp/pip.log")"
fi

python3 - "$tmp" "$package" "$version" <<'PY'
import pathlib, sys, zipfile

tmp, package, version = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
wheel = next(tmp.glob("*.whl"))
libs, bundled, info = f".{package}.mesonpy.libs/", f"{package}.libs/", f"{package}-{version}.dist-info/"
# Clients of object stores and test programs: large, and nothing here loads them.
unwanted = ("libaws", "libazure", "libs2n", "libgusli", "libucx_perftest")

def wanted(name: str) -> bool:
    file = name.rsplit("/", 1)[-1]
    if name.startswith(libs + "plugins/"):
        return file == "libplugin_UCX.so"
    if name.startswith(bundled + "nixl/"):
        return False
    if name.startswith((libs, bundled)):
        return ".so" in file and not file.startswith(unwanted)
    return name == info + "METADATA" or name.startswith(info + "licenses/")

with zipfile.ZipFile(wheel) as archive:
    names = [name for name in archive.namelist() if wanted(name)]
    archive.extractall(tmp / "new", names)
PY

# Loaded and used as kvxfer will use it, in a process of its own.
if ! python3 - "$tmp/new/$capi" >"$tmp/check.log" 2>&1 <<'PY'; then
import ctypes, sys

capi = ctypes.CDLL(sys.argv[1])
agent, params, backend = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
for code in (
    capi.nixl_capi_create_agent(b"kvxfer-install", ctypes.byref(agent)),
    capi.nixl_capi_create_params(ctypes.byref(params)),
    capi.nixl_capi_create_backend(agent, b"UCX", params, ctypes.byref(backend)),
):
    if code:
        sys.exit(f"NIXL answered {code}")
PY
  give_up "NIXL $version was downloaded but does not work here: $(tail -n1 "$tmp/check.log")"
fi

old=""
if [ -e "$dir" ]; then
  old="$tmp/old"
  mv "$dir" "$old"
fi
mv "$tmp/new" "$dir"
echo "install-nixl: NIXL $version (CUDA $cuda) installed: $dir/$capi"
