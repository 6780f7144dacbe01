"""Baselines: objective R (P, K) -> advantage A = R - b (P, K), as pure functions.

A baseline that does not depend on the row's own response leaves E[A * grad log pi] equal to the
gradient of E[R] and only changes its variance: E[b * grad log pi(y)] = b * sum_y grad pi(y) = 0.
`none`, `Ema`, `rloo` and `remax` are of that kind. `group_mean` and `grpo` are not, and their
docstrings say by how much.

What is called `reward` here is R, the objective: KL and penalty are in it already.
`valid` (P, K) bool marks the rows that count. Rows that do not get advantage 0, and their rewards,
NaN included, are never read. None of these functions writes to its inputs. Left out: whitening over
the batch, and leave-one-out with a standard deviation, which explodes (rewards 1, 0, 0, 0 give
advantages of a million).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _checked(reward: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (reward with 0 where invalid, valid), both (P, K).

    Raises ValueError on any other shape or type.
    """
    if reward.ndim != 2 or not reward.is_floating_point():
        raise ValueError(
            f"reward must be a float tensor (P, K), got {reward.dtype} {tuple(reward.shape)}"
        )
    if valid is None:
        valid = torch.ones_like(reward, dtype=torch.bool)
    if valid.shape != reward.shape or valid.dtype != torch.bool:
        raise ValueError(
            f"valid must be bool {tuple(reward.shape)}, got {valid.dtype} {tuple(valid.shape)}"
        )
    return reward.masked_fill(~valid, 0.0), valid


def _shifted(reward: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards minus their group's first valid one (P, K), valid (P, K), and its sums (P, 1).

    A group's advantages do not change when a constant is added to its rewards. Subtracting a
    member first makes equal rewards give exactly 0: the mean of seven equal floats is often one
    rounding off, and `grpo` would divide that by almost nothing.
    """
    reward, valid = _checked(reward, valid)
    first = reward.gather(1, valid.int().argmax(1, keepdim=True))  # (P, 1)
    shifted = (reward - first).masked_fill(~valid, 0.0)  # (P, K)
    return shifted, valid, valid.sum(1, keepdim=True)


def none(reward: Tensor, valid: Tensor | None = None) -> Tensor:
    """No baseline: A = R. Unbiased, and noisy where rewards are far from 0.

    See "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
    Williams (1992).

    >>> none(torch.tensor([[1.0, 3.0]]))
    tensor([[1., 3.]])
    """
    return _checked(reward, valid)[0]


def rloo(reward: Tensor, valid: Tensor | None = None) -> Tensor:
    """Leave-one-out: A_i = R_i - mean of the group's other valid rewards. Unbiased; needs K >= 2.

    The baseline of row i never sees R_i. Equal to K/(K-1) * (R_i - group mean). A group with one
    valid row gets 0.

    See "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", Ahmadian et al. (2024, arXiv 2402.14740), and "Buy 4 REINFORCE Samples, Get a Baseline
    for Free!", Kool et al. (2019).

    >>> rloo(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    tensor([[ 0.3333, -1.0000, -1.0000,  1.6667]])
    """
    reward, valid, n = _shifted(reward, valid)
    total = reward.sum(1, keepdim=True)  # (P, 1)
    others = (total - reward) / (n - 1).clamp(min=1)  # (P, K), mean over valid j != i
    return (reward - others).masked_fill(~valid | (n < 2), 0.0)


def group_mean(reward: Tensor, valid: Tensor | None = None) -> Tensor:
    """Group mean, the row's own reward included: A_i = R_i - mean(R). Biased.

    E[gradient] = (K-1)/K times the true one while every row is valid: a smaller learning rate,
    which AdamW undoes. See "Understanding R1-Zero-Like Training: A Critical Perspective" (Dr.
    GRPO), Liu et al. (2025, arXiv 2503.20783).

    >>> group_mean(torch.tensor([[1.0, 0.0, 0.0, 3.0]]))
    tensor([[ 0., -1., -1.,  2.]])
    """
    reward, valid, n = _shifted(reward, valid)
    mean = reward.sum(1, keepdim=True) / n.clamp(min=1)  # (P, 1)
    return (reward - mean).masked_fill(~valid, 0.0)


def grpo(reward: Tensor, valid: Tensor | None = None) -> Tensor:
    """Group mean over group deviation: A_i = (R_i - mean(R)) / (std(R) + 1e-6). Biased.

    std divides by n - 1, n valid rows. The bias is in direction, not in length alone: a group's
    weight depends on its own rewards, so prompts whose rewards differ little count as much as those
    where they differ a lot. On 40 random problems of one prompt, enumerated (K = 3), the cosine to
    the true gradient is 0.97 in the median and 0.36 at least. Rewards of 0 and 1 are a special
    case: of one prompt the gradient is that of an increasing function of P(reward 1). See
    "DeepSeekMath", Shao et al. (2024, arXiv 2402.03300).

    >>> grpo(torch.tensor([[1.0, 3.0]]))
    tensor([[-0.7071,  0.7071]])
    """
    advantage = group_mean(reward, valid)  # (P, K), 0 where invalid
    valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    degrees = (valid.sum(1, keepdim=True) - 1).clamp(min=1)  # (P, 1)
    std = (advantage.square().sum(1, keepdim=True) / degrees).sqrt()  # (P, 1)
    return advantage / (std + 1e-6)


def remax(reward: Tensor, greedy_reward: Tensor, valid: Tensor | None = None) -> Tensor:
    """ReMax: A_i = R_i - R(greedy response of the same prompt), greedy_reward (P,). Unbiased.

    The greedy response is a function of the prompt, not of the sampled response. It costs one more
    response per prompt, is scored exactly as the others, and is never in the loss. See "ReMax: A
    Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language
    Models", Li et al. (2023, arXiv 2310.10505).

    >>> remax(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0]))
    tensor([[-1.,  1.]])
    """
    reward, valid = _checked(reward, valid)
    if greedy_reward.shape != reward.shape[:1]:
        raise ValueError(
            f"greedy_reward must be ({reward.shape[0]},), got {tuple(greedy_reward.shape)}"
        )
    return (reward - greedy_reward[:, None]).masked_fill(~valid, 0.0)


class Ema:
    """Moving average of past rollouts: A = R - b. Unbiased.

    Then b <- decay * b + (1 - decay) * mean(valid R). b starts at 0 and is not corrected for it, so
    the first rollouts have little baseline. See Williams (1992), "reinforcement comparison".

    >>> baseline = Ema(decay=0.9)
    >>> baseline(torch.tensor([[1.0, 3.0]])), round(baseline.value, 6)
    (tensor([[1., 3.]]), 0.2)
    """

    def __init__(self, decay: float) -> None:
        """`decay` in [0, 1): the share of the old value that one rollout keeps."""
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.value = 0.0

    @property
    def state(self) -> float:
        """What a run saves, and gives back when it goes on."""
        return self.value

    @state.setter
    def state(self, value: float) -> None:
        self.value = value

    def __call__(self, reward: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the advantage (P, K) against the past, then learn from this rollout."""
        reward, valid = _checked(reward, valid)
        advantage = (reward - self.value).masked_fill(~valid, 0.0)  # (P, K)
        if valid.any():
            mean = (reward.sum(dtype=torch.float64) / valid.sum()).item()
            self.value = self.decay * self.value + (1 - self.decay) * mean
        return advantage


