"""The surrogate: a scalar whose gradient is the REINFORCE estimate.

    loss = -(1/N) sum_b A_b sum_t w_bt logp_bt
    grad loss = -(1/N) sum_b A_b grad log pi(y_b)         with w_bt = 1 on the response's tokens

Its value measures nothing; only its gradient is used. N is one number for the whole optimizer step:
all ranks, all micro-batches. Dividing by a micro-batch's own count instead gives tokens of short
micro-batches more weight. See "Policy Gradient Methods for Reinforcement Learning with Function
Approximation", Sutton et al. (1999).
"""

import torch
from torch import Tensor


def _check(logp: Tensor, advantage: Tensor, weight: Tensor, divisor: float) -> None:
    if logp.ndim != 2 or weight.shape != logp.shape or advantage.shape != logp.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logp, advantage, weight))
        raise ValueError(f"expected logp (B, T), advantage (B,), weight (B, T); got {shapes}")
    if not divisor > 0:
        raise ValueError(
            f"divisor must be positive, got {divisor}: a step without valid rows has no loss"
        )


def _weighted(per_token: Tensor, factor: Tensor, weight: Tensor, divisor: float) -> Tensor:
    """-sum_b factor_b sum_t weight * per_token / divisor.

    Tokens of weight 0 are never read, inf and NaN included.
    """
    per_token = per_token.masked_fill(weight == 0, 0.0)  # (B, T)
    return -(factor * (weight * per_token).sum(1)).sum() / divisor


def reinforce_loss(logp: Tensor, advantage: Tensor, weight: Tensor, divisor: float) -> Tensor:
    """-sum_b A_b sum_t weight * logp / divisor, scalar.

    logp (B, T), advantage (B,), weight (B, T) bool or float.

    >>> logp, weight = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]])
    >>> reinforce_loss(logp, torch.tensor([0.5]), weight, divisor=2)
    tensor(0.2500)
    """
    _check(logp, advantage, weight, divisor)
    return _weighted(logp, advantage, weight, divisor)


def clipped_loss(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, weight: Tensor, divisor: float, clip: float
) -> Tensor:
    """For several optimizer steps from one rollout, scalar.

        -sum_b sum_t weight * min(rho A, clip(rho, 1 - clip, 1 + clip) A) / divisor

    rho = exp(logp - logp_old) per token, (B, T). At rho = 1 the gradient is `reinforce_loss`'s;
    away from it, biased. See "Proximal Policy Optimization Algorithms", Schulman et al. (2017,
    arXiv 1707.06347).

    >>> logp, one = torch.tensor([[-1.0]]), torch.tensor([1.0])
    >>> clipped_loss(logp, logp - 1, one, torch.tensor([[True]]), divisor=1, clip=0.2)
    tensor(-1.2000)
    """
    _check(logp, advantage, weight, divisor)
    if logp_old.shape != logp.shape:
        raise ValueError(
            f"logp_old {tuple(logp_old.shape)} and logp {tuple(logp.shape)} differ in shape"
        )
    d = (logp - logp_old.detach()).masked_fill(weight == 0, 0.0)  # (B, T)
    ratio = d.exp()  # (B, T)
    gain = advantage[:, None] * ratio  # (B, T)
    clipped = advantage[:, None] * ratio.clamp(1 - clip, 1 + clip)  # (B, T)
    return _weighted(torch.minimum(gain, clipped), torch.ones_like(advantage), weight, divisor)


def clipped_tokens(
    logp: Tensor, logp_old: Tensor, advantage: Tensor, weight: Tensor, clip: float
) -> Tensor:
    """Number of tokens, scalar, whose gradient `clipped_loss` cuts.

    Those with rho above 1 + clip where A > 0, and below 1 - clip where A < 0.

    >>> logp, ones = torch.tensor([[0.5, -0.5]]), torch.ones(1, 2)
    >>> clipped_tokens(logp, torch.zeros(1, 2), torch.tensor([1.0]), ones, clip=0.2)
    tensor(1)
    """
    ratio = (logp.detach() - logp_old).exp()  # (B, T)
    sign = advantage.sign()[:, None]  # (B, 1)
    cut = ((ratio > 1 + clip) & (sign > 0)) | ((ratio < 1 - clip) & (sign < 0))  # (B, T)
    return (cut & (weight != 0)).sum()


def token_weights(mask: Tensor, norm: str) -> Tensor:
    """The w of the formula, (B, T): the mask, or for norm "length" (the tutorial's) mask / length.

    "length" follows E[(R - b) / |y| grad log pi] = grad E[R / |y|] - (b - beta) grad E[1 / |y|],
    since R falls by beta log pi: another objective, in which an advantage, of either sign, counts
    more in a short response.

    >>> token_weights(torch.tensor([[True, True, False]]), "length")
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    if norm not in ("sequence", "token", "length"):
        raise ValueError(f"loss norm must be sequence, token or length, got {norm!r}")
    weight = mask.to(torch.get_default_dtype())  # (B, T)
    return weight / weight.sum(1, keepdim=True).clamp(min=1) if norm == "length" else weight


def normaliser(length: Tensor, valid: Tensor, norm: str) -> int:
    """The N of the formula over all rows of an optimizer step; length and valid have one shape.

    "sequence" and "length" count valid rows, "token" counts their tokens. "sequence" is the
    unbiased default. "token" divides by a number that depends on the responses: with many rows its
    expectation nears the true gradient over the mean length, with few it favours short batches.
    From one norm to another the gradient changes by a factor of about a response's length. AdamW
    undoes a constant factor, a limit on the gradient's length does not.

    >>> normaliser(torch.tensor([3, 5]), torch.tensor([True, False]), "token")
    3
    """
    return int((length * valid).sum() if norm == "token" else valid.sum())
