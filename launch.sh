#!/usr/bin/env bash
#SBATCH --job-name=reinforce
#SBATCH --output=slurm-%j.log --open-mode=append --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH hetjob
#SBATCH --nodes=1 --ntasks-per-node=1
# Both jobs: a reward server in the background, the actor in front, and one exit code.
#
#   ./launch.sh [TRAIN FLAGS]                          the toy, prepared on first use
#   ./launch.sh smollm2 [TRAIN FLAGS]                  SmolLM2-135M-Instruct against a served sentiment function
#   ./launch.sh run SERVER FLAGS -- TRAIN FLAGS        your own models, prompts and reward
#   ./launch.sh hh PAIRS [--size S] [--base MODEL] [TRAIN FLAGS]   HH-RLHF: SFT, reward model, REINFORCE, evaluation, all from
#                                                      one base (SmolLM2); S: quick, hour (on two cores, default), full
#   ./launch.sh compare [FLAGS] [-- TRAIN FLAGS]       all baselines on the toy, or on your policy and reward (--help)
#   sbatch SERVER'S NODES : ACTOR'S NODES launch.sh run SERVER FLAGS -- TRAIN FLAGS     the same as a Slurm hetjob
#
# NPROC: processes of the actor, on each node (default: 1; under Slurm the GPUs of a node). Under Slurm, SRUN_ARGS goes to both
# sruns (container image, mounts, --mpi), and PYTHON names the Python in the container. Needs bash 3.2 or newer.
set -euo pipefail

slurm="${SLURM_JOB_ID:+${SLURM_JOB_NODELIST_HET_GROUP_1:-}}"  # the actor's nodes, in a hetjob
here="$(cd "$(dirname "$0")" && pwd)"
if [ -n "$slurm" ]; then
  here="$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this file from a folder of its own
  if [ ! -e "$here/train.py" ]; then
    echo "launch.sh: there is no train.py in $here; call sbatch in the folder that holds launch.sh" >&2
    exit 2
  fi
fi
python="${PYTHON:-}"
for candidate in ${VIRTUAL_ENV:+python} ${CONDA_PREFIX:+python} "$here/.venv/bin/python" python3; do
  if [ -z "$python" ] && "$candidate" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; then
    python="$candidate"
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
  -h|--help) sed -n '8,20s/^# \{0,1\}//p' "$here/launch.sh"; exit 0 ;;
  -*|'') ;;
  *) echo "launch.sh: unknown recipe '$1'; there are toy, smollm2, run, hh and compare" >&2; exit 2 ;;
esac

run="" previous=""
for word in "$@"; do
  case "$word" in --log-dir=*) run="${word#--log-dir=}" ;; esac
  if [ "$previous" = --log-dir ]; then run="$word"; fi
  previous="$word"
done

server_flags=(--exit-with-parent)
if [ -n "$slurm" ]; then server_flags=(--host 0.0.0.0); fi
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
  if [ -n "$slurm" ]; then run="runs/$mode-$SLURM_JOB_ID"; fi  # requeued, the job finds its run again
  [ -n "$slurm" ] || [ ! -e "$run" ] || run="$run-$$"
  mkdir -p "$run"
fi
mkdir -p "$run"
if [ -n "$slurm" ]; then run="$(cd "$run" && pwd)"; fi  # a container may start in another folder
rm -f "$run/exit.json" "$run/server.ready"

last_step() {  # name of the newest checkpoint
  local folder last=''
  for folder in "$run"/checkpoints/step-*; do
    if [ -d "$folder" ]; then last="${folder##*/}"; fi
  done
  echo "$last"
}
before="$(last_step)"

