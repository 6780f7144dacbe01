"""What the loop needs of torch.distributed, behind a few verbs.

Whole prompts are dealt to the ranks round-robin, so the K responses of a group are on one rank.
The results of all ranks are gathered in prompt order: every rank computes advantages and metrics
from all rows, and gets the same numbers. Parameters are copied to every rank (DDP), or cut into
shards and gathered block by block (FSDP2). In one process without torchrun all verbs but those of
FSDP do nothing.

With tensor parallelism a team of M ranks holds one model (tensor_parallel.py): prompts are dealt to
teams, and the ranks of a team do the same with them.

See "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", Zhao et al. (2023, arXiv
2304.11277). Left out: pipeline parallelism.
"""

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from reinforce import device as devices
from reinforce.errors import ConfigError, FailedError, RetryError, StoppedError
from reinforce.policy import blocks

T = TypeVar("T")
# how long the ranks wait for one that hangs; longer than the total deadline of the reward client
TIMEOUT = timedelta(minutes=30)
# ranks as (teams, 1, ranks of a team), made by `start`; None where each team is one rank
_mesh: DeviceMesh | None = None
_AXES = ("shard", "one", "tensor")


def rank() -> int:
    """This process's number, 0 to world_size() - 1."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes (ranks) of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def team_mesh() -> DeviceMesh | None:
    """The ranks of this rank's team, which hold one model; None where the team is one rank."""
    return None if _mesh is None else _mesh["tensor"]


def team_size() -> int:
    """M, the number of ranks that hold one model."""
    return 1 if _mesh is None else _mesh["tensor"].size()


def teams() -> int:
    """Number of teams: each has a part of the prompts."""
    return world_size() // team_size()


