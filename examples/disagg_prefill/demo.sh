#!/usr/bin/env bash
# demo.sh: the XpYd guide in one command, without a GPU: two prefillers, a decoder and the proxy with the embedded engine, a few
# streamed prompts, their answers beside those of a single instance, then the transfer of a large cache over each transport.
# What needs building is built. Logs land in build/demo. Exit code 0: all of it held.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=$PWD
command -v python3 >/dev/null || { echo "demo: python3 is needed for the client (Debian: apt-get install python3)" >&2; exit 1; }
mkdir -p build/demo
export LOGS=$root/build/demo ENGINE_BINARY=${KVXFER_ENGINE:-$root/target/release/kvxfer-engine}
bash examples/disagg_prefill/xp1d/disagg_example_xp1d.sh --engine embedded --logs build/demo \
  --run 'python3 -u examples/disagg_prefill/demo.py' "$@"
echo
echo "The same path with the cache of a large model:"
"${KVXFER:-$root/target/release/kvxfer}" demo
