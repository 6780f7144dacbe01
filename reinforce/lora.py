"""LoRA: the weights stay as they are, and each chosen layer learns a low-rank change of its own.

    y = W x + (alpha / r) B A x        W (out, in) frozen, A (r, in), B (out, r)

A begins as PyTorch's linear layers do (Kaiming-uniform), B at zero, so the adapted model is at
first the model itself, bit by bit. With its adapters off it is the initial policy for good: the
reference of the KL needs no second model.

See "LoRA: Low-Rank Adaptation of Large Language Models", Hu et al. (2021, arXiv 2106.09685). Left
out: dropout of x, adapters of embeddings and head, a rank for each layer.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from reinforce.errors import ConfigError

LINEAR = (nn.Linear, Conv1D)  # Conv1D is GPT-2's, its weight (in, out)


class Adapter(nn.Module):
    """(alpha / r) B A x of one layer, (..., in) -> (..., out)."""

    def __init__(self, layer: Any, rank: int, alpha: float, draw: torch.Generator) -> None:
        """`layer` is one of LINEAR."""
        super().__init__()
        self.transposed = isinstance(layer, Conv1D)
        outputs, inputs = layer.weight.t().shape if self.transposed else layer.weight.shape
        bound = inputs**-0.5
        drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=draw)
        self.A = nn.Parameter(drawn)  # (r, in)
        self.B = nn.Parameter(torch.zeros(outputs, rank))  # (out, r)
        self.alpha, self.scale, self.on = alpha, alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        """The change of the layer's output."""
        return linear(linear(x, self.A) * self.scale, self.B)

    def change(self) -> Tensor:
        """The change of the layer's weight, in the weight's own shape."""
        change = self.scale * self.B @ self.A  # (out, in)
        return change.t() if self.transposed else change


def check_flags(rank: int, alpha: float | None, targets: Sequence[str]) -> None:
    """Raise ConfigError on values of --lora-rank, --lora-alpha, --lora-targets that cannot work."""
    if rank < 0:
        raise ConfigError(f"--lora-rank is {rank}; it must not be negative")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigError(f"--lora-alpha is {alpha}; it must be positive and finite")
    if not rank and (alpha is not None or targets):
        given = "--lora-targets" if alpha is None else "--lora-alpha"
        raise ConfigError(f"{given} goes with --lora-rank: give a rank, 8 say, or leave it out")
    if "" in targets:
        raise ConfigError("--lora-targets: an empty name matches no layer; name one")


def layers(blocks: Sequence[nn.Module], model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers of the blocks that end in one of `targets`; all without targets.

    Raises ConfigError on a target that no layer has.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    found = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, LINEAR) and not _is_router(model, name)
    ]
    if not found:
        raise ConfigError(
            "--lora-rank: the blocks of this model have no linear layers; leave it out"
        )
    for target in targets:
        if not any(_ends_in(name, target) for name in found):
            names = ", ".join(sorted({last_name(name) for name in found}))
            raise ConfigError(
                f"--lora-targets {target}: no linear layer of the model's blocks has this name; "
                f"it has {names}"
            )
    return [n for n in found if not targets or any(_ends_in(n, target) for target in targets)]


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether this layer, or a module that it is part of, chooses experts, by the class's name.

    Llama 4's and PhiMoE's are linear layers themselves, whose forward gives more than the product.
    """
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:n])) for n in range(1, len(parts) + 1))
    return any(re.search("Router|(Gate|Gating)$", type(module).__name__) for module in around)


def _ends_in(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def last_name(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def add(model: nn.Module, names: Sequence[str], rank: int, alpha: float | None, seed: int) -> None:
    """Freeze the model, and give each named layer an adapter, which alone is trained.

    Without alpha it is 2 r.
    """
    model.requires_grad_(False)
    alpha = 2.0 * rank if alpha is None else float(alpha)
    draw = torch.Generator().manual_seed(seed)
    for name in names:
        layer = cast(Any, model.get_submodule(name))
        adapter = Adapter(layer, rank, alpha, draw)
        # a layer on the meta device gets its values later; the adapter has its values
        layer.lora = adapter if layer.weight.is_meta else adapter.to(layer.weight.device)
        layer.lora.hook = layer.register_forward_hook(_add_change)


def _add_change(layer: Any, x: tuple[Tensor], y: Tensor) -> Tensor:
    return y + layer.lora(x[0]) if layer.lora.on else y


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model, by the name of the layer."""
    found = dict(model.named_modules())
    return {n.removesuffix(".lora"): m for n, m in found.items() if isinstance(m, Adapter)}


def summary(model: nn.Module) -> str:
    """What is trained, in one line."""
    found = list(adapters(model).values())
    size = sum(w.numel() for adapter in found for w in adapter.parameters())
    one = found[0]
    trained = f"{size / 1e6:.2f}M parameters are trained"
    return f"LoRA: rank {one.A.shape[0]}, alpha {one.alpha:g}, {len(found)} layers · {trained}"


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """A block in which the model is what it was without its adapters."""
    found = adapters(model).values()
    for adapter in found:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.on = True


class Initial(nn.Module):
    """The scorer of the initial policy: an adapted scorer with its adapters off."""

    def __init__(self, scorer: nn.Module) -> None:
        """`scorer` shares its parameters with the policy."""
        super().__init__()
        self.scorer = scorer

    def forward(self, *rows: Tensor) -> Tensor:
        """As the scorer's."""
        with off(self.scorer):
            return cast(Tensor, self.scorer(*rows))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add each change to its layer's weight, and remove the adapters; all weights are trainable."""
    for name, adapter in adapters(model).items():
        layer = cast(Any, model.get_submodule(name))
        layer.weight += adapter.change()
        cast(Any, adapter.hook).remove()
        del layer.lora
    model.requires_grad_(True)
