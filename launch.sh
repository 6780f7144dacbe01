#!/usr/bin/env bash
#SBATCH --job-name=reinforce
#SBATCH --output=slurm-%j.log --open-mode=append --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH hetjob
#SBATCH --nodes=1 --ntasks-per-node=1
# A reward server in the background, the actor in front, and one exit code:
#
#   ./launch.sh                                          the toy, prepared on first use
#   ./launch.sh run SERVER FLAGS -- TRAIN FLAGS          your own models, prompts and reward
#   ./launch.sh --help                                   all of it
#   sbatch SERVER'S NODES : ACTOR'S NODES launch.sh run SERVER FLAGS -- TRAIN FLAGS
#
# This file only finds the repository and a Python for reinforce/run/launch.py, which does the work.
# Needs bash 3.2 or newer, and any Python from 3.8 on; PyTorch may be in another one (PYTHON).
set -euo pipefail

if [ -n "${SLURM_JOB_ID:+${SLURM_JOB_NODELIST_HET_GROUP_1:-}}" ]; then
  here="$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this file from a folder of its own
else
  self="${BASH_SOURCE[0]}"
  while [ -L "$self" ]; do  # as readlink -f, which older systems lack
    link="$(readlink "$self")"
    case "$link" in /*) self="$link" ;; *) self="$(dirname "$self")/$link" ;; esac
  done
  here="$(CDPATH='' cd -- "$(dirname -- "$self")" && pwd -P)"
fi
if [ ! -e "$here/reinforce/run/launch.py" ]; then
  echo "launch.sh: $here is not the repository; call it, or sbatch, in the folder of launch.sh" >&2
  exit 2
fi

for python in python3 "${VIRTUAL_ENV:-$here/.venv}/bin/python" "${PYTHON:-python}"; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    exec "$python" "$here/reinforce/run/launch.py" "$@"  # exec: Slurm's signal comes to this process
  fi
done
echo "launch.sh: no Python 3.8 or newer: python3, an active environment, .venv or PYTHON" >&2
exit 2
