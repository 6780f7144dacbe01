"""HH-RLHF from preference pairs to a report: SFT, reward model, REINFORCE, evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reinforce.run.children import EndedError

if TYPE_CHECKING:
    from reinforce.run.launch import Job

RECIPES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Size:
    """The lengths and numbers of one --size."""

    conversation: int  # tokens of a training conversation at most
    prompt: int  # tokens of a prompt at most
    examples: int  # examples of SFT, and pairs of the reward model, at most
    steps: int  # steps of REINFORCE
    prompts: int  # prompts of a step
    validation: int  # steps between two validations
    tests: int  # prompts of the evaluation


SIZES = {
    "quick": Size(128, 96, 128, steps=8, prompts=4, validation=4, tests=16),
    "hour": Size(192, 128, 2000, steps=100, prompts=4, validation=25, tests=100),
    "full": Size(1024, 768, 1_000_000, steps=400, prompts=32, validation=50, tests=1000),
}


def pipeline(job: Job, words: list[str]) -> None:
    """`words`: PAIRS [--size S] [--base MODEL] [flags of train.py]. Raises EndedError."""
    if not words or words[0].startswith("-"):
        raise EndedError(2, "hh needs a file of preference pairs: ./launch.sh hh PAIRS.jsonl.gz")
    pairs, words = words[0], words[1:]
    name, words = taken("--size", words, "hour")
    base, words = taken("--base", words, "")
    if name not in SIZES:
        raise EndedError(2, f"--size is '{name}'; give one of {', '.join(SIZES)}")
    size = SIZES[name]
    settings = f"""
        --num-rollout-samples {size.prompts} --num-rollouts-per-prompt 4
        --max-prompt-length {size.prompt} --max-new-tokens 48
        --max-steps {size.steps} --max-epochs 10 --val-check-interval {size.validation}
        --lr 1e-5 --initial-policy-kl-penalty 0.05
        --micro-batch-size 16 --micro-batch-tokens 2048
    """.split()
    # the reward model has learnt from whole replies alone
    if not any(word.startswith("--truncated") for word in words):
        settings += ["--truncated", "drop"]
    job.check(train=[*settings, *words])

    data = Path(job.output("recipes/hh.py", pairs, *skipping(words)))
    base = base or job.output("recipes/smollm2.py", "--model-only") + "/policy"
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    work = data / f"{name}-{key_of(base)}"
    job.make(
        work / "sft",
        "recipes/sft.py",
        *("--model", base, "--data", data / "train.jsonl", "--val-data", data / "validation.jsonl"),
        *("--max-length", size.conversation, "--max-examples", size.examples),
    )
    job.make(
        work / "reward_model",
        "recipes/train_rm.py",
        *("--model", work / "sft", "--pairs", data / "train.jsonl"),
        *("--test-pairs", data / "test.jsonl", "--lr", "3e-5"),
        *("--max-length", size.conversation, "--max-pairs", size.examples),
    )
    print("== reinforce", flush=True)
    job.serve("--reward-model", work / "reward_model")
    job.train(
        *("--policy", work / "sft", "--train-data", data / "train.jsonl"),
        *("--val-data", data / "validation.jsonl", *settings, *words),
    )
    print("== evaluate", flush=True)
    tokens = max(96, int(taken("--max-new-tokens", words, "96")[0]))
    job.run(
        "recipes/evaluate.py",
        *("--run", job.folder, "--test-data", data / "test.jsonl", "--max-prompts", size.tests),
        *("--max-new-tokens", tokens, "--rm-host", job.address[0], "--rm-port", job.address[1]),
    )


def taken(flag: str, words: list[str], default: str) -> tuple[str, list[str]]:
    """The last value of a flag, as for argparse, and the words without the flag.

    Raises EndedError if the flag has no value.
    """
    value, rest, i = default, [], 0
    while i < len(words):
        name, equals, given = words[i].partition("=")
        if name != flag:
            rest.append(words[i])
        elif equals:
            value = given
        elif i + 1 == len(words):
            raise EndedError(2, f"{flag} needs a value")
        else:
            i += 1
            value = words[i]
        i += 1
    return value, rest


def skipping(words: list[str]) -> list[str]:
    """The words that recipes/hh.py gets, too: --skip-bad-lines holds for prompts and pairs."""
    return [word for word in words if word == "--skip-bad-lines"]


def key_of(base: str) -> str:
    """Part of a folder's name: another base, other files in it, another recipe, another folder."""
    sources = (Path(__file__), *(RECIPES / f"{name}.py" for name in ("sft", "train_rm", "fit")))
    files = sorted(Path(base).glob("*")) if Path(base).is_dir() else []
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = b"".join([f"{base}{facts}".encode(), *(path.read_bytes() for path in sources)])
    return hashlib.sha256(text).hexdigest()[:8]
