"""launch.sh as a Slurm hetjob, with stand-ins for sbatch, srun and scontrol that really start both jobs."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, metrics

from reinforce.run import checkpoint, slurm
from reinforce.run.children import EndedError

SBATCH = """#!/usr/bin/env bash
# sbatch OPTIONS : OPTIONS SCRIPT WORDS: runs a copy of the script, as Slurm does, with a hetjob's variables
while [ "${1##*/}" != launch.sh ]; do shift; done
mkdir -p "$STANDIN/spool"; cp "$1" "$STANDIN/spool/slurm_script"; shift
export SLURM_JOB_ID=4242 SLURM_SUBMIT_DIR="$PWD" SLURM_HET_SIZE=2 SLURM_CPUS_ON_NODE=2
export SLURM_JOB_NODELIST_HET_GROUP_0=rm1 SLURM_JOB_NODELIST_HET_GROUP_1="$ACTOR_NODES"
exec bash "$STANDIN/spool/slurm_script" "$@"
"""
SRUN = """#!/usr/bin/env bash
# srun OPTIONS PROGRAM WORDS: one process a node; USR1 goes to every process below them; the largest code is its own
for word in "$@"; do [ "$word" != : ] || { echo "srun: error: het component" >&2; exit 1; }; done
echo "$@" >>"$STANDIN/srun"
nodes=1
while [ "${1#-}" != "$1" ]; do
  case "$1" in --nodes=*) nodes="${1#*=}" ;; esac
  shift
done
tasks=()
for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i "$@" & tasks+=("$!"); done
trap 'kill -KILL "${tasks[@]}"' TERM  # as the real one does: "forcing job termination"
below() { for child in $(ps -A -o pid=,ppid= | awk -v p="$1" '$2 == p {print $1}'); do below "$child"; done; kill -USR1 "$1" 2>/dev/null; }
trap 'for task in "${tasks[@]}"; do below "$task"; done' USR1
code=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task"; one=$?; done
  [ "${one:-0}" -le "$code" ] || code=$one
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") for ((i = 0; i < ${3##*[!0-9]}; i++)); do echo localhost; done ;;  # rm1: one host, actor2: two
  *) echo "$@" >>"$STANDIN/scontrol" ;;
esac
"""


@pytest.fixture
def sbatch(small, tmp_path):
    """Submit launch.sh in the repository's folder; returns the batch job's process."""
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    jobs = []

    def submit(*words, nodes=1, server=(), **extra):
        env = environment(**extra, STANDIN=tmp_path, ACTOR_NODES=f"actor{nodes}", NPROC=1, SRUN_ARGS="--mpi=none --container-image=x", VIRTUAL_ENV=sys.prefix,
                          PATH=f"{tmp_path}/bin:{sys.prefix}/bin:{os.environ['PATH']}")  # fmt: skip
        command = ["sbatch", "--gpus-per-node=1", ":", f"--nodes={nodes}", "launch.sh", "run", "--reward-model", str(small / "reward_model"), *server, "--",
                   "--policy", str(small / "policy"), "--train-data", str(small / "train.jsonl"), "--num-rollout-samples", "6",
                   "--num-rollouts-per-prompt", "2", "--max-new-tokens", "8", "--save-interval", "1", "--log-dir", str(tmp_path / "run"),
                   *map(str, words)]  # fmt: skip
        job = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
        )
        jobs.append(job)
        return job

    yield submit
    for job in jobs:
        job.kill()


def after_steps(run, count, job):
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < count:
        assert time.monotonic() < end and job.poll() is None, job.communicate()[0]
        time.sleep(0.1)


def running(folder):
    """Command lines of processes that work in this test's folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if any(str(folder) in word for word in words) and any("python" in word for word in words[:1]):
            found.append(" ".join(words))
    return found


def test_a_requeue_that_fails_is_told(tmp_path, monkeypatch):
    job = object.__new__(slurm.Hetjob)
    job.id = "4242"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job.requeue() == "scontrol cannot be started: No such file or directory"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert job.requeue() == "scontrol requeue ended with code 1"


@pytest.mark.slow
def test_a_job_whose_time_runs_out_goes_on_when_requeued_and_ends_with_its_server(sbatch, tmp_path):
    """Two actor nodes; Slurm's USR1 comes to the batch script; then the same job again, on one node, until its server dies."""
    run = tmp_path / "run"
    job = sbatch("--max-epochs", 900, nodes=2)
    after_steps(run, 2, job)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    done = len(metrics(run))
    assert job.returncode == 75 and f"requeued, to go on from step-{done:06d}" in out, out
    assert (tmp_path / "scontrol").read_text() == "requeue 4242\n" and not running(tmp_path)

    server, actor = (tmp_path / "srun").read_text().splitlines()[:2]
    assert (
        server.startswith("--het-group=0 --nodes=1 --ntasks-per-node=1 --mpi=none --container-image=x")
        and "--host 0.0.0.0" in server
    )
    assert (
        actor.startswith("--het-group=1 --nodes=2 --ntasks-per-node=1 --kill-on-bad-exit=1")
        and "--mpi=none --container-image=x" in actor
    )
    assert "--rdzv-endpoint=localhost:24242" in actor and "--nnodes=2" in actor and "--rm-host localhost" in actor
    token = run / "rm_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    everything = (
        out + server + actor + "".join(p.read_text() for p in run.iterdir() if p.is_file() and p != token and p.suffix != ".png")
    )
    assert token.read_text() not in everything
    assert json.loads((run / "config.json").read_text())["rm_host"] == "localhost" and "2 ranks" in out

    job = sbatch("--max-epochs", 900)
    after_steps(run, done + 1, job)
    (pid,) = [p for p in os.listdir("/proc") if p.isdigit() and is_server(p, tmp_path)]
    os.kill(int(pid), signal.SIGKILL)
    out, _ = job.communicate(timeout=120)
    assert (
        f"going on after step {done}" in out and job.returncode == 137 and "the reward server ended first, with code 137" in out
    ), out
    steps = [line["step"] for line in metrics(run)]
    assert steps == list(range(1, len(steps) + 1)) and checkpoint.newest(run).name == f"step-{len(steps):06d}"
    assert (tmp_path / "scontrol").read_text() == "requeue 4242\n", "this code is no reason to" and not running(tmp_path)


