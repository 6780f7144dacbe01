"""What one prompt gave: K responses as text and as numbers. Built from a rank's rollout, gathered over ranks, logged.

The reward model reads text that stands for exactly the sampled tokens: special tokens included, an
end token only where the response has one. Both halves are decoded together, since a tokenizer may
drop the space between them when it sees one alone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reinforce.objective import Judged
from reinforce.rollout import Rollout
from reinforce.text import Prompt, decoded, response_ids


@dataclass(frozen=True)
class Group:
    """One prompt's K responses; every list has K entries."""

    index: int  # of the prompt among its file's usable lines, from 0
    prompt: str
    response: list[str]
    reward: list[float | None]  # None: the reward server refused it
    kl: list[float] | None  # nats, of the whole response
    objective: list[float | None]
    valid: list[bool]  # counts in baselines and loss
    length: list[int]
    finished: list[bool]
    logp: list[float]  # of the whole response, as sampled


def make_groups(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rollout: Rollout,
    judged: Judged,
    valid: Tensor | None = None,
) -> list[Group]:
    """One Group a prompt from a rollout of B rows, row b of prompt b // (B / P); `valid` (B,) bool, by default all."""
    k, kl = len(judged.reward) // len(prompts), judged.kl
    valid = torch.ones_like(rollout.finished) if valid is None else valid  # (B,)
    ids, logp = response_ids(rollout), rollout.logp.sum(1).tolist()
    groups = []
    for j, prompt in enumerate(prompts):
        own = slice(j * k, (j + 1) * k)
        groups.append(
            Group(
                prompt.index,
                prompt.text,
                [decoded(tokenizer, prompt.ids, r, skip_special_tokens=True) for r in ids[own]],
                known(judged.reward[own]),
                None if kl is None else kl[own].tolist(),
                known(judged.objective[own]),
                valid[own].tolist(),
                [len(r) for r in ids[own]],
                rollout.finished[own].tolist(),
                logp[own],
            )
        )
    return groups


def known(values: Tensor) -> list[float | None]:
    """Numbers, with None for NaN."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def recorded(run: Path) -> dict[int, list[Group]]:
    """The validations in a run folder, {step: groups}, in order."""
    found: dict[int, list[Group]] = {}
    if not (run / "validation.jsonl").exists():
        return found
    for line in (run / "validation.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record.pop("step"), []).append(Group(**record))
    return found
