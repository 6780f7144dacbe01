"""Float32 logits: the head's product has a float32 result, whatever the precision of the rest.

A logit of 20 in bfloat16 is off by up to 0.06, and so is log pi. The sampler, the scorer and the
reference all call the head, so the rule stands here, once: under autocast the operands of its
product are bfloat16, the sum and the result float32. The products of its gradients are bfloat16
whole, as those of every other layer. Left out: heads that are not a plain linear layer, whose
result is only cast.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn


class _HalfProduct(torch.autograd.Function):
    """states (n, H) and weight (V, H) -> states @ weight.T, (n, V) float32.

    Both are bfloat16 on a GPU. On a CPU they are float32 and rounded inside the product.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        if _on_gpu(weight):
            return torch.mm(states, weight.t(), out_dtype=torch.float32)
        with rounded_operands():
            return states @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = (x.bfloat16() for x in ctx.saved_tensors)
        grad = grad.bfloat16()  # (n, V)
        of_states, of_weight = ctx.needs_input_grad
        return grad @ weight if of_states else None, grad.t() @ states if of_weight else None


@contextlib.contextmanager
def rounded_operands() -> Iterator[None]:
    """A block in which a CPU's float32 products round their operands to bfloat16.

    The sums stay float32. A processor without bfloat16 instructions computes in float32.
    """
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, products.fp32_precision = products.fp32_precision, "bf16"
    try:
        yield
    finally:
        products.fp32_precision = before


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
    half = torch.is_autocast_enabled(device)
    dtype = torch.bfloat16 if half and _on_gpu(weight) else torch.float32
    with torch.autocast(device, enabled=False):
        weight = weight.to(dtype)  # (V, H)

    def product(states: Tensor) -> Tensor:
        with torch.autocast(device, enabled=False):
            if not half:
                return nn.functional.linear(states.float(), weight, bias)
            rows = states.to(dtype).flatten(0, -2)  # (n, H)
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


def has_float32_logits(layer: nn.Module) -> bool:
    """Whether this is a head that `give_float32_logits` has changed."""
    return getattr(vars(layer).get("forward"), "func", None) is _forward


def _forward(head: nn.Module, states: Tensor) -> Tensor:
    return float32_product(head)(states)