def is_server(pid, folder):
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False
    return "python" in words[0] and any(w.endswith("serve_rm.py") for w in words) and any(str(folder) in w for w in words)


@pytest.mark.slow
def test_a_job_without_a_new_checkpoint_is_not_requeued(sbatch, tmp_path):
    """The signal comes before the first step: there is nothing to go on from, and a requeue would end the same way for ever."""
    job = sbatch("--max-epochs", 900)
    end = time.monotonic() + 60
    while not (tmp_path / "srun").exists() or len((tmp_path / "srun").read_text().splitlines()) < 2:
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 75 and "not requeued" in out, out
    assert not (tmp_path / "scontrol").exists() and not running(tmp_path)


@pytest.mark.slow
def test_the_server_of_a_job_may_be_several_processes_of_its_node(sbatch, tmp_path):
    """srun kills torchrun, and with it the ranks; the stand-in leaves the ranks, which see the end of torchrun."""
    job = sbatch("--max-steps", 1, server=["--data-parallel"], RM_NPROC=2)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0 and len(metrics(tmp_path / "run")) == 1, out
    end = time.monotonic() + 20
    while left := running(tmp_path):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    server = (tmp_path / "srun").read_text().splitlines()[0]
    assert server.startswith("--het-group=0 --nodes=1") and "torchrun.py --standalone --nproc-per-node 2" in server


def test_the_defects_of_the_tutorials_scripts_have_no_counterpart():
    batch = (ROOT / "launch.sh").read_text()
    assert "set -euo pipefail" in batch, "no undefined variable"
    assert "#SBATCH --signal=B:USR1@300" in batch and "#SBATCH hetjob" in batch and "--requeue" in batch
    assert not re.search(r">\s*-e|-o -e", batch), "no log file named -e"
    for name in ("launch", "slurm", "children"):
        text = (ROOT / f"reinforce/run/{name}.py").read_text()
        assert not re.search(r"sleep\([1-9]", text), "readiness is asked for, not slept for"


# slurm.py's functions


@pytest.fixture
def hetjob(tmp_path, monkeypatch):
    """Variables of a job with one server node and two actor nodes."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST_HET_GROUP_0": "rm1",
                        "SLURM_JOB_NODELIST_HET_GROUP_1": "actor2", "STANDIN": str(tmp_path)}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_words_of_srun_args_keep_their_quotes_and_cpus_are_of_their_group(hetjob):
    hetjob.setenv("SRUN_ARGS", "--container-mounts='/a b:/a b' --mpi=none")
    hetjob.setenv("SLURM_CPUS_PER_TASK_HET_GROUP_1", "12")
    job = slurm.Hetjob()
    assert job.srun(0) == [
        "srun",
        "--het-group=0",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--container-mounts=/a b:/a b",
        "--mpi=none",
    ]
    assert "--cpus-per-task=12" in job.srun(1) and "--nodes=2" in job.srun(1)
    assert job.rendezvous() == ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=123456", "--rdzv-endpoint=localhost:23456"]


@pytest.mark.parametrize(("given", "cpus"), [("32(x2),16", 32), ("16", 16), ("16,32", 16), ("", None)])
def test_the_cpus_of_an_actors_node(hetjob, given, cpus):
    hetjob.setenv("SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1", given)
    assert slurm.Hetjob().cpus() == cpus


@pytest.mark.parametrize(("given", "processes"), [("8", "8"), ("h100:4", "4"), (None, "gpu")])
def test_a_process_for_each_gpu_of_a_node(hetjob, given, processes):
    if given:
        hetjob.setenv("SLURM_GPUS_PER_NODE_HET_GROUP_1", given)
    assert slurm.Hetjob().processes() == processes


def test_an_empty_node_list_and_a_missing_scontrol_are_told(hetjob, tmp_path):
    with pytest.raises(EndedError, match="names no host of 'rm0'"):
        slurm.hosts_of("rm0")
    hetjob.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(EndedError, match="scontrol cannot be started"):
        slurm.hosts_of("rm1")


def test_a_token_replaces_an_old_file_that_others_could_read(tmp_path):
    token = tmp_path / "rm_token"
    token.write_text("old")
    token.chmod(0o644)
    slurm.write_token(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and re.fullmatch(r"[0-9a-f]{64}", token.read_text())


def test_a_lone_colon_would_end_sruns_command_and_is_refused_with_the_way_out(sbatch):
    out, _ = (job := sbatch("--end-strings", ":")).communicate(timeout=60)
    assert job.returncode == 2 and "write --end-strings=:" in out


def test_a_batch_script_submitted_elsewhere_says_where_to(tmp_path):
    env = environment(SLURM_JOB_ID=1, SLURM_JOB_NODELIST_HET_GROUP_1="a", SLURM_SUBMIT_DIR=tmp_path)
    out = subprocess.run(["bash", ROOT / "launch.sh", "run", "--"], env=env, capture_output=True, text=True)
    assert out.returncode == 2 and "call it, or sbatch, in the folder of launch.sh" in out.stderr
