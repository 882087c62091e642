#!/usr/bin/env bash
# disagg_vllm_launcher.sh prefiller1|prefiller2|...|decoder|decoder2|... [MODEL]: one server of this example, in the foreground.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../lib.sh
. "$(dirname "$0")/../lib.sh"
serve_instance "$@"