def start(device: torch.device, alone: bool, tensor_parallel: int = 1) -> None:
    """Join the other ranks, in teams of `tensor_parallel` neighbours.

    With `alone`, make a group of this process if it is the only one. Gloo carries objects and
    tensors on the CPU, NCCL carries tensors on a GPU.
    """
    global _mesh
    _join(device, alone)
    _mesh = None
    if tensor_parallel > 1:
        shape, names = (world_size() // tensor_parallel, 1, tensor_parallel), _AXES
        _mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        for first in _AXES[:2]:  # a sum over both axes at once
            cast(Any, _mesh[first, "tensor"])._flatten()


def _join(device: torch.device, alone: bool) -> None:
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

    # in a thread: it waits in C++ for ranks that may have died, and no signal reaches Python there
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if raised:
        raise raised[0]


def stop() -> None:
    """Leave the group; nothing happens if this process never joined one."""
    if dist.is_initialized():
        # a thread of gloo drops the tensors of the last collective a moment later, and aborts if
        # the interpreter has ended by then
        time.sleep(0.1)
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an exception says that another rank has ended or hangs.

    Gloo raises a plain RuntimeError, and NCCL the same one for a GPU without memory, say: both are
    told from others by their text.
    """
    if isinstance(error, dist.DistBackendError):
        text = str(error).lower()
        return any(words in text for words in ("/gloo/", "remote process", "aborted", "timeout"))
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


def deal(items: Sequence[T]) -> list[T]:
    """This team's share of the items, round-robin."""
    return list(items[rank() // team_size() :: teams()])


def gather(items: Sequence[T]) -> list[T]:
    """Undo `deal` on every rank: the items of all teams, in the order before dealing.

    A rank gives one item for each dealt one, the same ones as the others of its team.
    """
    if world_size() == 1:
        return list(items)
    return _in_order(list(items))


def groups_of(rows: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Rows of this rank's prompts, (B, ...) -> groups of all prompts, (P, K, ...), on the CPU.

    The prompts of all ranks are in the order before they were dealt; every rank must ask.
    """
    groups = rows.cpu().unflatten(0, (len(prompts), -1))  # (p, K, ...)
    return groups if world_size() == 1 else torch.stack(_in_order(groups))


def rows_of(groups: Tensor) -> Tensor:
    """The other way: groups of all prompts, (P, K, ...) -> rows of this rank's, (B, ...)."""
    return groups[rank() // team_size() :: teams()].flatten(0, 1)


def _in_order(part: Any) -> list[Any]:
    """The dealt items of all teams in the order before dealing; `part` is a list or a tensor."""
    parts = of_all(part)[:: team_size()]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def of_all(item: T) -> list[T]:
    """One item of each rank, on every rank."""
    items: list[Any] = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


def first_of_team() -> bool:
    """Whether this rank is the one of its team that asks for rewards."""
    return rank() % team_size() == 0


def once_a_team(work: Callable[[], T]) -> T:
    """Call `work` on the first rank of each team; the others get its result, or its error."""
    if _mesh is None:
        return work()
    outcome: list[Any] = [None, None]
    if first_of_team():
        try:
            outcome[0] = work()
        except (ConfigError, RetryError, FailedError) as raised:
            outcome[1] = raised
    dist.broadcast_object_list(outcome, group=_mesh.get_group("tensor"), group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def together(work: Callable[[], T], only_first: bool = False) -> T:
    """Call `work` on every rank; with `only_first` on rank 0 alone, whose result all ranks return.

    If it raises an error of reinforce/errors.py on any rank, the error of the first such rank is
    raised on all of them, so that no rank waits for another.
    """
    result: Any = None
    error: BaseException | None = None
    if rank() == 0 or not only_first:
        try:
            result = work()
        except (ConfigError, RetryError, StoppedError, FailedError) as raised:
            error = raised
    if world_size() > 1 and only_first:
        outcome = [result, error]
        dist.broadcast_object_list(outcome, src=0)
        result, error = outcome
    elif world_size() > 1:
        error = next((e for e in of_all(error) if e is not None), None)
    if error is not None:
        raise error
    return cast(T, result)


def wrap(
    scorer: nn.Module, device: torch.device, parallel: str, bf16: bool, on_host: bool = False
) -> nn.Module:
    """The scorer as a module whose backward pass averages gradients over the ranks.

    `backward` below turns these means into sums.
    parallel="ddp":  every rank holds a copy. Nothing is wrapped where there is one rank, or where
                     no parameter has a gradient.
    parallel="fsdp": the scorer is sharded in place, in the memory of `device`, one transformer
                     block at a time. Its forward pass and its `decode` gather what they need. With
                     bf16 the gathered blocks are bfloat16. The optimizer sees the float32 shards.
                     With on_host the shards, their gradients and the optimizer's step are on the
                     host, and the device has what is gathered.
    In teams both act on the shards of a rank, between ranks that have the same one: "ddp" is
    FSDP2's replication there, since DDP takes no parameter that is a shard.
    """
    trained = any(p.requires_grad for p in scorer.parameters())
    if parallel == "fsdp" or (_mesh is not None and teams() > 1 and trained):
        if _mesh is None:
            mesh = init_device_mesh(device.type, (world_size(),))
        else:
            mesh = _mesh["shard"] if parallel == "fsdp" else _mesh["shard", "one"]
        policy = MixedPrecisionPolicy()
        if bf16 and parallel == "fsdp":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shards = OffloadPolicy()
        if on_host:
            shards = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for block in blocks(scorer):
            fully_shard(block, mesh=mesh, mp_policy=policy, offload_policy=shards)
            if policy.param_dtype is not None:
                block.register_forward_pre_hook(_bound_masks, prepend=True, with_kwargs=True)
        # embeddings and head stay float32
        fully_shard(scorer, mesh=mesh, offload_policy=shards)
        register_fsdp_forward_method(scorer, "decode")
        return scorer
    if teams() == 1 or not trained:
        return scorer
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(scorer, device_ids=ids, gradient_as_bucket_view=True)
    # DDP sorts its buckets anew after the first backward pass. With more than two ranks that
    # changes the order of its sums. A first pass of weight 0 makes all real ones alike, also those
    # of a run that goes on.
    token = torch.zeros(1, 1, dtype=torch.long, device=device)  # (1, 1)
    mask = torch.ones(1, 1, dtype=torch.bool, device=device)  # (1, 1)
    with devices.autocast(device, bf16):  # weights that LoRA freezes are stored in bfloat16
        nothing = 0 * wrapped(token, mask, token, mask).sum()
    nothing.backward()
    scorer.zero_grad()
    return wrapped


def _bound_masks(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A block's inputs whose masks FSDP can cast: float32's least number would become -inf.

    The softmax of a padding's row, which sees nothing, would be NaN then.
    """
    least = torch.finfo(torch.bfloat16).min

    def bounded(x: Any) -> Any:
        is_mask = isinstance(x, Tensor) and x.dtype == torch.float32 and x.ndim == 4  # (B, 1, Q, L)
        return x.clamp(min=least) if is_mask else x

    return tuple(map(bounded, args)), {key: bounded(value) for key, value in kwargs.items()}


def give_memory(module: nn.Module, device: torch.device) -> None:
    """Memory, of any content, for this rank's shards of parameters that are on the meta device."""
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)


def is_packed(parameter: Tensor) -> bool:
    """Whether a team's rank has several stretches of a tensor, so that no slice of a file is it."""
    return isinstance(parameter, DTensor) and isinstance(parameter.placements[-1], _StridedShard)


@torch.no_grad()
def fill(parameter: Tensor, whole: Tensor) -> None:
    """Give this rank's shard of a parameter its values out of the whole tensor."""
    own, values = (cast(DTensor, x).to_local() for x in (parameter, shard_like(parameter, whole)))
    own.copy_(values)


def read_shards(parameters: dict[str, Tensor], folder: str) -> None:
    """Read this rank's shards of the named parameters from the safetensors files of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says what no_dist says: each rank reads by itself
        load(dict(parameters), storage_reader=HuggingFaceStorageReader(folder), no_dist=True)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A block in which sharded parameters stay gathered, for many forward passes without gradient.

    The ranks need not keep in step there.
    """
    sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for m in sharded:
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    try:
        yield
    finally:
        for m in sharded:
            # the root stays gathered after a forward pass: the backward pass begins with it
            m.set_reshard_after_forward(m is not module, recurse=False)
            m.reshard()


def team_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over this rank's team. Every rank of it must call it."""
    assert _mesh is not None
    total = tensor.clone()
    dist.all_reduce(total, group=_mesh["tensor"].get_group())
    return total


def gather_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this rank may hold a shard. Every rank must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # FSDP2 has cut the shards of a team again, so they are put together in the reverse order
    across = [Replicate()] * (tensor.device_mesh.ndim - 1)
    return tensor.redistribute(placements=[*across, tensor.placements[-1]]).full_tensor()


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Undo `gather_tensor`: this rank's shard of a whole tensor, placed like `parameter`."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    shard = distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return shard.to(parameter.device)  # shards on the host come back from the mesh's device


def in_step(parts: list[list[int]]) -> list[list[int]]:
    """Micro-batches, with empty ones added until every rank has the same number.

    The forward pass of a sharded model needs all ranks.
    """
    return parts + [[]] * (max(gather([len(parts)])) - len(parts))


def backward(loss: Tensor) -> None:
    """Add the gradient of the sum of the losses of all teams.

    DDP and FSDP average over the teams. The factor undoes that.
    """
    (loss * teams()).backward()


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """A block for the forward and backward pass of one micro-batch.

    DDP exchanges gradients in the last micro-batch of an optimizer step, FSDP in each of them.
    """
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
