"""The actor: trains a policy with REINFORCE against a reward server.

    torchrun train.py --baseline rloo                                   the toy, reward server included
    torchrun --nproc-per-node 2 train.py --baseline remax               on two processes
    torchrun train.py --policy SFT --train-data prompts.jsonl --rm-host 127.0.0.1 --rm-port 5567

The update, for K responses y ~ pi to each prompt x:

    R = r(x, y) - beta * sum_t [log pi(y_t) - log pi_ref(y_t)]       A = R - baseline(R)
    gradient of  -(1/N) sum_b A_b sum_t log pi(y_bt)                 N: rows of the whole optimizer step, all ranks

Beside GRPO trainers the default deletes the clipped ratio and the old log-probs (one update per rollout is on-policy), the
division by the group's deviation, the division by a response's length, and KL as a loss term: what is left is unbiased.
"""

import dataclasses
import faulthandler
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from reinforce import baselines, checkpoint, distributed, lifecycle, optim
from reinforce import device as devices
from reinforce.actor import Actor, Inputs, check, load, open_run_folder
from reinforce.config import TrainConfig, parse, seconds
from reinforce.data import step_prompts, steps_per_epoch, total_steps
from reinforce.errors import FailedError, RetryError
from reinforce.experience import in_step, judge, rollout, score, validate
from reinforce.group import Group, make_groups
from reinforce.loss import clipped_loss, clipped_tokens, normaliser, reinforce_loss, token_weights
from reinforce.metrics import Recorder, mean_reward, recorded, summarise, tell
from reinforce.sampler import Rollout, micro_batches


def make_baseline(config: TrainConfig, ema: float | None = None) -> Callable[..., Tensor]:
    """The advantage function of --baseline: (P, K) -> (P, K), for remax with greedy (P,) as second argument; `ema` is its past."""
    if config.baseline == "ema":
        baseline = baselines.Ema(config.ema_decay)
        baseline.value = ema or 0.0
        return baseline
    return cast(Callable[..., Tensor], getattr(baselines, config.baseline.replace("-", "_")))


def optimizer_steps(prompts: int, per_step: int) -> list[range]:
    """The prompts of each optimizer step of one rollout: whole prompts in rollout order, the last step maybe short.

    >>> optimizer_steps(prompts=5, per_step=2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(first, min(first + per_step, prompts)) for first in range(0, prompts, per_step)]


@dataclass(frozen=True)
class Batch:
    """Rows of this rank, as the loss needs them."""

    rollout: Rollout
    advantage: Tensor  # (B,) float32
    valid: Tensor  # (B,) bool
    logp_old: Tensor | None  # (B, T), of the policy before the first of several optimizer steps

    def take(self, rows: list[int]) -> "Batch":
        """Some of the rows; of no rows, one row without a token, for a rank that has none left while others have."""
        part, at = self.rollout.take(rows), rows or [0]
        old = None if self.logp_old is None else self.logp_old[at, : part.mask.shape[1]]  # (b, T)
        return Batch(part, self.advantage[at], self.valid[at], old)


def backward(actor: Actor, batch: Batch, rows: list[int], divisor: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of one optimizer step, in micro-batches of this rank's `rows`; `divisor` is N, over all ranks.

    Returns this rank's loss and number of clipped tokens, both scalar, and logp (B, T), 0 in other rows.
    """
    config, device = actor.config, actor.device
    loss_sum, clipped, scored = torch.zeros((), device=device), torch.zeros((), device=device), torch.zeros_like(batch.rollout.logp)
    lengths = batch.rollout.total_length[rows].tolist()
    parts = micro_batches(lengths, config.micro_batch_size, config.micro_batch_tokens)
    parts = in_step([[rows[j] for j in part] for part in parts])
    actor.model.train(config.gradient_checkpointing)  # only there a Hugging Face model checkpoints; dropout is 0 either way
    for i, here in enumerate(parts):
        part = batch.take(here)
        r, weight = part.rollout, token_weights(part.rollout.mask, config.loss_norm) * part.valid[:, None]  # (b, T)
        with distributed.accumulating(actor.scorer, last=i + 1 == len(parts)):
            with devices.autocast(device, actor.bf16):
                logp = actor.scorer(r.prompt, r.prompt_mask, r.response, r.mask)  # (b, T)
            if part.logp_old is None:
                loss = reinforce_loss(logp, part.advantage, weight, divisor)
            else:
                loss = clipped_loss(logp, part.logp_old, part.advantage, weight, divisor, config.ratio_clip)
                clipped += clipped_tokens(logp, part.logp_old, part.advantage, weight, config.ratio_clip)
            (loss * distributed.world_size()).backward()  # DDP and FSDP average over ranks, and N already counts them all
        loss_sum += loss.detach()
        scored[here, : logp.shape[1]] = logp.detach()[: len(here)]
    actor.model.eval()
    return loss_sum, clipped, scored


