"""Weights for sampling on a CPU in bfloat16, laid out once for all tokens of a rollout.

A product of few rows takes as long as its weight takes to be read. oneDNN reads a layout of its own
and makes it anew in each call from PyTorch's (out, in) matrix; here it is made once. The numbers
are the same, up to the order of a sum. bench/packed.py prints what it buys. Left out: the head,
whose result is float32 (head.py), weights that are cut over ranks, and float32.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 8  # of the product that the layout is chosen for


@contextmanager
def packed_weights(model: nn.Module, bf16: bool) -> Iterator[None]:
    """A block in which the linear layers of a model on a CPU have weights laid out for sampling.

    For forward passes without gradient; nothing in the block may change a weight.
    """
    layers: list[Any] = [m for m in model.modules() if bf16 and _may_be_packed(m)]
    for layer in layers:
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        layer.forward = functools.partial(_product, _packed(layer.weight), bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _may_be_packed(layer: Any) -> bool:
    """Whether this is a plain linear layer on a CPU whose forward nobody has replaced."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and layer.weight.device.type == "cpu"
        and not hasattr(layer.weight, "full_tensor")
        and torch.backends.mkldnn.is_available()
    )


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), ROWS)
    return packed


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x (..., in) -> (..., out) bfloat16, as autocast would have it."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, bias, "none", [], "")
    return y
