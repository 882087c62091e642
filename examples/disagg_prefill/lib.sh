# shellcheck shell=bash
# lib.sh: what the examples of this folder share. Sourced by them, not run.
#
# An example names how many prefillers and decoders it wants and calls `run_example`; `disagg_vllm_launcher.sh` beside it calls
# `serve_instance`, which becomes one server. Everything that is started runs in a session of its own, is watched, and is ended
# with the example, whatever ends it.

guide_model=meta-llama/Llama-3.1-8B-Instruct
# The example's own folder.
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
e2e_home=${KVXFER_E2E_HOME:-$HOME/.cache/kvxfer-e2e}

# Names and process ids of what runs, in the order in which it was started.
names=()
pids=()

say() { printf '%s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

usage() {
  cat <<EOF
usage: bash $(basename "$0") [options]

Starts $prefillers prefiller(s), $decoders decoder(s) and the proxy; Ctrl-C stops everything.

  --engine vllm|vllm-cpu|embedded   vllm: as in LMCache's guides, on GPUs (default)
                                    vllm-cpu: the same stack with a tiny random model, without a GPU
                                    embedded: the Rust engine of this repository; nothing to install
  --model NAME|FOLDER               model [$guide_model]
  --prefillers N, --decoders N      how many [$prefillers, $decoders]
  --host HOST                       where all of them listen [localhost]
  --port N                          proxy [9000]
  --prefiller-port N                first prefiller, the next ones follow [8100]
  --decoder-port N                  first decoder, the next ones follow [8200]
  --init-port N, --alloc-port N     first decoder's transfer ports [7300, 7400]
  --notify-port N                   the proxy's notification socket [7500]
  --logs FOLDER                     prefiller1.log, decoder.log, proxy.log [.]
  --timeout SECONDS                 longest wait until all of it serves [900]
  --run COMMAND                     run it once all of it serves, then stop and return its status
  --check                           only check what is needed
  -h, --help                        this
EOF
}

# run_example PREFILLERS DECODERS "$@": the whole life of an example.
run_example() {
  prefillers=$1 decoders=$2
  shift 2
  engine=vllm model=$guide_model host=localhost port=9000 prefiller_port=8100 decoder_port=8200
  init_port=7300 alloc_port=7400 notify_port=7500 logs=. timeout=900 command='' check_only=
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage; exit 0 ;;
      --check) check_only=1; shift; continue ;;
      --engine | --model | --prefillers | --decoders | --host | --port | --prefiller-port | --decoder-port | --init-port | \
        --alloc-port | --notify-port | --logs | --timeout | --run) ;;
      *) fail "unknown option $1; see --help" ;;
    esac
    [ $# -ge 2 ] || fail "$1 needs a value; see --help"
    case $1 in
      --engine) engine=$2 ;;
      --model) model=$2 ;;
      --host) host=$2 ;;
      --logs) logs=$2 ;;
      --run) command=$2 ;;
      *)
        [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || fail "$1 $2: a number from 1 on is needed"
        case $1 in
          --prefillers) prefillers=$2 ;;
          --decoders) decoders=$2 ;;
          --port) port=$2 ;;
          --prefiller-port) prefiller_port=$2 ;;
          --decoder-port) decoder_port=$2 ;;
          --init-port) init_port=$2 ;;
          --alloc-port) alloc_port=$2 ;;
          --notify-port) notify_port=$2 ;;
          --timeout) timeout=$2 ;;
        esac
        ;;
    esac
    shift 2
  done
  case $engine in
    vllm | vllm-cpu | embedded) ;;
    *) fail "--engine $engine: vllm, vllm-cpu and embedded are known" ;;
  esac

  check_all
  [ -z "$check_only" ] || { say "everything that --engine $engine needs is here"; exit 0; }
  mkdir -p "$logs"
  logs=$(cd "$logs" && pwd)
  export ENGINE=$engine HOST=$host PREFILLERS=$prefillers DECODERS=$decoders PREFILLER_PORT=$prefiller_port \
    DECODER_PORT=$decoder_port INIT_PORT=$init_port ALLOC_PORT=$alloc_port NOTIFY_PORT=$notify_port
  build
  RUN_DIR=$(mktemp -d)
  export RUN_DIR
  trap stop_all EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP

  local i
  for ((i = 1; i <= decoders; i++)); do
    start "$(decoder_name "$i")" bash "$here/disagg_vllm_launcher.sh" "decoder$i" "$model"
  done
  # One after the other: models that load at the same time fight for memory and disk.
  for ((i = 1; i <= prefillers; i++)); do
    pause "$(stagger)"
    start "prefiller$i" bash "$here/disagg_vllm_launcher.sh" "prefiller$i" "$model"
  done
  start proxy "$kvxfer" proxy --host "$host" --port "$port" \
    --prefiller-host "$host" --prefiller-port "$(ports "$prefiller_port" "$prefillers")" --num-prefillers "$prefillers" \
    --decoder-host "$host" --decoder-port "$(ports "$decoder_port" "$decoders")" \
    --decoder-init-port "$(ports "$init_port" "$decoders")" --decoder-alloc-port "$(ports "$alloc_port" "$decoders")" \
    --num-decoders "$decoders" --proxy-host "$host" --proxy-port "$notify_port"

  say "waiting until all of it serves; logs in $logs"
  local deadline=$((SECONDS + timeout))
  for ((i = 1; i <= decoders; i++)); do wait_healthy "$(decoder_name "$i")" $((decoder_port + i - 1)) $deadline; done
  for ((i = 1; i <= prefillers; i++)); do wait_healthy "prefiller$i" $((prefiller_port + i - 1)) $deadline; done
  wait_healthy proxy "$port" $deadline

  say "all servers are up: http://$host:$port (statistics: /stats, a page to look at: /dashboard)"
  if [ -n "$command" ]; then
    local status=0
    # In the background, so that a signal is heard at once.
    URL=http://$host:$port PORT=$port MODEL=$model bash -c "$command" &
    wait $! || status=$?
    exit $status
  fi
  say "try it:  curl http://$host:$port/v1/completions -H 'Content-Type: application/json' \\"
  say "           -d '{\"model\": \"$model\", \"prompt\": \"Tell me a story\", \"max_tokens\": 100}'"
  say "Ctrl-C stops all servers"
  while true; do
    watch_all
    pause 1
  done
}

