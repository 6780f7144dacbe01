"""Every torch.distributed call there is, behind ten verbs. Without torchrun all of them are no-ops on one process.

Whole prompts are dealt to ranks round-robin, so a group's K responses are always on one rank, and what a rank makes of its
prompts is gathered and put back into prompt order: advantages and metrics are computed from all rows, the same on every rank.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # longer than the reward client's total deadline


def rank() -> int:
    """This process's number, 0 to world_size() - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> None:
    """Join the other ranks. Gloo carries Python objects and CPU tensors, NCCL what is on a GPU."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def stop() -> None:
    """Leave the group; harmless if it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def deal(items: Sequence[T]) -> list[T]:
    """This rank's share of the items, round-robin."""
    return list(items[rank() :: world_size()])


def position(i: int) -> int:
    """Place before dealing of this rank's i-th item."""
    return i * world_size() + rank()


def gather(items: Sequence[T]) -> list[T]:
    """Undo `deal`: every rank's items, one per dealt item, in the order before dealing, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def agree(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, with gradients averaged over ranks in the backward pass (so a loss is multiplied by world_size() first)."""
    if world_size() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def largest(value: int) -> int:
    """The largest of all ranks' values; the same answer on every rank."""
    parts = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, value)
    return max(parts)


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around the backward pass of a micro-batch: only the last one of a step exchanges gradients."""
    return nullcontext() if last or not isinstance(module, DistributedDataParallel) else module.no_sync()
