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
from conftest import ROOT, environment, metrics, script, split_models
from test_server import call, serving
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from recipes import toy
from reinforce.errors import ConfigError
from reinforce.run.children import family
from reinforce.serving.config import ServeConfig
from reinforce.serving.load import load_reward
from reinforce.serving.reward_model import load_reward_model, query_ids, score
from reinforce.serving.tensor_parallel import check_model
from reinforce.tensor_plan import refuse_version

WRAPPER = ROOT / "reinforce/run/torchrun.py"  # as the launcher starts it
SENTENCE = "anna on the pizza in rome : the crust was superb . </s>"
TEXTS = [" ".join([SENTENCE] * n) for n in (3, 1, 5, 2, 1, 4, 6)] + ["the crust", "the"]
LAYOUTS = {"data": (2, ["--data-parallel"]), "tensor": (2, ["--tensor-model-parallel-size", 2]),
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
    if layout != "data":
        pytest.importorskip("accelerate")
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


@pytest.mark.parametrize(
    "layout", ["data", pytest.param("tensor", marks=split_models), pytest.param("both", marks=[pytest.mark.slow, split_models])]
)
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


@pytest.mark.parametrize(("layout", "busy"), [("data", True), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in (("data", False), ("tensor", True), ("tensor", False)))])  # fmt: skip
def test_a_rank_that_is_killed_ends_the_server_with_one_sentence(layout, busy, reward_model, tmp_path):
    with server(tmp_path, reward_model, layout, "--inference-micro-batch-size", 1) as (address, job, ranks, log):
        assert torch.equal(scores(address)[0], torch.cat([scores(address, [text])[0] for text in TEXTS])), (
            "of a text alone, bitwise"
        )
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


@pytest.mark.slow
def test_the_other_ranks_end_with_rank_0(reward_model, tmp_path):
    with server(tmp_path, reward_model, "data", "--inference-micro-batch-size", 1) as (address, job, ranks, _log):
        found = scores(address)[0]
        os.kill(ranks[0], signal.SIGKILL)
        assert job.wait(40) != 0 and all_gone(ranks)
    model, tokenizer = load_reward_model(str(reward_model), torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    one_by_one = [score(model, [query_ids(tokenizer, text)], tokenizer.pad_token_id).item() for text in TEXTS]
    torch.set_num_threads(threads)
    assert found.tolist() == one_by_one, "copies of a model give the bits of one process"


@pytest.mark.slow
def test_a_rank_that_hangs_is_a_forward_that_hangs(reward_model, tmp_path):
    """watch.py's two minutes; torchrun then needs half a minute to kill a stopped process."""
    with server(tmp_path, reward_model, "data", runner=[WRAPPER]) as (address, job, ranks, log):
        os.kill(ranks[1], signal.SIGSTOP)
        asking(address, threading.Event())
        assert job.wait(240) != 0 and all_gone(ranks)
        assert "serve_rm.py: a forward took over 120 s" in log.read_text()


@pytest.mark.slow
def test_the_end_of_torchruns_parent_ends_all_ranks(reward_model, tmp_path):
    """As of a launcher that is killed: torchrun would serve on, and no rank would see it."""
    (tmp_path / "parent.py").write_text("import subprocess, sys\nsubprocess.run(sys.argv[1:])\n")
    with server(tmp_path, reward_model, "data", "--exit-with-parent", runner=[tmp_path / "parent.py", sys.executable, WRAPPER]) as (
        _,
        job,
        ranks,
        log,
    ):
        job.kill()
        job.wait()
        assert all_gone(ranks, 40), log.read_text()


@pytest.mark.slow
def test_the_launcher_starts_and_ends_a_server_of_several_processes(reward_model, small, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [ROOT / "launch.sh", "run", "--reward-model", reward_model, "--data-parallel", "--", "--policy", small / "policy", "--train-data",
         small / "train.jsonl", "--num-rollout-samples", "6", "--num-rollouts-per-prompt", "2", "--max-new-tokens", "8", "--max-steps", "1",
         "--log-dir", run], env=environment(RM_NPROC=2, OMP_NUM_THREADS=1, PYTHON=sys.executable), cwd=ROOT, text=True, timeout=180,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0 and len(metrics(run)) == 1, done.stdout
    assert (run / "server.log").read_text().startswith("serving reward_model at http://127.0.0.1:")
    words = [Path(f"/proc/{pid}/cmdline").read_text() for pid in os.listdir("/proc") if pid.isdigit() and runs(pid)]
    assert not [word for word in words if str(reward_model) in word and str(run) in word]


# what is refused


@pytest.mark.parametrize(("flags", "count", "sentence"), [
    ({}, 2, "torchrun started 2 processes: add --data-parallel, or --tensor-model-parallel-size 2"),
    ({"tensor_model_parallel_size": 2}, 1, "--tensor-model-parallel-size 2 does not divide the number of processes, 1"),
    ({"tensor_model_parallel_size": 2}, 3, "--tensor-model-parallel-size 2 does not divide the number of processes, 3"),
    ({"tensor_model_parallel_size": 2}, 4, "torchrun started 4 processes: add --data-parallel"),
    ({"reward_fn": "x.py:f"}, 2, "--reward-fn: a function runs in one process"),
    ({"reward_fn": "x.py:f", "data_parallel": True}, 1, "--reward-fn: a function runs in one process"),
])  # fmt: skip
def test_processes_without_a_task_are_refused_by_name(flags, count, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ServeConfig(**flags).check_processes(count)


@pytest.mark.parametrize(("size", "heads"), [(3, "4 query heads"), (4, "2 KV heads")])
def test_a_size_that_does_not_divide_the_heads_is_refused(reward_model, size, heads):
    with pytest.raises(ConfigError, match=f"--tensor-model-parallel-size {size} does not divide the {heads}"):
        check_model(str(reward_model), size, torch.device("cpu"))


def test_without_accelerate_the_flag_is_refused_by_name(reward_model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size 2 needs the package accelerate"):
        check_model(str(reward_model), 2, torch.device("cpu"))


def test_a_folder_that_is_missing_is_still_one_sentence():
    with pytest.raises(ConfigError, match="--reward-model /no/where: no such folder"):
        load_reward(ServeConfig(reward_model="/no/where", tensor_model_parallel_size=2))


def test_an_older_transformers_is_refused_by_the_flag(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.22.1")
    with pytest.raises(
        ConfigError, match=r"--tensor-model-parallel-size 2 needs transformers 5\.23 or newer, and this is 5\.22\.1"
    ):
        refuse_version(2)


@pytest.mark.parametrize(("words", "sentence"), [
    pytest.param(["--tensor-model-parallel-size", 2], "transformers has no tensor parallel plan for a gpt2 model",
                 marks=pytest.mark.slow),
    pytest.param([], "torchrun started 2 processes: add --data-parallel", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_is_refused_ends_all_ranks_with_one_sentence_and_code_2(words, sentence, tmp_path):
    tokenizer = toy.make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, num_labels=1)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = script(WRAPPER, "--standalone", "--nproc-per-node", 2, ROOT / "serve_rm.py", "--reward-model", tmp_path, *words,
                  OMP_NUM_THREADS=1)  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert done.returncode == 2 and line.startswith("serve_rm.py: ") and sentence in line
