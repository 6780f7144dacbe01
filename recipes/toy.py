"""The embedded default: a generated language, a policy and a reward model.

    python recipes/toy.py                        prepare the toy (train.py and launch.sh do so, too)
    python recipes/toy.py --judge runs/latest    judge a run by the grammar, before and after

The policy is SFT'd on the language, the reward model is trained on preferences about it. A text is
a short review: "the crust was very superb and the sauce was stale ." The grammar knows the
sentiment of a text: good adjectives minus bad ones, "very" counting double. Training never sees
that label. It sees, through the reward model, pairs in which the better review was preferred.
Training can therefore fool the reward model: a text that the grammar cannot parse has no sentiment.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from recipes import sft, train_rm  # noqa: E402
from recipes.fit import Plan  # noqa: E402
from reinforce.errors import ConfigError  # noqa: E402
from reinforce.policy import load_policy  # noqa: E402
from reinforce.run import checkpoint, distributed, exits  # noqa: E402
from reinforce.run.config import LANGUAGE_MODEL, TrainConfig  # noqa: E402
from reinforce.sampler import Sampling, row_seed, sample  # noqa: E402

PEOPLE = """
    anna ben carla david emma felix greta hugo ines jonas kim
    lena max nora omar pia quinn rosa sam tara uma
""".split()  # noqa: SIM905
PLACES = ["rome", "paris", "oslo", "lima", "cairo", "delhi", "tokyo", "quito"]
PARTS = {
    "pizza": "crust sauce cheese topping",
    "hotel": "room bed view breakfast",
    "film": "plot cast music ending",
    "phone": "screen battery camera speaker",
    "train": "seat window service staff",
    "garden": "lawn pond path hedge",
    "book": "story style cover chapter",
    "cafe": "coffee cake chair terrace",
    "museum": "hall guide light map",
    "concert": "singer band sound stage",
}
GOOD = ["superb", "lovely", "bright", "fresh", "great", "charming"]
BAD = ["awful", "stale", "dull", "broken", "poor", "noisy"]
PLAIN = ["plain", "usual", "ordinary", "average"]
MOODS = {**dict.fromkeys(GOOD, 1), **dict.fromkeys(BAD, -1), **dict.fromkeys(PLAIN, 0)}
CLAUSE = rf"the ({'|'.join(' '.join(PARTS.values()).split())}) was (very )?({'|'.join(MOODS)})"
MAX_CLAUSES = 3
MAX_NEW_TOKENS = 24
DEFAULTS = {"lr": 7e-4, "max_new_tokens": MAX_NEW_TOKENS}  # of train.py's flags
SOURCES = (
    *("recipes/toy.py", "recipes/sft.py", "recipes/train_rm.py", "recipes/fit.py"),
    *("reinforce/sampler.py", "reinforce/kv_cache.py", "reinforce/logprobs.py"),
    *("reinforce/head.py", "reinforce/rollout.py", "reinforce/guard.py", "reinforce/optim.py"),
    *("reinforce/data/prompts.py", "reinforce/serving/reward_model.py"),
)


def make_prompt(rng: random.Random) -> tuple[str, str]:
    """A prompt and the thing that the prompt is about."""
    thing = rng.choice(list(PARTS))
    return f"{rng.choice(PEOPLE)} on the {thing} in {rng.choice(PLACES)} :", thing


def make_review(rng: random.Random, thing: str) -> str:
    """A review of one to three clauses about the thing's parts."""
    clauses = []
    for part in rng.choices(PARTS[thing].split(), k=rng.randint(1, MAX_CLAUSES)):
        mood = rng.choices((GOOD, PLAIN, BAD), (0.25, 0.35, 0.4))[0]
        very = "very " if mood is not PLAIN and rng.random() < 0.25 else ""
        clauses.append(f"the {part} was {very}{rng.choice(mood)}")
    return "".join(f"{c} {rng.choice(('and', 'but'))} " for c in clauses[:-1]) + f"{clauses[-1]} ."


