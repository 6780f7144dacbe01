"""The objective that training maximises, and the rows that count.

    R = r(x, y) - beta * KL - missing-EOS penalty of an unfinished response

The KL is in the reward, before the baseline, and no gradient flows through it. By default it is k1
summed over the response, the one choice whose REINFORCE gradient is that of KL(pi || pi_ref); see
`kl.py` for the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Judged:
    """What B responses are worth."""

    reward: Tensor  # (B,) float64, r
    kl: Tensor | None  # (B,) float64, nats, as it is in the objective; None if beta = 0
    objective: Tensor  # (B,) float64, R


def objective(
    reward: Tensor,
    kl: Tensor | None,
    beta: float,
    finished: Tensor,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """R of each response, all (B,) on one device; `kl` None stands for beta = 0.

    >>> r, kl = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])
    >>> objective(r, kl, 0.05, torch.tensor([True, False]), missing_eos_penalty=0.5)
    tensor([0.9000, 0.5000])
    """
    if kl is not None:
        reward = reward - beta * kl
    if missing_eos_penalty is not None:
        reward = reward - missing_eos_penalty * (~finished).to(reward.dtype)
    return reward


def counted(finished: Tensor, reward: Tensor, truncated: str) -> Tensor:
    """`valid` of each response, (B,) bool: it has a reward, and with --truncated drop has finished.

    A reward of NaN stands for a response that the server refused. Leaving rows out is biased. For
    one prompt, rloo climbs E[R | counted] + beta log P(counted), and none climbs
    E[R * 1{counted}] + beta P(counted). The first is E_q[r] - beta KL(q || pi_ref), q = pi given
    counted: nothing pulls on P(counted). Over several prompts, N counts the rows of all of them, so
    a prompt with few counted rows weighs less: rloo weighs the gradient of prompt x by
    E[n 1{n >= 2} / N], n its counted rows.

    >>> counted(torch.tensor([True, False, True]), torch.tensor([1.0, 1.0, torch.nan]), "drop")
    tensor([ True, False, False])
    """
    answered = ~torch.isnan(reward)
    return answered & finished if truncated == "drop" else answered