@dataclass(frozen=True)
class Baseline:
    """An estimator as the loop calls it, and what it needs."""

    # (R, valid) -> A; with a greedy response (R, greedy R, valid) -> A
    function: Callable[..., Tensor]
    min_k: int = 1  # responses of one prompt
    needs_greedy: bool = False  # R of the greedy response, too

    def __call__(
        self, objective: Tensor, valid: Tensor, greedy_objective: Tensor | None = None
    ) -> Tensor:
        """objective, valid (P, K), of a greedy response (P,) -> advantage (P, K)."""
        if self.needs_greedy:
            return self.function(objective, greedy_objective, valid)
        return self.function(objective, valid)

    @property
    def state(self) -> Any:
        """A JSON value that is all the function remembers; None if it remembers nothing."""
        return getattr(self.function, "state", None)

    def restore(self, state: Any) -> None:
        """Give the function back a `state` that was read before; nothing happens without one."""
        if hasattr(self.function, "state"):
            self.function.state = state


Maker = Callable[[float], Baseline]  # called with --ema-decay
BASELINES: dict[str, Maker] = {  # the names of --baseline
    "none": lambda decay: Baseline(none),
    "ema": lambda decay: Baseline(Ema(decay)),
    "rloo": lambda decay: Baseline(rloo, min_k=2),
    "remax": lambda decay: Baseline(remax, needs_greedy=True),
    "group-mean": lambda decay: Baseline(group_mean, min_k=2),
    "grpo": lambda decay: Baseline(grpo, min_k=2),
}