# serve_instance NAME [MODEL]: becomes the server called prefiller1, prefiller2, ..., decoder (= decoder1), decoder2, ...
serve_instance() {
  [ $# -ge 1 ] || fail "usage: $(basename "$0") prefiller1|prefiller2|...|decoder|decoder2|... [MODEL]"
  local model=${2:-$guide_model} engine=${ENGINE:-vllm} host=${HOST:-localhost} role number
  role=${1%%[0-9]*} number=${1##*[!0-9]}
  number=${number:-1}
  [[ $role =~ ^(prefiller|decoder)$ && $number -ge 1 ]] || fail "$1 is neither a prefiller nor a decoder"
  local i=$((number - 1)) run_dir=${RUN_DIR:-$(mktemp -d)}
  local first=${PREFILLER_PORT:-8100} rpc=producer$number kv_role=kv_producer gpu=$i extra=''
  if [ "$role" = decoder ]; then
    # After the prefillers' GPUs.
    first=${DECODER_PORT:-8200} rpc=consumer$number kv_role=kv_consumer gpu=$((${PREFILLERS:-1} + i))
    # The last token is computed by the decoder in any case.
    extra=', "skip_last_n_tokens": 1'
  fi
  local port=$((first + i))

  if [ "$engine" = embedded ]; then
    find_binaries
    local args=(--host "$host" --port "$port" --served-model-name "$model")
    [ ! -d "$model" ] || args+=(--model "$model")
    if [ "$role" = decoder ]; then
      args+=(--role decode --kv-host "$host" --kv-port $((${INIT_PORT:-7300} + i)))
    else
      args+=(--role prefill --proxy-host "$host" --proxy-port "${NOTIFY_PORT:-7500}")
    fi
    # shellcheck disable=SC2086 # words on purpose
    exec "$kvxfer_engine" "${args[@]}" ${ENGINE_ARGS:-}
  fi

  local config=$run_dir/lmcache-$role$number.yaml
  sed -E -e "s/^(pd_peer_init_port:).*/\\1 $((${INIT_PORT:-7300} + i))/" \
    -e "s/^(pd_peer_alloc_port:).*/\\1 $((${ALLOC_PORT:-7400} + i))/" -e "s/^(pd_proxy_port:).*/\\1 ${NOTIFY_PORT:-7500}/" \
    -e "s/^(pd_(peer|proxy)_host:).*/\\1 \"$host\"/" "$here/configs/lmcache-$role-config.yaml" >"$config"
  local served=$model
  local args=(--host "$host" --port "$port" --enforce-eager)
  export LMCACHE_CONFIG_FILE=$config VLLM_ENABLE_V1_MULTIPROCESSING=1 VLLM_WORKER_MULTIPROC_METHOD=spawn
  # LMCache's keys contain Python hashes: equal on all instances, or nothing is ever found.
  export PYTHONHASHSEED=${PYTHONHASHSEED:-0}
  if [ "$engine" = vllm-cpu ]; then
    local cpus
    mapfile -t cpus < <(taskset -cp $$ | sed 's/.*: //' | tr , '\n' | awk -F- '{ for (i = $1; i <= ($2 == "" ? $1 : $2); i++) print i }')
    sed -i -e 's/"cuda"/"cpu"/' -e 's/^pd_buffer_size:.*/pd_buffer_size: 268435456/' "$config"
    rpc=$rpc-$port served=$e2e_home/model
    [ ! -d "$model" ] || served=$model
    # bfloat16 sums depend on how a prefill is cut, and LMCache's async mode wants a prompt in one step on a CPU.
    args+=(--served-model-name "$model" --max-model-len 8192 --max-num-batched-tokens 8192 --max-num-seqs 4
      --no-enable-prefix-caching)
    PATH=$e2e_home/venv/bin:$PATH
    export PATH VLLM_CPU_OMP_THREADS_BIND=${cpus[$((gpu % ${#cpus[@]}))]} VLLM_CPU_KVCACHE_SPACE=1
    export VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo UCX_NET_DEVICES=${UCX_NET_DEVICES:-lo} HF_HUB_OFFLINE=1
    export LMCACHE_TRACK_USAGE=false VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
  else
    export UCX_TLS=${UCX_TLS:-cuda_ipc,cuda_copy,tcp} CUDA_VISIBLE_DEVICES=$gpu
    # The guides' option; later releases do not log requests by default and no longer know it.
    ! vllm_knows disable-log-requests || args+=(--disable-log-requests)
  fi
  # shellcheck disable=SC2086 # words on purpose
  exec vllm serve "$served" "${args[@]}" --kv-transfer-config \
    "{\"kv_connector\": \"LMCacheConnectorV1\", \"kv_role\": \"$kv_role\", \"kv_connector_extra_config\": {\"discard_partial_chunks\": false, \"lmcache_rpc_port\": \"$rpc\"$extra}}" \
    ${ENGINE_ARGS:-}
}

# ---- what is needed

check_all() {
  local missing=0 p
  for tool in curl setsid ps; do
    need "command -v $tool" "$tool is missing; Debian: apt-get install curl util-linux procps"
  done
  for p in $(all_ports); do
    need "! listening $p" "port $p is in use; stop what listens there (ss -ltnp 'sport = :$p') or choose others (--help)"
  done
  case $engine in
    vllm) check_vllm ;;
    vllm-cpu) check_vllm_cpu ;;
  esac
  need 'find_binaries quietly || command -v cargo' \
    "neither cargo nor a built kvxfer; install Rust (https://rustup.rs) or set KVXFER to the command's path"
  [ "$missing" = 0 ] || exit 1
}

check_vllm() {
  local gpus=0 wanted=$((prefillers + decoders))
  if command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true); fi
  need "[ $gpus -ge $wanted ]" \
    "$wanted GPUs are needed, one for each instance, and $gpus found; without GPUs use --engine embedded or --engine vllm-cpu"
  if [ ! -d "$model" ]; then
    # shellcheck disable=SC2016 # expanded by need
    need '[[ ${HF_TOKEN:-} == hf_?* ]]' \
      "HF_TOKEN is not set or does not start with hf_; export HF_TOKEN=hf_your_token_here, with access to $model"
  fi
  need 'command -v vllm' "vllm is missing; pip install vllm"
  need 'command -v python3' "python3 is missing"
  local package
  for package in lmcache kvxfer; do
    need "python_has $package" "the Python package $package is missing; pip install $package"
  done
  if grep -q '^transfer_channel: *"\?nixl' "$here"/configs/*.yaml; then
    need 'python_has nixl' "the Python package nixl is missing; pip install nixl"
  fi
}

check_vllm_cpu() {
  need "[ -f '$e2e_home/venv/.complete' ] && [ -f '$e2e_home/model/model.safetensors' ]" \
    "vLLM's CPU stack is not in $e2e_home; run $root/examples/vllm_cpu/install.sh (3 minutes, 3.2 GB, once)"
  need "'$e2e_home/venv/bin/python' -c 'import kvxfer'" \
    "kvxfer is not installed beside vLLM; make demo-vllm does it, or: $e2e_home/venv/bin/pip install $root/ffi/python"
}

# need TEST ADVICE: all advice at once is better than one piece per attempt.
need() {
  if ! eval "$1" >/dev/null 2>&1; then
    printf 'needed: %s\n' "$2" >&2
    missing=1
  fi
}

python_has() { python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }

vllm_knows() {
  local file
  file=$(python3 -c 'import importlib.util; print(importlib.util.find_spec("vllm").submodule_search_locations[0])' 2>/dev/null)
  grep -qs -- "--$1\|${1//-/_}" "$file/engine/arg_utils.py"
}

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

all_ports() {
  local i
  echo "$port" "$notify_port"
  for ((i = 0; i < prefillers; i++)); do echo $((prefiller_port + i)); done
  for ((i = 0; i < decoders; i++)); do echo $((decoder_port + i)) $((init_port + i)) $((alloc_port + i)); done
}

# ---- the programs of this repository

# Sets `kvxfer` and `kvxfer_engine`, from KVXFER and KVXFER_ENGINE or from the release build.
find_binaries() {
  kvxfer=${KVXFER:-$root/target/release/kvxfer}
  kvxfer_engine=${KVXFER_ENGINE:-$root/target/release/kvxfer-engine}
  [ -x "$kvxfer" ] && { [ "${ENGINE:-$engine}" != embedded ] || [ -x "$kvxfer_engine" ]; }
}

build() {
  local packages=()
  [ -n "${KVXFER:-}" ] || packages+=(-p kvxfer-cli)
  [ "$engine" != embedded ] || [ -n "${KVXFER_ENGINE:-}" ] || packages+=(-p kvxfer-engine)
  if [ ${#packages[@]} -gt 0 ] && command -v cargo >/dev/null; then
    say "building (release; minutes the first time)"
    local features
    features=$("$root/scripts/features.sh" || true)
    # The optional parts belong to the command; the engine is built without them.
    case " ${packages[*]} " in *kvxfer-cli*) ;; *) features='' ;; esac
    # shellcheck disable=SC2086 # words on purpose
    (cd "$root" && cargo build --release --quiet "${packages[@]}" $features) || fail "the build failed"
  fi
  find_binaries || fail "cannot execute $kvxfer${kvxfer_engine:+ or $kvxfer_engine}"
}

# ---- processes

decoder_name() { if [ "$decoders" = 1 ]; then echo decoder; else echo "decoder$1"; fi; }
stagger() { case $engine in vllm) echo 10 ;; vllm-cpu) echo 5 ;; *) echo 0.2 ;; esac; }
# A comma-separated list of COUNT ports from FIRST on.
ports() { seq -s , "$1" $(($1 + $2 - 1)); }

# A sleep that a signal ends.
pause() {
  sleep "$1" &
  wait $!
}

# start NAME COMMAND...: in a session of its own, with NAME.log.
start() {
  local name=$1
  shift
  setsid "$@" </dev/null >"$logs/$name.log" 2>&1 &
  names+=("$name")
  pids+=($!)
  say "started $name (pid $!, $logs/$name.log)"
}

# Fails when anything that was started has ended.
watch_all() {
  local i
  for i in "${!pids[@]}"; do
    if ! kill -0 "${pids[$i]}" 2>/dev/null; then
      printf '%s has ended; the end of its log, %s:\n' "${names[$i]}" "$logs/${names[$i]}.log" >&2
      tail -n 20 "$logs/${names[$i]}.log" | cut -c -300 | sed 's/^/  | /' >&2
      exit 1
    fi
  done
}

# wait_healthy NAME PORT DEADLINE
wait_healthy() {
  until curl --silent --fail --output /dev/null --max-time 5 --noproxy '*' "http://$host:$2/health"; do
    watch_all
    [ "$SECONDS" -lt "$3" ] || fail "$1 does not answer on port $2 after $timeout s; see $logs/$1.log"
    pause 0.3
  done
  say "$1 serves on port $2"
}

# What is left of the started sessions.
remaining() {
  local sessions
  sessions=$(IFS=,; echo "${pids[*]}")
  [ -z "$sessions" ] || ps -o pid= --sid "$sessions" 2>/dev/null || true
}

# The proxy first, so that nobody is sent to a server that is stopping; then everybody; what does not listen is killed.
stop_all() {
  local status=$? i left
  trap - EXIT
  trap '' INT TERM HUP
  [ ${#pids[@]} -eq 0 ] || say "stopping all servers"
  for ((i = ${#pids[@]} - 1; i >= 0; i--)); do kill -TERM -- "-${pids[$i]}" 2>/dev/null || true; done
  for ((i = 0; i < 100; i++)); do
    left=$(remaining)
    [ -n "$left" ] || break
    sleep 0.1
  done
  # shellcheck disable=SC2086 # a list of process ids
  [ -z "$left" ] || kill -KILL $left 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$RUN_DIR"
  exit $status
}