def train(actor: Actor, inputs: Inputs, run: Path, stop: lifecycle.Stop) -> None:
    """The loop."""
    config, prompts, held_out, first = actor.config, inputs.prompts, inputs.held_out, inputs.start.step
    p, k = config.num_rollout_samples, config.num_rollouts_per_prompt
    per_update = (config.global_batch_size or p * k) // k  # prompts of one optimizer step
    per_epoch = steps_per_epoch(len(prompts), p)
    total = total_steps(len(prompts), p, config.max_steps, config.max_epochs)
    min_lr = config.lr if config.min_lr is None else config.min_lr
    optimizer = optim.adamw(actor.model, config.lr, cast(tuple[float, float], config.adam_betas), config.weight_decay)
    baseline = make_baseline(config, inputs.start.ema)
    if inputs.start.folder is not None:
        checkpoint.restore(inputs.start.folder, actor.model, optimizer)
    recorder = Recorder(run, total, first) if distributed.rank() == 0 else None
    saved = first  # steps that the last checkpoint has

    def save(done: int, val_reward: float | None = None) -> None:
        nonlocal saved
        if done > saved:
            if recorder:
                recorder.sync()
            state = {"val_reward": val_reward, "ema": getattr(baseline, "value", None), "bf16": actor.bf16}
            checkpoint.save(run, done, actor.model, optimizer, actor.tokenizer, state, config.save_top_k)
            saved = done

    def log(metrics: dict[str, Any], groups: list[Group], advantage: Tensor) -> None:
        if recorder:
            recorder.log(metrics, groups, advantage.flatten().tolist())

    def log_and_save(metrics: dict[str, Any], groups: list[Group], advantage: Tensor) -> None:
        log(metrics, groups, advantage)
        save(metrics["step"])

    if recorder and first:
        recorder.say(f"going on after step {first} of {total}: {inputs.start.folder}")
    done = distributed.together(lambda: first in recorded(run), only_first=True)
    if held_out and not done and first % config.val_check_interval == 0:  # the first one, or one whose server was gone
        before = validate(actor, held_out)
        if recorder:
            recorder.validated(first, before)
    stop.in_loop = True
    for step in range(first, total):
        # 1. sample: K responses to each of this rank's prompts, and for ReMax the greedy one
        start = time.perf_counter()
        mine = distributed.deal([prompts[i] for i in step_prompts(len(prompts), p, config.seed, step)])
        greedy = None
        with distributed.gathered(actor.policy):
            out = rollout(actor, mine, k, step, actor.training, config.rollout_micro_batch_size)
            if config.baseline == "remax":
                likeliest = dataclasses.replace(actor.training, greedy=True)
                greedy = rollout(actor, mine, 1, step, likeliest, config.rollout_micro_batch_size)
        sampled = time.perf_counter()

        # 2. and 3. score over HTTP, KL to the initial policy: R = r - beta * KL
        with lifecycle.before_retry(partial(save, step)):  # a server that is gone costs no step
            judged = judge(actor, mine, out)
            rival = None if greedy is None else judge(actor, mine, greedy)
        scored = time.perf_counter()

        # 4. advantages, over whole groups, from all ranks' rows in prompt order
        valid = out.finished if config.truncated == "drop" else torch.ones_like(out.finished)  # (B,)
        groups = distributed.gather(make_groups(actor.tokenizer, mine, out, judged, valid))
        rivals = None if greedy is None or rival is None else distributed.gather(make_groups(actor.tokenizer, mine, greedy, rival))
        objective = torch.tensor([g.objective for g in groups], dtype=torch.float64)  # (P, K)
        counts, length = torch.tensor([g.valid for g in groups]), torch.tensor([g.length for g in groups])  # (P, K)
        if rivals is None:
            advantage = baseline(objective, counts)  # (P, K)
        else:
            advantage = baseline(objective, torch.tensor([g.objective[0] for g in rivals], dtype=torch.float64), counts)  # (P, K)
        own = torch.stack(distributed.deal(list(advantage))).flatten().float().to(actor.device)  # (B,)

        # 5. update: one optimizer step on the whole rollout; with --global-batch-size several, and the clipped ratio
        lr = optim.learning_rate(step, total, config.lr, min_lr, config.warmup_steps, config.constant_steps)
        optim.set_learning_rate(optimizer, lr)
        updates, place = optimizer_steps(len(groups), per_update), distributed.deal(range(len(groups)))
        logp_old = score(actor, actor.scorer, out) if len(updates) > 1 else None  # (B, T)
        batch, scorer_logp = Batch(out, own, valid, logp_old), logp_old
        losses, clipped, grad_norms = [], 0.0, []
        for update in updates:
            divisor = normaliser(length[update], counts[update], config.loss_norm)  # N
            if divisor == 0:  # every response was dropped
                continue
            rows = [b for b in range(len(own)) if place[b // k] in update]
            loss, cut, logp = backward(actor, batch, rows, divisor)
            clipped, scorer_logp = clipped + cut.item(), logp if logp_old is None else logp_old
            losses.append(math.fsum(distributed.gather([loss.item()])))
            grad_norms.append(optim.clip(actor.model, config.max_grad_norm))
            if not math.isfinite(losses[-1] + grad_norms[-1]):  # the same numbers on every rank
                told = distributed.gather((~(logp.sum(1) + own).isfinite()).view(-1, k).tolist())  # (P, K) bad ones
                if recorder:
                    recorder.accuse(step + 1, groups, update, told)
                raise FailedError(f"loss {losses[-1]}, gradient {grad_norms[-1]} in step {step + 1}: no update was made; "
                                  f"the responses: {run}/nonfinite.jsonl")  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
        updated = time.perf_counter()

        # 6. log, validate, save
        gap = None if scorer_logp is None else (out.logp - scorer_logp).sum(1).view(-1, k).sum(1).tolist()
        last = step + 1 == total
        stopped = next((reason for reason in distributed.gather([stop.reason]) if reason), None)
        tokens = sum(sum(g.length) for g in [*groups, *(rivals or [])])
        metrics = {
            "step": step + 1, **summarise(groups, advantage.flatten().tolist()),
            "loss": math.fsum(losses) / len(losses) if losses else None,
            "grad_norm": sum(grad_norms) / len(grad_norms) if grad_norms else None, "lr": lr,
            "optimizer_steps": len(grad_norms),
            "logprob_gap": None if gap is None else math.fsum(distributed.gather(gap)) / objective.numel(),
            "ratio_clipped": math.fsum(distributed.gather([clipped])) / max(1, int((length * counts).sum())),
            "tokens": tokens, "tokens_per_s": tokens / (sampled - start), "time_rollout": sampled - start,
            "time_reward": judged.seconds + (rival.seconds if rival else 0.0), "time_update": updated - scored,
            "prompts_seen": (step // per_epoch) * len(prompts) + min((step % per_epoch + 1) * p, len(prompts)),
            "epoch": step // per_epoch,
        }  # fmt: skip
        metrics["time_reference"] = scored - sampled - metrics["time_reward"]
        after = None
        if held_out and (last or (step + 1) % config.val_check_interval == 0):
            with lifecycle.before_retry(partial(log_and_save, metrics, groups, advantage)):
                after = validate(actor, held_out)
            metrics["val_reward"] = mean_reward(after)[0]
        log(metrics, groups, advantage)
        if recorder and after:
            recorder.validated(step + 1, after)
        if last or stopped or (step + 1) % (config.save_interval or config.val_check_interval) == 0:
            save(step + 1, metrics.get("val_reward"))
        if stopped and not last:
            break

    if recorder:
        recorder.close()
        if first >= total:
            recorder.say(f"this run has all its {total} steps")
        elif last:
            tell(held_out, run)
    if first < total and not last:
        raise RetryError(f"stopped by {stopped} after step {step + 1} of {total}; the same command with --log-dir {run} goes on")


def main() -> None:
    """Command line; the exit code is lifecycle's."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    given = lifecycle.log_dir_of(sys.argv)
    folders: list[Path | None] = [given if distributed.rank() else None]

    def body() -> None:
        stop = lifecycle.Stop()
        with ExitStack() as stack:
            if given is not None and distributed.rank() == 0:
                stack.enter_context(lifecycle.claimed(given))
                folders[:] = [given]
            config = parse(TrainConfig, __doc__)
            stop.limit = None if config.max_time_per_run is None else seconds(config.max_time_per_run)
            inputs = check(config, stack)
            inputs.client.stopped = lambda: stop.reason is not None
            run = open_run_folder(inputs)
            folders[:] = [run]
            train(load(inputs), inputs, run, stop)

    sys.exit(lifecycle.run(body, lambda: folders[0]))


if __name__ == "__main__":
    faulthandler.enable()  # a process that a library aborts says where it was
    main()
