"""Supervised fine-tuning: maximise log pi(answer | prompt), the loss on the answer's tokens alone.

loss = -(1/N) sum over answer tokens of log pi(token)
"""

from collections.abc import Sequence

import torch
from torch import nn

from reinforce.logprobs import Scorer, head_is_plain
from reinforce.optim import adamw, clip, learning_rate, set_learning_rate
from reinforce.sampler import left_pad

Example = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its answer, end token included


def train_sft(
    model: nn.Module, examples: Sequence[Example], steps: int, batch_size: int, lr: float, pad_id: int, seed: int
) -> float:
    """Train in place for `steps` batches drawn at random; return the last batch's loss, nats a token."""
    device = next(model.parameters()).device
    scorer = Scorer(model, head_is_plain(model))
    optimizer = adamw(model, lr, betas=(0.9, 0.95), weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for step in range(steps):
        batch = [examples[i] for i in torch.randint(len(examples), (batch_size,), generator=draw)]
        prompt, prompt_mask = left_pad([p for p, _ in batch], pad_id, device)  # (B, S)
        answer, mask = (x.flip(1) for x in left_pad([list(a)[::-1] for _, a in batch], pad_id, device))  # (B, T), padded right
        loss = -scorer(prompt, prompt_mask, answer, mask).sum() / mask.sum()
        loss.backward()
        clip(model, 1.0)
        set_learning_rate(optimizer, learning_rate(step, steps, lr, min_lr=lr / 10, warmup=steps // 20, constant=0))
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()
