#!/usr/bin/env bash
# Both jobs on one machine: a reward server in the background, the actor in front, and one exit code.
#
#   ./launch.sh [TRAIN FLAGS]                          the toy, prepared on first use
#   ./launch.sh smollm2 [TRAIN FLAGS]                  SmolLM2-135M-Instruct against a served sentiment function
#   ./launch.sh run SERVER FLAGS -- TRAIN FLAGS        your own models, prompts and reward
#   ./launch.sh hh PAIRS [--size S] [--base MODEL] [TRAIN FLAGS]   HH-RLHF: SFT, reward model, REINFORCE, evaluation, all from
#                                                      one base (SmolLM2); S: quick, hour (on two cores, default), full
#   ./launch.sh compare [FLAGS] [-- TRAIN FLAGS]       all baselines on the toy, or on your policy and reward (--help)
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
  toy|smollm2|run|hh) mode=$1; shift ;;
  compare) shift; exec "$python" "$here/recipes/compare.py" "$@" ;;
  -h|--help) sed -n '2,11s/^# \{0,1\}//p' "$here/launch.sh"; exit 0 ;;
  -*|'') ;;
  *) echo "launch.sh: unknown recipe '$1'; there are toy, smollm2, run, hh and compare" >&2; exit 2 ;;
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
  hh)
    pairs="${1:-}" size=hour base='' unfinished=(--truncated drop)  # the reward model knows whole replies alone
    case "$pairs" in
      -*|'') echo "launch.sh: hh needs a file of preference pairs: ./launch.sh hh PAIRS.jsonl.gz" >&2; exit 2 ;;
    esac
    shift
    while [ "${1:-}" = --size ] || [ "${1:-}" = --base ]; do
      if [ $# -lt 2 ]; then echo "launch.sh: $1 needs a value" >&2; exit 2; fi
      if [ "$1" = --size ]; then size=$2; else base=$2; fi
      shift 2
    done
    case "$size" in  # longest conversation and prompt to learn from, tokens; examples; steps of P prompts; validation interval
      quick) longest=128 prompt=96 examples=128 steps=8 p=4 interval=4 tests=16 ;;
      hour) longest=192 prompt=128 examples=2000 steps=100 p=4 interval=25 tests=100 ;;
      full) longest=1024 prompt=768 examples=1000000 steps=400 p=32 interval=50 tests=1000 ;;
      *) echo "launch.sh: --size is '$size'; there are quick, hour and full" >&2; exit 2 ;;
    esac
    for word in "$@"; do
      case "$word" in -h|--help) exec "$python" "$here/train.py" --help ;; --truncated*) unfinished=() ;; esac
    done
    train_flags+=(--num-rollout-samples "$p" --num-rollouts-per-prompt 4 --max-new-tokens 48 --max-prompt-length "$prompt"
      --max-steps "$steps" --max-epochs 10 --val-check-interval "$interval" --lr 1e-5 --initial-policy-kl-penalty 0.05
      --micro-batch-size 16 --micro-batch-tokens 2048 ${unfinished[@]+"${unfinished[@]}"})
    # hh.py checks these flags, too: now, and not after an hour
    data="$("$python" "$here/recipes/hh.py" "$pairs" "${train_flags[@]}" "$@")" || exit $?
    if [ -z "$base" ]; then base="$("$python" "$here/recipes/smollm2.py" --model-only)/policy" || exit $?; fi
    if [ -d "$base" ]; then base="$(cd "$base" && pwd)"; fi
    key="$( (echo "$base"; cat "$here/launch.sh" "$here"/recipes/{sft,train_rm,fit}.py) | cksum | cut -d ' ' -f 1)"
    work="$data/$size-$key"  # what another base or another recipe made is not taken for this one's
    stage() {  # stage FOLDER COMMAND ...: run it once, into a folder that is there only when it is whole
      if [ -d "$work/$1" ]; then echo "== $1: there already, $work/$1"; return 0; fi
      echo "== $1"
      rm -rf "$work/.$1"
      "${@:2}" --out "$work/.$1" && mv "$work/.$1" "$work/$1"
    }
    mkdir -p "$work"
    stage sft "$python" "$here/recipes/sft.py" --model "$base" --data "$data/train.jsonl" \
      --val-data "$data/validation.jsonl" --max-length "$longest" --max-examples "$examples" || exit $?
    stage reward_model "$python" "$here/recipes/train_rm.py" --model "$work/sft" --pairs "$data/train.jsonl" \
      --test-pairs "$data/test.jsonl" --max-length "$longest" --max-pairs "$examples" --lr 3e-5 || exit $?
    echo "== reinforce"
    server_flags+=(--reward-model "$work/reward_model")
    train_flags+=(--policy "$work/sft" --train-data "$data/train.jsonl" --val-data "$data/validation.jsonl") ;;
  run)
    while [ $# -gt 0 ] && [ "$1" != -- ]; do server_flags+=("$1"); shift; done
    [ $# -eq 0 ] || shift ;;
esac

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
if [ "$mode" = hh ]; then
  echo "== evaluate"
  "$python" "$here/recipes/evaluate.py" --run "$run" --test-data "$data/test.jsonl" --max-prompts "$tests" --max-new-tokens 96 \
    --rm-host "$host" --rm-port "$port" || exit $?
fi
if [ "$mode" = toy ]; then
  "$python" "$here/recipes/toy.py" --judge "$run"
  echo "to see the reward model fooled, take the KL penalty away: ./launch.sh --initial-policy-kl-penalty 0"
fi
