"""The tutorial's commands as docs/tutorial-keys.md has them, from SFT to evaluation, with tiny models and smaller sizes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment, metrics
from test_readme import blocks
from test_slurm import SCONTROL, SRUN

pytestmark = pytest.mark.slow  # a minute

SFT_AND_RM, SERVER, ACTOR, SLURM, EVALUATION = [b.text for b in blocks(ROOT / "docs/tutorial-keys.md") if b.language == "bash"]
TINY = "--max-new-tokens 8"


def scaled(text, *changes):
    """A command with other sizes; each of the changed words must be in it."""
    for before, after in changes:
        assert before in text, before
        text = text.replace(before, after)
    return text


def bash(text, folder, **extra):
    """A command of the page, in a folder with the files that it names, a session of its own."""
    env = environment(**{"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, **extra})
    return subprocess.Popen(["bash", "-euc", text], cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def ended(process, timeout=200):
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def folder(small, pairs, tmp_path_factory):
    """The repository's scripts, a base model, pairs, and what the first block of the page makes of them."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("recipes", "reinforce", "train.py", "serve_rm.py", "launch.sh"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "BASE").symlink_to(small / "policy")
    lines = pairs.read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join(lines[:-8]))
    (folder / "test.jsonl").write_text("".join(lines[-8:]))
    out = ended(bash(SFT_AND_RM, folder))
    assert "held-out" in out, out
    return folder


def test_server_actor_and_evaluation_of_the_page(folder):
    ready = folder / "ready"
    server = bash(scaled(SERVER, ("-node 8", "-node 2"), ("parallel-size 4", f"parallel-size 2 --ready-file {ready}"), (" --data-parallel", ""),
                         ("--port 5567", "--port 0")), folder)  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (ready.exists() and ready.read_text().endswith("\n")):
            assert time.monotonic() < end and server.poll() is None, server.communicate()[0]
            time.sleep(0.1)
        at = [("RM_HOST", "127.0.0.1"), ("5567", ready.read_text().split()[1])]
        sizes = [("--nnodes 8", "--nnodes 1"), ("-node 8", "-node 4"), ("HOST:29500", "127.0.0.1:0"), ("parallel-size 4", f"parallel-size 2 {TINY}"),
                 ("-steps 313", "-steps 2"), ("-steps 312", "-steps 1"), ("-samples 16", "-samples 6"), ("-batch-size 16", "-batch-size 12")]  # fmt: skip
        ended(bash(scaled(ACTOR, *at, *sizes), folder))
        said = ended(bash(scaled(EVALUATION, *at), folder))
        assert "win rate" in said, said
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)
    config = json.loads((folder / "RESULTS/config.json").read_text())
    lines = metrics(folder / "RESULTS")
    assert config["tensor_model_parallel_size"] == 2 and config["max_steps"] == 2
    assert [line["optimizer_steps"] for line in lines] == [2, 2] and lines[0]["lr"] == 1.001e-6
    assert (folder / "RESULTS/report.html").exists()


def test_the_batch_file_of_the_page(folder, tmp_path):
    """Two nodes of two ranks for the actor, one of two for the server."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    text = scaled(SLURM, ("RM_NPROC=8", "RM_NPROC=2 NPROC=2"), (" --data-parallel", ""), ("parallel-size 4", "parallel-size 2"), ("RESULTS", f"{tmp_path}/run"),
                  ("--baseline rloo", f"--baseline rloo --truncated keep --max-steps 2 {TINY}"))  # fmt: skip
    slurm = {"SLURM_JOB_ID": 4242, "SLURM_SUBMIT_DIR": folder, "STANDIN": tmp_path, "PYTHON": sys.executable}
    slurm |= {"SLURM_JOB_NODELIST_HET_GROUP_0": "rm1", "SLURM_JOB_NODELIST_HET_GROUP_1": "actor2"}
    out = ended(bash(text, folder, **slurm, PATH=f"{tmp_path}/bin:{sys.prefix}/bin:{os.environ['PATH']}"))
    server, actor = (tmp_path / "srun").read_text().splitlines()[:2]
    assert "--nproc-per-node 2" in server and "--nodes=2" in actor and "4 ranks" in out, out
    assert [line["optimizer_steps"] for line in metrics(tmp_path / "run")] == [4, 4]
