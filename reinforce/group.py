"""What one prompt gave: K responses as text and as numbers. Built from a rank's rollout, gathered over ranks, logged.

The reward model reads text that stands for exactly the sampled tokens: special tokens included, an end token only where the
response has one. Both halves are decoded together, since a tokenizer may drop the space between them when it sees one alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reinforce.data import Prompt
from reinforce.objective import Judged
from reinforce.rollout import Rollout


@dataclass(frozen=True)
class Group:
    """One prompt's K responses; every list has K entries."""

    index: int  # of the prompt among its file's usable lines, from 0
    prompt: str
    response: list[str]
    reward: list[float]
    kl: list[float] | None  # nats, of the whole response
    objective: list[float]
    valid: list[bool]  # counts in baselines and loss
    length: list[int]
    finished: list[bool]
    logp: list[float]  # of the whole response, as sampled


def decoded(tokenizer: Any, prompt: Sequence[int], response: Sequence[int], skip_special_tokens: bool) -> str:
    """The response's part of the decoded whole."""
    how = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
    whole: str = tokenizer.decode([*prompt, *response], **how)
    return whole[len(tokenizer.decode(list(prompt), **how)) :]


def response_ids(rollout: Rollout) -> list[list[int]]:
    """Token ids of each row's response, end token included."""
    return [row[:n] for row, n in zip(rollout.response.tolist(), rollout.length.tolist(), strict=True)]


def reward_request(tokenizer: Any, prompts: Sequence[Prompt], rollout: Rollout, as_text: bool) -> dict[str, list[Any]]:
    """Arguments of RewardClient.rewards for a rollout of B rows, row b of prompt b // (B / P).

    Messages if every prompt has them and `as_text` is not asked for, else one text a row; always with prompts, finished and
    the response without special tokens, for rewards that are plain functions of a text.
    """
    ids = response_ids(rollout)
    k = len(ids) // len(prompts)
    rows = [(prompts[b // k], ids[b]) for b in range(len(ids))]
    plain = [decoded(tokenizer, p.ids, r, skip_special_tokens=True) for p, r in rows]
    request: dict[str, list[Any]] = {
        "prompts": [p.text for p, _ in rows], "finished": rollout.finished.tolist(), "completions": plain,
    }  # fmt: skip
    if any(p.label is not None for p in prompts):
        request["labels"] = [p.label for p, _ in rows]
    if not as_text and all(p.messages is not None for p in prompts):
        said = [{"role": "assistant", "content": text} for text in plain]
        request["messages"] = [[*(p.messages or []), answer] for (p, _), answer in zip(rows, said, strict=True)]
    else:
        request["query"] = [p.text + decoded(tokenizer, p.ids, r, skip_special_tokens=False) for p, r in rows]
    return request


def make_groups(
    tokenizer: Any, prompts: Sequence[Prompt], rollout: Rollout, judged: Judged, valid: Tensor | None = None
) -> list[Group]:
    """One Group a prompt from a rollout of B rows, row b of prompt b // (B / P); `valid` (B,) bool, by default all."""
    k, kl = len(judged.reward) // len(prompts), judged.kl
    valid = torch.ones_like(rollout.finished) if valid is None else valid  # (B,)
    ids, logp = response_ids(rollout), rollout.logp.sum(1).tolist()
    groups = []
    for j, prompt in enumerate(prompts):
        own = slice(j * k, (j + 1) * k)
        groups.append(Group(
            prompt.index, prompt.text, [decoded(tokenizer, prompt.ids, r, skip_special_tokens=True) for r in ids[own]],
            judged.reward[own].tolist(), None if kl is None else kl[own].tolist(), judged.objective[own].tolist(),
            valid[own].tolist(), [len(r) for r in ids[own]], rollout.finished[own].tolist(), logp[own],
        ))  # fmt: skip
    return groups
