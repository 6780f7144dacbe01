"""The training loop of SFT and of reward models: batches in order, one divisor a batch, AdamW."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from tqdm import tqdm

from reinforce.data.prompts import step_prompts, steps_per_epoch
from reinforce.errors import FailedError
from reinforce.optim import adamw, clip, learning_rate, set_learning_rate
from reinforce.rollout import micro_batches


@dataclass(frozen=True)
class Plan:
    """A plan of training: each example once an epoch.

    The rate rises for a twentieth of the steps, then follows a cosine towards a tenth.
    """

    lr: float
    batch_size: int
    epochs: float = 1.0
    seed: int = 0
    micro_batch_tokens: int = 2048  # of one forward and backward pass
    quiet: bool = False


def fit(
    model: nn.Module,
    lengths: Sequence[tuple[int, int]],
    count: Sequence[int],
    loss_sum: Callable[[list[int]], Tensor],
    plan: Plan,
) -> float:
    """Train in place on examples 0..n-1 and return the mean loss of the last steps.

    The last steps are the last tenth of all, one step at least. `lengths` has the tokens of each
    example in the part that is padded left and in the part that is padded right. `loss_sum(rows)`
    is the summed loss of some examples. `count` has what each example adds to the divisor: its
    answer tokens for SFT, 1 for a pair. The divisor is that of the whole batch, whatever the
    micro-batches. Raises FailedError.
    """
    n = len(lengths)
    steps = max(1, round(plan.epochs * steps_per_epoch(n, plan.batch_size)))
    optimizer = adamw(model, plan.lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    no_bar = plan.quiet or not sys.stderr.isatty()
    bar = tqdm(range(steps), desc="step", dynamic_ncols=True, disable=no_bar)
    for step in bar:
        batch = step_prompts(n, plan.batch_size, plan.seed, step)
        divisor, total = sum(count[i] for i in batch), 0.0
        left, right = zip(*(lengths[i] for i in batch), strict=True)
        for part in micro_batches(left, right, len(batch), plan.micro_batch_tokens):
            loss = loss_sum([batch[i] for i in part]) / divisor
            loss.backward()
            total += loss.item()
        norm = clip(model, 1.0)
        if not math.isfinite(norm):
            raise FailedError(f"the gradient of step {step + 1} is {norm}; nothing was saved")
        rate = learning_rate(step, steps, plan.lr, plan.lr / 10, warmup=steps // 20, constant=0)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
        if bar.disable and not plan.quiet and (step + 1) % max(1, steps // 10) == 0:
            print(f"step {step + 1}/{steps}  loss {total:.3f}", flush=True)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)
