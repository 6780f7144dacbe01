"""One prompt's K responses as text and as numbers, for the logs.

Groups are made from the rollout of one rank, then gathered over the ranks. The text in them is
without special tokens. Prompt and response are decoded together, since a tokenizer that sees the
response alone may drop the space between them.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reinforce.errors import ConfigError
from reinforce.objective import Judged
from reinforce.rollout import Rollout
from reinforce.text import Prompt, decoded, response_ids


@dataclass(frozen=True)
class Group:
    """One prompt's K responses; every list has K entries."""

    index: int  # number of the prompt among the well-formed lines of its file, from 0
    prompt: str
    response: list[str]
    reward: list[float | None]  # None: the reward server refused the response
    kl: list[float] | None  # nats, of the whole response; None: no KL was computed
    objective: list[float | None]  # None where the reward is None
    valid: list[bool]  # whether the response counts in baselines and loss
    length: list[int]  # tokens
    finished: list[bool]  # whether the response ended by itself
    logp: list[float]  # nats, of the whole response, by the sampler


def make_groups(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    judged: Judged,
    valid: Tensor | None = None,
) -> list[Group]:
    """One Group a prompt, from a rollout of B rows of which row b is of prompt b // (B / P).

    `valid` (B,) bool: all rows by default.
    """
    k, kl = len(judged.reward) // len(prompts), judged.kl
    valid = torch.ones_like(rollout.finished) if valid is None else valid  # (B,)
    ids, logp = response_ids(rollout), rollout.logp.sum(1).tolist()

    def group(j: int, prompt: Prompt) -> Group:
        rows = slice(j * k, (j + 1) * k)
        texts = [decoded(tokenizer, prompt.ids, r, skip_special_tokens=True) for r in ids[rows]]
        return Group(
            index=prompt.index,
            prompt=prompt.text,
            response=texts,
            reward=known(judged.reward[rows]),
            kl=None if kl is None else kl[rows].tolist(),
            objective=known(judged.objective[rows]),
            valid=valid[rows].tolist(),
            length=[len(r) for r in ids[rows]],
            finished=rollout.finished[rows].tolist(),
            logp=logp[rows],
        )

    return [group(j, prompt) for j, prompt in enumerate(prompts)]


def known(values: Tensor) -> list[float | None]:
    """The numbers of a vector (B,), with None for NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def recorded(run: Path) -> dict[int, list[Group]]:
    """The validations in a run folder as {step: groups}, in the order of validation.jsonl.

    Raises ConfigError on a damaged line.
    """
    found: dict[int, list[Group]] = {}
    if not (run / "validation.jsonl").exists():
        return found
    path = run / "validation.jsonl"
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            found.setdefault(record.pop("step"), []).append(Group(**record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: line {number} is damaged; take it out") from error
    return found
