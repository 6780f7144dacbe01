"""The actor: trains a policy with REINFORCE against a reward server.

    torchrun train.py --baseline rloo                                   the toy, reward server included
    torchrun --nproc-per-node 2 train.py --baseline remax               on two processes
    torchrun train.py --policy SFT --train-data prompts.jsonl --rm-host 127.0.0.1 --rm-port 5567

The update, for K responses y ~ pi to each prompt x:

    R = r(x, y) - beta * sum_t [log pi(y_t) - log pi_ref(y_t)]       A = R - baseline(R)
    gradient of  -(1/N) sum_b A_b sum_t log pi(y_bt)                 N: rows of the whole optimizer step, all ranks

Beside GRPO trainers this deletes the clipped ratio and the old log-probs (one update per rollout is on-policy), the division
by the group's deviation, the division by a response's length, and KL as a loss term: what is left is unbiased.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
import transformers
from torch import Tensor

from reinforce import baselines, checkpoint, distributed, lifecycle, optim
from reinforce import device as devices
from reinforce.actor import Actor, open_run_folder, set_up
from reinforce.config import TrainConfig, parse
from reinforce.data import Prompt, step_prompts, steps_per_epoch
from reinforce.errors import FailedError, RetryError
from reinforce.group import Group, make_groups, reward_request
from reinforce.kl import k1, per_response
from reinforce.loss import normaliser, reinforce_loss
from reinforce.metrics import Recorder, mean_reward, summarise, tell
from reinforce.sampler import Rollout, Sampling, micro_batches, row_seed, sample_in_batches

VALIDATION = -1  # the "step" of validation's random numbers: the same at every validation, so before and after compare


def rollout(actor: Actor, prompts: Sequence[Prompt], k: int, step: int, how: Sampling, max_rows: int) -> Rollout:
    """k responses to each prompt, row b to prompt b // k, each row with its own random numbers."""
    seeds = [row_seed(actor.config.seed, step, p.index, j) for p in prompts for j in range(k)]
    with devices.autocast(actor.device, actor.bf16):
        return sample_in_batches(actor.model, [p.ids for p in prompts], seeds, how, max_rows)


def ask(actor: Actor, prompts: Sequence[Prompt], out: Rollout) -> Tensor:
    """The reward server's word on each row, (B,) float64."""
    request = reward_request(actor.tokenizer, prompts, out, as_text=actor.config.rm_format == "query")
    return torch.tensor(actor.client.rewards(**request), dtype=torch.float64)


def judge(actor: Actor, prompts: Sequence[Prompt], out: Rollout) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """reward (B,), KL (B,) or None, objective R = reward - beta * KL (B,), and the seconds that the reward took."""
    start = time.perf_counter()
    reward = ask(actor, prompts, out)  # (B,)
    seconds = time.perf_counter() - start
    if actor.reference is None:
        return reward, None, reward, seconds
    kl = torch.zeros_like(reward)  # (B,)
    for rows in micro_batches(out.total_length.tolist(), actor.config.forward_micro_batch_size, sys.maxsize):
        part = out.take(rows)
        with torch.no_grad(), devices.autocast(actor.device, actor.bf16):
            ref_logp = actor.reference(part.prompt, part.prompt_mask, part.response, part.mask)  # (b, T)
        kl[rows] = per_response(k1(part.logp, ref_logp), part.mask).double().cpu()
    return reward, kl, reward - actor.config.initial_policy_kl_penalty * kl, seconds


def validate(actor: Actor, prompts: list[Prompt]) -> list[Group]:
    """One response to each validation prompt, scored; the same groups on every rank."""
    mine = distributed.deal(prompts)
    groups: list[Group] = []
    if mine:
        out = rollout(actor, mine, 1, VALIDATION, actor.validation, actor.config.val_rollout_micro_batch_size)
        reward = ask(actor, mine, out)
        groups = make_groups(actor.tokenizer, mine, out, reward, None, reward)
    return distributed.gather(groups)


def make_baseline(config: TrainConfig) -> Callable[..., Tensor]:
    """The advantage function of --baseline: (P, K) -> (P, K), for remax with greedy (P,) as second argument."""
    if config.baseline == "ema":
        return baselines.Ema(config.ema_decay)
    return cast(Callable[..., Tensor], getattr(baselines, config.baseline.replace("-", "_")))


