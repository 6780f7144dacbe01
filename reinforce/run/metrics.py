"""The metrics of a step: one line of metrics.jsonl, computed from all rows of all ranks.

step             number of the step, from 1
reward           mean over the responses that have a reward
reward_std       standard deviation of the same rewards
kl               mean over responses, nats, as in the objective; null at beta = 0
objective        mean of R over the responses that have a reward
advantage_std    standard deviation of the advantages over responses
entropy          mean of -logp over the sampled tokens, an estimate, nats
response_length  mean over responses, tokens
finished         share of responses that ended by themselves
valid            share of responses that count in baselines and loss
zero_signal      share of groups whose valid responses all have the same reward, or that have fewer
                 than two: of them a group baseline leaves nothing but differences of KL and of the
                 missing-EOS penalty; null at K = 1
loss             mean over the step's optimizer steps
grad_norm        length of the gradient before clipping, mean over the step's optimizer steps
lr               learning rate
optimizer_steps  number of optimizer steps
ratio_clipped    share of the tokens of valid responses whose gradient the clipped ratio cut
logprob_gap      mean over responses of sum_t (logp of the sampler - logp of the scorer);
                 signed, so errors may cancel
ratio_distance   mean over tokens of rho - 1 - log rho, never negative, so nothing cancels;
                 rho = pi of the scorer / pi of the sampler
ratio_outside    share of tokens with rho outside [0.9, 1.1]
refused          responses that the reward server has refused so far and that were left out
tokens           sampled tokens, the greedy responses of ReMax included
tokens_per_s     tokens / time_rollout
time_rollout     seconds of sampling
time_reward      seconds of waiting for rewards after the reference has scored; the server works
                 meanwhile
time_reference   seconds of the reference model
time_update      seconds of everything else in the step
prompts_seen     prompts taken so far, counted again in each epoch
epoch            the epoch of this step, from 0
val_reward       mean reward of the validation after this step; missing where there is none
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from reinforce.run.group import Group


def summarise(groups: Sequence[Group], advantage: Sequence[float]) -> dict[str, Any]:
    """Metrics of the groups of all ranks in one step; advantage (P*K,)."""
    reward = rewards_of(groups)
    objective = [value for g in groups for value in g.objective if value is not None]
    kl = [value for g in groups for value in g.kl or []]
    logp = [value for g in groups for value in g.logp]
    length = [value for g in groups for value in g.length]
    finished = [value for g in groups for value in g.finished]
    silent = [len(set(_counted(g))) < 2 for g in groups]  # groups without a signal from rewards
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
        "zero_signal": statistics.fmean(silent) if len(groups[0].reward) > 1 else None,
    }


def summarise_updates(
    groups: Sequence[Group], updates: Sequence[tuple[float, float, float]], lr: float
) -> dict[str, Any]:
    """Metrics of a step's optimizer steps, given as (loss, clipped tokens, gradient norm) each.

    Means are None in a step without an optimizer step.
    """
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
    """The three metrics that compare sampler and scorer; None where nothing was scored.

    `sums` has a row for each prompt, summed over its responses: gap, rho - 1 - log rho, number of
    tokens with rho outside [0.9, 1.1]. `rows` and `tokens` are counts over all ranks.
    """
    if not sums:
        return dict.fromkeys(("logprob_gap", "ratio_distance", "ratio_outside"))
    gap, distance, outside = (math.fsum(column) for column in zip(*sums, strict=True))
    return {
        "logprob_gap": gap / rows,
        "ratio_distance": distance / tokens,
        "ratio_outside": outside / tokens,
    }


def speed(groups: Sequence[Group], greedy_tokens: int, seconds: dict[str, float]) -> dict[str, Any]:
    """Number of sampled tokens, tokens per second, and seconds for each part of the step."""
    tokens = sum(sum(g.length) for g in groups) + greedy_tokens
    parts = ("rollout", "reward", "reference", "update")
    times = {f"time_{part}": seconds.get(part, 0.0) for part in parts}
    return {"tokens": tokens, "tokens_per_s": tokens / times["time_rollout"], **times}


def _counted(group: Group) -> list[float]:
    """The rewards of the valid responses."""
    return [r for r, v in zip(group.reward, group.valid, strict=True) if v and r is not None]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; 0 for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def mean_reward(groups: Sequence[Group]) -> tuple[float, float]:
    """Mean of all rewards and its standard error."""
    return mean_and_error(rewards_of(groups))


def rewards_of(groups: Sequence[Group]) -> list[float]:
    """The rewards of all responses but refused ones."""
    return [r for g in groups for r in g.reward if r is not None]


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct-n: the number of different word n-grams over that of all word n-grams of the texts.

    It falls towards 0 as the texts become alike.

    See "A Diversity-Promoting Objective Function for Neural Conversation Models", Li et al. (2016,
    arXiv 1510.03055).

    >>> distinct(["a b a b"])
    0.6666666666666666
    """
    words = [text.split() for text in texts]
    grams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