processes="${NPROC:-1}" cpus="$(getconf _NPROCESSORS_ONLN)"
server_srun=() trainer_srun=() rendezvous=(--standalone)
host_of() {  # host_of NODELIST: its first host
  local first=''
  read -r first < <(scontrol show hostnames "$1") || true
  if [ -z "$first" ]; then echo "launch.sh: scontrol names no host of '$1'" >&2; exit 1; fi
  echo "$first"
}
if [ -n "$slurm" ]; then
  read -r -a srun_args <<<"${SRUN_ARGS:-}"
  server_srun=(srun --het-group=0 --nodes=1 --ntasks=1
    ${SLURM_CPUS_PER_TASK_HET_GROUP_0:+--cpus-per-task="$SLURM_CPUS_PER_TASK_HET_GROUP_0"} ${srun_args[@]+"${srun_args[@]}"})
  nodes="$(scontrol show hostnames "$slurm" | wc -l | tr -d ' ')"
  trainer_srun=(srun --het-group=1 --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1
    ${SLURM_CPUS_PER_TASK_HET_GROUP_1:+--cpus-per-task="$SLURM_CPUS_PER_TASK_HET_GROUP_1"} ${srun_args[@]+"${srun_args[@]}"})
  actor_host="$(host_of "$slurm")"
  rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"
    --rdzv-endpoint "$actor_host:$((20000 + SLURM_JOB_ID % 10000))")
  gpus="${SLURM_GPUS_PER_NODE_HET_GROUP_1:-gpu}" cpus="${SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1:-$cpus}"
  processes="${NPROC:-${gpus##*:}}" cpus="${cpus%%[(,]*}"  # torchrun takes "gpu" for as many as there are; 32(x2),16 is 32
  export RM_TOKEN_FILE="$run/rm_token"
  rm -f "$RM_TOKEN_FILE"
  (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RM_TOKEN_FILE")
fi

server='' trainer='' signalled=''
tell_trainer() {  # tell_trainer SIGNAL; srun would answer TERM by killing its tasks, and INT by asking for a second one
  local signal=$1
  if [ -n "$slurm" ]; then signal=USR1; fi
  if [ -n "$trainer" ]; then kill "-$signal" "$trainer" 2>/dev/null || true; fi
}
finish() {  # the trainer first, then the server that it talks to
  tell_trainer TERM
  if [ -n "$trainer" ]; then wait "$trainer" 2>/dev/null || true; fi
  if [ -n "$server" ]; then
    kill -TERM "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
}
trap finish EXIT
forward() {  # only the first signal: another one must not break the save that this one starts
  if [ -z "$trainer" ]; then exit 75; fi
  if [ -z "$signalled" ]; then
    signalled=$1
    echo "launch.sh: SIG$1: the actor ends after this step and saves" >&2
    tell_trainer "$1"
  fi
}
trap 'forward INT' INT
trap 'forward TERM' TERM
trap 'forward USR1' USR1

set -m  # process groups of their own: Ctrl-C comes here, and goes to the trainer alone
${server_srun[@]+"${server_srun[@]}"} "$python" "$here/serve_rm.py" "${server_flags[@]}" --ready-file "$run/server.ready" \
  </dev/null >"$run/server.log" 2>&1 &
server=$!
set +m
healthy() {  # healthy HOST PORT: whether GET /health answers 200
  local status=''
  (exec 3<>"/dev/tcp/$1/$2" && printf 'GET /health HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$1" >&3 \
    && read -r -t 5 status <&3 && [[ "$status" == *" 200 "* ]]) 2>/dev/null
}
host='' port=''
while :; do
  if ! kill -0 "$server" 2>/dev/null; then
    code=0; wait "$server" || code=$?
    tail -n 5 "$run/server.log" >&2
    echo "launch.sh: the reward server ended with code $code; its log: $run/server.log" >&2
    exit "$((code ? code : 1))"
  fi
  if [ -s "$run/server.ready" ]; then
    read -r host port <"$run/server.ready"
    if [ -z "$slurm" ]; then break; fi
    host="$(host_of "$SLURM_JOB_NODELIST_HET_GROUP_0")"
    if healthy "$host" "$port"; then break; fi
  fi
  sleep 0.1
done
echo "reward server: http://$host:$port, log: $run/server.log"

threads=1
case "$processes" in *[!0-9]*) ;; *) threads="$((cpus / processes))" ;; esac
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
set -m
${trainer_srun[@]+"${trainer_srun[@]}"} "$python" -m torch.distributed.run "${rendezvous[@]}" \
  --nproc-per-node "$processes" --shutdown-timeout 600 --signals-to-handle SIGTERM,SIGINT,SIGUSR1 "$here/train.py" \
  ${train_flags[@]+"${train_flags[@]}"} --rm-host "$host" --rm-port "$port" --rm-wait 600 "$@" --log-dir "$run" </dev/null &
trainer=$!
set +m
server_code=''
while kill -0 "$trainer" 2>/dev/null; do
  if [ -z "$server_code" ] && ! kill -0 "$server" 2>/dev/null; then
    server_code=0; wait "$server" || server_code=$?
    tell_trainer TERM
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
  code="$(sed -n 's/.*"code": \([0-9]*\).*/\1/p' "$run/exit.json")"
elif [ "$code" -ne 0 ] && { [ -n "$signalled" ] || [ "$(last_step)" != "$before" ]; }; then
  code=75  # killed before it could say why; the next one goes on
fi
if [ "$code" -ne 0 ]; then
  if [ -s "$run/exit.json" ]; then
    sed -n 's/.*"reason": "\(.*\)".*/launch.sh: \1/p' "$run/exit.json" | sed 's/\\"/"/g' >&2
  fi
  if [ "$code" -eq 75 ] && [ -n "$slurm" ]; then
    finish
    if [ "$signalled" = TERM ] || [ "$signalled" = INT ]; then
      echo "launch.sh: not requeued: SIG$signalled, as of scancel; the same command with --log-dir $run goes on" >&2
    elif [ "$(last_step)" != "$before" ]; then
      echo "launch.sh: requeued, to go on from $(last_step)" >&2
      scontrol requeue "$SLURM_JOB_ID" || true
    else
      echo "launch.sh: not requeued: no new checkpoint since this job started" >&2
    fi
  elif [ "$code" -eq 75 ]; then
    echo "launch.sh: to go on, the same command with --log-dir $run" >&2
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
