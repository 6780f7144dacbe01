"""The model that is cut over ranks is the model that was measured whole.

transformers' plan says which weights a rank has, and the files' names which values: where one of
the two is wrong, the ranks train and save another model, and no number of theirs shows it. So a few
rows that `guard.inspect` has scored with the whole model are scored again, and differentiated, by
all ranks together.

A weight without a rule is whole on each rank of a team. If what it is applied to are the rank's own
heads or features, as in Apertus' activations, each rank has a part of its gradient: then the parts
are added up, as those of the norms that have such a rule.
"""

import torch
from torch import Tensor, nn

from reinforce import device as devices
from reinforce.errors import ConfigError, first_line
from reinforce.guard import GAP, Verdict
from reinforce.optim import length
from reinforce.run import distributed, tensor_parallel

ROUNDED = 1.0  # nats; where FSDP casts blocks to bfloat16
SHARE, FLOOR = 0.02, 1e-5  # of a gradient's length, and of all of them together


def check(
    wrapped: nn.Module,
    model: nn.Module,
    verdict: Verdict,
    device: torch.device,
    bf16: bool,
    name: str,
) -> None:
    """Raise ConfigError, on every rank, unless the ranks together compute what `verdict` holds.

    `wrapped` is the scorer of `model`, whose gradients are left as None. `bf16`: FSDP casts it.
    `name` stands for the model in errors: its flag and value.
    """

    def compare() -> list[str]:
        """What differs on any rank: names of parameters, or log pi in words."""
        ours = distributed.together(
            lambda: _difference(wrapped, model, verdict, device, bf16, name)
        )
        return sorted({other for one in distributed.of_all(ours) for other in one})

    other = compare()
    if other and other[0] in verdict.gradients:
        tensor_parallel.add_gradients_up(model, other)
        other = compare()
    if other:
        what = f"the gradient of {other[0]}" if other[0] in verdict.gradients else other[0]
        raise ConfigError(
            f"{name}: cut over ranks this {type(model).__name__} is another model ({what}); give "
            "other flags of parallelism, or one process"
        )


def _difference(
    wrapped: nn.Module,
    model: nn.Module,
    verdict: Verdict,
    device: torch.device,
    bf16: bool,
    name: str,
) -> list[str]:
    rows = verdict.rows.to(device)
    try:
        with devices.autocast(device, bf16):
            logp: Tensor = wrapped(rows.prompt, rows.prompt_mask, rows.response, rows.mask)
        gap = float((logp.detach() - rows.logp).abs().nan_to_num(torch.inf).max())
        distributed.backward(logp.sum())
        found = {
            key: float(length(distributed.gather_tensor(weight.grad))) / distributed.teams()
            for key, weight in model.named_parameters()
            if weight.grad is not None
        }
    except Exception as error:  # a plan that does not fit its model raises what it likes
        raise ConfigError(
            f"{name}: cut over ranks this {type(model).__name__} cannot be computed "
            f"({type(error).__name__}: {first_line(error)}); give other flags of parallelism, or "
            "one process"
        ) from error
    finally:
        for weight in model.parameters():
            weight.grad = None
    if gap > (ROUNDED if bf16 else GAP):
        return [f"log pi of a token changes by {gap:.2g} nats"]
    if bf16:
        return []
    total = sum(right**2 for right in verdict.gradients.values()) ** 0.5
    return [
        key
        for key, right in verdict.gradients.items()
        if abs(found.get(key, 0.0) - right) > SHARE * right + FLOOR * total
    ]
