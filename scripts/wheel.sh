#!/usr/bin/env bash
# wheel.sh [OUTDIR]: builds the release wheel into OUTDIR (dist), gives it the manylinux tag that its contents allow, lets
# auditwheel confirm that tag, and tries the wheel in a fresh environment. Prints tag and size.
#
# The tag is the oldest glibc that has every symbol which library and command use; building on an older distribution lowers it.
# maturin would look at the library alone, so the tag comes from auditwheel, which looks at all files. Nothing is grafted in: what
# the wheel needs beyond libraries that every such distribution has is an error here.
#
# Read from the environment: PYTHON, KVXFER_NO_NIXL, MATURIN_PEP517_ARGS (default --profile=release).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
out=${1:-dist}
build=$root/build/wheel
venv=$build/venv
python=${PYTHON:-python3}
mkdir -p "$build" "$out"
out=$(realpath "$out")

packages=("maturin>=1.9,<2" "cffi>=1.16" "auditwheel>=6" wheel)
if [ "$(cat "$venv/.complete" 2>/dev/null)" != "${packages[*]}" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "${packages[@]}"
  echo "${packages[*]}" >"$venv/.complete"
fi
export PATH=$venv/bin:$PATH

rm -rf "$build/wheels"
python -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir "$build/wheels" ./ffi/python
made=$(echo "$build"/wheels/kvxfer-*.whl)

# The highest policy that the wheel is consistent with; "linux_…" when there is none.
policy() { auditwheel show --json "$1" | python -c 'import json, sys; print(json.load(sys.stdin)["overall_tag"])'; }
tag=$(policy "$made")
case $tag in
  manylinux_*) ;;
  *)
    auditwheel show "$made" >&2
    echo "wheel: no manylinux tag fits (\"$tag\"): see above what it needs from outside" >&2
    exit 1
    ;;
esac
name=$(cd "$build/wheels" && python -m wheel tags --remove --platform-tag "$tag" "$(basename "$made")" | tail -1)
wheel=$build/wheels/$name
[ "$(policy "$wheel")" = "$tag" ] || { echo "wheel: auditwheel does not agree that $name is $tag" >&2; exit 1; }

auditwheel show "$wheel"
PYTHON=$venv/bin/python scripts/check-wheel.sh "$wheel"
mv "$wheel" "$out/"
echo "wheel: $out/$name: tag py3-none-$tag, $(stat -c %s "$out/$name") bytes"
