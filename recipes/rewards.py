"""Reward functions to start from: one float for each completion, from plain Python.

    ./launch.sh run --reward-fn recipes/rewards.py:solved -- --policy FOLDER --train-data sums.jsonl
    python recipes/rewards.py chain_sum 500 > sums.jsonl    the prompts and labels of `solved`

`solved` needs the package reasoning-gym, the others nothing. Each is called as
f(prompts=, completions=, labels=); docs/rewards.md tells more.
"""

import argparse
import functools
import importlib
import json
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

WORDS = 20  # as many words as `length` likes best
NUMBER = re.compile(r"answer is -?\d+(\.\d+)?\.?$", re.IGNORECASE)


def length(prompts: list[str], completions: list[str], labels: list[Any]) -> list[float]:
    """0 for WORDS words, less for fewer and for more: -1 for none."""
    return [-abs(len(text.split()) - WORDS) / WORDS for text in completions]


def pattern(prompts: list[str], completions: list[str], labels: list[Any]) -> list[float]:
    """1 where the completion ends in `answer is NUMBER`, else 0."""
    return [float(bool(NUMBER.search(text.strip()))) for text in completions]


def exact_match(prompts: list[str], completions: list[str], labels: list[Any]) -> list[float]:
    """1 where the completion is the label, but for case and white space at its ends, else 0."""
    if not all(isinstance(label, str) for label in labels):
        raise ValueError('each line of --train-data needs a "label", a string')
    pairs = zip(completions, labels, strict=True)
    return [float(text.strip().lower() == label.strip().lower()) for text, label in pairs]


def solved(prompts: list[str], completions: list[str], labels: list[Any]) -> list[float]:
    """reasoning-gym's own verdict, 0 to 1; the label is the problem, as this file writes it.

    The answer is what stands between <answer> and </answer>, or else the whole completion.
    """
    gym = reasoning_gym()
    rewards = []
    for text, problem in zip(completions, labels, strict=True):
        found = gym.utils.extract_answer(text)
        grade = grader(problem["metadata"]["source_dataset"])
        rewards.append(float(grade(text.strip() if found is None else found, problem)))
    return rewards


@functools.cache
def grader(kind: str) -> Callable[..., float]:
    """The function that grades answers to one kind of problem, made once."""
    return cast(Callable[..., float], reasoning_gym().get_score_answer_fn(kind))


def reasoning_gym() -> ModuleType:
    """The package. Raises ImportError with the line that installs it."""
    try:
        return importlib.import_module("reasoning_gym")
    except ModuleNotFoundError as error:
        install = f"{sys.executable} -m pip install reasoning-gym"
        raise ImportError(f"{error.name} is not installed; run: {install}") from error


def problems(name: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Lines of --train-data with the problem, its answer included, as label.

    Raises ValueError where reasoning-gym has no such problems, or loses their answers in JSON.
    """
    gym = reasoning_gym()
    lines = []
    for problem in gym.create_dataset(name, size=size, seed=seed):
        line = {
            "messages": [{"role": "user", "content": problem["question"]}],
            "label": {"answer": problem["answer"], "metadata": problem["metadata"]},
        }
        kept = json.loads(json.dumps(line))["label"]
        if solved([""], [f"<answer>{kept['answer']}</answer>"], [kept]) != [1.0]:
            raise ValueError(f"{name}: written as JSON, a problem no longer knows its answer")
        lines.append(line)
    return lines


def main() -> None:
    """Write problems of reasoning-gym; exit code 2 and one sentence where that cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="kind of problem, chain_sum for one; reasoning-gym lists them")
    parser.add_argument("size", type=int, help="how many problems to write")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default: 0)")
    args = parser.parse_args()
    try:
        for line in problems(args.name, args.size, args.seed):
            print(json.dumps(line))
    except (ImportError, ValueError, TypeError, AssertionError) as error:
        print(f"recipes/rewards.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
