"""Reward-model training on preferences, by Bradley-Terry: P(chosen > rejected) = sigmoid(r(chosen) - r(rejected))."""

from collections.abc import Sequence

import torch
from torch import nn

from reinforce.optim import adamw, clip, learning_rate, set_learning_rate
from reinforce.reward_model import bradley_terry_loss, score

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of prompt and response: the chosen one, the rejected one


def train_reward_model(
    model: nn.Module, pairs: Sequence[Pair], steps: int, batch_size: int, lr: float, pad_id: int, seed: int
) -> None:
    """Train in place for `steps` batches of pairs drawn at random."""
    optimizer = adamw(model, lr, betas=(0.9, 0.95), weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = [pairs[i] for i in torch.randint(len(pairs), (batch_size,), generator=draw)]
        rewards = score(model, [chosen for chosen, _ in batch] + [rejected for _, rejected in batch], pad_id)  # (2n,)
        bradley_terry_loss(*rewards.chunk(2)).backward()
        clip(model, 1.0)
        set_learning_rate(optimizer, learning_rate(step, steps, lr, min_lr=lr / 10, warmup=steps // 20, constant=0))
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def pair_accuracy(model: nn.Module, pairs: Sequence[Pair], pad_id: int) -> float:
    """Share of pairs whose chosen response gets the higher reward."""
    chosen = score(model, [c for c, _ in pairs], pad_id)
    rejected = score(model, [r for _, r in pairs], pad_id)
    return (chosen > rejected).float().mean().item()


@torch.no_grad()
def standardise(model: nn.Module, sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[float, float]:
    """Mean and deviation of the reward on these sequences, stored in the model's config, where serve_rm.py finds them."""
    rewards = score(model, sequences, pad_id)
    mean, std = rewards.mean().item(), rewards.std().item()
    model.config.reward_mean, model.config.reward_std = mean, std  # type: ignore[union-attr]
    return mean, std
