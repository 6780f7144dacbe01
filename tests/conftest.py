"""Tiny real models, and the scripts as the processes that a user starts."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from recipes import toy
from reinforce.policy import without_dropout
from reinforce.run import exits

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as under nohup; processes under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 50
SMALL_STEP = ["--num-rollout-samples", "6", "--num-rollouts-per-prompt", "2", "--max-new-tokens", "8"]

split_models = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23), reason="tensor parallelism needs transformers 5.23"
)


def tiny_llama(seed=0, vocabulary=VOCABULARY, **extra):
    """Two layers with weights large enough for sharp distributions."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **{**sizes, **extra},
    )  # fmt: skip
    return without_dropout(LlamaForCausalLM(config))


def tiny_gpt2(seed=0, dropout=0.1):
    """Learned positions, and dropout as its makers left it."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return without_dropout(GPT2LMHeadModel(config))


@pytest.fixture(params=["rope", "learned positions"])
def model(request):
    return tiny_llama() if request.param == "rope" else tiny_gpt2()


@pytest.fixture(scope="session")
def toy_folder():
    """The embedded default, as a newcomer's first run makes it."""
    return toy.prepare()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A policy, a reward model and prompts small enough for runs of seconds; random weights."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    policy, reward_model = (
        LlamaForCausalLM(toy.make_config(tokenizer)),
        LlamaForSequenceClassification(toy.make_config(tokenizer, num_labels=1)),
    )
    for model, name in ((policy, "policy"), (reward_model, "reward_model")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [f"{person} on the {thing} in rome :" for person in toy.PEOPLE[:6] for thing in list(toy.PARTS)[:3]]
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return folder


@pytest.fixture(scope="session")
def server_port(small, tmp_path_factory):
    """A server of the small reward model; a reward depends on its text alone, bitwise."""
    from test_server import serving

    with serving(tmp_path_factory.mktemp("rm"), "--reward-model", small / "reward_model", "--inference-micro-batch-size", 1) as (
        _,
        port,
        _p,
    ):
        yield port


def small_flags(small, server_port):
    """A run of three steps an epoch on the small models: six prompts a step, K = 2."""
    return ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--val-data", small / "train.jsonl",
            "--rm-host", "127.0.0.1", "--rm-port", server_port, "--num-rollout-samples", "6", "--num-rollouts-per-prompt", "2",
            "--max-new-tokens", "8", "--lr", "7e-4", "--val-check-interval", "2"]  # fmt: skip


@pytest.fixture
def flags(small, server_port):
    return small_flags(small, server_port)


@pytest.fixture(scope="session")
def six(small, server_port, tmp_path_factory):
    """Six steps in one go, two epochs of three, with --baseline ema; and the flags."""
    from same_run import go

    place = tmp_path_factory.mktemp("six")
    flags = ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--val-data", small / "train.jsonl",
             "--rm-host", "127.0.0.1", "--rm-port", server_port, "--num-rollout-samples", "7", "--num-rollouts-per-prompt", "2",
             "--max-new-tokens", "8", "--val-check-interval", "1", "--save-interval", "1", "--save-top-k", "9", "--baseline", "ema"]  # fmt: skip
    go(flags, place / "run", 6)
    return flags, place / "run"


@pytest.fixture
def server():
    """Scripted reward servers, closed when the test has ended."""
    from test_client import BadServer

    made = []

    def make(*answers, **how):
        made.append(BadServer(*answers, **how))
        return made[-1]

    yield make
    for one in made:
        one.close()


def environment(**extra):
    """The environment of a script under test: no proxies and no hub."""
    kept = {k: v for k, v in os.environ.items() if k.upper() not in ("HTTP_PROXY", "HTTPS_PROXY", "RM_TOKEN", "RM_TOKEN_FILE")}
    return {**kept, "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in extra.items()}}


def script(*words, timeout=240, cwd=None, **extra):
    """Run a script of the repository to its end; stdout and stderr together in .stdout."""
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd or ROOT, env=environment(**extra), timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def train_here(*words, **extra):
    """train.py in this process, which spares the seconds that a new one takes to import; the same fields as `script`.

    Curves are left out, most of a short run's time; runs in processes of their own draw them.
    """
    import train

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    text = io.StringIO()
    code = 0
    with (contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), mock.patch.object(sys, "argv", ["train.py", *map(str, words)]),
          mock.patch.dict(os.environ, {k: str(v) for k, v in extra.items()}), mock.patch("reinforce.run.recorder.draw_curves")):  # fmt: skip
        try:
            train.main()
        except SystemExit as done:
            code = done.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return SimpleNamespace(returncode=code, stdout=text.getvalue())


def torchrun(processes, *words, **how):
    """train.py on several processes of this machine."""
    return script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, ROOT / "train.py", *words,
                  OMP_NUM_THREADS=1, **how)  # fmt: skip


def metrics(run):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def rows_of(run):
    """The lines of a run's rollouts.jsonl, one a prompt."""
    return [json.loads(line) for line in (Path(run) / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture
def handlers():
    """The handlers of a run's signals are afterwards those of before."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def recipe(module, *words, stdin=""):
    """A recipe's main in this process: exit code and what it printed."""
    text = io.StringIO()
    with (contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), mock.patch.object(sys, "argv", ["x", *map(str, words)]),
          mock.patch.object(sys, "stdin", io.StringIO(stdin))):  # fmt: skip
        code = exits.run(module.main, name=module.__name__)
    return code, text.getvalue()


def data_flags(small, port):
    """A policy, prompts and a reward server, as train.py and the recipes take them."""
    return ["--policy", small / "policy", "--train-data", small / "train.jsonl", "--rm-host", "127.0.0.1", "--rm-port", port]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """HH-like pairs in the toy's words: the chosen review is the better one."""
    rng, lines = random.Random(0), []
    while len(lines) < 240:
        thing = rng.choice(list(toy.PARTS))
        a, b = toy.make_review(rng, thing), toy.make_review(rng, thing)
        if toy.sentiment(a) <= toy.sentiment(b):
            continue
        prompt = f"\n\nHuman: {toy.make_prompt(rng)[0]} {len(lines)}\n\nAssistant: "
        lines.append(json.dumps({"chosen": prompt + a, "rejected": prompt + b}) + "\n")
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(lines))
    return path
