"""Tensor parallelism: a team of M ranks holds one model, each rank some heads of every layer.

transformers' own plan says how each weight is cut (the rows of a query projection, the columns of
an output projection, the rows of the embedding). All ranks of a team see the same tokens and hold
the same hidden states. The logits are gathered, so a team draws the same tokens from the same
coins. A weight without a rule, a norm's, is whole on every rank.

See "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", Shoeybi
et al. (2019, arXiv 1909.08053). Left out: sequence parallelism.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from reinforce.errors import ConfigError
from reinforce.head import linear
from reinforce.run import distributed, shards
from reinforce.tensor_plan import FLAG, refuse_model, refuse_version

# transformers' rule for the norms of queries and keys: whole on each rank, which sees its own heads
OF_OWN_HEADS = "replicated_with_grad_allreduce"


def refuse_ranks(size: int, ranks: int) -> None:
    """Raise ConfigError if teams of `size` ranks cannot be made here."""
    if size == 1:
        return
    refuse_version(size)
    if ranks % size:
        raise ConfigError(
            f"{FLAG} {size} does not divide the {ranks} ranks; start a multiple of {size} processes"
        )


def refuse_policy(config: Any, size: int, where: str) -> None:
    """Raise ConfigError if the model of this configuration cannot be cut over `size` ranks.

    `where` is the policy's flag and value.
    """
    if size > 1:
        refuse_model(config, size, where, "--parallel fsdp")


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, cut in place over this rank's team, on `device`; as it is where that is one rank.

    Every parameter becomes a shard of itself or stays whole, under the same name. One on the meta
    device stays there.
    """
    mesh = distributed.team_mesh()
    if mesh is None:
        return model
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    hf = cast(Any, model)
    plan, _, _ = hf._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))
    # a weight with two names stands in the model under the first
    names = dict(model.named_modules()).keys() | dict(model.named_parameters()).keys()
    plan = {name: style for name, style in plan.items() if name in names}
    rest = {name: style for name, style in plan.items() if style != OF_OWN_HEADS}
    apply_tensor_parallelism(model, mesh, rest)
    for name, module in model.named_modules():
        if plan.get(name) == OF_OWN_HEADS:
            _add_gradients_up(module)
    hf.tie_weights(recompute_mapping=False)  # as it was loaded, whatever its configuration says
    head = hf.get_output_embeddings()
    if type(head) is nn.Linear and isinstance(head.weight, DTensor):
        cast(Any, head).forward = functools.partial(_logits, head)
    shards.move(model, device)
    return model


def add_gradients_up(model: nn.Module, names: Sequence[str]) -> None:
    """Let the gradients of these parameters, whole on each rank, be summed over the team."""
    if distributed.team_mesh() is None:
        return
    for owner in {name.rpartition(".")[0] for name in names}:
        _add_gradients_up(model.get_submodule(owner))


def _add_gradients_up(module: nn.Module) -> None:
    """Let the gradients of a norm that sees this rank's heads alone be summed over the team.

    transformers' own rule sums what has been accumulated, and so what the micro-batches before have
    summed once more.
    """
    forward, hooked = module.forward, dict[str, Tensor]()

    @functools.wraps(forward)
    def hooking(*args: Any, **kwargs: Any) -> Any:
        # here, since FSDP computes with other parameters than the module is made with
        for name, weight in module.named_parameters(recurse=False):
            if weight.requires_grad and torch.is_grad_enabled() and hooked.get(name) is not weight:
                cast(Any, weight).register_hook(distributed.team_sum)
                hooked[name] = weight
        return forward(*args, **kwargs)

    cast(Any, module).forward = hooking


def place_gradients(model: nn.Module) -> None:
    """Let each gradient be cut as its weight is; that of an embedding comes whole.

    For a team's model whose weights have their memory; it does nothing where a team is one rank.
    """
    if distributed.team_mesh() is None:
        return
    for weight in model.parameters():
        if isinstance(weight, DTensor) and weight.requires_grad:
            placed = functools.partial(_placed, placements=weight.placements)
            cast(Any, weight).register_hook(placed)


def _placed(grad: DTensor, placements: Any) -> DTensor:
    return grad.redistribute(placements=placements)


def _logits(head: nn.Linear, states: Tensor) -> Tensor:
    """states (..., H) -> logits (..., V) float32, the same on all ranks of the team.

    Each rank computes those of its rows. The states' gradient is the sum over the ranks.
    """
    weight, bias = cast(DTensor, head.weight), cast(DTensor | None, head.bias)
    mesh: DeviceMesh = weight.device_mesh
    product = linear(weight.to_local(), None if bias is None else bias.to_local())
    whole = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
    part = product(whole.to_local(grad_placements=[Partial()]))  # (..., V / M), or shorter
    shape = torch.Size([*states.shape[:-1], weight.shape[0]])
    stride = torch.empty(shape, device="meta").stride()
    logits = DTensor.from_local(
        part, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride
    )
    return logits.full_tensor()  # (..., V)
