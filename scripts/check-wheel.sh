#!/usr/bin/env bash
# check-wheel.sh WHEEL: installs a built wheel into a fresh virtual environment and uses what it brings: the `kvxfer` command on
# the PATH, the package with its library, hints and entry point. Then takes it out again and looks for leftovers.
#
# The one dependency, cffi, is fetched once into build/python/links; later runs need no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python3}
links=$root/build/python/links
wheel=$(realpath "${1:?usage: check-wheel.sh WHEEL}")
fail() { echo "check-wheel: $1" >&2; exit 1; }
same() { [ "$2" = "$3" ] || fail "$1: \"$2\", expected \"$3\""; }

compgen -G "$links/cffi-*.whl" >/dev/null || "$python" -m pip --disable-pip-version-check wheel --quiet --wheel-dir "$links" "cffi>=1.16"

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"$python" -m venv "$fresh/venv"
export PATH=$fresh/venv/bin:$PATH
unset PYTHONPATH
cd "$fresh"
before=$(find venv -type f -not -path '*/__pycache__/*' | sort)
python -m pip --disable-pip-version-check install --quiet --no-index --find-links "$links" "$wheel"

version=$(sed -nE 's/^version = "([^"]+)"/\1/p' "$root/Cargo.toml" | head -1)
same "the command on the PATH" "$(command -v kvxfer)" "$fresh/venv/bin/kvxfer"
same "kvxfer --version" "$(kvxfer --version)" "kvxfer $version"
same "kvxfer.__version__" "$(python -c 'import kvxfer; print(kvxfer.__version__)')" "$version"
same "version of the distribution" "$(python -c 'from importlib.metadata import version; print(version("kvxfer"))')" "$version"
case $(basename "$wheel") in
  "kvxfer-$version-py3-none-"*) ;;
  *) fail "$(basename "$wheel") is not a wheel of version $version for every Python 3" ;;
esac

for guide in "$root"/examples/disagg_prefill/1p1d/configs/*.yaml; do
  kvxfer config check "$guide" >config.txt || fail "kvxfer config check $guide: $(cat config.txt)"
  grep -q '^pd_role' config.txt || fail "kvxfer config check $guide does not explain pd_role: $(cat config.txt)"
done

# 0: this machine has what the doctor was told to require, the package of the same version beside it.
kvxfer doctor --secs 0 --require kvxfer-package,python --json >doctor.json || fail "kvxfer doctor: $(cat doctor.json)"

python - <<'PY'
import importlib.metadata
import pathlib

import kvxfer

installed = pathlib.Path(kvxfer.__file__).parent
for file in ("py.typed", "_native/lib_native.so", "_native/__init__.pyi"):
    assert (installed / file).is_file(), f"{file} is not in the wheel"
distribution = importlib.metadata.distribution("kvxfer")
names = [entry.value for entry in distribution.entry_points if entry.group == "vllm.general_plugins"]
assert names == ["kvxfer.lmcache.hook:register"], names
assert any(str(file).endswith("licenses/LICENSE") for file in distribution.files), "the licence is not in the wheel"
with kvxfer.Agent("receiver", listen="tcp://127.0.0.1:0") as receiver, kvxfer.Agent("sender") as sender:
    pages = receiver.allocate(1 << 16)
    pages.export("pages")
    source = sender.register(bytearray(b"cache" * 1000))
    peer = sender.connect(receiver.addresses[0])
    peer.write(source, peer.region("pages"), [(0, 4096, 5000)]).wait()
    assert bytes(pages.memory[4096:4101]) == b"cache"
PY

python -m pip --disable-pip-version-check uninstall --quiet --yes kvxfer
python -m pip --disable-pip-version-check uninstall --quiet --yes cffi pycparser
left=$(comm -13 <(echo "$before") <(find venv -type f -not -path '*/__pycache__/*' | sort))
[ -z "$left" ] || fail "left behind after uninstalling: $left"
echo "check-wheel: $(basename "$wheel"): kvxfer $version, command and package work"
