"""Every torch.distributed call there is, behind a few verbs. Without torchrun all but FSDP's are no-ops on one process.

Whole prompts are dealt to ranks round-robin, so a group's K responses are always on one rank, and
what a rank makes of its prompts is gathered and put back into prompt order: advantages and metrics
are computed from all rows, the same on every rank. Parameters are copied to every rank (DDP), or
cut into shards and gathered block by block (FSDP2).

See "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", Zhao et al. (2023, arXiv
2304.11277). Left out: tensor and pipeline parallelism, and shards that are read from the disk one
by one: a rank holds the whole model while it starts.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from reinforce.errors import ConfigError, FailedError, RetryError
from reinforce.policy import blocks

T = TypeVar("T")
TIMEOUT = timedelta(
    minutes=30
)  # how long ranks wait for one that hangs; longer than the reward client's total deadline


def rank() -> int:
    """This process's number, 0 to world_size() - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device, alone: bool) -> None:
    """Join the other ranks; `alone`: also if there are none. Gloo carries objects and CPU tensors, NCCL what is on a GPU."""
    if dist.is_initialized() or (world_size() == 1 and not alone):
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world_size() == 1:
        dist.init_process_group(backend, store=cast(Any, dist).HashStore(), rank=0, world_size=1)
        return
    raised: list[Exception] = []

    def join() -> None:
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except Exception as error:
            raised.append(error)

    # in a thread, since it waits in C++ for ranks that may have died, and there no signal reaches
    # Python
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if raised:
        raise raised[0]


def stop() -> None:
    """Leave the group; harmless if it was never joined."""
    if dist.is_initialized():
        # a thread of gloo drops the tensors of the last collective a moment later, and aborts if
        # the interpreter is gone by then
        time.sleep(0.1)
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone or hangs: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


def deal(items: Sequence[T]) -> list[T]:
    """This rank's share of the items, round-robin."""
    return list(items[rank() :: world_size()])


def gather(items: Sequence[T]) -> list[T]:
    """Undo `deal`: every rank's items, one per dealt item, in the order before dealing, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def deal_rows(tensor: Tensor) -> Tensor:
    """`deal` for a tensor with one row for each item, (P, ...) -> this rank's (p, ...)."""
    return tensor[rank() :: world_size()]


def gather_rows(tensor: Tensor) -> Tensor:
    """Undo `deal_rows`: every rank's rows on every rank, (p, ...) -> (P, ...) in the order before dealing, on the CPU."""
    parts: list[Any] = [None] * world_size()
    if world_size() == 1:
        return tensor.cpu()
    dist.all_gather_object(parts, tensor.cpu())
    return torch.stack(
        [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]
    )


def together(work: Callable[[], T], only_first: bool = False) -> T:
    """Call `work` on every rank, or on rank 0 alone, whose result then is everyone's.

    Where it raises one of our errors on any rank, the first such rank's is raised on all of them,
    so that none waits for another.
    """
    result: Any = None
    error: Exception | None = None
    if rank() == 0 or not only_first:
        try:
            result = work()
        except (ConfigError, RetryError, FailedError) as raised:
            error = raised
    if world_size() > 1 and only_first:
        box = [result, error]
        dist.broadcast_object_list(box, src=0)
        result, error = box
    elif world_size() > 1:
        error = next((e for e in gather([error]) if e is not None), None)
    if error is not None:
        raise error
    return cast(T, result)


def wrap(scorer: nn.Module, device: torch.device, parallel: str, bf16: bool) -> nn.Module:
    """The module (a Scorer), its gradients averaged over ranks in the backward pass; `backward` makes sums of them.

    fsdp shards it in place, each transformer block for itself, in `device`'s memory; with bf16 what
    is gathered is bfloat16, and the float32 shards are what the optimizer sees. Its forward and its
    `decode` gather first what they need.
    """
    if parallel == "fsdp":
        mesh = init_device_mesh(device.type, (world_size(),))
        policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if bf16
            else MixedPrecisionPolicy()
        )
        for block in blocks(scorer):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(scorer, mesh=mesh)  # embeddings and head stay float32
        register_fsdp_forward_method(scorer, "decode")
        return scorer
    if world_size() == 1 or not any(p.requires_grad for p in scorer.parameters()):
        return scorer
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(scorer, device_ids=ids, gradient_as_bucket_view=True)
    # DDP sorts its buckets anew after the first backward pass, and with more than two ranks that
    # changes the order of its sums; a first pass of weight 0 makes all real ones alike, those of a
    # run that goes on too
    token, mask = (
        torch.zeros(1, 1, dtype=torch.long, device=device),
        torch.ones(1, 1, dtype=torch.bool, device=device),
    )  # (1, 1)
    (0 * wrapped(token, mask, token, mask)).sum().backward()
    scorer.zero_grad()
    return wrapped


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Around many forward passes without gradient: sharded parameters are gathered once, so ranks need not keep in step."""
    shards = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for m in shards:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in shards:
            m.set_reshard_after_forward(
                m is not module, recurse=False
            )  # the root is needed again at once, by the backward pass
            m.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a shard. Every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo `whole`: this rank's part of a tensor that every rank has, placed as `like`."""
    tensor = tensor.to(like.device)
    return (
        distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
        if isinstance(like, DTensor)
        else tensor
    )


def in_step(parts: list[list[int]]) -> list[list[int]]:
    """Micro-batches, with empty ones added until every rank has as many: a sharded model's forward pass needs all ranks."""
    return parts + [[]] * (max(gather([len(parts)])) - len(parts))


def backward(loss: Tensor) -> None:
    """Add the gradient of the sum of all ranks' losses: DDP and FSDP average over ranks, which is undone here."""
    (loss * world_size()).backward()


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a micro-batch's forward and backward: DDP exchanges gradients in the last one of a step, FSDP its shards in each."""
    return (
        nullcontext()
        if last or not isinstance(module, DistributedDataParallel)
        else module.no_sync()
    )
