"""serve_rm.py on several processes: real torchrun, real HTTP, ranks that are killed; scores as of one process."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from test_server import call, serving
from transformers import LlamaConfig, LlamaForSequenceClassification

from recipes import toy
from reinforce.run.children import family

TEXTS = [" ".join(["anna on the pizza in rome : the crust was superb . </s>"] * n) for n in (3, 1, 5, 2, 1, 4, 6)] + [
    "the crust",
    "the",
]
LAYOUTS = {"one": (1, []), "data": (2, ["--data-parallel"]), "tensor": (2, ["--tensor-model-parallel-size", 2]),
           "both": (4, ["--data-parallel", "--tensor-model-parallel-size", 2])}  # fmt: skip


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A LLaMA with 4 query heads and 2 key-value heads."""
    folder, tokenizer = tmp_path_factory.mktemp("rm") / "reward_model", toy.make_tokenizer()
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.3, num_labels=1, pad_token_id=tokenizer.pad_token_id, reward_mean=0.25,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def server(folder, model, layout, *flags, runner=("-m", "torch.distributed.run"), **extra):
    """A server in a layout; yields its address, torchrun's process, the ids of its ranks and its log."""
    count, words = LAYOUTS[layout]
    ready, log = folder / f"ready-{time.monotonic_ns()}", folder / f"log-{time.monotonic_ns()}"
    command = [sys.executable, *runner, "--standalone", "--nproc-per-node", count, ROOT / "serve_rm.py",
               "--reward-model", model, "--ready-file", ready, *words, *flags]  # fmt: skip
    with log.open("w") as out:
        job = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=out, cwd=ROOT, env=environment(OMP_NUM_THREADS=1, **extra)
        )
    try:
        end = time.monotonic() + 120
        while not ready.exists():
            assert job.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        host, port = ready.read_text().split()
        ranks = ranks_of(job.pid)
        assert len(ranks) == count
        yield (host, int(port)), job, ranks, log
    finally:
        left = family(job.pid)
        job.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(40)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def ranks_of(pid):
    """The processes of rank 0, 1, ... below torchrun."""
    found = {}
    for child in family(pid)[:-1]:
        variables = dict(word.split("=", 1) for word in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in word)
        if "LOCAL_RANK" in variables:
            found[int(variables["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def runs(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def all_gone(pids, wait=20):
    end = time.monotonic() + wait
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(runs, pids))


def scores(address, texts=TEXTS):
    status, reply = call(address, "POST", "/get_reward", {"query": texts})
    assert status == 200, reply
    return torch.tensor(reply["scores"], dtype=torch.float64), torch.tensor(reply["rewards"], dtype=torch.float64)


@pytest.fixture(scope="module")
def alone(reward_model, tmp_path_factory):
    """What one process without torchrun answers: scores, rewards, and /info."""
    with serving(tmp_path_factory.mktemp("alone"), "--reward-model", reward_model, "--reward-std", 2, "--inference-micro-batch-size", 4,
                 OMP_NUM_THREADS=1) as (host, port, _):  # fmt: skip
        return *scores((host, port)), call((host, port), "GET", "/info")[1]


@pytest.mark.parametrize("layout", ["data", "tensor", pytest.param("both", marks=pytest.mark.slow)])
def test_scores_order_and_info_are_those_of_one_process_and_a_signal_ends_all_ranks_with_0(layout, reward_model, alone, tmp_path):
    with server(tmp_path, reward_model, layout, "--reward-std", 2, "--inference-micro-batch-size", 4) as (address, job, ranks, log):
        expected, rewards, info = alone
        for count in (len(TEXTS), 1, 0, 3):  # fewer texts than ranks as well
            found = scores(address, TEXTS[:count])
            torch.testing.assert_close(found[0], expected[:count], rtol=0, atol=1e-5)
            torch.testing.assert_close(found[1], rewards[:count], rtol=0, atol=1e-5)
        assert call(address, "GET", "/info")[1] == info
        os.kill(ranks[0], signal.SIGTERM)
        assert job.wait(40) == 0, log.read_text()  # torchrun's code is 0 where every rank's is
        assert all_gone(ranks) and len(log.read_text().splitlines()) == 1, log.read_text()


def asking(address, stop):
    """Keep the server busy until `stop`; what it answered."""
    statuses = []

    def ask():
        while not stop.is_set():
            try:
                statuses.append(call(address, "POST", "/get_reward", {"query": TEXTS})[0])
            except OSError:
                return

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    return threads, statuses


@pytest.mark.parametrize(("layout", "busy"), [("data", False), ("tensor", True), pytest.param("data", True, marks=pytest.mark.slow),
                                              pytest.param("tensor", False, marks=pytest.mark.slow)])  # fmt: skip
def test_a_rank_that_is_killed_ends_the_server_with_one_sentence(layout, busy, reward_model, tmp_path):
    with server(tmp_path, reward_model, layout) as (address, job, ranks, log):
        stop = threading.Event()
        threads, statuses = asking(address, stop) if busy else ([], [])
        time.sleep(0.5 * busy)
        os.kill(ranks[1], signal.SIGKILL)
        assert job.wait(40) != 0 and all_gone(ranks)
        stop.set()
        for thread in threads:
            thread.join(20)
        said = [line for line in log.read_text().splitlines() if line.startswith("serve_rm.py: ")]
        assert said == ["serve_rm.py: rank 1 has ended, and the server with it"], log.read_text()
        assert set(statuses) <= {200}, "a client asks again where no answer comes, and not after a 500"


def test_the_other_ranks_end_with_rank_0(reward_model, tmp_path):
    with server(tmp_path, reward_model, "data") as (_, job, ranks, _log):
        os.kill(ranks[0], signal.SIGKILL)
        assert job.wait(40) != 0 and all_gone(ranks)
