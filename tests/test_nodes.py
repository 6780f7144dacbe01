"""Several nodes: two torchrun agents of two ranks each, which meet over loopback, and a reward server apart from both."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment, metrics, small_flags, torchrun
from same_run import assert_same

from reinforce.run import checkpoint

pytestmark = pytest.mark.slow


def agents(words, log):
    """The same command on two nodes; only their logs differ."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, str(ROOT / "train.py"), *map(str, words)]
    made = []
    for node in (0, 1):
        with (log.parent / f"{log.name}-{node}").open("w") as out:
            made.append(subprocess.Popen(command, cwd=ROOT, env=environment(OMP_NUM_THREADS=1), stdout=out, stderr=out))
        time.sleep(0.5)  # the first one holds the store of the rendezvous
    return made


def workers(agent):
    """The ranks that an agent has started."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()]


@pytest.fixture(scope="module")
def one_agent(small, server_port, tmp_path_factory):
    """The undisturbed run of four ranks under one agent, and its flags."""
    flags = [*small_flags(small, server_port), "--max-epochs", 99, "--max-steps", 12, "--save-interval", 1, "--save-top-k", 99]
    run = tmp_path_factory.mktemp("one") / "run"
    out = torchrun(4, *flags, "--log-dir", run)
    assert out.returncode == 0, out.stdout
    return flags, run


def test_two_agents_make_the_run_of_one(one_agent, tmp_path):
    flags, right = one_agent
    for agent in agents([*flags, "--log-dir", tmp_path / "run"], tmp_path / "log"):
        assert agent.wait(200) == 0, (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    assert "4 ranks" in (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    assert_same(tmp_path / "run", right)


@pytest.mark.parametrize("lost", [0, 1], ids=["the rendezvous' node", "the other node"])
def test_a_lost_node_ends_the_job_and_the_same_command_goes_on(one_agent, tmp_path, lost, capsys):
    """The agent and its ranks are killed; the ranks of the other one say so in a sentence, and its agent ends with them."""
    flags, right = one_agent
    run, words = tmp_path / "run", [*flags, "--log-dir", tmp_path / "run"]
    job = agents(words, tmp_path / "log")
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert all(agent.poll() is None for agent in job), (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
        time.sleep(0.02)
    victim, other = job[lost], job[1 - lost]
    orphans = workers(other)
    pids = [victim.pid, *workers(victim)]
    began = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    code = other.wait(120)
    said = (tmp_path / f"log-{1 - lost}").read_text()
    with capsys.disabled():
        print(f"\nended {time.monotonic() - began:.1f} s after the kill with code {code}")
        print("\n".join(line for line in said.splitlines() if "train.py" in line and "gone" in line))
    victim.wait(10)
    assert len(pids) == 3 and code == 1 and "another rank is gone" in said, said
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail(f"rank {pid} of the other node still runs")
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    done = int(checkpoint.newest(run).name[-6:])
    assert 1 <= done < 12
    again = agents(words, tmp_path / "again")
    assert [agent.wait(200) for agent in again] == [0, 0], (tmp_path / "again-0").read_text()
    assert f"going on after step {done} of 12" in (tmp_path / "again-0").read_text() + (tmp_path / "again-1").read_text()
    assert_same(run, right)
