"""Experience: responses to prompts, their rewards, and the objective that training maximises.

    R = r(x, y) - beta * KL - missing-EOS penalty of an unfinished response

The KL is in the reward, before the baseline, and no gradient flows through it. By default it is k1 summed over the response,
the one choice whose REINFORCE gradient is that of KL(pi || pi_ref); see `kl.py` for the others.
"""

import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reinforce import device as devices
from reinforce import distributed, kl
from reinforce.actor import Actor
from reinforce.data import Prompt
from reinforce.group import Group, Judged, make_groups, reward_request
from reinforce.sampler import Rollout, Sampling, micro_batches, row_seed, sample_in_batches

VALIDATION = -1  # the "step" of validation's random numbers: the same at every validation, so before and after compare


def rollout(actor: Actor, prompts: Sequence[Prompt], k: int, step: int, how: Sampling, max_rows: int) -> Rollout:
    """k responses to each prompt, row b to prompt b // k, each row with its own random numbers.

    Call it under `distributed.gathered(actor.policy)`: ranks stop at different lengths.
    """
    seeds = [row_seed(actor.config.seed, step, p.index, j) for p in prompts for j in range(k)]
    with devices.autocast(actor.device, actor.bf16):
        return sample_in_batches(actor.policy.decode, [p.ids for p in prompts], seeds, how, max_rows, actor.device)


def ask(actor: Actor, prompts: Sequence[Prompt], out: Rollout) -> Tensor:
    """The reward server's word on each row, (B,) float64."""
    request = reward_request(actor.tokenizer, prompts, out, as_text=actor.config.rm_format == "query")
    return torch.tensor(actor.client.rewards(**request), dtype=torch.float64)


def in_step(parts: list[list[int]]) -> list[list[int]]:
    """Micro-batches of rows, with empty ones added until every rank has as many: a sharded model's forward pass needs all ranks."""
    return parts + [[]] * (max(distributed.gather([len(parts)])) - len(parts))


@torch.no_grad()
def score(actor: Actor, scorer: nn.Module, out: Rollout) -> Tensor:
    """logp of every response token under `scorer`, (B, T) float32, in micro-batches; 0 outside the mask."""
    logp = torch.zeros_like(out.logp)  # (B, T)
    for rows in in_step(micro_batches(out.total_length.tolist(), actor.config.forward_micro_batch_size, sys.maxsize)):
        part = out.take(rows)
        with devices.autocast(actor.device, actor.bf16):
            scored = scorer(part.prompt, part.prompt_mask, part.response, part.mask)  # (b, t)
        logp[rows, : part.mask.shape[1]] = scored[: len(rows)]
    return logp


def judge(actor: Actor, prompts: Sequence[Prompt], out: Rollout) -> Judged:
    """Reward and objective of a rollout's rows. A rank whose server fails it takes the others along."""
    config, start = actor.config, time.perf_counter()
    reward = distributed.together(lambda: ask(actor, prompts, out))  # (B,)
    seconds = time.perf_counter() - start
    objective, penalty = reward, None  # (B,)
    if actor.reference is not None:
        estimate = {"k1": kl.k1, "abs": kl.abs_k1}[config.kl]
        penalty = kl.per_response(estimate(out.logp, score(actor, actor.reference, out)), out.mask, config.kl_reduce).double().cpu()
        objective = objective - config.initial_policy_kl_penalty * penalty
    if config.truncated == "penalize":
        objective = objective - (config.missing_eos_penalty or 0.0) * (~out.finished).double().cpu()
    return Judged(reward, penalty, objective, seconds)


def validate(actor: Actor, prompts: list[Prompt]) -> list[Group]:
    """One response to each validation prompt, scored; the same groups on every rank."""
    mine = distributed.deal(prompts)

    def answered() -> list[Group]:
        if not mine:
            return []
        out = rollout(actor, mine, 1, VALIDATION, actor.validation, actor.config.val_rollout_micro_batch_size)
        reward = ask(actor, mine, out)
        return make_groups(actor.tokenizer, mine, out, Judged(reward, None, reward))

    with distributed.gathered(actor.policy):
        groups = distributed.together(answered)
    return distributed.gather(groups)
