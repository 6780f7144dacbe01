#!/usr/bin/env bash
# Both jobs on one machine: a reward server in the background, the actor in front, and one exit code.
#
#   ./launch.sh [TRAIN FLAGS]                          the toy, prepared on first use
#   ./launch.sh smollm2 [TRAIN FLAGS]                  SmolLM2-135M-Instruct against a served sentiment function
#   ./launch.sh run SERVER FLAGS -- TRAIN FLAGS        your own models, prompts and reward
#
# NPROC=2 trains on two processes. Needs bash 3.2 or newer.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
python=''
for candidate in ${VIRTUAL_ENV:+python} ${CONDA_PREFIX:+python} "$here/.venv/bin/python" python3; do
  if "$candidate" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
if [ -z "$python" ]; then
  echo "launch.sh: no PyTorch in the active environment, .venv or python3. First, in $here:" >&2
  echo "  python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && ./launch.sh" >&2
  exit 2
fi

mode=toy
case "${1:-}" in
  toy|smollm2|run) mode=$1; shift ;;
  -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$here/launch.sh"; exit 0 ;;
  -*|'') ;;
  *) echo "launch.sh: unknown recipe '$1'; there are toy, smollm2 and run" >&2; exit 2 ;;
esac

server_flags=(--exit-with-parent)
train_flags=()
case "$mode" in
  toy)
    data="$("$python" "$here/recipes/toy.py")" || exit $?
    server_flags+=(--reward-model "$data/reward_model")
    train_flags+=(--policy "$data/policy" --train-data "$data/train.jsonl" --val-data "$data/validation.jsonl") ;;
  smollm2)
    data="$("$python" "$here/recipes/smollm2.py")" || exit $?
    server_flags+=(--reward-fn "$here/recipes/smollm2.py:positivity")
    train_flags+=(--policy "$data/policy" --train-data "$data/train.jsonl" --val-data "$data/validation.jsonl"
      --num-rollout-samples 8 --num-rollouts-per-prompt 4 --max-new-tokens 32 --max-steps 24 --max-epochs 2
      --lr 2e-5 --initial-policy-kl-penalty 0.02 --val-check-interval 12 --micro-batch-size 16) ;;
  run)
    while [ $# -gt 0 ] && [ "$1" != -- ]; do server_flags+=("$1"); shift; done
    [ $# -eq 0 ] || shift ;;
esac

run="" previous=""
for word in "$@"; do
  case "$word" in --log-dir=*) run="${word#--log-dir=}" ;; esac
  if [ "$previous" = --log-dir ]; then run="$word"; fi
  previous="$word"
done
if [ -e "$run/metrics.jsonl" ]; then
  echo "launch.sh: --log-dir $run holds another run; give an empty or new folder" >&2
  exit 2
fi
if [ -z "$run" ]; then
  run="runs/$mode-$(date +%Y%m%d-%H%M%S)"
  [ ! -e "$run" ] || run="$run-$$"
  mkdir -p "$run"
  ln -sfn "$(basename "$run")" runs/latest
fi
mkdir -p "$run"
rm -f "$run/exit.json" "$run/server.ready"

server='' trainer=''
finish() {  # the trainer first, then the server that it talks to
  for pid in $trainer $server; do
    kill -TERM "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
}
trap finish EXIT
forward() { if [ -n "$trainer" ]; then kill "-$1" "$trainer" 2>/dev/null || true; else exit 75; fi; }
trap 'forward INT' INT
trap 'forward TERM' TERM
trap 'forward USR1' USR1

set -m  # process groups of their own: Ctrl-C comes here, and goes to the trainer alone
"$python" "$here/serve_rm.py" "${server_flags[@]}" --ready-file "$run/server.ready" \
  </dev/null >"$run/server.log" 2>&1 &
server=$!
set +m
while [ ! -s "$run/server.ready" ]; do
  if ! kill -0 "$server" 2>/dev/null; then
    code=0; wait "$server" || code=$?
    tail -n 5 "$run/server.log" >&2
    echo "launch.sh: the reward server ended with code $code; its log: $run/server.log" >&2
    exit "$((code ? code : 1))"
  fi
  sleep 0.1
done
read -r host port <"$run/server.ready"
echo "reward server: http://$host:$port, log: $run/server.log"

processes="${NPROC:-1}"
threads="$(($(getconf _NPROCESSORS_ONLN) / processes))"
set -m
OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}" "$python" -m torch.distributed.run --standalone \
  --nproc-per-node "$processes" --shutdown-timeout 600 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 "$here/train.py" \
  ${train_flags[@]+"${train_flags[@]}"} --rm-host "$host" --rm-port "$port" --rm-wait 600 --log-dir "$run" "$@" </dev/null &
trainer=$!
set +m
server_code=''
while kill -0 "$trainer" 2>/dev/null; do
  if [ -z "$server_code" ] && ! kill -0 "$server" 2>/dev/null; then
    server_code=0; wait "$server" || server_code=$?
    kill -TERM "$trainer" 2>/dev/null || true
  fi
  sleep 0.2
done
code=0; wait "$trainer" || code=$?
trainer=''
if [ -n "$server_code" ]; then
  tail -n 5 "$run/server.log" >&2
  echo "launch.sh: the reward server ended first, with code $server_code; its log: $run/server.log" >&2
  exit "$((server_code ? server_code : 75))"
fi
if [ -s "$run/exit.json" ]; then
  code="$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["code"])' "$run/exit.json")"
fi
if [ "$code" -ne 0 ]; then
  if [ -s "$run/exit.json" ]; then
    "$python" -c 'import json, sys; print("launch.sh:", json.load(open(sys.argv[1]))["reason"])' "$run/exit.json" >&2
  fi
  echo "launch.sh: exit code $code; logs: $run" >&2
  exit "$code"
fi
if [ "$mode" = toy ]; then
  "$python" "$here/recipes/toy.py" --judge "$run"
  echo "to see the reward model fooled, take the KL penalty away: ./launch.sh --initial-policy-kl-penalty 0"
fi
