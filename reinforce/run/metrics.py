"""The numbers of a step, means over all rows, or tokens, of all ranks. Those that do not say it themselves:

kl              per response, nats, as in the objective
entropy         mean of -logp per token, an estimate from the sampled tokens
zero_signal     share of groups whose valid rows all have the same objective, or are fewer than two: they teach group
                baselines nothing (null at K = 1)
logprob_gap     mean over responses of sum_t (sampler's - scorer's logp): signed, so errors may cancel
ratio_distance  mean over tokens of rho - 1 - log rho, rho = scorer's pi / sampler's: cannot cancel
ratio_outside   share of tokens with rho outside [0.9, 1.1]
ratio_clipped   share of tokens whose gradient the clipped ratio cut
refused         responses that the reward server has refused so far and that were left out; they have no reward
tokens          what was sampled, ReMax's greedy responses included
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from reinforce.run.group import Group


def summarise(groups: Sequence[Group], advantage: Sequence[float]) -> dict[str, Any]:
    """Metrics of one step's groups, of all ranks; advantage (P*K,)."""
    rows = [
        row
        for g in groups
        for row in zip(g.reward, g.objective, g.length, g.finished, g.logp, strict=True)
    ]
    rewards, objectives, length, finished, logp = (
        list(column) for column in zip(*rows, strict=True)
    )
    reward = [value for value in rewards if value is not None]
    objective = [value for value in objectives if value is not None]
    kl = [value for g in groups for value in g.kl or []]
    return {
        "reward": statistics.fmean(reward) if reward else None,
        "reward_std": statistics.stdev(reward) if len(reward) > 1 else 0.0,
        "kl": statistics.fmean(kl) if kl else None,
        "objective": statistics.fmean(objective) if objective else None,
        "advantage_std": statistics.stdev(advantage) if len(advantage) > 1 else 0.0,
        "entropy": -math.fsum(logp) / sum(length),
        "response_length": statistics.fmean(length),
        "finished": statistics.fmean(finished),
        "valid": statistics.fmean(v for g in groups for v in g.valid),
        "zero_signal": statistics.fmean(len(set(_counted(g))) < 2 for g in groups)
        if len(groups[0].reward) > 1
        else None,
    }


def summarise_updates(
    groups: Sequence[Group], updates: Sequence[tuple[float, float, float]], lr: float
) -> dict[str, Any]:
    """Means over a step's optimizer steps, of (loss, clipped tokens, length of the gradient) each; None where there was none."""
    losses, clipped, norms = ([update[i] for update in updates] for i in range(3))
    tokens = sum(n for g in groups for n, valid in zip(g.length, g.valid, strict=True) if valid)
    return {
        "loss": math.fsum(losses) / len(losses) if losses else None,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "lr": lr,
        "optimizer_steps": len(norms),
        "ratio_clipped": math.fsum(clipped) / max(1, tokens),
    }


def summarise_ratios(
    sums: Sequence[Sequence[float]], rows: int, tokens: int
) -> dict[str, float | None]:
    """Of sums over each prompt's responses (gap, rho - 1 - log rho, tokens with rho outside [0.9, 1.1]) the means."""
    if not sums:
        return dict.fromkeys(("logprob_gap", "ratio_distance", "ratio_outside"))
    gap, distance, outside = (math.fsum(column) for column in zip(*sums, strict=True))
    return {
        "logprob_gap": gap / rows,
        "ratio_distance": distance / tokens,
        "ratio_outside": outside / tokens,
    }


def speed(groups: Sequence[Group], greedy_tokens: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Sampled tokens, and what the step's parts took in seconds."""
    tokens = sum(sum(g.length) for g in groups) + greedy_tokens
    times = {
        f"time_{work}": seconds.get(work, 0.0)
        for work in ("rollout", "reward", "reference", "update")
    }
    return {"tokens": tokens, "tokens_per_s": tokens / times["time_rollout"], **times}


def _counted(group: Group) -> list[float]:
    return [r for r, v in zip(group.objective, group.valid, strict=True) if v and r is not None]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def mean_reward(groups: Sequence[Group]) -> tuple[float, float]:
    """Mean of all rewards, and its standard error."""
    return mean_and_error(rewards_of(groups))


def rewards_of(groups: Sequence[Group]) -> list[float]:
    """All rewards of responses that were not refused."""
    return [r for g in groups for r in g.reward if r is not None]


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n: different word n-grams over all word n-grams of the texts; falls towards 0 as they become alike.

    See "A Diversity-Promoting Objective Function for Neural Conversation Models", Li et al. (2016,
    arXiv 1510.03055).

    >>> distinct(["a b a b"])
    0.6666666666666666
    """
    words = [text.split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