def sentiment(review: str) -> int | None:
    """The grammar's label: good minus bad adjectives, "very" counting double.

    None for a text outside the grammar.
    """
    grammar = rf"{CLAUSE}( (and|but) {CLAUSE}){{0,{MAX_CLAUSES - 1}}} \."
    if not re.fullmatch(grammar, review.strip()):
        return None
    return sum((2 if very else 1) * MOODS[mood] for _, very, mood in re.findall(CLAUSE, review))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    content = [*PEOPLE, *PLACES, *PARTS, *" ".join(PARTS.values()).split(), *MOODS]
    function = ["on", "the", "in", ":", "was", "very", "and", "but", "."]
    words = dict.fromkeys([*special, *content, *function])
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    start = [("<s>", vocabulary["<s>"])]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=start)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
    )


def make_config(tokenizer: Any, **extra: Any) -> LlamaConfig:
    """A LLaMA of 0.1M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **extra,
    )


def is_toy(policy: str) -> bool:
    """Whether a policy's folder is the toy's, of this version or an earlier one."""
    folder = Path(policy).resolve()
    toy = folder.parent
    return folder.name == "policy" and toy.parent == ROOT / "cache" and toy.name.startswith("toy-")


def prepare() -> Path:
    """The toy's folder, built if it is missing.

    It has policy/, reward_model/, train.jsonl and validation.jsonl. Its name has the hash of the
    source files that make the toy.
    """
    sources = [ROOT / name for name in SOURCES]
    stamp = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:8]
    folder = ROOT / "cache" / f"toy-{stamp}"
    if not folder.is_dir():
        start = time.monotonic()
        notice = "preparing the toy: a language, a policy, a reward model (once) ..."
        print(notice, file=sys.stderr, flush=True)
        partial = folder.with_name(f".{folder.name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"{partial}: cannot be made ({error.strerror})") from error
        summary = build(partial)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
        seconds = time.monotonic() - start
        result = f"{summary}; {seconds:.0f} s, in {folder.relative_to(ROOT)}"
        print(result, file=sys.stderr, flush=True)
    return folder


def filled(config: TrainConfig) -> TrainConfig:
    """train.py's settings with the defaults that depend on the policy. Raises ConfigError.

    The toy's policy has the toy's defaults, any other policy those of a language model.
    """
    on_toy = config.policy is None or is_toy(config.policy)
    return config.filled(DEFAULTS if on_toy else LANGUAGE_MODEL)


def stand_in(config: TrainConfig, stack: ExitStack) -> TrainConfig:
    """train.py's settings with the toy's policy, prompts and reward server if none are named.

    Every rank calls this function. Rank 0 prepares and serves. The server ends with `stack`.
    """
    config = filled(config)
    if config.policy is not None:
        return config
    folder = distributed.together(lambda: str(prepare()), only_first=True)
    host, port = distributed.together(lambda: stack.enter_context(server()), only_first=True)
    if distributed.rank() == 0:
        print(f"reward server: http://{host}:{port}")
    return dataclasses.replace(
        config,
        policy=f"{folder}/policy",
        train_data=f"{folder}/train.jsonl",
        val_data=config.val_data or f"{folder}/validation.jsonl",
        rm_host=host,
        rm_port=port,
    )


@contextlib.contextmanager
def server(wait: float = 120.0, batch: int = 32) -> Iterator[tuple[str, int]]:
    """serve_rm.py with the toy's reward model on a free loopback port: its host and port.

    The server ends with the block, or with this process. `wait` is the time in seconds that it may
    take to start. `batch` is its --inference-micro-batch-size: at 1 a reward depends on its text
    alone, bitwise.
    """
    model = prepare() / "reward_model"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "server.log").open("w+") as log:
        ready = Path(folder) / "ready"
        command = [
            *(sys.executable, str(ROOT / "serve_rm.py")),
            *("--reward-model", str(model)),
            *("--ready-file", str(ready), "--exit-with-parent"),
            *("--inference-micro-batch-size", str(batch)),
        ]
        of_rank = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        environment = {name: value for name, value in os.environ.items() if name not in of_rank}
        server = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment
        )
        try:
            end = time.monotonic() + wait
            while not ready.exists():
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    end_of_log = log.read()[-2000:]
                    raise RuntimeError(f"the toy's reward server did not start: {end_of_log}")
                time.sleep(0.05)
            host, port = ready.read_text().split()
            yield host, int(port)
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def build(folder: Path) -> str:
    """Make the toy in an empty folder and return one line about the result."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = make_tokenizer()
    end = [tokenizer.eos_token_id]

    def review_ids(thing: str) -> tuple[list[int], int]:
        text = make_review(rng, thing)
        return tokenizer(text, add_special_tokens=False)["input_ids"] + end, sentiment(text) or 0

    def preference() -> train_rm.Pair:
        prompt, thing = make_prompt(rng)
        (a, a_mood), (b, b_mood) = review_ids(thing), review_ids(thing)
        if a_mood == b_mood:
            return preference()
        ids = tokenizer(prompt)["input_ids"]
        chosen, rejected = (a, b) if a_mood > b_mood else (b, a)
        return ids + chosen, ids + rejected

    things = [make_prompt(rng) for _ in range(4000)]
    examples = [(tokenizer(prompt)["input_ids"], review_ids(thing)[0]) for prompt, thing in things]
    policy = LlamaForCausalLM(make_config(tokenizer))
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    plan = Plan(lr=5e-3, batch_size=64, epochs=6.4, seed=1, quiet=True)
    loss = sft.train_sft(policy, examples, pad, plan)

    pairs = [preference() for _ in range(4000)]
    reward_model = LlamaForSequenceClassification(make_config(tokenizer, num_labels=1))
    plan = Plan(lr=2e-3, batch_size=64, epochs=2.7, seed=2, quiet=True)
    train_rm.train_reward_model(reward_model, pairs[:3600], pad, plan)
    accuracy = train_rm.pair_accuracy(reward_model.eval(), pairs[3600:], pad)
    ids = [p for p, _ in examples[:256]]
    responses = sample_ids(policy.eval(), tokenizer, ids, seed=3)
    texts = [list(prompt) + response for prompt, response in zip(ids, responses, strict=True)]
    train_rm.standardise(reward_model, texts, pad)

    for model, name in ((policy, "policy"), (reward_model, "reward_model")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = list(dict.fromkeys(make_prompt(rng)[0] for _ in range(100_000)))
    for name, part in (("validation", prompts[-80:]), ("train", prompts[:1600])):
        lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in part)
        (folder / f"{name}.jsonl").write_text(lines)
    right = f"reward model right on {accuracy:.0%} of 400 held-out pairs"
    return f"SFT loss {loss:.2f} nats a token, {right}"


