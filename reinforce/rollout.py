"""B responses as tensors, and how their rows are cut into micro-batches: what the update works on.

Which tokens belong to a response is a length, kept as a mask, and never read back from token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rollout:
    """B responses: prompts padded on the left, responses on the right.

    So column S is every row's first response token.
    """

    prompt: Tensor  # (B, S) token ids
    prompt_mask: Tensor  # (B, S) bool
    response: Tensor  # (B, T) token ids, end token included
    mask: Tensor  # (B, T) bool
    logp: Tensor  # (B, T) float32, as sampled; 0 outside the mask
    finished: Tensor  # (B,) bool: ended by an end token or an end string

    @property
    def length(self) -> Tensor:
        """Response tokens per row, (B,)."""
        return self.mask.sum(1)

    @property
    def groups(self) -> list[int]:
        """The number of each row's prompt; rows of one prompt share it."""
        numbers: list[int] = distinct(self.prompt, self.prompt_mask)[1].tolist()
        return numbers

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Prompt tokens and response tokens of each row."""
        return self.prompt_mask.sum(1).tolist(), self.length.tolist()

    def to(self, device: torch.device) -> "Rollout":
        """The same on another device."""
        return Rollout(*(getattr(self, field.name).to(device) for field in fields(self)))

    def take(self, rows: Sequence[int]) -> "Rollout":
        """Some of the rows, without the padding that they do not need.

        Of no rows: one row of which no token counts.
        """
        if not rows:
            one = self.mask[:1, :1]
            return Rollout(
                self.prompt[:1, -1:],
                torch.ones_like(one),
                self.response[:1, :1],
                torch.zeros_like(one),
                torch.zeros_like(self.logp[:1, :1]),
                self.finished[:1],
            )
        index = torch.as_tensor(rows, dtype=torch.long, device=self.mask.device)
        left = self.prompt.shape[1] - int(self.prompt_mask[index].sum(1).max())
        right = int(self.mask[index].sum(1).max())
        return Rollout(
            self.prompt[index, left:],
            self.prompt_mask[index, left:],
            self.response[index, :right],
            self.mask[index, :right],
            self.logp[index, :right],
            self.finished[index],
        )


def join(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Rollouts of several batches as one, padded to the longest prompt and the longest response."""
    s = max(r.prompt.shape[1] for r in rollouts)
    t = max(r.response.shape[1] for r in rollouts)

    def padded(name: str, left: bool, fill: float) -> Tensor:
        parts = [getattr(r, name) for r in rollouts]
        widths = [(s - p.shape[1], 0) if left else (0, t - p.shape[1]) for p in parts]
        pairs = zip(parts, widths, strict=True)
        return torch.cat([nn.functional.pad(part, width, value=fill) for part, width in pairs])

    return Rollout(
        padded("prompt", True, pad_id),
        padded("prompt_mask", True, False),
        padded("response", False, pad_id),
        padded("mask", False, False),
        padded("logp", False, 0.0),
        torch.cat([r.finished for r in rollouts]),
    )


@dataclass(frozen=True)
class Batch:
    """Rows as the loss needs them."""

    rollout: Rollout
    advantage: Tensor  # (B,) float32
    weight: Tensor  # (B, T) float32, w of the loss, 0 in rows that do not count
    logp_old: Tensor | None = None  # (B, T), before the first of several optimizer steps
    rows: Sequence[int] = ()  # of a part: its rows' numbers in the whole

    def take(self, rows: Sequence[int]) -> "Batch":
        """Some of the rows.

        Of no rows: one row of weight 0, for a rank that has none left while others have.
        """
        part, at = self.rollout.take(rows), list(rows) or [0]
        t = part.mask.shape[1]
        weight = self.weight[at, :t] if rows else torch.zeros_like(self.weight[:1, :t])  # (b, T)
        old = None if self.logp_old is None else self.logp_old[at, :t]  # (b, T)
        return Batch(part, self.advantage[at], weight, old, rows)


def positions(mask: Tensor) -> Tensor:
    """Position of each real token among its row's real tokens, (B, L).

    So padding on the left does not move a prompt.
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def distinct(prompt: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The different prompts of some rows, (U, S), -1 where padded; and each row's number, (B,)."""
    ids = prompt.masked_fill(~prompt_mask, -1)  # (B, S)
    unique, row = torch.unique(ids, dim=0, return_inverse=True)
    return unique, row


def micro_batches(
    prompt: Sequence[int],
    response: Sequence[int],
    max_rows: int,
    max_tokens: int,
    group: Sequence[int] | None = None,
) -> list[list[int]]:
    """Rows sorted by length, in runs of at most `max_rows` rows and `max_tokens` tokens.

    A run has one row at least. `prompt` and `response` are the two lengths of each row. Padding
    counts: a run is as wide as its longest prompt and its longest response. With `group`, the
    number of each row's prompt, a run has no padding and computes a prompt once for all its rows;
    the rows of a group then stand beside each other.

    >>> micro_batches([8, 1, 1, 1], [1, 1, 2, 7], max_rows=3, max_tokens=20)
    [[1, 2], [3], [0]]
    >>> micro_batches([8, 8, 8, 8], [1, 2, 1, 2], max_rows=4, max_tokens=11, group=[0, 1, 0, 1])
    [[0, 2], [1], [3]]
    """
    length = [p + r for p, r in zip(prompt, response, strict=True)]
    order = sorted(range(len(length)), key=lambda row: length[row])
    if group is not None:
        longest = {group[row]: length[row] for row in order}  # the last of a group stays
        order.sort(key=lambda row: (longest[group[row]], group[row]))

    def tokens(run: Sequence[int]) -> int:
        if group is None:
            widest = max(prompt[row] for row in run), max(response[row] for row in run)
            return len(run) * sum(widest)
        once = {group[row]: prompt[row] for row in run}
        return sum(once.values()) + sum(response[row] for row in run)

    runs: list[list[int]] = []
    for row in order:
        longer = [*runs[-1], row] if runs else []
        if runs and len(longer) <= max_rows and tokens(longer) <= max_tokens:
            runs[-1] = longer
        else:
            runs.append([row])
    return runs
