"""AdamW, the learning rate as a function of the step, and clipping by the global norm.

See "Decoupled Weight Decay Regularization", Loshchilov and Hutter (2017, arXiv 1711.05101).
"""

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn


def adamw(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    kind: Callable[..., torch.optim.AdamW] = torch.optim.AdamW,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, vectors (norms, biases) do not.

    `kind` is AdamW, or a class that differs from it in where it keeps its averages.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    groups = [{"params": some, "weight_decay": weight_decay} for some in alike(matrices)]
    groups += [{"params": some, "weight_decay": 0.0} for some in alike(vectors)]
    return kind(groups, lr=lr, betas=betas, fused=True)


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in lists of those that are cut over the ranks in the same way.

    One list where nothing is cut, or everything alike. Kernels for many tensors take no mixture.
    """
    lists: dict[object, list[nn.Parameter]] = {}
    for p in parameters:
        layout = (getattr(p, "device_mesh", None), getattr(p, "placements", None))
        lists.setdefault(layout, []).append(p)
    return list(lists.values())


def learning_rate(
    step: int, total: int, lr: float, min_lr: float, warmup: int, constant: int
) -> float:
    """Learning rate of a step, counted from 0.

    A linear warm-up, a cosine to `min_lr`, then `constant` steps at `min_lr`, and so past `total`.
    With min_lr = lr the rate is constant after the warm-up.

    >>> [round(learning_rate(s, 6, lr=1.0, min_lr=0.0, warmup=2, constant=1), 2) for s in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.25, 0.0]
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    decay = total - warmup - constant
    if step >= warmup + decay:
        return min_lr
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))


def clip(model: nn.Module, max_norm: float) -> float:
    """Scale the gradient down to `max_norm` if it is longer (0: never); return its length before.

    Of a sharded model every rank must call this.
    """
    lists = alike(p for p in model.parameters() if p.grad is not None)
    norms = [_length(some) for some in lists]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for some in lists:
        nn.utils.clip_grads_with_norm_(some, max_norm or math.inf, norm)
    return float(norm)


def length(tensor: Tensor) -> Tensor:
    """Euclidean length of all numbers of a tensor, (), float64.

    Rows are summed in float64: on a CPU PyTorch's float32 norm of 28 million numbers comes out
    0.1 % short, and less so where ranks share them, so that the clipped gradient would depend on
    the ranks. Within a row float32 is exact enough, and faster.
    """
    rows = torch.linalg.vector_norm(tensor, dim=-1)
    return cast(Tensor, torch.linalg.vector_norm(rows, dtype=torch.float64))


def _length(parameters: list[nn.Parameter]) -> Tensor:
    """Length of the gradient of parameters that are cut alike, each element counted once."""
    norms = [length(p.grad) for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    whole = cast(Tensor, norm.full_tensor()) if hasattr(norm, "full_tensor") else norm
    return whole.float()


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the optimizer's next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