def sample_ids(
    model: nn.Module, tokenizer: Any, prompts: list[Any], seed: int, temperature: float = 1.0
) -> list[list[int]]:
    """One response to each prompt, as token ids."""
    ends, pad = (tokenizer.eos_token_id,), tokenizer.pad_token_id
    sampling = Sampling(MAX_NEW_TOKENS, end_ids=ends, pad_id=pad, temperature=temperature)
    seeds = [row_seed(seed, 0, i, 0) for i in range(len(prompts))]
    out = sample(model, prompts, seeds, sampling)
    return [row[mask].tolist() for row, mask in zip(out.response, out.mask, strict=True)]


def grammar_line(name: str, policy: Path, tokenizer: Any, temperature: float) -> str:
    """A line of the table: the grammar's judgement of 256 fresh samples of a policy."""
    rng = random.Random(7)
    model = load_policy(str(policy), tokenizer, torch.device("cpu"))
    prompts = [tokenizer(make_prompt(rng)[0])["input_ids"] for _ in range(256)]
    responses = sample_ids(model, tokenizer, prompts, 8, temperature)
    reviews = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
    labels = [sentiment(r) for r in reviews]
    positive = sum(s is not None and s > 0 for s in labels) / len(labels)
    grammatical = sum(s is not None for s in labels) / len(labels)
    return f"{name:>8} {positive:9.2f} {grammatical:12.2f}   {reviews[0]}"


def main() -> None:
    """Prepare the toy, or judge a run on it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--judge", metavar="RUN", help="run folder whose last checkpoint the grammar judges"
    )
    run = parser.parse_args().judge
    transformers.utils.logging.disable_progress_bar()
    folder = prepare()
    if run is None:
        print(folder)
        return
    last = checkpoint.newest(Path(run))
    if last is None:
        sys.exit(f"recipes/toy.py: --judge {run}: the folder has no checkpoints")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "policy")
    print("the grammar's own label of 256 fresh samples:")
    print(f"{'':>8} {'positive':>9} {'grammatical':>12}   a sample")
    temperature = json.loads((Path(run) / "config.json").read_text())["temperature"]
    print(grammar_line("before", folder / "policy", tokenizer, temperature))
    print(grammar_line("after", last, tokenizer, temperature))


if __name__ == "__main__":
    sys.exit(exits.run(main, name="recipes/toy.py"))