def train(actor: Actor, prompts: list[Prompt], held_out: list[Prompt], run: Path, stop: lifecycle.Stop) -> None:
    """The loop."""
    config = actor.config
    p, k, world = config.num_rollout_samples, config.num_rollouts_per_prompt, distributed.world_size()
    per_epoch = steps_per_epoch(len(prompts), p)
    total = min(config.max_steps or sys.maxsize, (config.max_epochs or sys.maxsize) * per_epoch)
    min_lr = config.lr if config.min_lr is None else config.min_lr
    optimizer = optim.adamw(actor.model, config.lr, cast(tuple[float, float], config.adam_betas), config.weight_decay)
    baseline = make_baseline(config)
    recorder = Recorder(run, total) if distributed.rank() == 0 else None
    before = after = validate(actor, held_out)
    if recorder and before:
        recorder.validated(0, before)

    stop.in_loop = True
    for step in range(total):
        # 1. sample: K responses to each of this rank's prompts, and for ReMax the greedy one
        start = time.perf_counter()
        mine = distributed.deal([prompts[i] for i in step_prompts(len(prompts), p, config.seed, step)])
        out = rollout(actor, mine, k, step, actor.training, config.rollout_micro_batch_size)
        greedy = None
        if config.baseline == "remax":
            likeliest = dataclasses.replace(actor.training, greedy=True)
            greedy = rollout(actor, mine, 1, step, likeliest, config.rollout_micro_batch_size)
        sampled = time.perf_counter()

        # 2. and 3. score over HTTP, KL to the initial policy: R = r - beta * KL
        reward, kl, objective, reward_seconds = judge(actor, mine, out)  # (B,) each
        greedy_objective = None
        if greedy is not None:
            _, _, greedy_objective, more_seconds = judge(actor, mine, greedy)  # (P of this rank,)
            reward_seconds += more_seconds
        judged = time.perf_counter()

        # 4. advantages, over whole groups, from all ranks' rows in prompt order
        groups = distributed.gather(make_groups(actor.tokenizer, mine, out, reward, kl, objective))
        objectives = torch.tensor([g.objective for g in groups], dtype=torch.float64)  # (P, K)
        if greedy_objective is None:
            advantages = baseline(objectives)  # (P, K)
        else:
            against = torch.tensor(distributed.gather(greedy_objective.tolist()), dtype=torch.float64)  # (P,)
            advantages = baseline(objectives, against)  # (P, K)
        own = torch.stack(distributed.deal(list(advantages))).flatten().float().to(actor.device)  # (B,)

        # 5. update: one optimizer step, in micro-batches, divided by the rows of all ranks
        divisor = normaliser(torch.tensor([g.length for g in groups]), torch.ones_like(objectives, dtype=torch.bool), "sequence")
        loss, gap = torch.zeros((), device=actor.device), torch.zeros(len(own), device=actor.device)
        parts = micro_batches(out.total_length.tolist(), config.micro_batch_size, config.micro_batch_tokens)
        for rows in parts:
            part = out.take(rows)
            with distributed.accumulating(actor.scorer, last=rows is parts[-1]):
                with devices.autocast(actor.device, actor.bf16):
                    logp = actor.scorer(part.prompt, part.prompt_mask, part.response, part.mask)  # (b, T)
                micro_loss = reinforce_loss(logp, own[rows], part.mask, divisor)
                (micro_loss * world).backward()  # DDP averages over ranks, and N already counts them all
            loss += micro_loss.detach()
            gap[rows] = (part.logp - logp.detach()).sum(1)
        grad_norm = optim.clip(actor.model, config.max_grad_norm)
        if not math.isfinite(grad_norm):
            raise FailedError(f"the gradient of step {step + 1} is {grad_norm}; no optimizer step was made")
        lr = optim.learning_rate(step, total, config.lr, min_lr, config.warmup_steps, config.constant_steps)
        optim.set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        updated = time.perf_counter()

        # 6. log, validate, save
        gaps, losses = distributed.gather(gap.view(-1, k).sum(1).tolist()), distributed.gather([loss.item()])
        last = step + 1 == total
        stopping = distributed.anywhere(stop.signal is not None)
        metrics = {
            "step": step + 1, **summarise(groups, advantages.flatten().tolist()), "loss": math.fsum(losses), "grad_norm": grad_norm,
            "lr": lr, "logprob_gap": math.fsum(gaps) / objectives.numel(), "ratio_clipped": 0.0,
            "tokens_per_s": sum(sum(g.length) for g in groups) / (sampled - start), "time_rollout": sampled - start,
            "time_reward": reward_seconds, "time_reference": judged - sampled - reward_seconds, "time_update": updated - judged,
            "prompts_seen": (step // per_epoch) * len(prompts) + min((step % per_epoch + 1) * p, len(prompts)),
            "epoch": step // per_epoch,
        }  # fmt: skip
        if held_out and (last or (step + 1) % config.val_check_interval == 0):
            after = validate(actor, held_out)
            metrics["val_reward"] = mean_reward(after)[0]
        if recorder:
            recorder.log(metrics, groups, advantages.flatten().tolist())
            if "val_reward" in metrics:
                recorder.validated(step + 1, after)
            if last or stopping or (step + 1) % (config.save_interval or config.val_check_interval) == 0:
                state = {"val_reward": metrics.get("val_reward"), "ema": getattr(baseline, "value", None)}
                checkpoint.save(run, step + 1, actor.model, actor.tokenizer, state, config.save_top_k)
        if stopping and not last:
            break

    if recorder:
        recorder.close()
        if last:
            tell(held_out, before, after, run)
    if not last:
        by = stop.signal or "a signal to another rank"
        raise RetryError(f"stopped by {by} after step {step + 1} of {total}; a checkpoint is in {run}/checkpoints")


def main() -> None:
    """Command line; the exit code is lifecycle's."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    given = lifecycle.log_dir_of(sys.argv)
    folders = [given] if given is not None and not lifecycle.holds_run(given) else []
    if folders and distributed.rank() == 0:
        (folders[0] / "exit.json").unlink(missing_ok=True)

    def body() -> None:
        stop = lifecycle.Stop()
        with ExitStack() as stack:
            config = parse(TrainConfig, __doc__)
            actor, prompts, held_out = set_up(config, stack)
            folders[:] = [open_run_folder(config)]
            train(actor, prompts, held_out, folders[0], stop)

    sys.exit(lifecycle.run(body, lambda: folders[0] if folders else None))


if __name__ == "__main__":
    main()
