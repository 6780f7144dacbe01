"""A step's record, which rows make one optimizer step, and what its micro-batches add up to."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reinforce.loss import clipped_tokens, normaliser
from reinforce.objective import Judged
from reinforce.rollout import Batch, Rollout
from reinforce.run import distributed
from reinforce.run.config import TrainConfig
from reinforce.text import Prompt


@dataclass(frozen=True)
class Step:
    """What one step made, on this rank."""

    number: int  # from 0
    prompts: list[Prompt]
    batch: Batch  # the rollout, and what the loss needs
    valid: Tensor  # (B,) bool
    judged: Judged
    greedy: Rollout | None
    advantage: Tensor  # (P, K) of all ranks


@dataclass(frozen=True)
class Update:
    """One optimizer step."""

    prompts: range  # of the rollout, whole groups of all ranks
    rows: list[int]  # of this rank; none if its prompts are in other steps
    n: int  # N of the loss, over the rows of all ranks; 0 if all their responses were dropped


def plan_updates(valid: Tensor, length: Tensor, config: TrainConfig) -> list[Update]:
    """The optimizer steps of one rollout, whole prompts in rollout order.

    valid and length (P, K) are of all ranks. --global-batch-size says how many rows each step
    takes, by default all.
    """
    p, k = valid.shape
    size = (config.global_batch_size or p * k) // k  # prompts
    ours = distributed.deal(range(p))  # the prompt of each of this rank's groups
    updates = []
    for first in range(0, p, size):
        prompts = range(first, min(first + size, p))
        n = normaliser(length[prompts], valid[prompts], config.loss_norm)
        rows = [b for b in range(k * len(ours)) if ours[b // k] in prompts]
        updates.append(Update(prompts, rows, n))
    return updates


@dataclass(frozen=True)
class Summed:
    """What one optimizer step's micro-batches added up to."""

    loss: float  # of all ranks
    clipped: float  # tokens of all ranks whose gradient the clipped ratio cut
    logp: Tensor  # (B, T) of this rank's rows, 0 in those of other steps


class Sums:
    """Adds up the micro-batches of one optimizer step on this rank."""

    def __init__(self, batch: Batch, ratio_clip: float) -> None:
        """Only the shape of `batch` is read."""
        self._loss, self._clipped = batch.advantage.new_zeros(()), batch.advantage.new_zeros(())
        self._logp, self._ratio_clip = torch.zeros_like(batch.rollout.logp), ratio_clip  # (B, T)

    def add(self, part: Batch, logp: Tensor, loss: Tensor) -> None:
        """One micro-batch: its loss, scalar, and logp (b, T)."""
        self._loss += loss.detach()
        if part.logp_old is not None:
            arguments = (logp, part.logp_old, part.advantage, part.weight)
            self._clipped += clipped_tokens(*arguments, self._ratio_clip)
        self._logp[part.rows, : logp.shape[1]] = logp.detach()[: len(part.rows)]

    def over_ranks(self) -> Summed:
        """The sums of all ranks; every rank must ask."""
        sums = distributed.gather([(self._loss.item(), self._clipped.item())])
        loss, clipped = zip(*sums, strict=True)
        finite = all(map(math.isfinite, loss))
        return Summed(math.fsum(loss) if finite else sum(loss), math.fsum(clipped), self._logp)
