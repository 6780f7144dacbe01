"""The last screen of a run: before and after, a few responses, and where the files are."""

import json
import resource
import sys
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from reinforce.data.prompts import Data
from reinforce.run.folder import checkpoints_of
from reinforce.run.group import Group, recorded
from reinforce.run.metrics import distinct, mean_reward
from reinforce.run.printable import columns_of, escaped, wrapped
from reinforce.text import Prompt

SAMPLES = 5  # validation prompts
TRAINING_SAMPLES = 2  # of the first step and of the last one, where there is no validation
LONGEST = 4  # lines of a response


def print_summary(data: Data, folder: Path) -> None:
    """Validation before and after, or without one training responses; files; peak memory."""
    columns = columns_of(sys.stdout)
    validations = list(recorded(folder).values())
    if validations:
        _print_validation(data.held_out, validations[0], validations[-1], columns)
    else:
        _print_training(data.prompts, folder, columns)
    policies = checkpoints_of(folder)
    places = {
        "curves": folder / "curves.png",
        "metrics": folder / "metrics.jsonl",
        "responses": folder / "rollouts.jsonl",
        "policy": policies[-1] if policies else folder / "checkpoints",
    }
    print()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    if idle := sum(line["optimizer_steps"] == 0 for line in lines):
        print(f"{'no update':<13}in {idle} steps: none of their responses counted")
    if lines and lines[-1]["refused"]:
        print(f"{'left out':<13}{lines[-1]['refused']} responses that the reward server refused")
    for name, path in places.items():
        print(f"{name:<13}{path}")
    print(f"{'peak memory':<13}{peak_memory():.1f} GiB", flush=True)


def _print_validation(
    prompts: list[Prompt], before: list[Group], after: list[Group], columns: int
) -> None:
    """A table of both, and the same prompts' responses side by side."""
    rows = [[name, *_numbers(groups)] for name, groups in (("before", before), ("after", after))]
    head = ["validation", "reward", "tokens", "finished", "distinct-2"]
    widths = [12, 16, 9, 10, 12]
    while sum(widths) > columns and len(widths) > 2:
        widths.pop()
    print()
    for row in [head, *rows]:
        numbers = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=False)]
        print(f"{row[0]:<{widths[0]}}" + "".join(numbers))
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:SAMPLES]:
        print()
        _print_text("prompt", "", _asked(prompt), columns)
        _print_text("before", _signed(old.reward[0]), old.response[0], columns)
        _print_text("after", _signed(new.reward[0]), new.response[0], columns)


def _numbers(groups: Sequence[Group]) -> list[str]:
    """Reward, tokens, finished and distinct-2 of a validation."""
    reward, error = mean_reward(groups)
    n = len(groups)
    tokens, finished = sum(g.length[0] for g in groups) / n, sum(g.finished[0] for g in groups) / n
    variety = distinct([g.response[0] for g in groups])
    return [f"{reward:.3f} ± {error:.3f}", f"{tokens:.1f}", f"{finished:.2f}", f"{variety:.2f}"]


def _print_training(prompts: list[Prompt], folder: Path, columns: int) -> None:
    """Responses of the first step and of the last one."""
    asked = {prompt.index: _asked(prompt) for prompt in prompts}
    for name, groups in _first_and_last(folder / "rollouts.jsonl").items():
        for group, k in _spread(groups):
            print()
            prompt = asked.get(group["index"], group["prompt"])
            _print_text("prompt", "", prompt, columns)
            _print_text(name, _signed(group["reward"][k]), group["response"][k], columns)


def _first_and_last(rollouts: Path) -> dict[str, list[dict[str, Any]]]:
    """Groups of the first step and of the last one: "step 1" -> groups. The file may be large."""
    with rollouts.open() as file:
        first = list(islice(file, TRAINING_SAMPLES))
        file.seek(0)
        last = deque(file, TRAINING_SAMPLES)
    found: dict[str, list[dict[str, Any]]] = {}
    for lines, known in ((first, 0), (list(last), -1)):
        groups = [json.loads(line) for line in lines]
        steps = [group["step"] for group in groups]
        if steps:
            step = steps[known]
            found[f"step {step}"] = [group for group in groups if group["step"] == step]
    return found


def _spread(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """As many responses as are shown of a step, of different prompts where there are."""
    pairs = [(group, k) for group in groups for k in range(len(group["response"]))]
    return sorted(pairs, key=lambda pair: pair[1])[:TRAINING_SAMPLES]


def _print_text(name: str, number: str, text: str, columns: int) -> None:
    """A name, a number, and a text in the columns to the right of them."""
    indent = f"{name:<6}  " + (f"{number}  " if number else "")
    rows = wrapped(escaped(text), max(20, columns - len(indent)), LONGEST) or ["(empty)"]
    print(indent + rows[0])
    for row in rows[1:]:
        print(" " * len(indent) + row)


def _asked(prompt: Prompt) -> str:
    """The last turn of a conversation, or the text of a prompt that is none."""
    return prompt.messages[-1]["content"] if prompt.messages else prompt.text


def _signed(reward: float | None) -> str:
    return "refused" if reward is None else f"{reward:+.2f}"


def peak_memory() -> float:
    """The most memory that this process has had, GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
