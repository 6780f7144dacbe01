"""Float32 logits: the head's product has a float32 result, whatever the precision of the rest.

A logit of 20 in bfloat16 is off by up to 0.06, and so is log pi. The sampler, the scorer and the
reference all call the head, so the rule stands here, once: on a CPU the product is computed in
float32; on a GPU under autocast its operands are bfloat16, the sum and the result float32. Left
out: heads that are not a plain linear layer, whose result is only cast.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


class _HalfProduct(torch.autograd.Function):
    """states (n, H) and weight (V, H), both bfloat16 -> states @ weight.T, (n, V) float32."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return torch.mm(states, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        states, weight = ctx.saved_tensors
        half = grad.to(states.dtype)  # (n, V)
        return half @ weight, half.t() @ states


def float32_product(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The head as a function, states (..., H) -> logits (..., V) float32.

    The weight is cast once, for all calls of that function. A head that is cut over several ranks
    gathers its logits by itself.
    """
    if type(head) is not nn.Linear or hasattr(head.weight, "full_tensor"):
        return lambda states: cast(Tensor, head(states)).float()
    return linear(head.weight, head.bias)


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`float32_product` of a weight (V, H) and a bias (V,)."""
    device = weight.device.type
    half = _on_gpu(weight) and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        weight = weight.bfloat16() if half else weight.float()  # (V, H)

    def product(states: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            if not half:
                return nn.functional.linear(states.float(), weight, bias)
            rows = states.bfloat16().flatten(0, -2)  # (n, H)
            logits: Tensor = cast(Any, _HalfProduct).apply(rows, weight)  # (n, V)
            logits = logits if bias is None else logits + bias
            return logits.view(*states.shape[:-1], weight.shape[0])

    return product


def _on_gpu(weight: Tensor) -> bool:
    return weight.device.type == "cuda"


def give_float32_logits(model: nn.Module) -> nn.Module:
    """The model itself, its output head following the rule above wherever it is called.

    The sampler calls it once a token, and on a GPU casts the weight each time.
    """
    head: Any = cast(Any, model).get_output_embeddings()
    if type(head) is nn.Linear:
        cast(Any, head).forward = functools.partial(_forward, head)
    return model


def _forward(head: nn.Module, states: Tensor) -> Tensor:
    return float32_product(head)(states)
