"""Weights for sampling on a CPU, laid out once for all tokens of a rollout.

A product of few rows takes as long as its weight takes to be read. oneDNN reads a layout of its own
and makes it anew in each call from PyTorch's (out, in) matrix; here it is made once. The numbers
are the same, up to the order of a sum. `bench/sampling.py --lever weights` prints what it buys.
Left out: weights that are cut over ranks, and small ones, as the toy's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from reinforce.head import has_float32_logits, rounded_operands

ROWS = 8  # of the product that the layout is chosen for
SMALL = 2**16  # numbers of a weight; below, the call costs more than the layout saves


@contextmanager
def packed_weights(model: nn.Module, bf16: bool) -> Iterator[None]:
    """A block in which the linear layers of a model on a CPU have weights laid out for sampling.

    For forward passes without gradient; nothing in the block may change a weight.
    """
    layers = [m for m in model.modules() if _may_be_packed(m, bf16)]
    replaced = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer in layers:
        layer.forward = _packed_forward(layer, bf16)
    try:
        yield
    finally:
        for layer, forward in replaced:
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _may_be_packed(layer: Any, bf16: bool) -> bool:
    """Whether this is a plain layer of some size on a CPU, its forward PyTorch's or head.py's.

    Frozen weights, those below adapters, may be stored in bfloat16.
    """
    dtypes = (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)
    return (
        type(layer) is nn.Linear
        and ("forward" not in vars(layer) or has_float32_logits(layer))
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in dtypes
        and layer.weight.numel() >= SMALL
        and not hasattr(layer.weight, "full_tensor")
        and torch.backends.mkldnn.is_available()
    )


def _packed_forward(layer: Any, bf16: bool) -> Callable[[Tensor], Tensor]:
    """The layer's forward, from a copy of its weight."""
    is_head = has_float32_logits(layer)
    dtype = torch.bfloat16 if bf16 and not is_head else torch.float32
    rounds = rounded_operands if bf16 and is_head else nullcontext  # a head's, as in head.py
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    with rounds():
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), ROWS)

    def product(x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        with rounds():
            y: Tensor = torch.ops.mkldnn._linear_pointwise(
                x.to(dtype), weight, bias, "none", [], ""
            )
            return y

    return product
